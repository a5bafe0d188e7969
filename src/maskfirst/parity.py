"""Parity: whether a graph answers on pictures as the model that it was made of, and how long both took."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import UInt8
from rich.table import Table
from torch import Tensor

from maskfirst.segmenter import Segmenter
from maskfirst.types import Names, Proposals, Segments

LEAST_IOU = 0.999
"""Of a mask with its likeness, so that both count as one."""
LEAST_MASKS = 20
"""Masks with pixels that must have been compared."""
MOST_SHARE = 0.01
"""The largest difference of logits, as a share of the largest logit, which rounding stays far below."""


@dataclass(frozen=True)
class Picture:
    """What is compared on: RGB 0..255, and the truth where the model is told the masks."""

    image: UInt8[Tensor, "3 H W"]
    key: str
    truth: Segments | None = None


@dataclass
class Parity:
    """What was found; worst first is what counts. `masks`: with pixels, in PyTorch's answers; `least_iou`, `mean_iou`: of each
    with the graph's likest mask of its class. `difference`, `scale`: of logits, the largest. Milliseconds are a network's for
    one batch of canvases, the median.
    """

    pictures: int = 0
    ious: list[float] = field(default_factory=list)
    difference: float = 0.0
    scale: float = 0.0
    torch_seconds: list[float] = field(default_factory=list)
    graph_seconds: list[float] = field(default_factory=list)

    @property
    def masks(self) -> int:
        return len(self.ious)

    @property
    def least_iou(self) -> float:
        return min(self.ious, default=0.0)

    @property
    def faults(self) -> list[str]:
        """Why the graph is not the model, in clauses; none where it is."""
        found = []
        if self.masks < LEAST_MASKS:
            found.append(
                f"only {self.masks} masks with pixels in {self.pictures} pictures, and {LEAST_MASKS} are to be compared; "
                "give more pictures with --images"
            )
        if self.masks and self.least_iou < LEAST_IOU:
            low = sum(iou < LEAST_IOU for iou in self.ious)
            found.append(f"{low} of {self.masks} masks have an IoU below {LEAST_IOU}, the least {self.least_iou:.4f}")
        # Put so that NaN, too, is a fault.
        if not self.difference <= MOST_SHARE * self.scale:
            found.append(f"logits differ by up to {self.difference:.3g}, where the largest is {self.scale:.3g}")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": not self.faults,
            "faults": self.faults,
            "pictures": self.pictures,
            "masks": self.masks,
            "least_iou": self.least_iou,
            "mean_iou": sum(self.ious) / max(self.masks, 1),
            "largest_logit_difference": self.difference,
            "largest_logit": self.scale,
            "torch_ms": _milliseconds(self.torch_seconds),
            "graph_ms": _milliseconds(self.graph_seconds),
        }

    def as_table(self) -> Table:
        told = self.as_json()
        table = Table(title="parity with PyTorch", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        table.add_row("pictures", str(self.pictures))
        table.add_row("masks with pixels", str(self.masks))
        table.add_row("IoU, least", f"{self.least_iou:.5f}")
        table.add_row("IoU, mean", f"{told['mean_iou']:.5f}")
        table.add_row("largest difference of logits", f"{self.difference:.3g}")
        table.add_row("largest logit", f"{self.scale:.3g}")
        table.add_row("PyTorch, a pass", f"{told['torch_ms']:.1f} ms")
        table.add_row("the graph, a pass", f"{told['graph_ms']:.1f} ms")
        table.add_row("verdict", "passed" if not self.faults else "refused")
        return table


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * sorted(seconds)[len(seconds) // 2], 3) if seconds else 0.0


def compare(model: Segmenter, graph: Segmenter, pictures: Iterable[Picture], task: str, least: int = 4) -> Parity:
    """Both answers to `task` on pictures, in their order, until there are enough masks and `least` pictures."""
    found = Parity()
    for picture in pictures:
        if found.pictures >= least and found.masks >= LEAST_MASKS:
            break
        with _heard(model) as own, _heard(graph) as others:
            # One of them is first by turns, so that neither always has the warm caches.
            answers: dict[bool, Segments] = {}
            for first in (True, False) if found.pictures % 2 else (False, True):
                answers[first] = (model if first else graph).segment(
                    picture.image, task, truth=picture.truth, key=picture.key
                )
        found.pictures += 1
        found.ious += ious(answers[True], answers[False])
        for mine, theirs in zip(own, others, strict=True):
            found.torch_seconds.append(mine.seconds)
            found.graph_seconds.append(theirs.seconds)
            for one, other in zip(mine.logits, theirs.logits, strict=True):
                difference = torch.where(one == other, 0.0, (one - other).abs()).max().item()
                # A NaN stays one, which `max` alone would lose or keep by its place.
                found.difference = difference if difference != difference else max(found.difference, difference)
                found.scale = max(found.scale, one[one.isfinite()].abs().max().item())
    return found


def ious(answer: Segments, other: Segments) -> list[float]:
    """Of every mask of `answer` with pixels the IoU with the likest mask of its class in `other`; 0 where there is none."""
    found = []
    for mask, index in zip(answer.masks, answer.classes, strict=True):
        if mask.any():
            alike = other.masks[other.classes == index]
            shared = (alike & mask).flatten(1).sum(1)
            whole = (alike | mask).flatten(1).sum(1)
            found.append((shared / whole).max().item() if len(alike) else 0.0)
    return found


@dataclass(frozen=True)
class _Pass:
    seconds: float
    logits: tuple[Tensor, Tensor]


@contextmanager
def _heard(segmenter: Segmenter) -> Iterator[list[_Pass]]:
    """What the networks of a segmenter make inside the block, one entry a batch of canvases."""
    passes: list[_Pass] = []
    starts: list[float] = []

    def before(module: Segmenter, given: Any) -> None:
        starts.append(time.perf_counter())

    def after(module: Segmenter, given: Any, made: tuple[Proposals, Names]) -> None:
        proposals, names = made
        passes.append(_Pass(time.perf_counter() - starts[-1], (proposals.masks.cpu(), names.logits.cpu())))

    hooks = (segmenter.register_forward_pre_hook(before), segmenter.register_forward_hook(after))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
