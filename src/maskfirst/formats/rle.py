"""Run lengths: masks as COCO keeps them, made and opened by pycocotools, and polygons on their way there and back.

A mask is {"size": [height, width], "counts": runs down the columns, the first outside of the mask, packed into text}.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from pycocotools import mask as pycocotools
from torch import Tensor

from maskfirst.data.images import PIXELS
from maskfirst.formats import FormatError
from maskfirst.frames import Size

Rle = dict[str, Any]
coco: Any = pycocotools
"""Untyped, as its stubs know one of the forms that each function takes."""
PACKED = re.compile("(?:[P-o]{0,5}[0-O])+")
"""Groups of up to six characters, the last of each without the bit that says that more follow."""
LONGEST_OUTLINE = 2_000_000
"""px; the rasteriser keeps five points a pixel of an outline in memory."""


def encode(masks: Bool[Tensor, "N H W"]) -> list[Rle]:
    """Run lengths whose counts are text, ready for JSON."""
    return [_encoded(mask) for mask in masks.cpu().numpy()]


def decode(rles: Sequence[Rle], size: Size | None = None) -> Bool[Tensor, "N H W"]:
    """The masks; `size` (height, width) px is needed only where there may be none."""
    if not rles:
        if size is None:
            raise ValueError("no run lengths and no size to decode to")
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = coco.decode(list(rles))
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)).view(np.bool_))


def area(rles: Sequence[Rle]) -> Int64[Tensor, " N"]:
    """px of each mask."""
    return torch.from_numpy(np.asarray(coco.area(list(rles)), np.int64).reshape(-1))


def boxes(rles: Sequence[Rle]) -> Float64[Tensor, "N 4"]:
    """(x, y, width, height) px of each mask, COCO's `bbox`; 0 for an empty mask."""
    return torch.from_numpy(np.asarray(coco.toBbox(list(rles)), np.float64).reshape(-1, 4))


def from_runs(counts: Sequence[int], size: Size) -> Rle:
    """From runs that add up to the picture, in turn outside and inside of the mask."""
    packed = coco.frPyObjects({"size": list(size), "counts": list(counts)}, *size)
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def from_polygons(polygons: Sequence[Sequence[float | int]], size: Size) -> Rle:
    """The union of polygons [x0, y0, x1, y1, ...] px, by COCO's own rasteriser; parts outside of the picture are cut off.

    Each polygon has at least three points; one that crosses itself is filled by the even-odd rule.
    """
    return union(coco.frPyObjects([list(polygon) for polygon in polygons], *size))


def union(rles: Sequence[Rle]) -> Rle:
    """The pixels of any of the masks, of which there is at least one."""
    merged = coco.merge(list(rles))
    return {"size": merged["size"], "counts": merged["counts"].decode()}


def from_json(value: Any, size: Size, place: str) -> Rle:
    """A mask as a file has it: a list of polygons, run lengths as a list, or packed into text. Untrusted.

    `size`: (height, width) px of its picture. Raises FormatError that begins with `place`.
    """
    return read([value], size, lambda _: place)[0]


def read(values: Sequence[Any], size: Size, place: Callable[[int], str]) -> list[Rle]:
    """`from_json` of all masks of one picture at once; `place(i)` names the i-th."""
    rles = []
    packed = []
    for index, value in enumerate(values):
        if isinstance(value, dict):
            rles.append(_sized(value, size, place(index)))
            if isinstance(rles[-1]["counts"], str):
                packed.append(index)
            else:
                rles[-1] = from_runs(_checked_runs(rles[-1]["counts"], size, place(index)), size)
        elif isinstance(value, list) and value:
            for number, polygon in enumerate(value):
                _check_polygon(polygon, f"{place(index)}: polygon {number}" if len(value) > 1 else place(index))
            rles.append(from_polygons(value, size))
        else:
            raise FormatError(f"{place(index)}: no mask; `segmentation` should be polygons or run lengths")
    _check_packed([rles[index]["counts"] for index in packed], size, lambda number: place(packed[number]))
    return rles


def check_size(height: Any, width: Any, place: str) -> Size:
    """A picture's size out of an untrusted file. Raises FormatError that begins with `place`."""
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise FormatError(f"{place}: height and width should be whole numbers of px, got {height!r} and {width!r}")
    if height * width > PIXELS:
        raise FormatError(f"{place}: {width} x {height} px, more than the limit of {PIXELS / 1e6:.4g} million")
    return height, width


def to_polygon(mask: Bool[Tensor, "H W"]) -> list[int]:
    """One polygon [x0, y0, x1, y1, ...] along the borders of pixels whose even-odd fill is the mask; [] for an empty one.

    Further parts and holes hang on seams that are walked there and back, and so enclose nothing.
    """
    padded = np.pad(mask.cpu().numpy(), 1)
    # A corner of the outline is where an odd number of the four pixels around it is inside, or two that touch in it only.
    crossings = padded[1:, 1:] ^ padded[1:, :-1] ^ padded[:-1, 1:] ^ padded[:-1, :-1]
    saddles = (padded[1:, 1:] != padded[1:, :-1]) & ~crossings & (padded[1:, 1:] == padded[:-1, :-1])
    y, x = np.nonzero(crossings | saddles)
    twice = 1 + saddles[y, x]
    y, x = np.repeat(y, twice), np.repeat(x, twice)
    # In reading order the corners of a row belong together in pairs, as do, down the columns, those of a column.
    down = np.lexsort((y, x))
    across, along = np.empty((2, len(x)), np.int64)
    across[0::2], across[1::2] = np.arange(1, len(x), 2), np.arange(0, len(x), 2)
    along[down[0::2]], along[down[1::2]] = down[1::2], down[0::2]
    return _joined(list(zip(x.tolist(), y.tolist(), strict=True)), across.tolist(), along.tolist())


