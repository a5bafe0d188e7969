"""Mixed: several data sets of one vocabulary as one, each seen as often in an epoch as its weight says."""

import math
from collections.abc import Sequence

from maskfirst.contracts import Dataset
from maskfirst.data.coding import DataError
from maskfirst.types import Sample


class Mixed(Dataset):
    """The parts one after the other, by a table of indices that is the same at every call."""

    def __init__(self, parts: list[Dataset], weights: list[float] | None = None) -> None:
        """`weights`: how many times an epoch sees each part; 0.25 is every fourth sample of it. None: once.

        Raises DataError where there are no parts, where their vocabularies differ, or where a weight leaves nothing.
        """
        weights = [1.0] * len(parts) if weights is None else weights
        if not parts:
            raise DataError("parts: none; give data sets to mix")
        if len(weights) != len(parts):
            raise DataError(f"weights: {len(weights)} for {len(parts)} parts; give one each")
        for index, part in enumerate(parts):
            if part.vocabulary.names != parts[0].vocabulary.names:
                raise DataError(
                    f"parts[{index}]: its {len(part.vocabulary)} names are not the {len(parts[0].vocabulary)} of parts[0]; "
                    "give both the same vocabulary"
                )
        self.parts = tuple(parts)
        self.vocabulary = parts[0].vocabulary
        self.table: list[tuple[int, int]] = []
        for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            count = round(weight * len(part)) if 0 < weight < math.inf else 0
            if not count:
                raise DataError(
                    f"weights[{index}]: {weight:g} leaves nothing of {len(part)} samples; take a number above 0, or drop it"
                )
            self.table += [(index, place * len(part) // count) for place in range(count)]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        part, place = self.table[index]
        return self.parts[part][place]

    def keys(self) -> Sequence[str]:
        keys = [part.keys() for part in self.parts]
        return [keys[part][place] for part, place in self.table]
