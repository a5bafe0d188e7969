"""Instances: the segments of one picture with their masks compressed, free to overlap."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from maskfirst.formats import rle
from maskfirst.formats.rle import Rle
from maskfirst.frames import Size
from maskfirst.types import Segments


@dataclass(frozen=True, eq=False)
class Instances:
    """As `Segments`, a run-length mask each in place of a row of pixels. `size`: (height, width) px of the picture.

    `told_areas`: px, where a file tells them; COCO's own, of polygons, differ from their masks' by some pixels, and its
    evaluator sorts truth into small, medium and large by them.
    """

    rles: list[Rle]
    classes: Int64[Tensor, " N"]
    scores: Float[Tensor, " N"]
    crowd: Bool[Tensor, " N"]
    size: Size
    told_areas: Float[Tensor, " N"] | None = None

    @classmethod
    def of(cls, segments: Segments) -> "Instances":
        height, width = segments.masks.shape[-2:]
        segments = segments.to("cpu")
        return cls(rle.encode(segments.masks), segments.classes, segments.scores, segments.crowd, (height, width))

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, keep: Tensor) -> "Instances":
        """Those where `keep` is true, or those that it numbers."""
        kept = torch.arange(len(self))[keep]
        told = None if self.told_areas is None else self.told_areas[kept]
        rles = [self.rles[index] for index in kept.tolist()]
        return Instances(rles, self.classes[kept], self.scores[kept], self.crowd[kept], self.size, told)

    @property
    def areas(self) -> Float[Tensor, " N"]:
        """px: as the file tells, or counted."""
        return rle.area(self.rles).double() if self.told_areas is None else self.told_areas

    @property
    def boxes(self) -> Float[Tensor, "N 4"]:
        """(x0, y0, x1, y1) px as `Segments.boxes`."""
        boxes = rle.boxes(self.rles).float()
        return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)

    @property
    def segments(self) -> Segments:
        """Opened into masks."""
        return Segments(rle.decode(self.rles, self.size), self.classes, self.scores.float(), self.crowd)
