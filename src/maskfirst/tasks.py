"""Tasks: how masks and names become an answer, and truth a target. Pure functions.

The semantic read-out is MaskFormer's (Cheng et al., 2021): every pixel sums, over the proposals, mask times name. The panoptic
and the instance answer are Mask2Former's (Cheng et al., 2022). What a proposal is called is asked first, and only the masks of
those that can be part of the answer are enlarged, a strip of rows at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from maskfirst.errors import UserError, nearest
from maskfirst.frames import Frame, Size
from maskfirst.rows import Rows, crop, enlarge, flip, whole
from maskfirst.types import TASKS, VOID, Names, Proposals, SegmentMap, Segments, Vocabulary

Order = Literal["masks_home", "masks_first", "names_first"]
"""When masks are mixed into names: after they were enlarged to the picture's own size (Mask2Former where it does all tasks), to
the canvas (semantic models of all origins), or before (faster, near equal)."""

PIECE = 2**20
"""Values of masks or scores that are worked on at a time: what stays in a processor's cache is several times as fast."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a segment. `object` and `overlap` are panoptic: the probability of its name that a proposal must
    exceed, and the share of its mask that must not belong to others, both 0..1. `instances`: how many pairs of proposal and
    name the instance task answers with at most; `least`: the probability of its name that each must exceed.
    """

    object: float = 0.8
    overlap: float = 0.8
    instances: int = 100
    least: float = 0.0

    def __post_init__(self) -> None:
        for name in ("object", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} must lie in 0..1; 0.8 is usual")
        if not 0 <= self.least < 1:
            raise UserError(f"least: {self.least} must lie in 0..1, below 1; 0 is usual")
        if self.instances < 1:
            raise UserError(f"instances: {self.instances} must be at least 1; 100 is usual")


def check_known(task: str) -> None:
    """Raises where `task` is none."""
    if task not in TASKS:
        raise UserError(f"unknown task '{task}'.{nearest(task, TASKS)} Known: {', '.join(TASKS)}.")


def check_task(task: str, able: frozenset[str], vocabulary: Vocabulary) -> None:
    """Raises where a model is asked for a task that its proposer, or its vocabulary, cannot do."""
    check_known(task)
    if task not in able:
        raise UserError(f"this model cannot do the {task} task, only: {', '.join(sorted(able))}")
    if task == "instance" and not vocabulary.things:
        raise UserError(
            "the instance task finds things, and none of the vocabulary's names is marked as one (`thing: true`)"
        )


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
    return segments if task == "panoptic" else segments[_are_things(segments.classes, vocabulary)]


def _are_things(classes: Int64[Tensor, " N"], vocabulary: Vocabulary) -> Tensor:
    return torch.isin(classes, torch.tensor(sorted(vocabulary.things), dtype=torch.int64, device=classes.device))


def _runs(count: int, rows: Rows, most: int) -> Iterator[tuple[int, int]]:
    """First and last row + 1 of pieces, of at most `most` rows, of `count` maps."""
    step = max(1, min(most, PIECE // max(1, count * rows.width)))
    return ((first, min(first + step, rows.height)) for first in range(0, rows.height, step))


def home(proposals: Proposals, image: int, frame: Frame, chosen: Int64[Tensor, " q"] | slice = slice(None)) -> Rows:
    """Mask logits of picture `image`, all or the `chosen` ones, brought back to the original picture. Not for windows."""
    rows = whole(proposals.masks[image][chosen].float())
    rows = enlarge(enlarge(rows, proposals.resolution or frame.outer), frame.outer)
    rows = enlarge(crop(rows, frame.visible), frame.original)
    return flip(rows) if frame.flipped else rows


def read_out(proposals: Proposals, names: Names, image: int, canvas: Size, order: Order = "masks_first") -> Rows:
    """Scores (K, canvas) of picture `image`: sum over q of P(name of q) times P(pixel in mask q).

    Masks that arrived named, one a class in order, are the scores themselves: a per-pixel classifier's logits.
    Values 0..Q for mixed masks, any for logits. An `order` of "masks_home" is `read_home`'s, and "masks_first" here.
    """
    masks = whole(proposals.masks[image])
    if proposals.names is names and proposals.competing:
        return enlarge(masks, canvas)
    if order == "names_first":
        return enlarge(_mix(masks, proposals, names, image), canvas)
    return enlarge(_mix(enlarge(masks, proposals.resolution or canvas), proposals, names, image), canvas)


def read_home(proposals: Proposals, names: Names, image: int, frame: Frame) -> Rows:
    """Scores (K, original) of picture `image`, its masks brought home before they are mixed. Else as `read_out`."""
    masks = home(proposals, image, frame)
    return masks if proposals.names is names and proposals.competing else _mix(masks, proposals, names, image)


def _mix(rows: Rows, proposals: Proposals, names: Names, image: int) -> Rows:
    """Masks (Q, H, W) into scores (K, H, W)."""
    share = names.joint[image].to(proposals.masks.dtype).T
    most = max(1, 2 * PIECE // max(1, share.shape[1] * rows.width))

    def piece(first: int, last: int) -> Tensor:
        logits = rows.fetch(first, last)
        inside = logits.softmax(0) if proposals.competing else logits.sigmoid()
        return (share @ inside.to(share.dtype).flatten(1)).unflatten(1, logits.shape[1:])

    def fetch(first: int, last: int) -> Tensor:
        # As few pieces as fit, all of one size: enlarging makes the rows at their borders twice.
        step = math.ceil((last - first) / math.ceil((last - first) / most))
        if step == last - first:
            return piece(first, last)
        scores = share.new_empty(len(share), last - first, rows.width)
        for start in range(first, last, step):
            scores[:, start - first : start - first + step] = piece(start, min(start + step, last))
        return scores

    return Rows(rows.height, rows.width, fetch, most)


def semantic(scores: Rows, strip: int = 64) -> Segments:
    """The class of every pixel by its largest score, `strip` rows at most at a time; a segment's score is its pixels' mean.

    A pixel whose scores are all exactly 0 lies in no mask, and has no class.
    """
    labels, best, nothing = [], [], 0
    step = min(strip, scores.run or strip)
    for first in range(0, scores.height, step):
        some = scores.fetch(first, min(first + step, scores.height))
        value, index = some.max(0)
        nothing = len(some)
        # The largest alone does not say it, as logits may all be below 0; looked at only where it may be so.
        if (blank := value == 0).any():
            index[blank & (some == 0).all(0)] = nothing
        labels.append(index)
        best.append(value.float())
    found = torch.cat(labels)
    counts = torch.bincount(found.flatten(), minlength=nothing)[:nothing]
    sums = torch.bincount(found.flatten(), torch.cat(best).flatten(), minlength=nothing)[:nothing]
    classes = counts.nonzero()[:, 0]
    means = (sums[classes] / counts[classes]).float()
    return Segments(found[None] == classes[:, None, None], classes, means, torch.zeros_like(classes, dtype=torch.bool))


def panoptic(
    proposals: Proposals,
    names: Names,
    image: int,
    vocabulary: Vocabulary,
    frame: Frame,
    thresholds: Thresholds | None = None,
    strip: int = 64,
) -> SegmentMap:
    """Segments of picture `image` that share its pixels out; all of a class that is no thing are one. Some pixels have none.

    Every pixel goes to the proposal with the largest probability of name times mask, and is kept where that mask is at least
    0.5. Segments come in the order of the proposals; their score is the probability of the name, of stuff the largest.
    """
    thresholds = thresholds or Thresholds()
    best, labels = names.logits[image].float().softmax(-1).max(-1)
    chosen = ((labels < len(vocabulary)) & (best > thresholds.object)).nonzero()[:, 0]
    best, labels = best[chosen], labels[chosen]
    rows = home(proposals, image, frame, chosen)
    owners = torch.full(frame.original, len(chosen), device=best.device)  # nobody
    inside = torch.zeros(frame.original, dtype=torch.bool, device=best.device)
    full = torch.zeros_like(chosen)
    for first, last in _runs(len(chosen), rows, strip) if len(chosen) else ():
        probabilities = rows.fetch(first, last).sigmoid()
        within = probabilities >= 0.5
        full += within.flatten(1).sum(1)
        owner = probabilities.mul_(best[:, None, None]).max(0, keepdim=True).indices
        owners[first:last] = owner[0]
        inside[first:last] = within.gather(0, owner)[0]
    areas = torch.bincount(owners.flatten(), minlength=len(chosen) + 1)[:-1]
    finals = torch.bincount(owners[inside], minlength=len(chosen) + 1)[:-1]

    numbers, classes, scores = [], [], []
    stuff: dict[int, int] = {}
    for name, score, *counts in zip(*(each.tolist() for each in (labels, best, areas, full, finals)), strict=True):
        if 0 in counts or counts[0] / counts[1] < thresholds.overlap:
            numbers.append(VOID)
        elif name in stuff:
            numbers.append(stuff[name])
            scores[stuff[name]] = max(scores[stuff[name]], score)
        else:
            numbers.append(len(classes))
            classes.append(name)
            scores.append(score)
            if name not in vocabulary.things:
                stuff[name] = numbers[-1]
    table = torch.tensor([*numbers, VOID], dtype=torch.int32, device=best.device)
    ids = table[owners].masked_fill_(~inside, VOID)
    return SegmentMap(
        ids,
        torch.tensor(classes, dtype=torch.int64, device=best.device),
        torch.tensor(scores, dtype=torch.float32, device=best.device),
        torch.zeros(len(classes), dtype=torch.bool, device=best.device),
    )


def instance(
    proposals: Proposals,
    names: Names,
    image: int,
    vocabulary: Vocabulary,
    frame: Frame,
    thresholds: Thresholds | None = None,
    strip: int = 64,
) -> Segments:
    """Things of picture `image`, which may overlap, the surest first; one proposal may be answered under several names.

    Of the pairs of proposal and name that are likeliest those are kept whose name is a thing, and likelier than `least`, so
    that none is kept that cannot be (a probability of exactly 0). A mask is where its logit is above 0, and may be empty; a
    score is the probability of the name times the mean of the mask's, inside.
    """
    thresholds = thresholds or Thresholds()
    joint = names.joint[image].float()
    likely = joint.flatten().topk(min(thresholds.instances, joint.numel()))
    things = _are_things(likely.indices % joint.shape[1], vocabulary) & (likely.values > thresholds.least)
    likelihood, pairs = likely.values[things], likely.indices[things]
    chosen, place = (pairs // joint.shape[1]).unique(return_inverse=True)
    rows = home(proposals, image, frame, chosen)
    masks = torch.empty(len(chosen), *frame.original, dtype=torch.bool, device=joint.device)
    areas, sums = (torch.zeros(len(chosen), dtype=torch.float64, device=joint.device) for _ in range(2))
    for first, last in _runs(len(chosen), rows, strip) if len(chosen) else ():
        logits = rows.fetch(first, last)
        inside = torch.gt(logits, 0)
        masks[:, first:last] = inside
        areas += inside.flatten(1).sum(1, dtype=torch.int32)
        # A logit above 0 has a probability above 0.5, and leaving out all others so is far faster than by a mask.
        sums += F.threshold(logits.sigmoid(), 0.5, 0.0, inplace=True).flatten(1).sum(1)
    scores = likelihood * (sums / (areas + 1e-6)).float()[place]
    order = scores.argsort(descending=True, stable=True)
    return Segments(
        masks[place[order]],
        (pairs % joint.shape[1])[order],
        scores[order],
        torch.zeros(len(order), dtype=torch.bool, device=joint.device),
    )
