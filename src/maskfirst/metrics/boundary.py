"""Boundary IoU: the confusion of classes along their borders alone.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskfirst.contracts import Metric, Scores
from maskfirst.metrics.iou import LabelMap
from maskfirst.types import VOID, Vocabulary

RATIO = 0.02
"""Width of a border, as a share of the picture's diagonal."""


class BoundaryIoU(Metric[LabelMap]):
    """IoU by class of the pixels near the border of the class, in truth and in prediction.

    The border of a mask is what an erosion takes off: pixels nearer than RATIO of the diagonal, in steps along rows, columns
    and diagonals, to one outside of the mask or of the picture. Pixels whose truth is VOID are left out, and the masks of
    both sides end where they begin.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.names = vocabulary.names
        self.common = np.zeros(len(self.names), np.int64)
        self.either = np.zeros(len(self.names), np.int64)

    def update(self, truth: Int[Tensor, "H W"], prediction: Int[Tensor, "H W"], picture: int = 0) -> float | None:
        """Adds two label maps with values 0..K-1 or VOID; returns the mean over the classes of this truth."""
        K = len(self.names)
        labels = truth.cpu().numpy().astype(np.int32)
        guess = np.where(labels == VOID, VOID, prediction.cpu().numpy()).astype(np.int32)
        true_edge, guess_edge = (boundaries(values) & (values != VOID) for values in (labels, guess))

        def count(values: Int[np.ndarray, " P"]) -> Int[np.ndarray, " K"]:
            return np.bincount(values, minlength=K)

        common = count(labels[true_edge & guess_edge & (labels == guess)])
        present = count(labels[true_edge])
        either = present + count(guess[guess_edge]) - common
        self.common += common
        self.either += either
        return float((common[present > 0] / either[present > 0]).mean()) if present.any() else None

    def merge(self, other: "BoundaryIoU") -> None:
        self.common += other.common
        self.either += other.either

    def scores(self) -> Scores:
        """`mBIoU` and, by name, `BIoU`; the mean leaves NaN out, and is NaN where nothing is left."""
        iou = torch.from_numpy(self.common).double() / torch.from_numpy(self.either).double()
        mean = iou.nanmean().item()
        values = dict(zip(self.names, iou.tolist(), strict=True))
        rows = [(name, (value,)) for name, value in values.items()]
        return Scores("mBIoU", {"mBIoU": mean}, {"mBIoU": mean, "BIoU": values}, ("BIoU",), rows, [("mean", (mean,))])


def boundaries(labels: Int[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Where a pixel is near the border of the mask of its own value."""
    reach = max(1, round(RATIO * float(np.hypot(*labels.shape))))
    # A window is all of one value where no square of 2 x 2 px in it has several; outside of the picture lies another value.
    padded = np.pad(labels, reach, constant_values=VOID - 1)
    down, right = padded[1:] != padded[:-1], padded[:, 1:] != padded[:, :-1]
    mixed = down[:, 1:] | down[:, :-1] | right[1:] | right[:-1]
    return _any_of_run(_any_of_run(mixed, 2 * reach).T, 2 * reach).T


def _any_of_run(marks: Bool[np.ndarray, "H W"], length: int) -> Bool[np.ndarray, "h W"]:
    """Whether any of `length` rows from each one on is marked; h = H - length + 1."""
    marks, reached = np.ascontiguousarray(marks), 1
    while reached < length:
        step = min(reached, length - reached)
        marks = marks[step:] | marks[:-step]
        reached += step
    return marks
