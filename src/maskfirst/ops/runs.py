"""Runs: work whose middle is larger than its ends is done some at a time, as many as the caches or the memory hold."""

import sys

from torch import Tensor, nn


def at_a_time(bound: int, source: Tensor) -> int:
    """`bound`, at least 1; no bound for tensors without data, whose operators are counted and take time but no memory."""
    if source.device.type == "meta" or type(source) not in (Tensor, nn.Parameter):
        return sys.maxsize
    return max(1, bound)
