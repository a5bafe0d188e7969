"""Runs: work whose middle is larger than its ends is done some at a time, as many as the caches or the memory hold."""

import sys

from torch import Tensor, nn


def has_data(tensor: Tensor) -> bool:
    """Whether there are numbers in it: not in one on the meta device or that only stands for another."""
    return tensor.device.type != "meta" and type(tensor) in (Tensor, nn.Parameter)


def at_a_time(bound: int, source: Tensor) -> int:
    """`bound`, at least 1; no bound for tensors without data, whose operators are counted and take time but no memory."""
    return max(1, bound) if has_data(source) else sys.maxsize
