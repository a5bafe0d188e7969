"""Given: the names that the masks arrived with, unchanged."""

from collections.abc import Mapping
from typing import Any, ClassVar

from maskfirst.contracts import Namer, NoNamesError
from maskfirst.types import Batch, Names, Proposals


class Given(Namer):
    """For proposers whose masks arrive named: per-pixel classifiers, files of other tools, the oracle."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "given"}

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        if proposals.names is None:
            raise NoNamesError(
                "namer given: this proposer's masks arrive without names; use a namer such as class_head"
            )
        return proposals.names
