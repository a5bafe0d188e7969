"""Seen and unseen: the scores of classes that training showed labels of and of those it did not, and their harmonic mean.

Xian et al., "Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the Ugly", 2018.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from maskfirst.contracts import Metric, Scores
from maskfirst.formats.instances import Instances
from maskfirst.types import VOID, SegmentMap, Vocabulary

Seen = TypeVar("Seen")
Mean = Callable[[Float64[np.ndarray, "N C"], Sequence[str]], Float64[np.ndarray, " C"]]
"""Of the rows of some classes, and what their columns are: their means, NaN where there is none."""
GROUPS = ("seen", "unseen", "harmonic")


@dataclass(frozen=True)
class Split:
    """How classes are told apart. `unseen`: names. `only`: nothing but the unseen is scored, the rest being no class.

    `as_published`: means over classes as the published zero-shot evaluators take them, see PUBLISHED.
    """

    unseen: frozenset[str]
    only: bool = False
    as_published: bool = False


def occurring(rows: Float64[np.ndarray, "N C"], columns: Sequence[str]) -> Float64[np.ndarray, " C"]:
    """Over the classes that have a score."""
    return np.array([np.nan if np.isnan(column).all() else np.nanmean(column) for column in rows.T])


def all_or_none(rows: Float64[np.ndarray, "N C"], columns: Sequence[str]) -> Float64[np.ndarray, " C"]:
    """Over all classes: one without a pixel in the truth leaves no mean, as in PADing's semantic evaluator."""
    absent = ~(rows[:, [*columns].index("share")] > 0)
    return np.where(absent[:, None], np.nan, rows).sum(0) / len(rows)


def zero_where_absent(rows: Float64[np.ndarray, "N C"], columns: Sequence[str]) -> Float64[np.ndarray, " C"]:
    """Over all classes: one that does not occur counts as 0, as in PADing's panoptic evaluator."""
    return np.nan_to_num(rows).sum(0) / len(rows)


@dataclass(frozen=True)
class Way:
    """How means over groups of classes are taken, and what column stands for all under what name; None: the headline's."""

    mean: Mean = occurring
    column: str | None = None
    name: str | None = None


PUBLISHED: Mapping[str, Way] = {
    "semantic": Way(all_or_none),
    "panoptic": Way(zero_where_absent),
    "instance": Way(column="AP50", name="mAP"),
}
"""Task -> the way of the published evaluators. That of instances, by Zheng et al. (ZSI), says mAP of AP at an IoU of 0.5."""


class SeenUnseen(Metric[Seen]):
    """What another metric says, with means over the seen and over the unseen classes, and the harmonic mean of both.

    A class that occurs nowhere is left out of its mean by default. The harmonic mean of two zeros is 0.
    """

    def __init__(self, metric: Metric[Seen], unseen: Collection[str], way: Way = Way()) -> None:
        self.metric = metric
        self.unseen = frozenset(unseen)
        self.way = way

    def update(self, truth: Seen, prediction: Seen, picture: int = 0) -> float | None:
        return self.metric.update(truth, prediction, picture)

    def merge(self, other: "SeenUnseen[Seen]") -> None:
        self.metric.merge(other.metric)

    def scores(self) -> Scores:
        """The metric's own; `means` with the headline's, such as `mIoU_seen`; `content` with `seen`, `unseen`, `harmonic`.

        Each of these has the columns of the table, but for shares of pixels, and `n`, the number of classes with a score.
        """
        told = self.metric.scores()
        rows = np.array([numbers for _, numbers in told.rows], np.float64).reshape(-1, len(told.columns))
        hidden = np.array([name in self.unseen for name, _ in told.rows], bool)
        counted = np.array([column != "share" for column in told.columns])
        found = [
            np.where(counted, self.way.mean(rows[mask], told.columns), np.nan)
            if mask.any()
            else np.full(len(counted), np.nan)
            for mask in (~hidden, hidden)
        ]
        numbers = [*found, harmonic(*found)]
        content = {
            group: {name: float(value) for name, value, keep in zip(told.columns, row, counted, strict=True) if keep}
            for group, row in zip(GROUPS, numbers, strict=True)
        }
        for group, mask in zip(GROUPS, (~hidden, hidden), strict=False):
            content[group]["n"] = int((~np.isnan(rows[mask][:, 0])).sum())
        place = 0 if self.way.column is None else told.columns.index(self.way.column)
        name = told.headline if self.way.name is None else self.way.name
        means = {f"{name}_{group}": float(row[place]) for group, row in zip(GROUPS, numbers, strict=True)}
        below = [(group, tuple(map(float, row))) for group, row in zip(GROUPS, numbers, strict=True)]
        return Scores(
            told.headline,
            {**told.means, **means},
            {**told.content, **content},
            told.columns,
            told.rows,
            [*told.below, *below],
        )


class Only(Metric[Seen]):
    """Another metric, of some classes alone: pixels and segments of all others are no class, on both sides."""

    def __init__(self, metric: Metric[Seen], vocabulary: Vocabulary, names: Collection[str]) -> None:
        self.metric = metric
        self.names = frozenset(names)
        self.kept = torch.tensor([name in self.names for name in vocabulary.names])

    def update(self, truth: Seen, prediction: Seen, picture: int = 0) -> float | None:
        return self.metric.update(_among(truth, self.kept), _among(prediction, self.kept), picture)

    def merge(self, other: "Only[Seen]") -> None:
        self.metric.merge(other.metric)

    def scores(self) -> Scores:
        """The metric's, without the rows of classes that are left out."""
        told = self.metric.scores()
        rows = [(name, numbers) for name, numbers in told.rows if name in self.names]
        return Scores(told.headline, told.means, told.content, told.columns, rows, told.below)


def harmonic(one: Float64[np.ndarray, " C"], two: Float64[np.ndarray, " C"]) -> Float64[np.ndarray, " C"]:
    """2 a b / (a + b); 0 where both are 0."""
    both = one + two
    return 2 * one * two / np.where(both == 0, 1, both)


def _among(seen: Any, kept: Tensor) -> Any:
    """A picture's truth or prediction without the classes that are not kept."""
    if isinstance(seen, Tensor):
        # VOID, -1, is the last.
        return torch.where(torch.cat([kept, torch.tensor([False])]).to(seen.device)[seen.long()], seen, VOID)
    assert isinstance(seen, SegmentMap | Instances)
    return seen[kept.to(seen.classes.device)[seen.classes]]
