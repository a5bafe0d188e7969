"""What torch does slowly on processors with AVX-512, done fast: linear layers in fp32, attention in bf16.

MKL's products use AVX-512 on Intel's processors only. On AMD's, oneDNN does a linear layer in half the time, forward and
backward, and torch has no switch to take it for fp32. Torch's fused attention is no faster in bf16 than in fp32; plain
products and a softmax are, some heads at a time, and in training all at once where they are few. Numbers differ by rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WORTH = 2**23
"""Multiply-adds below which a layer is as fast either way."""
SCORES = 2**21
"""Scores of attention that are made at a time: 4 MiB, which stay in the caches."""
KEPT = 2**23
"""The most scores that a layer keeps for its backward pass: 16 MiB."""


def fast_on_cpu() -> AbstractContextManager[object]:
    """Inside the block these layers are the fastest ones; what linear ones record for the backward pass is, too.

    Does nothing where there is nothing to win: other processors, other types, and what is being compiled.
    """
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return nullcontext()
    return _Fast() if torch.backends.cpu.get_cpu_capability() == "AVX512" else nullcontext()


def both_times() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Where a checkpoint runs, and where it runs anew: outside of what surrounds the model, yet with the very same tensors."""
    return fast_on_cpu(), fast_on_cpu()


class _Fast(TorchFunctionMode):
    """Runs linear layers in fp32 as convolutions of 1 x 1, and attention in bf16 as two products."""

    # It is called for every function and every attribute of a tensor, checks of its shape in the tests among them.
    @no_type_check
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and _linear_is_won(args[0], args[1]):
            return _convolved(*args)
        if func is F.scaled_dot_product_attention and _attention_is_won(args, kwargs):
            return _attended(*args[:3])
        return func(*args, **kwargs)


def _is_plain(tensor: Tensor) -> bool:
    # Tensors of other types, such as those that only count operators, see the layer as it is.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def _linear_is_won(maps: Tensor, weight: Tensor) -> bool:
    return (
        _is_plain(maps)
        and _is_plain(weight)
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


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    flat = (queries * queries.shape[-1] ** -0.5).flatten(0, -3)
    keys = keys.flatten(0, -3).transpose(1, 2)
    values = values.flatten(0, -3)
    if torch.is_grad_enabled():
        return torch.bmm(torch.bmm(flat, keys).softmax(-1), values).view(queries.shape)
    found = torch.empty_like(flat)
    # Whole heads, as many as there is room for; of one that is too large, some queries.
    count, each = flat.shape[1], keys.shape[-1]
    heads = max(1, SCORES // (count * each))
    step = -(-count // -(-count * each // SCORES)) if heads == 1 else count
    for head in range(0, len(flat), heads):
        of = slice(head, head + heads)
        for first in range(0, count, step):
            scores = torch.bmm(flat[of, first : first + step], keys[of])
            torch.bmm(torch.softmax(scores, -1, out=scores), values[of], out=found[of, first : first + step])
    return found.view(queries.shape)


def _attention_is_won(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # A mask, dropout, causality or a scale of its own are left to torch.
    plain = len(args) == 3 and all(isinstance(value, float | bool | None) and not value for value in kwargs.values())
    return (
        plain
        and all(_is_plain(each) and each.dtype == torch.bfloat16 for each in args)
        and args[0].shape[:-2] == args[1].shape[:-2]
        and not (torch.is_grad_enabled() and args[0].shape[:-1].numel() * args[1].shape[-2] > KEPT)
    )
