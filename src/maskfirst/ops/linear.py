"""Linear layers in fp32 on CPUs with AVX-512, through oneDNN's convolutions instead of torch's choice, MKL.

MKL's products use AVX-512 on Intel's processors only. On AMD's, oneDNN does the same layer in half the time, forward and
backward, and torch has no switch to take it for fp32. Numbers differ by rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WORTH = 2**23
"""Multiply-adds below which a layer is as fast either way."""


def fast_linear() -> AbstractContextManager[object]:
    """Inside the block the linear layers are the fastest ones; what they record for the backward pass is, too.

    Does nothing where there is nothing to win: other processors, other types, autocast, and what is being compiled.
    """
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return nullcontext()
    return _Convolved() if torch.backends.cpu.get_cpu_capability() == "AVX512" else nullcontext()


class _Convolved(TorchFunctionMode):
    """Runs linear layers as convolutions of 1 x 1."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _is_won(args[0], args[1]):
            return _convolved(*args)
        return func(*args, **(kwargs or {}))


def _is_won(maps: Tensor, weight: Tensor) -> bool:
    # Tensors of other types, such as those that only count operators, see the layer as it is.
    plain = type(maps) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter)
    return (
        plain
        and maps.device.type == "cpu"
        and maps.dtype == weight.dtype == torch.float32
        and maps.ndim > 1
        and maps.numel() * len(weight) >= WORTH
        and not torch.is_autocast_enabled("cpu")
    )


def _convolved(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = maps.reshape(1, 1, -1, maps.shape[-1]).permute(0, 3, 1, 2)
    # Dilation changes nothing for a kernel of one place, but torch hands undilated ones to MKL where it has one thread.
    found = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return found.permute(0, 2, 3, 1).reshape(*maps.shape[:-1], len(weight))
