"""The confusion matrix: how many pixels of each class were called what, and the scores that follow from it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from maskfirst.types import VOID


class ConfusionMatrix:
    """Counts of pixels, truth by prediction, from which mIoU, mAcc and aAcc follow exactly.

    Pixels whose truth is VOID are left out. A pixel predicted VOID is one that its class has missed: it counts against
    IoU and accuracy of that class and of no other, as in mmseg. `counts` is all that is kept, on the CPU: row = class in
    the truth, column = class predicted, the last column = predicted VOID.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    @property
    def num_classes(self) -> int:
        return self.counts.shape[0]

    def update(self, truth: Int[Tensor, "H W"], prediction: Int[Tensor, "H W"]) -> None:
        """Adds one picture: two label maps with values 0..K-1 or VOID. Raises ValueError for other values."""
        if truth.numel() == 0:
            return
        K = self.num_classes
        for what, labels in (("truth", truth), ("prediction", prediction)):
            low, high = (int(v) for v in labels.aminmax())
            if low < VOID or high >= K:
                raise ValueError(
                    f"{what} holds {low if low < VOID else high}; {K} classes are 0..{K - 1}, {VOID} is void"
                )
        # One count of a joint index does it all; VOID = -1 becomes row and column 0. 32 bits are the fastest wide enough.
        joint = torch.add(prediction.int(), truth.int(), alpha=K + 1).add_(K + 2)
        counts = torch.bincount(joint.flatten(), minlength=(K + 1) ** 2).view(K + 1, K + 1)[1:].cpu()
        self.counts[:, :K] += counts[:, 1:]
        self.counts[:, K] += counts[:, 0]

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the pixels of another matrix over the same classes."""
        self.counts += other.counts

    @property
    def state(self) -> Int64[Tensor, "K K+1"]:
        """The counts as a tensor of its own: states of several processes add up to the state of all."""
        return self.counts.clone()

    @classmethod
    def from_state(cls, state: Int64[Tensor, "K K+1"]) -> "ConfusionMatrix":
        """The matrix whose `state` this is."""
        matrix = cls(state.shape[0])
        matrix.counts += state.cpu()
        return matrix

    @property
    def truth(self) -> Int64[Tensor, " K"]:
        """Pixels of each class in the truth."""
        return self.counts.sum(1)

    @property
    def iou(self) -> Float64[Tensor, " K"]:
        """Intersection over union of each class, 0..1; NaN for one in neither truth nor prediction."""
        hit, predicted = self.counts[:, :-1].diagonal(), self.counts[:, :-1].sum(0)
        return hit.double() / (self.truth + predicted - hit).double()

    @property
    def accuracy(self) -> Float64[Tensor, " K"]:
        """The share of each class's pixels that were found, 0..1; NaN for one that is not in the truth."""
        return self.counts[:, :-1].diagonal().double() / self.truth.double()

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """`mIoU`, `mAcc`, `aAcc` and, by name, `IoU` and `Acc`; means leave NaN out, and are NaN where nothing is left.

        `aAcc` is the share of all pixels found. `names`: one a class, in their order.
        """
        hit = self.counts[:, :-1].diagonal().sum().double()
        return {
            "mIoU": self.iou.nanmean().item(),
            "aAcc": (hit / self.truth.sum()).item(),
            "mAcc": self.accuracy.nanmean().item(),
            "IoU": dict(zip(names, self.iou.tolist(), strict=True)),
            "Acc": dict(zip(names, self.accuracy.tolist(), strict=True)),
        }
