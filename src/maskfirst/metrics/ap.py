"""Average precision of instances: how the share of right answers falls as more of the instances are found.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, counted as pycocotools counts masks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Float64, Int8, Int64
from pycocotools import mask as coco

from maskfirst.contracts import Metric, Scores
from maskfirst.formats import rle
from maskfirst.formats.instances import Instances
from maskfirst.types import Vocabulary

# As pycocotools makes them, to the last bit: they are compared with.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Of IoU, from which a match counts; the figures are means over all ten."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Where precision is read off."""
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""px, least and most, of all, small, medium and large instances."""
MOST = (1, 10, 100)
"""Instances of a class in a picture that are taken, by score."""
WRONG, RIGHT, LEFT_OUT = 0, 1, 2
FIGURES = {
    "AP": (0, slice(None)),
    "AP50": (0, slice(0, 1)),
    "AP75": (0, slice(5, 6)),
    "APs": (1, slice(None)),
    "APm": (2, slice(None)),
    "APl": (3, slice(None)),
}
"""Over which of AREAS and THRESHOLDS each is a mean."""


@dataclass(frozen=True)
class _Matches:
    """What is kept of a picture: its predicted instances, class by class from the best score on; A areas, T thresholds."""

    classes: Int64[np.ndarray, " D"]
    ranks: Int64[np.ndarray, " D"]
    scores: Float64[np.ndarray, " D"]
    outcomes: Int8[np.ndarray, "D A T"]

    @classmethod
    def joined(cls, several: Sequence["_Matches"]) -> "_Matches":
        nothing = np.zeros(0, np.int64)
        several = [cls(nothing, nothing, np.zeros(0), np.zeros((0, len(AREAS), len(THRESHOLDS)), np.int8)), *several]
        return cls(*(np.concatenate([getattr(each, field.name) for each in several]) for field in fields(cls)))

    def __getitem__(self, keep: Int64[np.ndarray, " _"] | Bool[np.ndarray, " D"]) -> "_Matches":
        return _Matches(self.classes[keep], self.ranks[keep], self.scores[keep], self.outcomes[keep])


class AveragePrecision(Metric[Instances]):
    """Matches of predicted with true instances at ten thresholds of IoU, over all sizes and by size.

    Within a class, the best score takes the true instance with which its IoU is largest. Left out, neither right nor wrong,
    are answers that match a crowd (IoU then being the share of the answer that lies in it) or an instance of another size,
    and those without a match that are of another size themselves. The crowd marks of predictions mean nothing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.names = vocabulary.names
        self.things = sorted(vocabulary.things)
        self.positives = np.zeros((len(self.names), len(AREAS)), np.int64)
        self.matches: dict[int, _Matches] = {}

    def update(self, truth: Instances, prediction: Instances, picture: int = 0) -> float | None:
        """Adds the instances of one picture; returns the AP over the classes that have instances in its truth.

        `picture`: a number that no other has; of equal scores, those of the picture with the lower one count first.
        Raises ValueError where the sizes differ.
        """
        if truth.size != prediction.size:
            raise ValueError(f"truth is {truth.size} px, the prediction {prediction.size}")
        if picture in self.matches:
            raise ValueError(f"picture {picture} was added before; give each a number of its own")
        classes, areas, crowd = truth.classes.numpy(), truth.areas.double().numpy(), truth.crowd.numpy()
        ignored = np.stack([crowd | (areas < least) | (areas > most) for least, most in AREAS])
        positives = np.stack([np.bincount(classes[~out], minlength=len(self.names)) for out in ignored], 1)
        found = _match(truth, prediction, ignored)
        self.positives += positives
        self.matches[picture] = found
        present = np.flatnonzero(positives[:, 0])
        if not len(present):
            return None
        return float(np.mean([_precision(found[found.classes == index], 0, positives[index]) for index in present]))

    def merge(self, other: "AveragePrecision") -> None:
        twice = self.matches.keys() & other.matches.keys()
        if twice:
            raise ValueError(f"picture {min(twice)} is in both; give each a number of its own")
        self.positives += other.positives
        self.matches |= other.matches

    def scores(self) -> Scores:
        """COCO's twelve figures, and of every thing, under `per_class`, those of precision.

        AP over ten thresholds of IoU and over sizes, AP50 and AP75 at one; AR, the share of instances that are found, of 1,
        10 and 100 answers; s, m, l: small, medium, large. A class without instances of a size is left out of its means.
        """
        kept = _Matches.joined([self.matches[number] for number in sorted(self.matches)])
        # Sorted once, so that no class has to look through all.
        order = np.argsort(kept.classes, kind="stable")
        ends = np.searchsorted(kept.classes[order], np.arange(len(self.names) + 1))
        precision = np.full((len(self.names), len(AREAS), len(THRESHOLDS)), np.nan)
        recall = np.full((len(self.names), len(MOST), len(AREAS)), np.nan)
        for index in np.flatnonzero(self.positives.any(1)):
            own = kept[order[ends[index] : ends[index + 1]]]
            for area in np.flatnonzero(self.positives[index]).tolist():
                precision[index, area] = _precision(own, area, self.positives[index])
            recall[index] = _recall(own, self.positives[index])
        values = np.stack([precision[:, area, thresholds].mean(-1) for area, thresholds in FIGURES.values()], 1)
        means = dict(zip(FIGURES, map(_mean, values.T), strict=True))
        means |= {f"AR{most}": _mean(recall[:, place, 0]) for place, most in enumerate(MOST)}
        means |= {f"AR{size}": _mean(recall[:, -1, place]) for place, size in enumerate("sml", 1)}
        rows = [(self.names[index], tuple(values[index].tolist())) for index in self.things]
        per_class = {name: dict(zip(FIGURES, row, strict=True)) for name, row in rows}
        below = [("mean", tuple(means[name] for name in FIGURES))]
        return Scores("AP", means, {**means, "per_class": per_class}, tuple(FIGURES), rows, below)


