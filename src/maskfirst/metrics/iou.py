"""The confusion matrix: how many pixels of each class were called what, and the scores that follow from it."""

import math

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from maskfirst.contracts import Metric, Scores
from maskfirst.types import VOID, Vocabulary

LabelMap = Int[Tensor, "H W"]


class ConfusionMatrix(Metric[LabelMap]):
    """Counts of pixels, truth by prediction, from which mIoU, mAcc and aAcc follow exactly.

    Pixels whose truth is VOID are left out. A pixel predicted VOID is one that its class has missed: it counts against
    IoU and accuracy of that class and of no other, as in mmseg. `counts` is all that is kept, on the CPU: row = class in
    the truth, column = class predicted, the last column = predicted VOID.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.names = vocabulary.names
        self.counts = torch.zeros(len(self.names), len(self.names) + 1, dtype=torch.int64)

    def update(self, truth: Int[Tensor, "H W"], prediction: Int[Tensor, "H W"], picture: int = 0) -> float | None:
        """Adds two label maps with values 0..K-1 or VOID; returns the mIoU over the classes of this truth.

        Raises ValueError for other values.
        """
        one = self._count(truth, prediction)
        self.counts += one
        present = one.sum(1) > 0
        return _iou(one)[present].mean().item() if present.any() else None

    def _count(self, truth: Int[Tensor, "H W"], prediction: Int[Tensor, "H W"]) -> Int[Tensor, "K K+1"]:
        K = len(self.names)
        if truth.numel() == 0:
            return torch.zeros_like(self.counts)
        for what, labels in (("truth", truth), ("prediction", prediction)):
            low, high = (int(v) for v in labels.aminmax())
            if low < VOID or high >= K:
                raise ValueError(
                    f"{what} holds {low if low < VOID else high}; {K} classes are 0..{K - 1}, {VOID} is void"
                )
        # One count of a joint index does it all; VOID = -1 becomes row and column 0. 32 bits are the fastest wide enough.
        joint = torch.add(prediction.int(), truth.int(), alpha=K + 1).add_(K + 2)
        counts = torch.bincount(joint.flatten(), minlength=(K + 1) ** 2).view(K + 1, K + 1)[1:].cpu()
        return counts.roll(-1, 1)

    def merge(self, other: "ConfusionMatrix") -> None:
        self.counts += other.counts

    @property
    def truth(self) -> Int[Tensor, " K"]:
        """Pixels of each class in the truth."""
        return self.counts.sum(1)

    @property
    def iou(self) -> Float64[Tensor, " K"]:
        """Intersection over union of each class, 0..1; NaN for one in neither truth nor prediction."""
        return _iou(self.counts)

    @property
    def accuracy(self) -> Float64[Tensor, " K"]:
        """The share of each class's pixels that were found, 0..1; NaN for one that is not in the truth."""
        return self.counts[:, :-1].diagonal().double() / self.truth.double()

    def scores(self) -> Scores:
        """`mIoU`, `mAcc`, `aAcc` and, by name, `IoU` and `Acc`; means leave NaN out, and are NaN where nothing is left.

        `aAcc` is the share of all pixels found. The table adds each class's share of the pixels in the truth.
        """
        hit, iou, accuracy = self.counts[:, :-1].diagonal().sum().double(), self.iou, self.accuracy
        means = {
            "mIoU": iou.nanmean().item(),
            "aAcc": (hit / self.truth.sum()).item(),
            "mAcc": accuracy.nanmean().item(),
        }
        by_name = {
            what: dict(zip(self.names, values.tolist(), strict=True))
            for what, values in (("IoU", iou), ("Acc", accuracy))
        }
        numbers = torch.stack([iou, accuracy, self.truth / self.truth.sum()], 1).tolist()
        return Scores(
            "mIoU",
            means,
            {**means, **by_name},
            ("IoU", "Acc", "share"),
            [(name, tuple(row)) for name, row in zip(self.names, numbers, strict=True)],
            [("mean", (means["mIoU"], means["mAcc"], math.nan))],
        )


def _iou(counts: Int[Tensor, "K K+1"]) -> Float64[Tensor, " K"]:
    hit, predicted = counts[:, :-1].diagonal(), counts[:, :-1].sum(0)
    return hit.double() / (counts.sum(1) + predicted - hit).double()
