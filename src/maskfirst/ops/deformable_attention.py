"""Multi-scale deformable attention: every query reads some points of several maps, bilinearly, and sums them by weight.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", 2021.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskfirst.frames import Size
from maskfirst.ops.runs import at_a_time

SAMPLES = 2**17
"""Read at a time where nothing is kept for a backward pass, which bounds their rows and shares to 4 MiB."""


def deformable_attention(
    value: Float[Tensor, "B N M D"],
    sizes: Sequence[Size],
    places: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q _W"]:
    """What each query sees: for each of M heads the weighted sum of its L times P samples, the heads side by side.

    `value`: the L maps of `sizes` (h, w), row by row, one after another. `places`: (x, y) px on each map, 0 at the centre of
    its first token; maps are zero outside. `weights` need not sum to 1. Differentiable in all three.

    Each output is one bag of weighted rows of a table, which torch reads, scales and sums in one go: on a CPU 20 times as
    fast as sampling map by map, and without a sample in memory.
    """
    if torch.compiler.is_exporting():
        return deformable_attention_by_gather(value, sizes, places, weights)
    table = _table(value, sizes)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _summed(table, *_neighbours(sizes, places, weights))
    # A run of queries at a time: a large map's rows and shares together are ten times as large as the map.
    step = at_a_time(SAMPLES // weights[:, :1].numel(), weights)
    runs = zip(places.split(step, 1), weights.split(step, 1), strict=True)
    found = [_summed(table, *_neighbours(sizes, *run)) for run in runs]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def deformable_attention_by_gather(
    value: Float[Tensor, "B N M D"],
    sizes: Sequence[Size],
    places: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q _W"]:
    """The same numbers by operators that every exporter knows. It has all samples in memory at once.

    The four tokens around a sample are one row of its table: runtimes copy few long rows twice as fast as many short ones.
    """
    rows, shares = _around(sizes, places, weights, sum(_lengths(sizes)))
    samples = F.embedding(rows, _fourfold(value, sizes)).unflatten(4, (4, -1)).flatten(3, 4)
    return (torch.stack(shares, 4).flatten(3)[..., None, :] @ samples).flatten(2)


def to_places(locations: Float[Tensor, "*N L P 2"], sizes: Sequence[Size]) -> Float[Tensor, "*N L P 2"]:
    """Locations (x, y), 0..1 over each whole map, as places: px from the centre of its first token."""
    return locations * locations.new_tensor([(width, height) for height, width in sizes])[:, None] - 0.5


def numbers(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, " N"]:
    """A tensor of whole numbers, which are symbols where a graph is made whose maps may have any size."""
    if torch.compiler.is_exporting():
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    return torch.tensor(values, dtype=dtype, device=device)


def _summed(
    table: Float[Tensor, "T D"], rows: Int32[Tensor, "B Q M S"], shares: Float[Tensor, "B Q M S"]
) -> Float[Tensor, "B Q _W"]:
    bags, scales = rows.flatten(0, 2), shares.flatten(0, 2)
    sums = F.embedding_bag(bags, table.detach(), mode="sum", per_sample_weights=scales)
    return _TableGradient.apply(sums, table, bags, scales).view(*rows.shape[:2], -1)


class _TableGradient(torch.autograd.Function):
    """Passes the sums of bags on, and on the way back gives the table its gradient, three times as fast as torch does.

    What a row gives to all bags is again a bag, of gradients, once the bags' rows are sorted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Float[Tensor, "X D"],
        table: Float[Tensor, "T D"],
        bags: Int32[Tensor, "X S"],
        shares: Float[Tensor, "X S"],
    ) -> Float[Tensor, "X D"]:
        ctx.save_for_backward(bags, shares)
        ctx.length = len(table)
        return sums.view_as(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        bags, shares = ctx.saved_tensors
        rows, places = bags.flatten().sort()
        starts = torch.searchsorted(rows, torch.arange(ctx.length, dtype=rows.dtype, device=rows.device))
        scales = shares.flatten().index_select(0, places)
        readers = places // bags.shape[1]
        table = F.embedding_bag(readers, gradient.contiguous(), starts, mode="sum", per_sample_weights=scales)
        return gradient, table, None, None


class _Neighbours(NamedTuple):
    """The four tokens around every sample, S = 4 L P: their rows of the table, and their shares of the query's answer."""

    rows: Int32[Tensor, "B Q M S"]
    shares: Float[Tensor, "B Q M S"]


def _strides(sizes: Sequence[Size]) -> list[int]:
    """Rows of the table from a map's row to the next: its tokens and a zero, which is also left of the next row."""
    return [width + 1 for _, width in sizes]


def _lengths(sizes: Sequence[Size]) -> list[int]:
    """Rows of the table for each map: it lies between a row of zeros above and two below."""
    return [(height + 3) * stride for (height, _), stride in zip(sizes, _strides(sizes), strict=True)]


def _table(value: Tensor, sizes: Sequence[Size]) -> Float[Tensor, "T D"]:
    """The tokens of all pictures and heads, every map in a frame of zeros, so that no neighbour needs to be asked for."""
    return _framed(value, sizes).view(-1, value.shape[-1])


def _fourfold(value: Float[Tensor, "B N M D"], sizes: Sequence[Size]) -> Float[Tensor, "T F"]:
    """For each row of the table, but for the last two of a picture: it, that on its right, and those below both, F = 4 D."""
    lengths, strides = _lengths(sizes), _strides(sizes)
    framed = F.pad(_framed(value, sizes), (0, 0, 0, sum(strides)))
    maps = []
    for level, (length, stride) in enumerate(zip(lengths, strides, strict=True)):
        four = [framed.narrow(1, sum(lengths[:level]) + step, length) for step in (0, 1, stride, stride + 1)]
        maps.append(torch.stack([each.unflatten(2, value.shape[2:]) for each in four], 3))
    return torch.cat(maps, 1).flatten(3).flatten(0, 2)


def _framed(value: Tensor, sizes: Sequence[Size]) -> Float[Tensor, "B R W"]:
    """The rows of the table of each picture, those of its heads side by side."""
    maps = value.flatten(2).split([height * width for height, width in sizes], 1)
    framed = [F.pad(tokens.unflatten(1, size), (0, 0, 0, 1, 1, 2)) for tokens, size in zip(maps, sizes, strict=True)]
    zero = value.new_zeros(value.shape[0], 1, framed[0].shape[-1])
    return torch.cat([zero, *(tokens.flatten(1, 2) for tokens in framed), zero], 1)


def _neighbours(sizes: Sequence[Size], places: Tensor, weights: Tensor) -> _Neighbours:
    heads, levels, points = weights.shape[2:]
    first, shares = _around(sizes, places, weights, sum(_lengths(sizes)) + 2)
    down = numbers(_strides(sizes), torch.int32, places.device).repeat_interleave(points)
    steps = heads * torch.stack([torch.zeros_like(down), torch.ones_like(down), down, down + 1])
    rows = first.unflatten(3, (1, levels * points)) + steps
    return _Neighbours(rows.flatten(3), torch.cat(shares, 3))


def _around(
    sizes: Sequence[Size], places: Tensor, weights: Tensor, rows: int
) -> tuple[Int32[Tensor, "B Q M _S"], tuple[Float[Tensor, "B Q M _S"], ...]]:
    """Of every sample the row of the token above and left of it, a picture having so many `rows`, and the shares of this token,
    that on its right, and those below both."""
    batch, _, heads, levels, points, _ = places.shape

    # Constants of maps are spread over heads and points, so that all that follows runs along long rows.
    def each(values: Sequence[int]) -> Tensor:
        return numbers(values, places.dtype, places.device)[:, None].expand(heads, levels, points).flatten()

    # From -1 and from the size on, a sample lies between zeros.
    outside = torch.full((heads * levels * points,), -1.0, dtype=places.dtype, device=places.device)
    x = places[..., 0].flatten(2).clamp(outside, each([width for _, width in sizes]))
    y = places[..., 1].flatten(2).clamp(outside, each([height for height, _ in sizes]))
    left, top = x.detach().floor(), y.detach().floor()
    x, y = x - left, y - top
    lengths, strides = _lengths(sizes), _strides(sizes)
    starts = [1 + sum(lengths[:level]) + strides[level] for level in range(levels)]
    table = numbers(starts, torch.int32, places.device)[:, None]
    table = table + rows * torch.arange(batch, dtype=torch.int32, device=places.device)[:, None, None, None]
    table = table * heads + torch.arange(heads, dtype=torch.int32, device=places.device)[:, None, None]
    # What is not a number shows in the shares; as a row it would lie anywhere in memory.
    first = torch.addcmul(left, top, each(strides)).nan_to_num().int()
    first = torch.add(table.expand(-1, -1, -1, points).reshape(batch, 1, -1), first, alpha=heads)
    lower = weights.flatten(2) * y
    upper = weights.flatten(2) - lower
    lower_right, upper_right = lower * x, upper * x
    shares = (upper - upper_right, upper_right, lower - lower_right, lower_right)
    return first.unflatten(2, (heads, -1)), tuple(share.unflatten(2, (heads, -1)) for share in shares)
