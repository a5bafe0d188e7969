"""Criteria: how truth meets proposals.

`fixed`: query c stands for class c, always (SegViT; Zhang et al., 2022). `pixel`: cross-entropy of every pixel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.nn import functional as F

from maskfirst.contracts import Criterion
from maskfirst.frames import resize
from maskfirst.types import VOID, Names, Proposals, Segments, Vocabulary


def mean_count(count: int, device: torch.device) -> float:
    """A count averaged over the processes that train together, at least 1."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return max(float(count), 1.0)
    total = torch.tensor(float(count), device=device)
    distributed.all_reduce(total)
    return max(total.item() / distributed.get_world_size(), 1.0)


def focal_loss(
    logits: Float[Tensor, "M H W"], truth: Float[Tensor, "M H W"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, " M"]:
    """Sigmoid focal loss, averaged over the pixels of each mask (Lin et al., 2017)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    # 1 - p of the true side, and alpha for the inside, 1 - alpha for the outside.
    miss = probability + truth * (1 - 2 * probability)
    weight = truth * (2 * alpha - 1) + (1 - alpha)
    return (weight * cross_entropy * miss**gamma).flatten(1).mean(1)


def dice_loss(logits: Float[Tensor, "M H W"], truth: Float[Tensor, "M H W"]) -> Float[Tensor, " M"]:
    """1 - (2 st + 1) / (s + t + 1) over the pixels of each mask (Milletari et al., 2016)."""
    inside, truth = logits.sigmoid().flatten(1), truth.flatten(1)
    return 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)


class Fixed(Criterion):
    """SegViT's loss: query c answers for class c; cross-entropy on names, focal and dice on the masks of present classes.

    Classes absent from a picture have no object as their name and no mask loss. Pixels without a class count as outside
    of every mask. `no_object`: the weight of that name in the cross-entropy; it is a buffer, as checkpoints carry it.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "fixed"}

    def __init__(
        self,
        vocabulary: Vocabulary,
        name_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object: float = 0.1,
    ) -> None:
        super().__init__()
        self.name_weight = name_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        weights = torch.ones(len(vocabulary) + 1)
        weights[-1] = no_object
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights)

    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        classes = len(self.class_weights) - 1
        if names.logits.shape[1] != classes:
            raise ValueError(
                f"criterion fixed needs one query a class: {names.logits.shape[1]} queries, {classes} classes"
            )
        images = torch.cat([torch.full_like(segments.classes, i) for i, segments in enumerate(truth)])
        present = torch.cat([segments.classes for segments in truth])
        named = torch.full(names.logits.shape[:2], classes, device=present.device)
        named[images, present] = present
        losses = {"ce": self.name_weight * F.cross_entropy(names.logits.transpose(1, 2), named, self.class_weights)}
        count = mean_count(len(present), present.device)
        if len(present) == 0:
            nothing = 0.0 * proposals.masks.sum()
            return losses | {"mask": nothing, "dice": nothing}
        masks = proposals.masks[images, present]
        if proposals.resolution is not None:
            masks = resize(masks, proposals.resolution)
        inside = torch.cat([segments.masks for segments in truth]).to(masks.dtype)
        masks = resize(masks, (inside.shape[-2], inside.shape[-1]))
        losses["mask"] = self.mask_weight * focal_loss(masks, inside).sum() / count
        losses["dice"] = self.dice_weight * dice_loss(masks, inside).sum() / count
        return losses


class Pixel(Criterion):
    """Cross-entropy of every pixel over competing masks, one a class; pixels without a class are left out."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "pixel"}

    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        if not proposals.competing:
            raise ValueError("criterion pixel needs competing masks (proposer dense); use `fixed` or `set` for others")
        labels = torch.stack([segments.label_map() for segments in truth])
        logits = resize(proposals.masks, (labels.shape[-2], labels.shape[-1]))
        known = (labels != VOID).sum().clamp(min=1)
        return {"ce": proposals.weight * F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum") / known}
