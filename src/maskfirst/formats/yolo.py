"""YOLO's label files: one text file a picture, one line an object, `class x y x y ...` in shares of width and height.

As Ultralytics documents it, https://docs.ultralytics.com/datasets/segment/. A line is one polygon: what has several parts or
holes is joined by seams that enclose nothing. Scores and crowds have no place in it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from maskfirst.errors import nearest
from maskfirst.files import write_aside
from maskfirst.formats import FormatError, rle
from maskfirst.formats.instances import Instances
from maskfirst.frames import Size
from maskfirst.types import Segments


def read(path: Path | str, size: Size, names: Sequence[str]) -> Instances:
    """The instances of a picture of `size` (height, width) px; an empty file has none. Classes are indices of `names`.

    Raises FormatError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not a text file") from error
    classes, polygons, places = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        word, *numbers = line.split() or [""]
        if not word:
            continue
        place = f"{path}: line {number}"
        if not word.isdecimal() or int(word) >= len(names):
            raise FormatError(
                f"{place}: class '{word}'; a line begins with the index of a class, 0..{len(names) - 1}."
                f"{nearest(word, names)}"
            )
        if len(numbers) == 4:
            raise FormatError(f"{place}: a box and no polygon; export the labels for segmentation")
        try:
            shares = np.array(numbers, np.float64)
        except ValueError as error:
            raise FormatError(f"{place}: not all numbers after the class") from error
        if ((shares < -0.01) | (shares > 1.01)).any():
            raise FormatError(f"{place}: coordinates {shares.min():.4g}..{shares.max():.4g}; they are shares, 0..1")
        classes.append(int(word))
        polygons.append([(shares * np.resize([size[1], size[0]], len(shares))).tolist()])
        places.append(place)
    return Instances(
        rle.read(polygons, size, places.__getitem__),
        torch.tensor(classes, dtype=torch.int64),
        torch.ones(len(classes)),
        torch.zeros(len(classes), dtype=torch.bool),
        size,
    )


def write(path: Path | str, found: Segments | Instances) -> None:
    """One line a segment, in order; those without a pixel are left out. Raises DiskError."""
    found = Instances.of(found) if isinstance(found, Segments) else found
    height, width = found.size
    lines = []
    for index, mask in zip(found.classes.tolist(), found.rles, strict=True):
        corners = np.array(rle.to_polygon(rle.decode([mask])[0])).reshape(-1, 2) / (width, height)
        if len(corners):
            lines.append(" ".join([str(index), *(f"{share:.7g}" for share in corners.ravel())]) + "\n")
    with write_aside(path) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
