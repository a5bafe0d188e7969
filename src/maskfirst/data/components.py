"""Components: the things of a label map opened into instances where they do not touch."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from maskfirst.data.coding import DataError, Truth
from maskfirst.types import VOID

_TOUCHING = np.ones((3, 3), bool)
"""Pixels are connected by their sides and their corners."""


@dataclass(frozen=True)
class Components:
    """Each connected region of a thing class becomes a segment; stuff stays one segment a class.

    Regions of fewer than `smallest` px become, together, one crowd of their class: specks at the edges of other things are
    no instances that anyone should find, yet their pixels do have a class, and crowds are counted in the semantic task and
    neither wanted nor held against a prediction in the others.
    """

    things: frozenset[int]
    smallest: int = 1

    def __post_init__(self) -> None:
        if not self.things:
            raise DataError(
                "`instances: components` needs a vocabulary with things; mark them, {name: car, thing: true}, in classes.yaml"
            )
        if self.smallest < 1:
            raise DataError(f"smallest: should be at least 1 px, got {self.smallest}")

    def open(self, truth: Truth) -> Truth:
        """The truth with its things opened; the order of the classes is kept, crowds come last in theirs."""
        ids = np.full_like(truth.ids, VOID)
        classes: list[int] = []
        crowd: list[bool] = []
        windows = ndimage.find_objects(truth.ids + 1, len(truth.classes))
        for segment, (index, many) in enumerate(zip(truth.classes.tolist(), truth.crowd.tolist(), strict=True)):
            window = windows[segment]
            if window is None:
                continue
            inside, target = truth.ids[window] == segment, ids[window]
            if index not in self.things or many:
                target[inside] = len(classes)
                classes.append(index)
                crowd.append(many)
                continue
            regions = np.empty(inside.shape, np.int32)
            ndimage.label(inside, _TOUCHING, output=regions)
            count = int(regions.max())
            large = np.bincount(regions.ravel(), minlength=count + 1)[1:] >= self.smallest
            numbers = np.where(large, len(classes) + np.cumsum(large) - 1, len(classes) + large.sum())
            target[inside] = numbers[regions[inside] - 1]
            found = int(large.sum())
            classes += [index] * (found + (found < count))
            crowd += [False] * found + [True] * (found < count)
        return Truth(ids, np.array(classes, np.int64), np.array(crowd, bool))
