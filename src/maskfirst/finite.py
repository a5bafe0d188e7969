"""Finite: which layer of a network was the first to make NaN, told when an answer holds some."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from maskfirst.types import Batch, Names, Proposals


def has_nan(value: Any) -> bool:
    """Whether a tensor, or any tensor in a tuple, list, mapping, Proposals or Names, holds NaN."""
    return any(bool(tensor.isnan().any()) for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterable[Tensor]:
    match value:
        case Tensor():
            return (value,)
        case Proposals():
            return _tensors((value.masks, value.queries))
        case Names():
            return (value.logits,)
        case dict():
            return chain.from_iterable(map(_tensors, value.values()))
        case tuple() | list():
            return chain.from_iterable(map(_tensors, value))
        case _:
            return ()


def blame(network: nn.Module, batch: Batch) -> str:
    """Runs `network` on `batch` once more and says in a line which of its layers gave NaN first, and what may help."""
    first: list[tuple[str, nn.Module, bool]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if not first and has_nan(made):
                first.append((name, module, has_nan(given)))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        return (
            "the network made NaN, and none when run again; its layers are not the cause, look at the machine's memory"
        )
    name, module, before = first[0]
    spoilt = [key for key, tensor in chain(module.named_parameters(), module.named_buffers()) if not _sound(tensor)]
    if spoilt:
        return f"the network makes NaN first in '{name}', whose {spoilt[0]} is not finite; use other weights"
    place = f"on the way into '{name}'" if before else f"in '{name}'"
    return f"the network makes NaN first {place}, though its weights are finite; try precision fp32, or other weights"


def _sound(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
