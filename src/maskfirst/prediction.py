"""Prediction: the segments of one picture together with it and with the names, so that they can be looked at and passed on."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from maskfirst import draw
from maskfirst.formats import coco_instances, coco_panoptic
from maskfirst.formats.instances import Instances
from maskfirst.types import SegmentMap, Segments, Vocabulary


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model found in a picture, on the CPU. `image`: RGB 0..255. `key`: the picture's file, or "" where it came of none.

    In a notebook it shows itself.
    """

    image: UInt8[Tensor, "3 H W"]
    segments: Segments
    vocabulary: Vocabulary
    task: str
    key: str = ""

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, keep: Tensor | slice) -> "Prediction":
        """Some of the segments: `found[found.scores > 0.8]`."""
        return replace(self, segments=self.segments[keep])

    def __iter__(self) -> Iterator["Prediction"]:
        """One a segment."""
        return (self[index : index + 1] for index in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.image.shape[-2:]
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        return f"Prediction({self.task}, {width} x {height} px: {counts or 'nothing'})"

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each segment."""
        return tuple(self.vocabulary.names[index] for index in self.segments.classes.tolist())

    @property
    def masks(self) -> Bool[Tensor, "N H W"]:
        return self.segments.masks

    @property
    def classes(self) -> Int64[Tensor, " N"]:
        """Indices into `vocabulary.names`."""
        return self.segments.classes

    @property
    def scores(self) -> Float[Tensor, " N"]:
        """0..1; of the semantic task the mean score of a segment's pixels, which is no probability in every model."""
        return self.segments.scores

    @property
    def boxes(self) -> Float[Tensor, "N 4"]:
        """(x0, y0, x1, y1) px, x1 and y1 being the first beyond the mask."""
        return self.segments.boxes

    def label_map(self) -> Int64[Tensor, "H W"]:
        """The class of every pixel, -1 for none; where instances overlap, the smaller one's."""
        return self._front().label_map()

    def overlay(self, opacity: float = 0.5, least_score: float = draw.SURE, legend: bool = True) -> Image.Image:
        """The picture under the colours of its segments, with their names and, below it, a legend.

        `opacity`: of the fill, 0..1. `least_score`: of the instances that are drawn. `legend`: without, the picture's size.
        """
        front = SegmentMap.of(self._front(least_score))
        shares = draw.shares(front)
        return draw.explained(
            draw.to_picture(self.image),
            front,
            self.vocabulary,
            opacity,
            captioned=self.task != "semantic",
            shares=shares if legend else None,
        )

    def coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO's results: `image_id`, `category_id`, `bbox` (x, y, width, height), `segmentation` (run lengths), `score`."""
        found = coco_instances.records(Instances.of(self.segments), self.vocabulary)
        return [{"image_id": image_id} | record for record in found]

    def panoptic(self) -> tuple[UInt8[np.ndarray, "H W 3"], list[dict[str, Any]]]:
        """COCO's panoptic form: a picture whose colours are the segments' numbers, and its `segments_info`.

        Where instances overlap, the smaller one is in front.
        """
        front = SegmentMap.of(self._front())
        return coco_panoptic.painted(front, self.vocabulary), coco_panoptic.records(front, self.vocabulary)

    def labels(self) -> Image.Image:
        """The label map with the names' colours as its palette; see `draw.label_picture`."""
        return draw.label_picture(self.label_map(), self.vocabulary)

    def save(self, path: Path | str) -> None:
        """Writes `labels` as a PNG. Raises DiskError."""
        draw.write_label_map(path, self.label_map(), self.vocabulary)

    def _front(self, least_score: float = 0.0) -> Segments:
        """The segments in the order in which they are painted."""
        if self.task != "instance":
            return self.segments
        return draw.smaller_in_front(self.segments[self.scores >= least_score])

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        png = io.BytesIO()
        self.overlay().save(png, "PNG")
        return png.getvalue()
