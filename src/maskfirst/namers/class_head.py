"""Class head: one linear layer from a proposal's query to the names and no object.

Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation" (MaskFormer), 2021.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from maskfirst.contracts import Namer, NoNamesError, PerClass
from maskfirst.types import Batch, Names, Proposals, Vocabulary


class ClassRows(nn.Linear, PerClass):
    """A linear layer whose rows are the K classes and, last, no object."""

    class_rows: ClassVar[Mapping[str, bool]] = {"weight": True, "bias": True}


class ClassHead(Namer):
    """One linear layer for all proposals, the earlier ones too. `width`: D of the proposer's queries."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "class_head"}

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__()
        self.linear = ClassRows(width, len(vocabulary) + 1)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        if proposals.queries is None:
            raise NoNamesError(
                "namer class_head reads queries, and this proposer gives none; use `given` or a point namer"
            )
        return Names(self.linear(proposals.queries))
