"""Blocks: how often their branches are dropped along a backbone of stages, and how they are run anew in the backward pass."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskfirst.ops.cpu import both_times


def drop_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """The rate of every block, a list a stage: from 0 for the first block evenly up to `last`."""
    count = sum(depths)
    rates = [last * index / max(count - 1, 1) for index in range(count)]
    return [rates[end - depth : end] for end, depth in zip(accumulate(depths), depths, strict=True)]


def run(part: Callable[..., Tensor], *given: Any, checkpointing: bool) -> Tensor:
    """What `part` makes of `given`; with `checkpointing` it is run anew in the backward pass, and keeps nothing until then."""
    if not checkpointing or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return part(*given)
    return checkpoint(part, *given, use_reentrant=False, context_fn=both_times)
