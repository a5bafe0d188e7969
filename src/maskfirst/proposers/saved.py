"""Saved: the masks of any other tool, from files, as proposals; the house's namers name them, or the files do."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from maskfirst.contracts import Proposer
from maskfirst.data.images import ImageError
from maskfirst.errors import UserError
from maskfirst.formats import saved as files
from maskfirst.frames import Size
from maskfirst.proposers.known import propose
from maskfirst.types import TASKS, Batch, Proposals, Vocabulary


class Saved(Proposer):
    """The masks in a file or folder, each picture's by its key. They are looked for when the first picture is asked for.

    Scores become names as `formats.saved.open_saved` says. UserError where the files cannot be read, or have names that the
    vocabulary does not have; ImageError where they have no such picture, or its masks are of another size.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "saved", "masks": "masks"}

    def __init__(self, vocabulary: Vocabulary, masks: str, names: bool = True) -> None:
        """`masks`: the path, see `formats.saved`. `names`: whether what files call the masks is read, for namer `given`.

        Without, masks may be of any names and none, and a namer that looks at pictures names them.
        """
        super().__init__()
        self.masks = masks
        self.vocabulary = vocabulary if names else None
        self.width = None
        self.tasks = frozenset(TASKS)
        self.mean = (0.0, 0.0, 0.0)
        self.multiple = 1
        self._last: tuple[str, Size, files.Masks] | None = None

    @cached_property
    def saved(self) -> files.Saved:
        """What `masks` leads to. Raises UserError."""
        return files.open_saved(self.masks, self.vocabulary)

    def opened(self) -> "Saved":
        """Itself, the files having been looked for. Raises UserError."""
        _ = self.saved
        return self

    def forward(self, batch: Batch) -> Proposals:
        found = [self._read(key, frame.original) for key, frame in zip(batch.keys, batch.frames, strict=True)]
        masks = [frame.lay(one.masks.to(batch.pixels.device)) for one, frame in zip(found, batch.frames, strict=True)]
        return propose(masks, self._names(found), batch)

    def _names(self, found: Sequence[files.Masks]) -> list[Float64[Tensor, "_N K1"]] | None:
        """Of each picture; of those without any mask, none is missing."""
        if self.vocabulary is None:
            return None
        none = torch.zeros(0, len(self.vocabulary) + 1, dtype=torch.float64)
        told = [one.names if len(one.masks) else none for one in found]
        named = [names for names in told if names is not None]
        if any(map(len, named)) and len(named) < len(told):
            raise UserError(
                f"{self.masks}: says what the masks of some pictures are, not of others; set `names: false`"
            )
        return named if len(named) == len(told) else None

    def _read(self, key: str, size: Size) -> files.Masks:
        """Kept for the next window of the same picture."""
        if self._last is None or self._last[:2] != (key, size):
            opened = self.saved
            try:
                self._last = (key, size, opened.read(key, size))
            except UserError as error:
                # Of this picture alone: others can be answered.
                raise ImageError(str(error)) from error
        return self._last[2]
