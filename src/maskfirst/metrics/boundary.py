"""Boundary IoU: the confusion of classes along their borders alone.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.ndimage import maximum_filter1d, minimum_filter1d
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
        true_edge, guess_edge = (np.where(boundaries(values), values, VOID) for values in (labels, guess))

        def count(values: np.ndarray) -> np.ndarray:
            return np.bincount(values.ravel() + 1, minlength=K + 1)[1:]

        common = count(np.where(true_edge == guess_edge, true_edge, VOID))
        present = count(true_edge)
        either = present + count(guess_edge) - common
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
    height, width = labels.shape
    reach = max(1, round(RATIO * float(np.hypot(height, width))))
    # A window all of one value is one whose least and largest value agree; outside of the picture lies another value.
    side, outside = 2 * reach + 1, VOID - 1
    least, most = labels, labels
    for axis in (0, 1):
        least = minimum_filter1d(least, side, axis, mode="constant", cval=outside)
        most = maximum_filter1d(most, side, axis, mode="constant", cval=outside)
    return least != most
