"""PADing: a linear classifier over names seen in training and names that never were, which is taught those by made queries.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation", CVPR 2023.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from maskfirst.contracts import Namer, NoNamesError, Receiver
from maskfirst.errors import UserError, listed, nearest
from maskfirst.formats import class_vectors
from maskfirst.namers.class_head import ClassRows
from maskfirst.namers.disentangling import Rebuild, Relation, part
from maskfirst.namers.embeddings import Raised, VectorRows
from maskfirst.namers.primitives import Generator
from maskfirst.types import Batch, Names, Proposals, Vocabulary


@dataclass(frozen=True)
class Synthesis:
    """What PADing is trained with, and does not need to answer.

    `vectors`: a file of class vectors, or a bundled table, which are kept with the weights; `length`: numbers a vector; `kept`:
    false in checkpoints of the original's, which have none. `primitives`, `layers`, `heads`, `feedforward`, `dropout`: of the
    generator. `noise`: its standard deviation, in every layer. `parts_dropout`: of what takes features apart and puts them
    together.
    """

    vectors: str | None = None
    length: int = 512
    kept: bool = True
    primitives: int = 400
    layers: int = 3
    heads: int = 8
    feedforward: int = 1024
    dropout: float = 0.1
    parts_dropout: float = 0.1
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("length", "primitives", "layers", "heads", "feedforward"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("dropout", "parts_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must lie in 0..1, 0.1 being usual")
        if self.noise < 0:
            raise UserError(f"noise: {self.noise} must not be negative; 1 is usual, 0 for none")
        if self.vectors is not None and not self.kept:
            raise UserError("kept: false is for weights without class vectors, and `vectors` names some; leave one out")


class SynthesisBranch(nn.Module):
    """All that makes queries of classes: their vectors, the generator, and the nets of its losses.

    `head`: the class head of the first stage, which goes on matching; it is not trained. `seen`, `unseen`: indices of names.
    """

    def __init__(self, settings: Synthesis, vocabulary: Vocabulary, width: int, unseen: Sequence[str]) -> None:
        """Raises UserError for unseen names that are none, for a split without any seen, and for vectors that do not fit."""
        super().__init__()
        names = vocabulary.names
        strange = [name for name in unseen if name not in names]
        if strange:
            raise UserError(
                f"unseen: {listed(strange)} is no name of the vocabulary.{nearest(strange[0], names)} "
                f"It has {listed(names)}"
            )
        if not unseen:
            raise UserError(
                "namer pading learns with `unseen` names; say at the top of the recipe which names training has no labels of"
            )
        self.unseen = tuple(sorted({names.index(name) for name in unseen}))
        self.seen = tuple(index for index in range(len(names)) if index not in self.unseen)
        if not self.seen:
            raise UserError(f"unseen: leaves no seen class of the {len(names)}; name fewer")
        self.settings = settings
        self.head = ClassRows(width, len(names) + 1)
        self.head.requires_grad_(False)
        self.vectors = VectorRows(len(names), settings.length) if settings.kept else None
        if self.vectors is not None and settings.vectors is not None:
            self._take(class_vectors.read(settings.vectors, names), settings)
        self.project = nn.Linear(settings.length, width)
        self.generator = Generator(
            width,
            settings.primitives,
            settings.layers,
            settings.heads,
            settings.feedforward,
            settings.dropout,
            settings.noise,
        )
        self.related = part(width, settings.parts_dropout)
        self.unrelated = part(width, settings.parts_dropout)
        self.rebuild = Rebuild(width, settings.parts_dropout)
        self.relation = Relation(width)

    def _take(self, table: Tensor, settings: Synthesis) -> None:
        if table.shape[1] != settings.length:
            raise UserError(
                f"length: {settings.length}, and the vectors of {settings.vectors} have {table.shape[1]} numbers"
            )
        self.get_buffer("vectors.table").copy_(table)


class PADing(Namer, Receiver):
    """One linear layer for all names. `width`: D of the proposer's queries.

    `synthesis`: what trains it, by `phase: {kind: pading}`; None: without, as answers do not need it. `unseen`: names without a
    label in training, the recipe's. Given the weights of a
    first stage, whose class head knows no unseen names or never saw one, that head is also kept for the matching. `enlarge`:
    how its rows become those of all names: "by_name", no object's staying so and new names beginning at 0; or "compatible", as
    the published conversion, row by row, so that no object's becomes that of the first unseen name and no object begins at 0.
    `calibration`: see Raised; 0 as published.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "pading"}

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        synthesis: Synthesis | None = None,
        unseen: Sequence[str] = (),
        enlarge: Literal["by_name", "compatible"] = "by_name",
        calibration: float = 0.0,
    ) -> None:
        super().__init__()
        self.raised = Raised(vocabulary, unseen, calibration)
        self.linear = ClassRows(width, len(vocabulary) + 1)
        self.synthesis = None if synthesis is None else SynthesisBranch(synthesis, vocabulary, width, unseen)
        self.enlarge = enlarge
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        if self.synthesis is not None:
            with torch.no_grad():
                self.linear.weight[list(self.synthesis.unseen)] = 0.0
                self.synthesis.head.load_state_dict(self.linear.state_dict())

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        if proposals.queries is None:
            raise NoNamesError("namer pading reads queries, and this proposer gives none; use `given` or a point namer")
        logits = self.linear(proposals.queries)
        return Names(logits if self.training else self.raised(logits))

    @torch.no_grad()
    def receive(self, tensors: Mapping[str, Tensor]) -> Collection[str]:
        """The head of a first stage also becomes the one that matches. Raises UserError for one of another split."""
        branch = self.synthesis
        own = self.linear.state_dict()
        if branch is None or "synthesis.head.weight" in tensors or not own.keys() <= {*_of_linear(tensors)}:
            return ()
        found = _of_linear(tensors)
        rows, names = len(found["weight"]) - 1, len(self.linear.weight) - 1
        if rows not in (len(branch.seen), names):
            raise UserError(
                f"a first stage of {rows} names, and this split has {len(branch.seen)} seen of {names}; take one of this split"
            )
        filled = []
        if self.enlarge == "compatible":
            for name, value in own.items():
                value.zero_()
                value[: rows + 1] = found[name].to(value.dtype)
                filled.append(f"linear.{name}")
        branch.head.load_state_dict(own)
        return (*filled, "synthesis.head.weight", "synthesis.head.bias")


def _of_linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The linear layer's own, by its names."""
    return {name.removeprefix("linear."): value for name, value in tensors.items() if name.startswith("linear.")}