def _encoded(mask: Bool[np.ndarray, "H W"]) -> Rle:
    """By its box alone, as most masks are small: a fifth of the time that pycocotools takes."""
    height, width = mask.shape
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return from_runs([height * width], (height, width))
    top, bottom = rows[0], rows[-1] + 1
    columns = np.flatnonzero(mask[top:bottom].any(0))
    left, right = columns[0], columns[-1] + 1
    # Columns as rows, each with a pixel outside of the mask behind it.
    inside = np.zeros((right - left, bottom - top + 1), bool)
    inside[:, :-1] = mask[top:bottom, left:right].T
    column, row = np.divmod(np.flatnonzero(np.diff(inside.ravel(), prepend=False)), inside.shape[1])
    borders = (left + column) * height + top + row
    # A run that goes on from the foot of a column to the head of the next is one.
    through = borders[1:] == borders[:-1]
    borders = borders[~(np.append(through, False) | np.append(False, through))]
    runs = np.diff(borders, prepend=0, append=height * width)
    # As pycocotools has it, no empty run at the end.
    return from_runs((runs if runs[-1] else runs[:-1]).tolist(), (height, width))


def _joined(corners: list[tuple[int, int]], across: list[int], along: list[int]) -> list[int]:
    """The closed walks over corners by turns `across` and `along`, as one that returns to the first corner in between."""
    visited = bytearray(len(corners))
    path: list[tuple[int, int]] = []
    for start, corner in enumerate(corners):
        if visited[start]:
            continue
        first = len(path)
        here = start
        while not visited[here]:
            there = across[here]
            visited[here] = visited[there] = 1
            path += (corners[here], corners[there])
            here = along[there]
        if first:
            path += (corner, path[0])
        elif not all(visited):
            path.append(corner)
    return [value for point in path for value in point]


def _sized(value: dict[str, Any], size: Size, place: str) -> Rle:
    counts, told = value.get("counts"), value.get("size")
    if not isinstance(counts, str | list) or not isinstance(told, list):
        raise FormatError(f"{place}: run lengths need `size` and `counts`, got {', '.join(value) or 'nothing'}")
    if told != list(size):
        raise FormatError(f"{place}: run lengths of {told} px (height, width) in a picture of {list(size)} px")
    return {"size": list(size), "counts": counts}


def _checked_runs(counts: list[Any], size: Size, place: str) -> list[int]:
    if any(type(count) is not int or count < 0 for count in counts):
        raise FormatError(f"{place}: run lengths must be whole numbers from 0 on")
    _check_sum(sum(counts), size, place)
    return counts


def _check_sum(covered: int, size: Size, place: str) -> None:
    if covered != size[0] * size[1]:
        raise FormatError(f"{place}: run lengths of {covered} px in all for a picture of {size[0]} x {size[1]} px")


def _check_packed(texts: Sequence[str], size: Size, place: Callable[[int], str]) -> None:
    """Raises where packed counts do not add up to the picture: pycocotools would read and write beyond its memory.

    A count is a group of characters, five bits in each from '0' on, the lowest first; the sixth bit says that more follow,
    the fifth of the last one is the sign. From the fourth count on it is the difference to the count two places before.
    """
    for index, text in enumerate(texts):
        if not PACKED.fullmatch(text):
            raise FormatError(f"{place(index)}: counts that are no packed run lengths: {text[:40]!r}")
    if not texts:
        return
    codes = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int64) - ord("0")
    last = codes < 32
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    digit = np.arange(len(codes)) - starts[np.cumsum(last) - last]
    values = np.add.reduceat((codes & 31) << 5 * digit, starts)
    values -= np.where(codes[last] & 16, 32 << 5 * digit[last], 0)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[starts]
    heads = np.flatnonzero(np.diff(owner, prepend=-1))
    number = np.arange(len(values)) - heads[owner]
    counts = np.where(number == 0, values, 0)
    for chain in ((number % 2 == 1), (number % 2 == 0) & (number > 0)):
        sums = np.cumsum(np.where(chain, values, 0))
        counts += np.where(chain, sums - (sums[heads] - np.where(chain, values, 0)[heads])[owner], 0)
    for index in np.flatnonzero(np.minimum.reduceat(counts, heads) < 0)[:1]:
        raise FormatError(f"{place(int(index))}: run lengths below 0; the counts are damaged")
    covered = np.add.reduceat(counts, heads)
    for index in np.flatnonzero(covered != size[0] * size[1])[:1]:
        _check_sum(int(covered[index]), size, place(int(index)))


def _check_polygon(polygon: Any, place: str) -> None:
    try:
        points = np.asarray(polygon)
    except ValueError:
        points = np.zeros((0, 2))
    if points.ndim != 1 or points.dtype.kind not in "iuf":
        raise FormatError(f"{place}: a polygon should be a flat list of numbers [x0, y0, x1, y1, ...]")
    points = points.astype(np.float64)
    if len(points) % 2:
        raise FormatError(f"{place}: a polygon of {len(points)} numbers; x and y come in pairs")
    if len(points) < 6:
        raise FormatError(f"{place}: a polygon of {len(points) // 2} points; it takes at least three")
    if not np.isfinite(points).all():
        raise FormatError(f"{place}: a polygon with numbers that are not finite")
    steps = np.abs(points - np.roll(points, 2)).reshape(-1, 2).max(1).sum()
    if steps > LONGEST_OUTLINE or np.abs(points).max() > LONGEST_OUTLINE:
        raise FormatError(f"{place}: a polygon {steps:.4g} px around; coordinates should be px of the picture")
