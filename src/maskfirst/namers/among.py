"""Among: another namer's names, of which some alone may be given."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskfirst.contracts import Namer
from maskfirst.errors import UserError, nearest
from maskfirst.types import Batch, Names, Proposals, Vocabulary


class Among(Namer):
    """Every mask gets one of `names` or no object, as if there were no others; in training all names count.

    Adds no parameters.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "among", "namer": {"kind": "class_head"}, "names": ["road", "car"]}
    kept: Tensor

    def __init__(self, namer: Namer, vocabulary: Vocabulary, names: list[str]) -> None:
        """Raises UserError for names that the vocabulary lacks, or none."""
        super().__init__()
        strange = [name for name in names if name not in vocabulary.names]
        if strange or not names:
            told = f"no class '{strange[0]}'.{nearest(strange[0], vocabulary.names)}" if strange else "none to give"
            raise UserError(f"namer among: names: {told}")
        self.namer = namer
        self.uses_truth = namer.uses_truth
        kept = [name in names for name in vocabulary.names]
        self.register_buffer("kept", torch.tensor([*kept, True]), persistent=False)

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        names = self.namer(proposals, batch)
        return names if self.training else Names(names.logits.masked_fill(~self.kept, float("-inf")))
