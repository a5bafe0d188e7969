"""Boxes: rectangles in place of masks, those of many pictures as files of annotations tell them."""

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from maskfirst.formats import FormatError
from maskfirst.formats.coco import Key
from maskfirst.frames import Size
from maskfirst.types import Vocabulary


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of one picture, each with a pixel at least; `corners`: (x0, y0, x1, y1) px as `Segments.boxes`."""

    corners: Int64[Tensor, "N 4"]
    classes: Int64[Tensor, " N"]
    crowd: Bool[Tensor, " N"]


class Row(NamedTuple):
    """What is kept of an annotation while its file is read."""

    picture: Any
    category: Any
    box: Any
    crowd: Any


def compact(found: dict[str, Any]) -> Any:
    """Annotations without what is not used, such as polygons."""
    if "bbox" not in found or "category_id" not in found:
        return found
    box = found["bbox"]
    if isinstance(box, list):
        # What is wrong with one that this does not take is told when it is added.
        with contextlib.suppress(TypeError, OverflowError):
            box = array("d", box)
    return Row(found.get("image_id"), found["category_id"], box, found.get("iscrowd", 0))


class BoxTable:
    """The boxes of a file's pictures, as numbers in a row, since a data set may have tens of millions.

    `names`: where each picture lies; `sizes`: (height, width) px of those whose size the file tells. `warnings` counts, as
    pictures are read, what is odd but can mean one thing only.
    """

    def __init__(
        self, path: Path | str, vocabulary: Vocabulary, names: Mapping[Key, str], sizes: Mapping[Key, Size]
    ) -> None:
        self.path, self.vocabulary, self.names, self.sizes = Path(path), vocabulary, names, sizes
        self.warnings: Counter[str] = Counter()
        self._places = {key: array("q") for key in names}
        self._boxes, self._classes, self._crowd = array("d"), array("i"), bytearray()

    def add(self, picture: Key, row: Row, index: int, place: str) -> None:
        """A box of class `index`, told as (x, y, width, height) px. Raises FormatError that begins with `place`."""
        box = row.box
        if not isinstance(box, array) or len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            told = list(box) if isinstance(box, array) else box
            raise FormatError(f"{place}: bbox should be [x, y, width, height] in px, got {told!r}")
        if row.crowd not in (0, 1):
            raise FormatError(f"{place}: iscrowd should be 0 or 1, got {row.crowd!r}")
        self._places[picture].append(len(self._classes))
        self._boxes.extend(box)
        self._classes.append(index)
        self._crowd.append(row.crowd)

    def read(self, picture: Key, size: Size) -> Boxes:
        """The boxes of a picture of `size` (height, width) px, rounded to whole px and cut off at its borders.

        Those that have no pixel then are left out, and counted. Raises KeyError.
        """
        places = self._places[picture]
        told = np.array([self._boxes[4 * place : 4 * place + 4] for place in places], np.float64).reshape(-1, 4)
        corners = np.concatenate([told[:, :2], told[:, :2] + told[:, 2:]], 1)
        limits = np.array([size[1], size[0]] * 2, np.float64)
        cut = np.rint(corners).clip(0, limits)
        kept = np.asarray((cut[:, 2:] > cut[:, :2]).all(1))
        # More than one px beyond the picture; less is rounding.
        leaving = kept & ((corners < -1) | (corners > limits + 1)).any(1)
        if leaving.any():
            self.warnings["boxes that reach outside of their picture, cut off there"] += int(leaving.sum())
        if not kept.all():
            self.warnings["boxes without a pixel in their picture, left out"] += int((~kept).sum())
        some = [place for place, keep in zip(places, kept, strict=True) if keep]
        return Boxes(
            torch.from_numpy(cut[kept].astype(np.int64)),
            torch.tensor([self._classes[place] for place in some], dtype=torch.int64),
            torch.tensor([bool(self._crowd[place]) for place in some], dtype=torch.bool),
        )
