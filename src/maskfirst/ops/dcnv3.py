"""DCNv3: every place of a map reads a grid of points around itself, each moved by an offset, and sums them by weight.

Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from maskfirst.frames import Size
from maskfirst.ops.deformable_attention import deformable_attention, deformable_attention_by_gather


@dataclass(frozen=True)
class Window:
    """The grid of `kernel` x `kernel` points, `dilation` px apart, that lies on a map at every `stride` px.

    `padding`: px by which the first window begins before the map. `offset_scale` multiplies the distances of the points from
    the window's centre, those of the grid and the offsets alike.
    """

    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    offset_scale: float = 1.0

    def size(self, size: Size) -> Size:
        """Of the map of all windows on a map of `size`."""
        span = self.dilation * (self.kernel - 1) + 1
        height, width = ((side + 2 * self.padding - span) // self.stride + 1 for side in size)
        return height, width

    def places(self, offsets: Float[Tensor, "B Y X G P 2"]) -> Float[Tensor, "B Y X G P 2"]:
        """(x, y) px of all points of all windows from the centre of the map's first token; P walks down each column."""
        half = self.dilation * (self.kernel - 1) // 2
        height, width = offsets.shape[1:3]

        def line(count: int, step: int, start: int) -> Tensor:
            return torch.arange(count, dtype=offsets.dtype, device=offsets.device) * step + start

        taps = line(self.kernel, self.dilation, -half) * self.offset_scale
        grid = torch.stack([taps.repeat_interleave(self.kernel), taps.repeat(self.kernel)], -1)
        y, x = (line(count, self.stride, half - self.padding) for count in (height, width))
        centres = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
        return torch.add(centres[:, :, None, None] + grid, offsets, alpha=self.offset_scale)


def dcnv3(
    value: Float[Tensor, "B H W G D"],
    offsets: Float[Tensor, "B Y X G P 2"],
    weights: Float[Tensor, "B Y X G P"],
    window: Window,
) -> Float[Tensor, "B Y X _W"]:
    """For each of G groups of channels the weighted sum of its P samples of `value`, the groups side by side.

    `offsets`: (x, y) px. Maps are zero outside; samples are bilinear. Differentiable in all three.
    """
    size, given = _as_attention(value, offsets, weights, window)
    return deformable_attention(*given).unflatten(1, size)


def dcnv3_by_gather(
    value: Float[Tensor, "B H W G D"],
    offsets: Float[Tensor, "B Y X G P 2"],
    weights: Float[Tensor, "B Y X G P"],
    window: Window,
) -> Float[Tensor, "B Y X _W"]:
    """The same numbers by operators that every exporter knows. It has all samples in memory at once."""
    size, given = _as_attention(value, offsets, weights, window)
    return deformable_attention_by_gather(*given).unflatten(1, size)


def _as_attention(
    value: Tensor, offsets: Tensor, weights: Tensor, window: Window
) -> tuple[Size, tuple[Tensor, list[Size], Tensor, Tensor]]:
    """The map's size, and what deformable attention is given: windows are queries, groups heads, and there is one level."""
    size = (offsets.shape[1], offsets.shape[2])
    height, width = value.shape[1:3]
    if size != window.size((height, width)) or offsets.shape[-2] != window.kernel**2:
        raise ValueError(f"offsets {list(offsets.shape)} do not fit {window} on a map of {height} x {width}")
    places = window.places(offsets).flatten(1, 2).unsqueeze(3)
    return size, (value.flatten(1, 2), [(height, width)], places, weights.flatten(1, 2).unsqueeze(3))
