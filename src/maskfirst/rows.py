"""Rows: a map of scores of which any run of rows can be had without making the rest; enlarged, cropped, stitched, averaged.

All enlarging is `frames.resize`, written as products with two thin matrices, which a processor does several times as fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from maskfirst.frames import Frame, Size

BLOCK = 64
"""Rows or columns that are made by one product: few enough that little of its matrix is zero."""


@dataclass(frozen=True)
class Rows:
    """A map of scores (K, height, width), fetched by rows."""

    height: int
    width: int
    fetch: Callable[[int, int], Float[Tensor, "K n W"]]
    """Rows first..last-1, to be read only: they may be a view of what they came from."""
    run: int | None = None
    """Rows that are made at once at the least cost each; None: any number."""


def whole(scores: Float[Tensor, "K h w"]) -> Rows:
    """Rows of a map that is there already."""
    return Rows(scores.shape[-2], scores.shape[-1], lambda first, last: scores[:, first:last])


def enlarge(rows: Rows, size: Size) -> Rows:
    """`frames.resize`, run by run: up to rounding the same, whatever the runs; in float32 at least, also under autocast."""
    height, width = size
    if (rows.height, rows.width) == size:
        return rows
    columns = [_taps(rows.width, width, start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]

    def widen(source: Tensor) -> Tensor:
        if rows.width == width:
            return source
        return torch.cat([source[..., a:b] @ shares.T.to(source) for a, b, shares in columns], -1)

    def fetch(first: int, last: int) -> Tensor:
        if rows.height == height:
            top, bottom = first, last
        else:
            top, bottom, _ = _taps(rows.height, height, first, last)
        source = rows.fetch(top, bottom)
        source = source.to(torch.promote_types(source.dtype, torch.float32))
        with torch.autocast(source.device.type, enabled=False):
            source = widen(source)
            if rows.height == height:
                return source
            runs = [_taps(rows.height, height, start, min(start + BLOCK, last)) for start in range(first, last, BLOCK)]
            made = [shares.to(source) @ source[:, a - top : b - top] for a, b, shares in runs]
            return made[0] if len(made) == 1 else torch.cat(made, 1)

    return Rows(height, width, fetch)


def _taps(source: int, goal: int, first: int, last: int) -> tuple[int, int, Float[Tensor, "n m"]]:
    """Which of `source` places, from a to b-1, are mixed into the places first..last-1 of `goal`, and their shares."""
    # In float32, as `interpolate` does it: logits are large, and so is what a share's last digits make of them.
    centres = torch.arange(first, last, dtype=torch.float32).add_(0.5).mul_(source / goal).sub_(0.5).clamp_(min=0)
    above = centres.long().clamp_(max=source - 1)
    below = (above + 1).clamp_(max=source - 1)
    start, stop = int(above[0]), int(below[-1]) + 1
    share = centres - above
    weights = torch.zeros(last - first, stop - start)
    places = torch.arange(last - first)
    weights.index_put_((places, above - start), 1 - share, accumulate=True)
    weights.index_put_((places, below - start), share, accumulate=True)
    return start, stop, weights


def crop(rows: Rows, size: Size) -> Rows:
    """The top left part."""
    height, width = size
    if (rows.height, rows.width) == size:
        return rows
    return Rows(height, width, lambda first, last: rows.fetch(first, last)[..., :width], rows.run)


def flip(rows: Rows) -> Rows:
    """Mirrored left to right."""
    return Rows(rows.height, rows.width, lambda first, last: rows.fetch(first, last).flip(-1), rows.run)


def softmax(rows: Rows) -> Rows:
    """A softmax over K of every pixel."""
    return Rows(rows.height, rows.width, lambda first, last: rows.fetch(first, last).softmax(0), rows.run)


def mean(views: list[Rows]) -> Rows:
    """The average of maps of one size."""

    def fetch(first: int, last: int) -> Tensor:
        total = views[0].fetch(first, last)
        for view in views[1:]:
            total = total + view.fetch(first, last)
        return total / len(views)

    return views[0] if len(views) == 1 else Rows(views[0].height, views[0].width, fetch)


def stitch(parts: list[tuple[Frame, Rows]]) -> Rows:
    """Overlapping windows of one resized picture, averaged where they overlap."""
    height, width = parts[0][0].inner

    def fetch(first: int, last: int) -> Tensor:
        total: Tensor | None = None
        visits = torch.zeros(last - first, width)
        for frame, rows in parts:
            (y, x), top, bottom = frame.origin, max(first, frame.origin[0]), min(last, frame.origin[0] + rows.height)
            if top >= bottom:
                continue
            scores = rows.fetch(top - y, bottom - y)
            if total is None:
                total = scores.new_zeros(len(scores), last - first, width)
            total[:, top - first : bottom - first, x : x + rows.width] += scores
            visits[top - first : bottom - first, x : x + rows.width] += 1
        if total is None:
            raise ValueError(f"no window covers the rows {first}..{last - 1} of a picture {height} px high")
        return total.div_(visits.to(total))

    if len(parts) == 1 and (parts[0][1].height, parts[0][1].width) == (height, width):
        return parts[0][1]
    return Rows(height, width, fetch)
