"""Swin's block for maps of any size: windows that shift over a map which was padded first.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021. timm's block pads after it has
shifted, by which windows wrap round where a map is no multiple of them; dense prediction's checkpoints were trained otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskfirst.frames import Size
from maskfirst.ops.cpu import both_times

BLOCKED = -100.0
"""Added to the similarity of tokens that only share a window because it wraps round."""


class SwinBlock(nn.Module):
    """A block of timm's `swin_*` models, of which it takes the parts over by their names.

    `again`: attention and activation are made anew in the backward pass instead of being kept.
    """

    def __init__(self, block: Any, again: bool) -> None:
        super().__init__()
        self.again = again
        self.norm1: Any = block.norm1
        self.attn: Any = block.attn
        self.drop_path1: Any = block.drop_path1
        self.norm2: Any = block.norm2
        self.mlp: Any = block.mlp
        self.drop_path2: Any = block.drop_path2
        self.window: Size = tuple(block.window_size)
        self.shift: Size = tuple(block.shift_size)

    def forward(self, maps: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        maps = maps + self.drop_path1(self._run(self._attend, self.norm1(maps)))
        return maps + self.drop_path2(self._run(self._contract, self.mlp.fc1(self.norm2(maps))))

    def _run(self, part: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        if not self.again or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return part(given)
        # Nothing in it is random.
        return checkpoint(part, given, use_reentrant=False, preserve_rng_state=False, context_fn=both_times)

    def _contract(self, hidden: Tensor) -> Tensor:
        return self.mlp.fc2(self.mlp.act(hidden))

    def _attend(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        (tall, wide), (down, right) = self.window, self.shift
        # By their counts, so that a graph for maps of any size has simple terms for all that follows.
        rows, columns = (height + tall - 1) // tall, (width + wide - 1) // wide
        size = (tall * rows, wide * columns)
        maps = F.pad(maps, (0, 0, 0, size[1] - width, 0, size[0] - height))
        shifted = any(self.shift)
        if shifted:
            maps = maps.roll((-down, -right), (1, 2))
        inside = windows(maps, self.window).flatten(0, 2).flatten(1, 2)
        blocked = _blocked(size, self.window, self.shift, maps) if shifted else None
        seen = self.attn(inside, mask=blocked)
        seen = seen.view(batch, rows, columns, tall, wide, channels)
        seen = seen.transpose(2, 3).reshape(batch, *size, channels)
        if shifted:
            seen = seen.roll((down, right), (1, 2))
        return seen[:, :height, :width]


def windows(maps: Shaped[Tensor, "B H W C"], window: Size) -> Shaped[Tensor, "B Y X h w C"]:
    """The windows (h, w) of a map that they divide, in rows and columns of them."""
    sides = (maps.shape[1] // window[0], window[0], maps.shape[2] // window[1], window[1])
    return maps.unflatten(2, sides[2:]).unflatten(1, sides[:2]).transpose(2, 3)


def _blocked(size: Size, window: Size, shift: Size, like: Tensor) -> Float[Tensor, "M N N"]:
    """For each of the M windows of a shifted map, BLOCKED between tokens that did not lie side by side before."""
    regions = torch.zeros(size, dtype=torch.int32, device=like.device)
    for axis in range(2):
        place = torch.arange(size[axis], dtype=torch.int32, device=like.device)
        # What came round the end, and the rest of the windows that hold it.
        region = (place >= size[axis] - window[axis]).int() + (place >= size[axis] - shift[axis]).int()
        regions = 3 * regions + (region[:, None] if axis == 0 else region)
    tokens = windows(regions[None, ..., None], window).flatten(0, 2).flatten(1)
    return (tokens[:, None] != tokens[:, :, None]).to(like.dtype) * BLOCKED
