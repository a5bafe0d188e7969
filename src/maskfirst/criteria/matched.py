"""Matched: every true segment finds its own proposal, by the cheapest assignment over the whole picture.

Carion et al., "DETR", 2020; with masks at sampled points as in Cheng et al., "Mask2Former", 2022.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from maskfirst.contracts import Criterion
from maskfirst.criteria.counts import mean_count
from maskfirst.criteria.masks import TINY
from maskfirst.criteria.points import Draw, sample, sample_truth, uncertain, uniform
from maskfirst.errors import UserError
from maskfirst.types import Names, Proposals, Segments, Vocabulary

Pairs = tuple[Int64[Tensor, " _M"], Int64[Tensor, " _M"]]
"""Proposals, and the true segments that they are to become."""
UNKNOWN = -100
"""The name of proposals that teach no name: what cross-entropy leaves out."""
HOPELESS = 1e6
"""Cost in place of one that is infinite or NaN: a broken proposal is matched last, and no training dies of it."""


def hungarian(costs: Float[Tensor, "Q N"]) -> Pairs:
    """The assignment of least total cost (Kuhn, 1955), min(Q, N) pairs in the order of the proposals."""
    queries, segments = linear_sum_assignment(costs.cpu().numpy())
    return torch.from_numpy(queries).to(costs.device), torch.from_numpy(segments).to(costs.device)


class Matched(Criterion):
    """Mask2Former's loss, which serves every task: cross-entropy on names, and on the matched masks cross-entropy and dice.

    Matching and losses see masks at `points` places only: for matching at random ones, for the losses mostly at those, of
    `oversample` times as many, where the mask is least certain (the share `importance`). Proposals left over have no
    object as their name, with the weight `no_object` in a weighted mean. Pixels without a segment, padding among them,
    are outside of every mask. `labelled`: the share of a mask, 0..1, that must have labels for a proposal left over to be
    called no object; one below lies where labels are withheld, on an unseen thing perhaps, and teaches no name. 0, as
    published: all are. The costs of a match weigh as the losses do unless `name_cost`, `mask_cost` or `dice_cost` say
    otherwise. All is float32 whatever the precision of the network. `draw` and `assign` may be exchanged, to replay what
    was recorded.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "set", "points": 64}
    trains_void: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        name_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object: float = 0.1,
        name_cost: float | None = None,
        mask_cost: float | None = None,
        dice_cost: float | None = None,
        labelled: float = 0.0,
    ) -> None:
        super().__init__()
        if points < 1:
            raise UserError(f"points: {points} must be at least 1; 12544 is usual")
        if oversample < 1:
            raise UserError(f"oversample: {oversample} must be at least 1; 3 is usual, 1 for none")
        if not 0 <= importance <= 1:
            raise UserError(f"importance: {importance} must lie in 0..1; 0.75 is usual")
        if not 0 <= labelled <= 1:
            raise UserError(
                f"labelled: {labelled} must lie in 0..1; 0.5 is usual where labels are withheld, 0 as published"
            )
        self.points = points
        self.labelled = labelled
        self.oversample = oversample
        self.importance = importance
        self.name_weight, self.mask_weight, self.dice_weight = name_weight, mask_weight, dice_weight
        self.name_cost = name_weight if name_cost is None else name_cost
        self.mask_cost = mask_weight if mask_cost is None else mask_cost
        self.dice_cost = dice_weight if dice_cost is None else dice_cost
        self.draw: Draw = uniform
        self.assign: Callable[[Float[Tensor, "Q N"]], Pairs] = hungarian
        weights = torch.ones(len(vocabulary) + 1)
        weights[-1] = no_object
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        if proposals.competing:
            raise UserError(
                "criterion set needs masks that stand alone (such as proposer atm's); use `pixel` for competing ones"
            )
        with torch.autocast(proposals.masks.device.type, enabled=False):
            masks, logits = proposals.masks.float(), names.logits.float()
            pairs = self.match(masks.detach(), logits.detach(), truth)
            named = self.named(masks.detach(), pairs, truth)
            # A mean over no proposals would be NaN.
            nameless = not named.numel() or (self.labelled > 0 and bool((named == UNKNOWN).all()))
            ce = 0.0 * logits.sum() if nameless else F.cross_entropy(logits.transpose(1, 2), named, self.class_weights)
            mask, dice = self._mask_losses(masks, pairs, truth)
        count = mean_count(sum(map(len, truth)), masks.device)
        return {
            "ce": proposals.weight * self.name_weight * ce,
            "mask": proposals.weight * self.mask_weight * mask / count,
            "dice": proposals.weight * self.dice_weight * dice / count,
        }

    @torch.no_grad()
    def named(
        self, masks: Float[Tensor, "B Q h w"], pairs: Sequence[Pairs], truth: Sequence[Segments]
    ) -> Int64[Tensor, "B Q"]:
        """What every proposal is to be called: its segment's class, or K for no object, or UNKNOWN."""
        named = torch.full(masks.shape[:2], len(self.class_weights) - 1, device=masks.device)
        if self.labelled:
            for row, own, one in zip(named, masks, truth, strict=True):
                row[share_labelled(own, one) < self.labelled] = UNKNOWN
        for row, (queries, segments), one in zip(named, pairs, truth, strict=True):
            row[queries] = one.classes[segments]
        return named

    @torch.no_grad()
    def match(
        self, masks: Float[Tensor, "B Q h w"], logits: Float[Tensor, "B Q K1"], truth: Sequence[Segments]
    ) -> list[Pairs]:
        """Which proposal is to become which true segment, picture by picture."""
        return [self.assign(self.costs(*one)) for one in zip(masks, logits, truth, strict=True)]

    def costs(
        self, masks: Float[Tensor, "Q h w"], logits: Float[Tensor, "Q K1"], truth: Segments
    ) -> Float[Tensor, "Q N"]:
        """What every match of a picture would cost, seen at new random points that all its masks share."""
        points = self.draw(1, self.points, masks.device)
        if not len(truth) or not len(logits):
            return logits.new_zeros(len(logits), len(truth))
        x = sample(masks[None], points)[0]
        inside = sample_truth(truth.masks, torch.arange(len(truth), device=masks.device), points).T
        # Cross-entropy is softplus(x) - x t; softplus by way of a sigmoid, as its own operator takes ten times as long.
        p = x.sigmoid()
        softplus = (-x).sigmoid_().add_(TINY).log_().neg_()
        mask = (softplus.sum(1, keepdim=True) - x @ inside) / self.points
        dice = 1 - (2 * (p @ inside) + 1) / (p.sum(1, keepdim=True) + inside.sum(0) + 1)
        name = -logits.softmax(-1)[:, truth.classes]
        costs = self.name_cost * name + self.mask_cost * mask + self.dice_cost * dice
        return costs.nan_to_num_(HOPELESS, HOPELESS, -HOPELESS)

    def _mask_losses(
        self, masks: Float[Tensor, "B Q h w"], pairs: Sequence[Pairs], truth: Sequence[Segments]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Cross-entropy, averaged over points, and dice; both summed over all pairs."""
        counts = [len(queries) for queries, _ in pairs]
        if not sum(counts):
            nothing = 0.0 * masks.sum()
            return nothing, nothing
        chosen = torch.cat([own[queries] for own, (queries, _) in zip(masks, pairs, strict=True)])[:, None]
        with torch.no_grad():
            points = uncertain(chosen, self.points, self.oversample, self.importance, self.draw)
            parts = zip(truth, pairs, points.split(counts), strict=True)
            inside = torch.cat([sample_truth(one.masks, segments, some) for one, (_, segments), some in parts])
        x = sample(chosen, points)[:, 0]
        p = x.sigmoid()
        mask = F.binary_cross_entropy_with_logits(x, inside, reduction="sum") / self.points
        dice = 1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)
        return mask, dice.sum()


def share_labelled(masks: Float[Tensor, "Q h w"], truth: Segments) -> Float[Tensor, " Q"]:
    """How much of each mask, logits, lies on pixels that some segment of the truth has; 0 for an empty mask."""
    known = F.interpolate(truth.masks.any(0)[None, None].float(), masks.shape[-2:], mode="area")[0, 0]
    inside = (masks > 0).to(known.dtype)
    return (inside * known).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
