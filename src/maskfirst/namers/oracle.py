"""Oracle: names every mask by the true segment it overlaps most, to measure proposers alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from maskfirst.contracts import Namer
from maskfirst.frames import resize
from maskfirst.types import Batch, Names, Proposals, Vocabulary

CERTAIN = 50.0
"""Logit whose softmax leaves nothing to the others in float32."""


class OracleNamer(Namer):
    """P = 1 for the class of the true segment with the largest IoU, no object where no segment overlaps. Needs truth."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "oracle"}
    uses_truth = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.classes = len(vocabulary)

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        if batch.truth is None:
            raise ValueError("namer oracle needs the truth; use it in `evaluate`")
        masks = proposals.masks
        if proposals.competing:
            inside = masks.argmax(1, keepdim=True) == torch.arange(masks.shape[1], device=masks.device).view(
                1, -1, 1, 1
            )
        else:
            inside = masks > 0
        logits = torch.zeros(*masks.shape[:2], self.classes + 1, device=masks.device)
        for image, segments in enumerate(batch.truth):
            mine = inside[image].float().flatten(1)
            best = torch.full((len(mine),), self.classes, device=masks.device)
            if len(segments):
                grid = (masks.shape[-2], masks.shape[-1])
                truth = resize(segments.masks.float(), grid).flatten(1)
                shared = mine @ truth.T
                union = mine.sum(1, keepdim=True) + truth.sum(1)[None] - shared
                overlap, index = (shared / union.clamp(min=1e-6)).max(1)
                best = torch.where(overlap > 0, segments.classes[index], best)
            logits[image, torch.arange(len(mine)), best] = CERTAIN
        return Names(logits)
