"""Oracle: the true masks as proposals, to train or measure a namer alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from maskfirst.contracts import Proposer
from maskfirst.types import Batch, Names, Proposals, Vocabulary

CERTAIN = 50.0
"""Logit of a mask's inside; its negative outside."""


class OracleProposer(Proposer):
    """The true segments, named. Pictures with fewer segments than others are filled with empty masks named no object."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "oracle"}
    uses_truth: ClassVar[bool] = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.classes = len(vocabulary)
        self.width = None
        self.tasks = frozenset({"semantic", "instance", "panoptic"})
        self.mean = (0.0, 0.0, 0.0)
        self.multiple = 1

    def forward(self, batch: Batch) -> Proposals:
        if batch.truth is None:
            raise ValueError("proposer oracle needs the truth; use it in `train` or `evaluate`")
        most = max(1, *(len(segments) for segments in batch.truth))
        size, device = batch.pixels.shape[-2:], batch.pixels.device
        masks = torch.full((len(batch), most, *size), -CERTAIN, device=device)
        logits = torch.zeros(len(batch), most, self.classes + 1, device=device)
        for image, segments in enumerate(batch.truth):
            count = len(segments)
            masks[image, :count][segments.masks] = CERTAIN
            logits[image, torch.arange(count), segments.classes] = CERTAIN
            logits[image, count:, self.classes] = CERTAIN
        return Proposals(masks, names=Names(logits))
