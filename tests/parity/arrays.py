"""Arrays: the file of a fixture, each of its arrays compared once, and a backbone that hands such arrays out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskfirst.contracts import Backbone

from .foreign import NotCoveredError
from .rows import Row, Tolerance, compare, failed


def read_arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


class Compared:
    """The arrays of a fixture, each to be compared; what is left in the end is not covered."""

    def __init__(self, file: str, arrays: dict[str, Tensor]) -> None:
        self.file = file
        self.left = dict(arrays)

    def take(self, key: str) -> Tensor:
        if key not in self.left:
            raise NotCoveredError(f"{self.file} lacks '{key}'")
        return self.left.pop(key)

    def row(self, key: str, ours: Tensor, tolerance: Tolerance) -> Row:
        return compare(self.file, key, ours, self.take(key), tolerance)

    def rest(self) -> Iterator[Row]:
        for key in sorted(self.left):
            yield failed(self.file, key, "not covered")


class Given(Backbone):
    """Hands out given maps, whatever the picture."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides
        self.mean, self.multiple = (0.0, 0.0, 0.0), strides[-1]
        self.maps: list[Tensor] = []

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


def given(channels: list[int], strides: list[int]) -> dict[str, Any]:
    """The recipe of such a backbone."""
    return {"kind": f"{__name__}:Given", "channels": channels, "strides": strides}
