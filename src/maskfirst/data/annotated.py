"""Annotated: pictures whose truth lies in files of annotations, with masks that stay compressed until a picture is read."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from maskfirst.contracts import Dataset
from maskfirst.data.coding import DataError
from maskfirst.data.images import read_image
from maskfirst.formats import rle
from maskfirst.formats.boxes import Boxes
from maskfirst.formats.instances import Instances
from maskfirst.frames import Size
from maskfirst.types import VOID, Sample, Vocabulary

Window = tuple[slice, slice]
"""Rows and columns of a picture."""


@dataclass(frozen=True)
class Picture:
    """A picture on disk, by its key."""

    key: str
    path: Path


@dataclass(frozen=True, eq=False)
class Layers:
    """The segments of a picture as `Sample` has them: in layers of numbers, as those of one layer cannot overlap."""

    ids: Int32[Tensor, "L H W"]
    classes: Int64[Tensor, " N"]
    crowd: Bool[Tensor, " N"]

    @classmethod
    def of(cls, found: Instances) -> "Layers":
        """Each instance in the first layer that has room for it, so that few are needed; one mask is open at a time."""

        def opened() -> Iterator[tuple[Window, Bool[np.ndarray, "_h _w"]]]:
            for mask, box in zip(found.rles, rle.boxes(found.rles).int().tolist(), strict=True):
                left, top, width, height = box
                window = (slice(top, top + height), slice(left, left + width))
                yield window, rle.decode([mask])[0].numpy()[window]

        return cls(_layered(opened(), found.size), found.classes, found.crowd)

    @classmethod
    def of_boxes(cls, found: Boxes, size: Size) -> "Layers":
        """Each box, filled, in the first layer that has room for it."""
        windows = [(slice(top, bottom), slice(left, right)) for left, top, right, bottom in found.corners.tolist()]
        return cls(_layered(((window, ...) for window in windows), size), found.classes, found.crowd)

    @classmethod
    def none(cls, size: Size) -> "Layers":
        """Of a picture without any segment."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(torch.full((1, *size), VOID, dtype=torch.int32), nothing, nothing.bool())


def _layered(
    parts: Iterable[tuple[Window, Bool[np.ndarray, "_h _w"] | EllipsisType]], size: Size
) -> Int32[Tensor, "L H W"]:
    """Numbers 0, 1, ... in what the parts have inside of their windows, each in the first layer that is free there."""
    layers: list[Int32[np.ndarray, "H W"]] = []
    for number, (window, inside) in enumerate(parts):
        layer = next((layer for layer in layers if (layer[window][inside] == VOID).all()), None)
        if layer is None:
            layer = np.full(size, VOID, np.int32)
            layers.append(layer)
        layer[window][inside] = number
    # Those that there may be have no pixel.
    return torch.from_numpy(np.stack(layers)) if layers else torch.full((1, *size), VOID, dtype=torch.int32)


class Annotated(Dataset):
    """Pictures with segments from files of annotations. Abstract but for the reading of pictures.

    `warnings` counts, as samples are read, what is odd in them but can mean one thing only.
    """

    warnings: Counter[str]

    def __init__(self, vocabulary: Vocabulary, pictures: Sequence[Picture], place: Path) -> None:
        """`place`: the file or folder that messages name. Raises DataError where there are no pictures."""
        if not pictures:
            raise DataError(f"{place}: no pictures here; the split is empty")
        self.vocabulary = vocabulary
        self.pictures = tuple(pictures)

    @abstractmethod
    def segments(self, index: int, size: Size) -> Layers:
        """The segments of picture `index`, which is of `size` px. Raises FormatError or DataError."""

    def __len__(self) -> int:
        return len(self.pictures)

    def keys(self) -> Sequence[str]:
        return [picture.key for picture in self.pictures]

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        image = read_image(picture.path)
        found = self.segments(index, (image.shape[-2], image.shape[-1]))
        return Sample(image, found.ids, found.classes, found.crowd, picture.key)


def check_size(picture: Path, size: Size, told: Size, place: Path) -> None:
    """Raises DataError where `place` tells another size than its picture has."""
    if size != told:
        turned = "; was it annotated before its EXIF rotation?" if size == told[::-1] else ""
        raise DataError(
            f"{place}: says that {picture.name} has {told[1]} x {told[0]} px, but it has {size[1]} x {size[0]} px{turned}"
        )
