"""Embeddings: a query is named by the class vector that it is most like, so that a new name needs a vector and no label.

The plain baseline of zero-shot naming; Frome et al., "DeViSE: A Deep Visual-Semantic Embedding Model", NeurIPS 2013.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Namer, NoNamesError, PerClass
from maskfirst.errors import UserError
from maskfirst.formats import class_vectors
from maskfirst.ops.runs import has_data
from maskfirst.types import Batch, Names, Proposals, Vocabulary

TEMPERATURE = 0.07
"""What cosines are divided by at first, as in CLIP."""


class VectorRows(nn.Module, PerClass):
    """The vectors of K names, no parameters; NaN until they are read or come with weights."""

    class_rows: ClassVar[Mapping[str, bool]] = {"table": False}
    table: Float[Tensor, "K D"]

    def __init__(self, names: int, length: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((names, length), float("nan")))


class Raised(nn.Module):
    """Calibrated stacking: the logits of names without labels are raised, as names that were trained for win too often.

    Chao et al., "An Empirical Study and Analysis of Generalized Zero-Shot Learning for Object Recognition in the Wild", 2016.
    """

    amounts: Float[Tensor, " K1"]

    def __init__(self, vocabulary: Vocabulary, unseen: Sequence[str], by: float) -> None:
        super().__init__()
        amounts = torch.tensor([by * (name in unseen) for name in vocabulary.names] + [0.0])
        self.register_buffer("amounts", amounts, persistent=False)

    def forward(self, logits: Float[Tensor, "B Q K1"]) -> Float[Tensor, "B Q K1"]:
        return logits + self.amounts.to(logits.dtype)


class Embeddings(Namer):
    """Cosines of the class vectors with a learned projection of the query, times a learned scale.

    Whether it is an object is told by a layer of its own, from the query. `width`: D of the proposer's queries. `vectors`: a
    file of class vectors, a bundled table, or the vectors themselves by name; they are kept with the weights. `length`:
    numbers a vector. `unseen`: names without a label in training, by default the recipe's: as long as it trains they are
    not among the answers, or it would learn that they never are. `calibration`: what their logits are raised by when it
    is asked, see Raised.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "embeddings",
        "vectors": {"sky": [1.0, 0.0, 0.0], "road": [0.0, 1.0, 0.2], "car": [0.0, 0.4, 1.0]},
        "length": 3,
    }

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        length: int,
        vectors: str | dict[str, list[float]] | None = None,
        unseen: Sequence[str] = (),
        calibration: float = 0.0,
    ) -> None:
        """Raises FormatError, which names classes without a vector, and UserError for another length."""
        super().__init__()
        names = vocabulary.names
        self.vectors = VectorRows(len(names), length)
        if vectors is not None:
            whole = class_vectors.read_all(vectors) if isinstance(vectors, str) else class_vectors.told(vectors)
            found = whole.of(names)
            if found.shape[1] != length:
                raise UserError(f"length: {length}, and the vectors of {whole.source} have {found.shape[1]} numbers")
            self.vectors.table.copy_(found)
        self.project = nn.Linear(width, length)
        self.no_object = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        for linear in (self.project, self.no_object):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.hidden: Tensor
        self.register_buffer("hidden", torch.tensor([name in unseen for name in names]), persistent=False)
        self.filled = False
        self.raised = Raised(vocabulary, unseen, calibration)

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        """Raises UserError in training without vectors."""
        if proposals.queries is None:
            raise NoNamesError(
                "namer embeddings reads queries, and this proposer gives none; use `given` or a point namer"
            )
        if self.training and not self.filled and has_data(self.vectors.table):
            # Once, as it waits for the device.
            self.filled = bool(self.vectors.table.isfinite().all())
            if not self.filled:
                raise UserError(
                    "namer embeddings: has no class vectors; name a file of some as `vectors` in the recipe"
                )
        with torch.autocast(proposals.queries.device.type, enabled=False):
            queries = F.normalize(self.project(proposals.queries.float()), dim=-1)
            logits = queries @ F.normalize(self.vectors.table, dim=-1).T * self.log_scale.exp()
        if self.training:
            logits = logits.masked_fill(self.hidden, float("-inf"))
        logits = torch.cat([logits, self.no_object(proposals.queries).to(logits.dtype)], -1)
        return Names(logits if self.training else self.raised(logits))
