"""Oracle: the true masks as proposals, to train or measure a namer alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.nn import functional as F

from maskfirst.contracts import Proposer
from maskfirst.proposers.known import propose
from maskfirst.types import Batch, Proposals, Vocabulary


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
        masks = [segments.masks for segments in batch.truth]
        names = [F.one_hot(segments.classes, self.classes + 1).float() for segments in batch.truth]
        return propose(masks, names, batch)
