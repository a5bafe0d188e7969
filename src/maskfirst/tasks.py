"""Tasks: how masks and names become an answer, and truth a target. Pure functions.

The semantic read-out is MaskFormer's (Cheng et al., 2021): every pixel sums, over the proposals, mask times name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from maskfirst.errors import UserError
from maskfirst.frames import Frame, Size, resize
from maskfirst.types import TASKS, Names, Proposals, Segments, Vocabulary

Order = Literal["masks_first", "names_first"]
"""Whether masks are enlarged before they are mixed into names (the originals' order) or after (faster, near equal)."""

PIECE = 2**21
"""Mask values that are mixed into names at a time: what stays in a processor's cache is twice as fast."""


def check_task(task: str, able: frozenset[str]) -> None:
    """Raises where a model is asked for a task that its proposer cannot do."""
    if task not in TASKS:
        raise UserError(f"unknown task '{task}'. Known: {', '.join(TASKS)}.")
    if task not in able:
        raise UserError(f"this model cannot do the {task} task, only: {', '.join(sorted(able))}")


def targets(segments: Segments, vocabulary: Vocabulary, task: str) -> Segments:
    """The truth as `task` wants it: semantic merges the segments of a class, instance keeps things only.

    Crowds are kept in `semantic` and dropped from the two that count.
    """
    if task == "semantic":
        classes = torch.unique(segments.classes)
        if len(classes) == len(segments) and not segments.crowd.any():
            return segments
        masks = [segments.masks[segments.classes == index].any(0) for index in classes]
        merged = torch.stack(masks) if masks else segments.masks[:0]
        ones = torch.ones(len(classes), device=classes.device)
        return Segments(merged, classes, ones, torch.zeros_like(classes, dtype=torch.bool))
    segments = segments[~segments.crowd]
    if task == "panoptic":
        return segments
    things = torch.tensor(sorted(vocabulary.things), dtype=torch.int64, device=segments.classes.device)
    return segments[torch.isin(segments.classes, things)]


@dataclass(frozen=True)
class Rows:
    """A map of scores (K, height, width) of which any run of rows can be had without making the rest."""

    height: int
    width: int
    fetch: Callable[[int, int], Float[Tensor, "K n W"]]
    """Rows first..last-1, as a fresh tensor."""


def whole(scores: Float[Tensor, "K h w"]) -> Rows:
    """Rows of a map that is there already."""
    return Rows(scores.shape[-2], scores.shape[-1], lambda first, last: scores[:, first:last])


def enlarge(rows: Rows, size: Size) -> Rows:
    """`frames.resize`, run by run: the same numbers up to rounding, whatever the runs."""
    height, width = size
    if (rows.height, rows.width) == size:
        return rows
    step = rows.height / height

    def fetch(first: int, last: int) -> Tensor:
        if (first, last) == (0, height):
            return resize(rows.fetch(0, rows.height), size)
        centres = torch.arange(first, last, dtype=torch.float64).add_(0.5).mul_(step).sub_(0.5).clamp_(min=0)
        above = centres.long()
        below = (above + 1).clamp_(max=rows.height - 1)
        source_first, source_last = int(above[0]), int(below[-1]) + 1
        source = rows.fetch(source_first, source_last)
        source = resize(source, (source.shape[-2], width))
        share = (centres - above).to(source).view(-1, 1)
        above, below = (index.to(source.device) - source_first for index in (above, below))
        return source.index_select(1, above).lerp_(source.index_select(1, below), share)

    return Rows(height, width, fetch)


def crop(rows: Rows, size: Size) -> Rows:
    """The top left part."""
    height, width = size
    return Rows(height, width, lambda first, last: rows.fetch(first, last)[..., :width])


def flip(rows: Rows) -> Rows:
    """Mirrored left to right."""
    return Rows(rows.height, rows.width, lambda first, last: rows.fetch(first, last).flip(-1))


def softmax(rows: Rows) -> Rows:
    """A softmax over K of every pixel."""
    return Rows(rows.height, rows.width, lambda first, last: rows.fetch(first, last).softmax(0))


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


def read_out(proposals: Proposals, names: Names, image: int, canvas: Size, order: Order = "masks_first") -> Rows:
    """Scores (K, canvas) of picture `image`: sum over q of P(name of q) times P(pixel in mask q).

    Masks that arrived named, one a class in order, are the scores themselves: a per-pixel classifier's logits.
    Values 0..Q for mixed masks, any for logits.
    """
    masks = proposals.masks[image]
    if proposals.names is names and proposals.competing:
        return enlarge(whole(masks), canvas)
    share = names.joint[image].to(masks.dtype).T
    resolution = proposals.resolution or canvas

    def mixed(rows: Rows) -> Rows:
        run = max(1, PIECE // (len(masks) * rows.width))

        def mix(first: int, last: int) -> Tensor:
            logits = rows.fetch(first, last)
            inside = logits.softmax(0) if proposals.competing else logits.sigmoid()
            return (share @ inside.flatten(1)).unflatten(1, logits.shape[1:])

        def fetch(first: int, last: int) -> Tensor:
            if last - first <= run:
                return mix(first, last)
            scores = masks.new_empty(len(share), last - first, rows.width)
            for start in range(first, last, run):
                stop = min(start + run, last)
                scores[:, start - first : stop - first] = mix(start, stop)
            return scores

        return Rows(rows.height, rows.width, fetch)

    if order == "names_first":
        return enlarge(mixed(whole(masks)), canvas)
    return enlarge(mixed(enlarge(whole(masks), resolution)), canvas)


def semantic(scores: Rows, strip: int = 64) -> Segments:
    """The class of every pixel by its largest score, strip by strip; a segment's score is the mean of its pixels'."""
    labels, best = [], []
    for first in range(0, scores.height, strip):
        value, index = scores.fetch(first, min(first + strip, scores.height)).max(0)
        labels.append(index)
        best.append(value.float())
    found = Segments.from_label_map(torch.cat(labels))
    values = torch.cat(best)
    means = torch.stack([values[mask].mean() for mask in found.masks]) if len(found) else values.new_zeros(0)
    return Segments(found.masks, found.classes, means, found.crowd)
