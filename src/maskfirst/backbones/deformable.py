"""Deformable attention as a layer: each token of some maps looks at a few places of others, around where it lies itself.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", 2021; narrower values as in ViT-Adapter
(Chen et al., 2023).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskfirst.frames import Size
from maskfirst.ops.deformable_attention import deformable_attention, numbers


def places_on(maps: Sequence[Size], own: Sequence[Size], device: torch.device) -> Float[Tensor, "Q L 2"]:
    """Where the centre of each token of the maps `own` lies on each of `maps`: (x, y) px from that map's first centre.

    The maps, (h, w) tokens, cover the same picture; tokens come row by row, one map after another. Single precision.
    """
    unit = []
    for height, width in own:
        y, x = ((torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in (height, width))
        unit.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    sides = [side for height, width in maps for side in (width, height)]
    return torch.cat(unit)[:, None] * numbers(sides, torch.float32, device).unflatten(0, (-1, 2)) - 0.5


def at_least_single(tensor: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """In single precision where it was in less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def softmax_of_few(scores: Float[Tensor, "*S P"]) -> Float[Tensor, "*S P"]:
    """The softmax of short rows, for which torch's takes five times as long."""
    shares = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return shares / shares.sum(-1, keepdim=True)


class DeformableAttention(nn.Module):
    """Each query looks at `points` places of each of `levels` maps for each head.

    `ratio`: the width of what is read, to `width`. Where to look and the sum over places are computed in single precision at
    least, whatever the autocast; the projections of what is read follow it.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, ratio: float = 1.0) -> None:
        super().__init__()
        values = int(width * ratio)
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if values < 1 or values % heads:
            raise ValueError(f"values of {ratio} of width {width}, {values}, are not divisible by {heads} heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, values)
        self.output = nn.Linear(values, width)
        for linear in (self.offsets, self.weights, self.value, self.output):
            nn.init.zeros_(linear.bias)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
        # At first, head m looks in its own of M directions round the square, point p at p + 1 px.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None, None] * steps).expand(-1, levels, -1, -1).flatten())

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B N D"],
        sizes: Sequence[Size],
        places: Float[Tensor, "Q L 2"],
    ) -> Float[Tensor, "B Q D"]:
        """`tokens`: of the maps that are looked at, of `sizes`. `places`: of each query on each of them, see `places_on`."""
        value = self.value(tokens)
        with torch.autocast(queries.device.type, enabled=False):
            queries = queries.to(self.offsets.weight.dtype)
            given = (at_least_single(value), self.offsets(queries), self.weights(queries), sizes, places)
            if torch.is_grad_enabled():
                # Four numbers and rows a sample are made anew in the backward pass: for 2 % more time, an eighth less memory.
                seen = checkpoint(self._look, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                seen = self._look(*given)
        return self.output(seen.to(value.dtype))

    def _look(
        self, value: Tensor, offsets: Tensor, scores: Tensor, sizes: Sequence[Size], places: Tensor
    ) -> Float[Tensor, "B Q _W"]:
        offsets = at_least_single(offsets).unflatten(-1, (self.heads, self.levels, self.points, 2))
        scores = at_least_single(scores).unflatten(-1, (self.heads, -1))
        shares = softmax_of_few(scores).unflatten(-1, (self.levels, self.points))
        # As many rows as offsets, so that the sum does not fall into pieces of two numbers.
        around = places[:, None, :, None].expand(-1, self.heads, -1, self.points, -1).contiguous()
        return deformable_attention(value.unflatten(-1, (self.heads, -1)), sizes, around + offsets, shares)
