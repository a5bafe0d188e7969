"""Answers: what `tasks` makes of masks and names, written for a graph: tensors of fixed numbers, whatever is found.

All of a canvas at once, its padding with it, and many pictures at a time; `tasks` goes strip by strip and brings pictures home.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from maskfirst.frames import Size, resize
from maskfirst.tasks import Order, Thresholds
from maskfirst.types import VOID, Names, Proposals, Vocabulary

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "semantic": ("labels",),
    "instance": ("segments", "classes", "scores"),
    "panoptic": ("segments", "classes", "scores"),
}
"""What `answer` gives, by task. Labels (B, H, W) are classes. Instances are masks (B, N, H, W), classes (B, N), VOID where
there is none, and scores. Panoptic: each pixel's proposal (B, H, W), or VOID, and each proposal's class and score (B, Q)."""


def answer(
    task: str,
    proposals: Proposals,
    names: Names,
    canvas: Size,
    vocabulary: Vocabulary,
    order: Order,
    thresholds: Thresholds,
) -> tuple[Tensor, ...]:
    """The answer of `task`, as OUTPUTS says, on the canvas."""
    if task == "semantic":
        return (semantic(proposals, names, canvas, order),)
    things = torch.zeros(len(vocabulary), dtype=torch.bool, device=proposals.masks.device)
    things[sorted(vocabulary.things)] = True
    return (panoptic if task == "panoptic" else instance)(proposals, names, canvas, things, thresholds)


def semantic(proposals: Proposals, names: Names, canvas: Size, order: Order) -> Int64[Tensor, "B H W"]:
    """As `tasks.read_out` and `tasks.semantic`."""
    if proposals.names is names and proposals.competing:
        scores = resize(proposals.masks, canvas)
    elif order == "names_first":
        scores = resize(_mix(proposals.masks, proposals, names), canvas)
    else:
        masks = resize(proposals.masks, proposals.resolution or canvas)
        scores = resize(_mix(masks, proposals, names), canvas)
    blank = (scores == 0).all(1)
    return torch.where(blank, VOID, scores.argmax(1))


def _mix(masks: Tensor, proposals: Proposals, names: Names) -> Float[Tensor, "B K h w"]:
    inside = masks.softmax(1) if proposals.competing else masks.sigmoid()
    return (names.joint.mT @ inside.flatten(2)).unflatten(2, masks.shape[-2:])


def _home(masks: Tensor, proposals: Proposals, canvas: Size) -> Float[Tensor, "B Q H W"]:
    return resize(resize(masks, proposals.resolution or canvas), canvas)


def panoptic(
    proposals: Proposals, names: Names, canvas: Size, things: Bool[Tensor, " K"], thresholds: Thresholds
) -> tuple[Int64[Tensor, "B H W"], Int64[Tensor, "B Q"], Float[Tensor, "B Q"]]:
    """As `tasks.panoptic`. Segments of one stuff class have the number of the first of them."""
    best, labels = names.logits.softmax(-1).max(-1)
    named = labels < len(things)
    chosen = named & (best > thresholds.object)
    inside = _home(proposals.masks, proposals, canvas).sigmoid()
    owner = torch.where(chosen[..., None, None], inside * best[..., None, None], -1.0).argmax(1)
    within = inside.gather(1, owner[:, None])[:, 0] >= 0.5
    numbers = torch.arange(best.shape[1], device=best.device)
    owned = owner[:, None] == numbers[:, None, None]
    areas = owned.flatten(2).sum(2)
    full = (inside >= 0.5).flatten(2).sum(2)
    finals = (owned & within[:, None]).flatten(2).sum(2)
    enough = areas.double() >= thresholds.overlap * full.double()
    kept = chosen & (areas > 0) & (full > 0) & (finals > 0) & enough
    labels = torch.where(named, labels, 0)
    stuff = kept & ~things[labels]
    alike = (labels[:, :, None] == labels[:, None]) & stuff[:, :, None] & stuff[:, None]
    first = torch.where(stuff, alike.int().argmax(2), numbers)
    scores = torch.where(stuff, torch.where(alike, best[:, None], 0.0).amax(2), best)
    said = kept & (first == numbers)
    owners = owner.flatten(1)
    seen = kept.gather(1, owners) & within.flatten(1)
    segments = torch.where(seen, first.gather(1, owners), VOID).unflatten(1, owner.shape[1:])
    return segments, torch.where(said, labels, VOID), torch.where(said, scores, 0.0)


def instance(
    proposals: Proposals, names: Names, canvas: Size, things: Bool[Tensor, " K"], thresholds: Thresholds
) -> tuple[Bool[Tensor, "B N H W"], Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
    """As `tasks.instance`; what is left out there comes last here, without a class or a pixel."""
    joint = names.joint
    count = min(thresholds.instances, joint.shape[1] * joint.shape[2])
    likelihood, pairs = joint.flatten(1).topk(count)
    classes, owners = pairs % len(things), pairs // len(things)
    said = things[classes] & (likelihood > thresholds.least)
    places = owners[..., None, None].expand(-1, -1, *proposals.masks.shape[-2:])
    logits = _home(proposals.masks.gather(1, places), proposals, canvas)
    inside = logits > 0
    sums = torch.where(inside, logits.sigmoid(), 0.0).flatten(2).sum(2)
    scores = torch.where(said, likelihood * sums / (inside.flatten(2).sum(2) + 1e-6), -1.0)
    scores, ranks = scores.topk(count)
    classes = torch.where(said, classes, VOID).gather(1, ranks)
    masks = inside.gather(1, ranks[..., None, None].expand(-1, -1, *inside.shape[-2:]))
    # Those without a class have one score, and which of them comes first is each runtime's own.
    return masks & (classes != VOID)[..., None, None], classes, scores.clamp(min=0)
