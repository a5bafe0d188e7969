"""A segmenter against the truth of a data set: scores, a table by class, and the pictures that it does worst on."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from maskfirst import draw
from maskfirst.contracts import Dataset
from maskfirst.data.images import ImageError
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.predict import ahead
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Sample, Segments

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes."""
Gather = Callable[[list[Any]], list[list[Any]]]
"""The lists of all processes."""


@dataclass(frozen=True)
class Evaluation:
    """What came out. All but `seconds` is the same on every process, and on one process as on many."""

    scores: dict[str, Any]
    """`mIoU`, `aAcc`, `mAcc` and, by class, `IoU` and `Acc`: fractions, NaN where there was nothing to score."""
    rows: list[tuple[str, float, float, float]]
    """Of each class: name, IoU, accuracy, and its share of the pixels that have a class in the truth."""
    worst: list[tuple[str, float]]
    """Keys and mIoU over the classes of its own truth, of the pictures with the least; the worst first."""
    failed: list[tuple[str, str]]
    """Keys of pictures that could not be read, and why; they are not part of the scores."""
    count: int
    """Pictures scored."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON, with null for NaN."""
        return {
            **_plain(self.scores),
            "images": self.count,
            "seconds": round(self.seconds, 3),
            "worst": [{"key": key, "mIoU": score} for key, score in self.worst],
            "failed": [{"key": key, "error": error} for key, error in self.failed],
        }

    def as_table(self) -> Table:
        """One line a class and the means, in percent."""
        right = _percent(self.scores["aAcc"])
        table = Table(show_footer=True, caption=f"{right} of all pixels right (aAcc), {self.count} pictures")
        table.add_column("class", footer="mean")
        table.add_column("IoU", footer=_percent(self.scores["mIoU"]), justify="right")
        table.add_column("Acc", footer=_percent(self.scores["mAcc"]), justify="right")
        table.add_column("share", justify="right")
        for name, *numbers in self.rows:
            table.add_row(escape(name), *map(_percent, numbers))
        return table


def evaluate(
    segmenter: Segmenter,
    dataset: Dataset,
    task: str = "semantic",
    *,
    augment: bool = False,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    gather: Gather | None = None,
    progress: Callable[[int, int], None] | None = None,
    worst: int = 10,
    worst_dir: Path | str | None = None,
    workers: int = 2,
) -> Evaluation:
    """Predicts every picture of `dataset` and compares label maps. Only counts of pixels and `worst` keys are kept.

    `augment`: test-time augmentation. Process `rank` of `world` takes every `world`-th picture; `reduce` and `gather` then
    bring the processes together and are needed where `world` > 1. `progress` is told (done, all) of this process's
    pictures. In `worst_dir` the worst are drawn as picture | truth | prediction, for which they are predicted again.
    `workers`: threads that read ahead. The segmenter and the data set must have one vocabulary.
    """
    if world > 1 and (reduce is None or gather is None):
        raise ValueError(f"evaluating on {world} processes needs `reduce` and `gather`")
    start = time.perf_counter()
    vocabulary, keys, shard = segmenter.vocabulary, dataset.keys(), range(rank, len(dataset), world)
    total = ConfusionMatrix(len(vocabulary))
    least: list[tuple[float, int]] = []
    failed: list[tuple[int, str]] = []

    def label_maps(sample: Sample) -> tuple[Int64[Tensor, "H W"], Int64[Tensor, "H W"]]:
        truth = sample.truth if segmenter.uses_truth else None
        prediction = segmenter.predict(sample.image, task, augment=augment, truth=truth)
        return truth_labels(sample), prediction.label_map().cpu()

    for done, (index, reading) in enumerate(ahead(dataset.__getitem__, shard, workers), 1):
        try:
            sample = reading.result()
        except ImageError as error:
            failed.append((index, str(error)))
        else:
            one = ConfusionMatrix(len(vocabulary))
            one.update(*label_maps(sample))
            total.merge(one)
            if one.truth.any():
                least = sorted([*least, (one.iou[one.truth > 0].mean().item(), index)])[:worst]
        if progress is not None:
            progress(done, len(shard))

    if reduce is not None:
        # On the model's device, as NCCL cannot add up anything that lies on the CPU.
        total = ConfusionMatrix.from_state(reduce(total.state.to(segmenter.device)))
    if gather is not None:
        least = sorted(chain.from_iterable(gather(least)))[:worst]
        failed = sorted(chain.from_iterable(gather(failed)))
    seconds = time.perf_counter() - start

    for place, (score, index) in enumerate(least, 1):
        if worst_dir is not None and index % world == rank:
            sample = dataset[index]
            truth, prediction = (Segments.from_label_map(labels) for labels in label_maps(sample))
            title = f"{keys[index]}: mIoU {_percent(score)}"
            page = draw.side_by_side(sample.image, truth, prediction, vocabulary, title)
            draw.write_overlay(Path(worst_dir) / f"worst-{place:02d}.jpg", page)

    scores, present = total.scores(vocabulary.names), (total.truth / total.truth.sum()).tolist()
    return Evaluation(
        scores,
        list(zip(vocabulary.names, scores["IoU"].values(), scores["Acc"].values(), present, strict=True)),
        [(keys[index], score) for score, index in least],
        [(keys[index], error) for index, error in failed],
        len(dataset) - len(failed),
        seconds,
    )


def truth_labels(sample: Sample) -> Int64[Tensor, "H W"]:
    """The label map of `sample.truth`, without opening its masks."""
    # Where layers overlap the later segment wins, as in Segments.label_map; VOID, -1, finds the class put last.
    return torch.cat([sample.classes, torch.tensor([VOID])])[sample.ids.amax(0).long()]


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.2f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if math.isnan(value) else value