def _match(truth: Instances, prediction: Instances, ignored: Bool[np.ndarray, "A G"]) -> _Matches:
    """The fate of every answer, where `ignored` says which true instances are crowds or of another size."""
    classes, scores = prediction.classes.cpu().numpy(), prediction.scores.cpu().double().numpy()
    order = np.lexsort((-scores, classes))
    ranks = np.arange(len(order)) - np.searchsorted(classes[order], classes[order])
    order, ranks = order[ranks < MOST[-1]], ranks[ranks < MOST[-1]]
    rles = [prediction.rles[index] for index in order]
    classes, areas = classes[order], rle.area(rles).numpy()
    outside = np.stack([(areas < least) | (areas > most) for least, most in AREAS], 1)
    outcomes = np.where(outside, LEFT_OUT, WRONG).astype(np.int8)[..., None].repeat(len(THRESHOLDS), -1)
    true_classes, crowd = truth.classes.cpu().numpy(), truth.crowd.cpu().numpy()
    for index in np.intersect1d(classes, true_classes):
        true = np.flatnonzero(true_classes == index)
        first, last = np.searchsorted(classes, [index, index + 1])
        theirs = [truth.rles[place] for place in true]
        # Its stub knows packed counts as bytes only; text will do.
        ious = coco.iou(rles[first:last], theirs, crowd[true].tolist())  # pyright: ignore[reportArgumentType]
        _assign(np.asarray(ious), ignored[:, true], crowd[true], outcomes[first:last])
    return _Matches(classes, ranks, scores[order], outcomes)


def _assign(
    ious: Float[np.ndarray, "D G"],
    ignored: Bool[np.ndarray, "A G"],
    crowd: Bool[np.ndarray, " G"],
    outcomes: Int8[np.ndarray, "D A T"],
) -> None:
    """Lets the answers of one class, best first, each take a true instance; writes down what becomes of those that do."""
    free = np.ones((len(AREAS), len(THRESHOLDS), len(crowd)), bool)
    near = ious >= THRESHOLDS[0]
    for answer in np.flatnonzero(near.any(1)):
        close = np.flatnonzero(near[answer])
        # From the least IoU to the largest, so that the last that can be had is the best; of equal ones the last counts.
        close = close[np.argsort(ious[answer, close], kind="stable")]
        can = free[:, :, close] & (ious[answer, close] >= THRESHOLDS[:, None])
        counted = can & ~ignored[:, None, close]
        chosen = np.where(counted.any(-1), _last(counted), _last(can))
        area, threshold = np.nonzero(can.any(-1))
        taken = close[chosen[area, threshold]]
        outcomes[answer, area, threshold] = np.where(ignored[area, taken], LEFT_OUT, RIGHT)
        free[area, threshold, taken] = crowd[taken]


def _last(marks: Bool[np.ndarray, "A T C"]) -> Int64[np.ndarray, "A T"]:
    """The last marked place."""
    return marks.shape[-1] - 1 - marks[..., ::-1].argmax(-1)


def _precision(matches: _Matches, area: int, positives: Int64[np.ndarray, " A"]) -> Float64[np.ndarray, " T"]:
    """Mean precision of one class over RECALLS, in an area that has instances of it."""
    outcomes = matches.outcomes[np.argsort(-matches.scores, kind="stable"), area]
    right = np.cumsum(outcomes == RIGHT, 0).astype(np.float64)
    wrong = np.cumsum(outcomes == WRONG, 0).astype(np.float64)
    precision = right / (wrong + right + np.spacing(1))
    # The best precision at this recall or at a larger one; 0 where a recall is not reached.
    precision = np.concatenate([np.maximum.accumulate(precision[::-1], 0)[::-1], np.zeros((1, len(THRESHOLDS)))])
    recall = (right / positives[area]).T
    reached = np.stack([np.searchsorted(each, RECALLS) for each in recall], 1)
    return np.take_along_axis(precision, reached, 0).mean(0)


def _recall(matches: _Matches, positives: Int64[np.ndarray, " A"]) -> Float64[np.ndarray, "M A"]:
    """Share of the instances of one class that are found, over all THRESHOLDS; NaN where it has none."""
    whole = np.where(positives, positives, np.nan)
    right = [(matches.outcomes[matches.ranks < most] == RIGHT).sum(0).mean(-1) for most in MOST]
    return np.stack(right) / whole


def _mean(values: Float64[np.ndarray, " N"]) -> float:
    """Without NaN; NaN where nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan
