"""Panoptic quality: of how many segments each has one that matches it, and how well.

Kirillov et al., "Panoptic Segmentation", CVPR 2019, counted as COCO's panopticapi counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, Num

from maskfirst.contracts import Metric, Scores
from maskfirst.types import VOID, SegmentMap, Vocabulary

UNIT = 2.0**-40
"""IoUs are summed as whole numbers of it, so that the sum is the same in whatever order; off by 5e-13 an IoU at most."""
DENSE = 2**20
"""Up to so many pairs of segments, their common pixels are counted in a table of all pairs; a sort takes ten times as long."""
COLUMNS = ("PQ", "SQ", "RQ")


class PanopticQuality(Metric[SegmentMap]):
    """Matches of segments by class, from which PQ = SQ x RQ follows for all classes, things and stuff.

    A predicted segment matches a true one of its class where their IoU, without the pixels that are VOID in the truth, is
    above 0.5. Crowds match nothing. A segment without a match is a false one unless more than half of it lies on VOID and on
    a crowd of its class (the last, where a picture has several); it may be without pixels only in the truth, where it is
    then missed. `sums` is all that is kept, one row a class: IoU of the matches in UNITs, matches, false and missed segments.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.sums = np.zeros((len(vocabulary), 4), np.int64)

    def update(self, truth: SegmentMap, prediction: SegmentMap, picture: int = 0) -> float | None:
        """Adds two maps of one size; returns the PQ over the classes that occur in either.

        Raises ValueError where the sizes differ, or where a map holds numbers of no segment.
        """
        one = self._count(truth, prediction)
        self.sums += one
        quality = _quality(one)[:, 0]
        return None if np.isnan(quality).all() else float(np.nanmean(quality))

    def _count(self, truth: SegmentMap, prediction: SegmentMap) -> Int64[np.ndarray, "K 4"]:
        K = len(self.vocabulary)
        true_class, true_crowd, guess_class = (
            values.cpu().numpy() for values in (truth.classes, truth.crowd, prediction.classes)
        )
        pairs = _common_pixels(truth, prediction)
        true_area = np.bincount(pairs.true + 1, pairs.area, len(truth) + 1)[1:]
        guess_area = np.bincount(pairs.guess + 1, pairs.area, len(prediction) + 1)[1:]
        on_void = _sum_by_guess(pairs, pairs.true == VOID, len(prediction))

        inner = (pairs.true != VOID) & (pairs.guess != VOID)
        inner[inner] = true_class[pairs.true[inner]] == guess_class[pairs.guess[inner]]
        alike = pairs[inner & ~np.append(true_crowd, False)[pairs.true]]
        union = true_area[alike.true] + guess_area[alike.guess] - alike.area - on_void[alike.guess]
        iou = alike.area / union
        match = alike[iou > 0.5]

        crowd_of_class = np.full(K, VOID)
        crowds = np.flatnonzero(true_crowd)
        crowd_of_class[true_class[crowds]] = crowds
        excused = on_void + _sum_by_guess(
            pairs, inner & (pairs.true == np.append(crowd_of_class[guess_class], VOID)[pairs.guess]), len(prediction)
        )
        missed = ~true_crowd
        missed[match.true] = False
        false = (guess_area > 0) & (excused <= 0.5 * guess_area)
        false[match.guess] = False

        rounded = np.rint(iou[iou > 0.5] / UNIT).astype(np.int64)
        found = np.zeros((K, 4), np.int64)
        np.add.at(found[:, 0], true_class[match.true], rounded)
        for column, classes in enumerate((true_class[match.true], guess_class[false], true_class[missed]), 1):
            found[:, column] = np.bincount(classes, minlength=K)
        return found

    def merge(self, other: "PanopticQuality") -> None:
        self.sums += other.sums

    def scores(self) -> Scores:
        """`All`, `Things` and `Stuff`, each `pq`, `sq`, `rq` and `n`, the number of classes that occur; and `per_class`.

        A class without matches has SQ 0; one that occurs nowhere has NaN and is left out of the means.
        """
        quality, names = _quality(self.sums), self.vocabulary.names
        things = np.isin(np.arange(len(names)), list(self.vocabulary.things))
        groups = {
            group: (quality[kept & ~np.isnan(quality[:, 0])])
            for group, kept in (("All", np.ones_like(things)), ("Things", things), ("Stuff", ~things))
        }
        below = [
            (group, tuple(rows.mean(0).tolist()) if len(rows) else (math.nan,) * 3) for group, rows in groups.items()
        ]
        every, *parts = below
        means = dict(zip(COLUMNS, every[1], strict=True)) | {
            f"PQ_{group.lower()}": values[0] for group, values in parts
        }
        content = {group: {**_by_letters(values), "n": len(groups[group])} for group, values in below}
        rows = [(name, (row[0], row[1], row[2])) for name, row in zip(names, quality.tolist(), strict=True)]
        per_class = {name: _by_letters(values) for name, values in rows}
        return Scores("PQ", means, {**content, "per_class": per_class}, COLUMNS, rows, below)


@dataclass(frozen=True)
class _Pairs:
    """Segments of the truth and of the prediction (VOID for none) that have `area` pixels in common, P pairs."""

    true: Int64[np.ndarray, " P"]
    guess: Int64[np.ndarray, " P"]
    area: Int64[np.ndarray, " P"]

    def __getitem__(self, keep: Bool[np.ndarray, " P"]) -> "_Pairs":
        return _Pairs(self.true[keep], self.guess[keep], self.area[keep])


def _common_pixels(truth: SegmentMap, prediction: SegmentMap) -> _Pairs:
    if truth.ids.shape != prediction.ids.shape:
        raise ValueError(f"truth is {tuple(truth.ids.shape)} px, the prediction {tuple(prediction.ids.shape)}")
    if not truth.ids.numel():
        return _Pairs(*(np.zeros(0, np.int64) for _ in range(3)))
    for what, side in (("truth", truth), ("prediction", prediction)):
        low, high = (int(value) for value in side.ids.aminmax())
        if low < VOID or high >= len(side):
            raise ValueError(
                f"{what} holds {low if low < VOID else high}; its {len(side)} segments are 0.., {VOID} is void"
            )
    columns = len(prediction) + 1
    size = (len(truth) + 1) * columns
    if size <= DENSE:
        joint = torch.add(prediction.ids, truth.ids, alpha=columns).add_(columns + 1).flatten()
        counts = torch.bincount(joint, minlength=size).cpu().numpy()
        cells = np.flatnonzero(counts)
        area = counts[cells]
    else:
        joint = (truth.ids.long() + 1).mul_(columns).add_(prediction.ids).add_(1)
        cells, area = (values.cpu().numpy() for values in torch.unique(joint, return_counts=True))
    return _Pairs(cells // columns - 1, cells % columns - 1, area)


def _sum_by_guess(pairs: _Pairs, keep: Bool[np.ndarray, " P"], count: int) -> Num[np.ndarray, " M"]:
    """Pixels of each of `count` predicted segments in the pairs kept."""
    return np.bincount(pairs.guess[keep] + 1, pairs.area[keep], count + 1)[1:]


def _quality(sums: Int64[np.ndarray, "K 4"]) -> Float64[np.ndarray, "K 3"]:
    """PQ, SQ and RQ of each class, NaN for one that occurs nowhere."""
    iou, matches, false, missed = sums.T.astype(np.float64)
    segments = matches + 0.5 * (false + missed)
    segments[segments == 0] = np.nan
    seen = np.where(np.isnan(segments), np.nan, np.maximum(matches, 1))
    return np.stack([iou * UNIT / segments, iou * UNIT / seen, matches / segments], 1)


def _by_letters(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("pq", "sq", "rq"), values, strict=True))
