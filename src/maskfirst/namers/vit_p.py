"""ViT-P: a mask is named by one point of it, a token that stands where a plain ViT has its class token.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (arXiv 2505.19795).
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from maskfirst import tasks
from maskfirst.contracts import PerClass, PointNamer, Receiver, Trunk
from maskfirst.errors import UserError
from maskfirst.frames import Frame
from maskfirst.namers import points
from maskfirst.ops import sine_positions
from maskfirst.types import Batch, Proposals, Vocabulary

PLASTIC = 1.32471795724474602596
"""The real root of x^3 = x + 1."""
STRIP = 64
"""Rows of masks that are enlarged at a time."""


class PointRows(nn.Linear, PerClass):
    """A linear layer whose rows are the K classes."""

    class_rows: ClassVar[Mapping[str, bool]] = {"weight": False, "bias": False}


class ViTP(PointNamer, Receiver):
    """Every mask by its point, all points of a picture in one pass; it knows no object from none, which `blend` does.

    `trunk`: any plain ViT; the published one is DINOv2 without its class token and with `interpolate_offset` 0.1. Points stand
    before the trunk's own first tokens, and begin with the position of the class token that its weights had. `size`: (height,
    width) px that pictures are stretched to, multiples of the patch. `point`: where a mask is looked at: "peak", its largest
    logit; "center", its pixel deepest inside; "random", any inside. `read_at`: on the "grid" that masks come on, or at the
    "picture"'s own size. `with_padding`: the picture is seen with the padding of its canvas while points are told without it;
    this, and "picture", is the published evaluation in detectron2. Else the part of a canvas that shows the picture is what is
    seen, mirrored where the canvas is, and windows alone. `code`: what a point is told by: its place, as published, or the
    "sines" of it by which a trunk with `start: alike` tells its patches apart. `at_least`: points look at each other, so that
    one trained with many misjudges few; to these others are added, spread evenly, until there are so many.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "vit_p",
        "trunk": {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 16, "depth": 1, "heads": 2},
        "size": [32, 48],
    }

    def __init__(
        self,
        trunk: Trunk,
        vocabulary: Vocabulary,
        size: tuple[int, int] = (518, 518),
        point: Literal["peak", "center", "random"] = "peak",
        read_at: Literal["grid", "picture"] = "grid",
        with_padding: bool = False,
        code: Literal["place", "sines"] = "place",
        at_least: int = 0,
    ) -> None:
        super().__init__()
        if any(side < 1 or side % trunk.patch for side in size):
            near = [max(1, round(side / trunk.patch)) * trunk.patch for side in size]
            raise ValueError(
                f"size {list(size)} must be multiples of the trunk's patch of {trunk.patch} px; {near} is near"
            )
        self.trunk = trunk
        self.size = size
        self.point = point
        self.read_at = read_at
        self.with_padding = with_padding
        self.code = code
        self.at_least = at_least
        self.point_proj = nn.Linear(2 if code == "place" else trunk.width, trunk.width, bias=False)
        self.slot = nn.Parameter(torch.zeros(trunk.width))
        if trunk.class_position is not None:
            self.slot.data.copy_(trunk.class_position)
        self.head = PointRows(trunk.width, len(vocabulary))
        for linear in (self.point_proj, self.head):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        if code == "sines":
            # So that a point is at first what the patch around it is.
            nn.init.eye_(self.point_proj.weight)
        nn.init.zeros_(self.head.bias)

    def looks(self, proposals: Proposals, batch: Batch) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B Q 2"]]:
        seen = [self._seen(pixels, frame) for pixels, frame in zip(batch.pixels, batch.frames, strict=True)]
        places = [self.places(proposals, index, frame) for index, frame in enumerate(batch.frames)]
        return torch.stack(seen), torch.stack(places)

    def classify(self, pixels: Float[Tensor, "B 3 H W"], points: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N K"]:
        tokens, grid = self.trunk.embed(pixels)
        asked = points.shape[1]
        if asked < self.at_least:
            others = spread(self.at_least - asked).to(points)
            points = torch.cat([points, others.expand(points.shape[0], -1, -1)], 1)
        # Half precision would move points by a quarter of a pixel.
        with torch.autocast(pixels.device.type, enabled=False):
            places = points.to(self.slot.dtype)
            told = places if self.code == "place" else sine_positions.code(places, self.trunk.width)
            own = self.point_proj(told) + self.slot
        tokens = torch.cat([own.to(tokens.dtype), tokens], 1)
        for index in range(self.trunk.depth):
            tokens = self.trunk.block(index, tokens, grid)
        # Half precision would make classes alike that are 1 in 256 apart.
        with torch.autocast(pixels.device.type, enabled=False):
            return self.head(self.trunk.norm(tokens[:, :asked].to(self.slot.dtype)))

    @torch.no_grad()
    def receive(self, tensors: Mapping[str, Tensor]) -> Collection[str]:
        """Weights of a trunk alone bring what every point is given with the position of their class token."""
        position = self.trunk.class_position
        if position is None or "slot" in tensors or not any(name.startswith("trunk.") for name in tensors):
            return ()
        self.slot.copy_(position)
        return ("slot",)

    def _seen(self, pixels: Float[Tensor, "3 H W"], frame: Frame) -> Float[Tensor, "3 H2 W2"]:
        """What is looked at of a canvas, stretched."""
        height, width = frame.outer if self.with_padding else frame.visible
        return self.stretch(pixels[None, :, :height, :width])[0]

    def places(self, proposals: Proposals, index: int, frame: Frame) -> Float[Tensor, "Q 2"]:
        """(y, x) of every mask's point of picture `index` in what is seen: -1 for its first row or column, 1 past its last."""
        if self.read_at == "picture":
            found, size = self._at_picture(proposals, index, frame), frame.original
            if frame.flipped:
                found = torch.stack([found[:, 0], size[1] - 1 - found[:, 1]], 1)
            return found * (2 / found.new_tensor(size, dtype=torch.float)) - 1
        masks = proposals.masks[index].float()
        cells = (masks.shape[-2], masks.shape[-1])
        scales = [outer / count for outer, count in zip(frame.outer, cells, strict=True)]
        # Cells whose centre lies in the padding are of no picture.
        rows, columns = (
            min(count, max(1, -int(-(visible / scale - 0.5) // 1)))
            for count, visible, scale in zip(cells, frame.visible, scales, strict=True)
        )
        found = self._points(masks[:, :rows, :columns], proposals.competing)
        sides = [visible / scale for visible, scale in zip(frame.visible, scales, strict=True)]
        return found * (2 / found.new_tensor(sides, dtype=torch.float)) - 1

    def _points(self, masks: Float[Tensor, "Q h w"], competing: bool) -> Int64[Tensor, "Q 2"]:
        if self.point == "peak" or not masks.numel():
            return points.peaks(masks)
        inside = (
            masks.argmax(0) == torch.arange(len(masks), device=masks.device)[:, None, None] if competing else masks > 0
        )
        return points.centers(masks, inside) if self.point == "center" else points.random(masks, inside)

    def _at_picture(self, proposals: Proposals, index: int, frame: Frame) -> Int64[Tensor, "Q 2"]:
        """(row, column) of every mask's point at the picture's own size; peaks are found some rows at a time."""
        if frame.visible != frame.inner:
            raise UserError(
                "namer vit_p: read_at picture is for whole pictures, and this is a window of one; take grid"
            )
        rows = tasks.home(proposals, index, frame)
        if self.point != "peak":
            return self._points(rows.fetch(0, rows.height), proposals.competing)
        best: Tensor | None = None
        place = torch.zeros(proposals.masks.shape[1], dtype=torch.int64, device=proposals.masks.device)
        for first in range(0, rows.height, STRIP):
            most, there = rows.fetch(first, min(first + STRIP, rows.height)).flatten(1).max(1)
            higher = torch.ones_like(most, dtype=torch.bool) if best is None else most > best
            place = torch.where(higher, there + first * rows.width, place)
            best = most if best is None else torch.where(higher, most, best)
        return torch.stack([place // rows.width, place % rows.width], 1)


def spread(count: int) -> Float[Tensor, "N 2"]:
    """Places (y, x) in [-1, 1) that lie evenly however many they are, always the same.

    By multiples of the two numbers that are for the plane what the golden ratio is for the line (Roberts, "The Unreasonable
    Effectiveness of Quasirandom Sequences", 2018).
    """
    steps = torch.tensor([PLASTIC**-1, PLASTIC**-2], dtype=torch.float64)
    return (2 * (torch.arange(1, count + 1, dtype=torch.float64)[:, None] * steps % 1) - 1).float()
