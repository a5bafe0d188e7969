"""A segmenter against the truth of a data set: scores, a table by class, and the pictures that it does worst on."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from maskfirst import draw, tasks
from maskfirst.ahead import ahead
from maskfirst.contracts import Dataset, Metric, Scores
from maskfirst.data.images import ImageError
from maskfirst.data.zero_shot import unseen_of
from maskfirst.errors import UserError
from maskfirst.formats.instances import Instances
from maskfirst.metrics.ap import AveragePrecision
from maskfirst.metrics.beside import Beside
from maskfirst.metrics.boundary import BoundaryIoU
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.metrics.pq import PanopticQuality
from maskfirst.metrics.seen import PUBLISHED, Only, SeenUnseen, Split, Way
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Sample, SegmentMap, Segments, Vocabulary

Gather = Callable[[list[Any]], list[list[Any]]]
"""The lists of all processes."""


@dataclass(frozen=True)
class Measure:
    """How a task is scored: the metric, and what it is given of the truth and of an answer."""

    metric: Callable[[Vocabulary], Metric[Any]]
    truth: Callable[[Sample, Vocabulary], Any]
    answer: Callable[[Segments], Any]


@dataclass(frozen=True)
class Evaluation:
    """What came out. All but `seconds` is the same on every process, and on one process as on many."""

    scores: Scores
    worst: list[tuple[str, float]]
    """Keys and scores, each picture's own, of those with the least; the worst first."""
    failed: list[tuple[str, str]]
    """Keys of pictures that could not be read, and why; they are not part of the scores."""
    count: int
    """Pictures scored."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON, with null for NaN."""
        return {
            **_plain(self.scores.content),
            "images": self.count,
            "seconds": round(self.seconds, 3),
            "worst": [{"key": key, self.scores.headline: score} for key, score in self.worst],
            "failed": [{"key": key, "error": error} for key, error in self.failed],
        }

    def as_table(self) -> Table:
        """One line a class, those of several classes below, in percent; all means in the caption."""
        means = ", ".join(f"{name} {_percent(value)}" for name, value in self.scores.means.items())
        table = Table(caption=f"{means}; {self.count} pictures")
        table.add_column("class")
        for name in self.scores.columns:
            table.add_column(name, justify="right")
        for place, (name, numbers) in enumerate(self.scores.rows, 1):
            table.add_row(escape(name), *map(_percent, numbers), end_section=place == len(self.scores.rows))
        for name, numbers in self.scores.below:
            table.add_row(name, *map(_percent, numbers), style="bold")
        return table


def evaluate(
    segmenter: Segmenter,
    dataset: Dataset,
    task: str = "semantic",
    *,
    augment: bool = False,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    progress: Callable[[int, int], None] | None = None,
    worst: int = 10,
    worst_dir: Path | str | None = None,
    boundary: bool = False,
    split: Split | None = None,
    workers: int = 2,
) -> Evaluation:
    """Predicts every picture of `dataset` and compares it with its truth. Only what the metric counts and keys are kept.

    `augment`: test-time augmentation. Process `rank` of `world` takes every `world`-th picture; `gather` then brings the
    processes together and is needed where `world` > 1. `progress` is told (done, all) of this process's pictures. In
    `worst_dir` the worst are drawn as picture | truth | prediction, for which they are predicted again. `boundary`, `split`:
    see `measure_of`. `workers`: threads that read ahead. The segmenter and the data set must have one vocabulary. Raises
    UserError for a task that the vocabulary cannot be scored for.
    """
    if world > 1 and gather is None:
        raise ValueError(f"evaluating on {world} processes needs `gather`")
    start = time.perf_counter()
    vocabulary, keys, shard = segmenter.vocabulary, dataset.keys(), range(rank, len(dataset), world)
    measure = measure_of(task, vocabulary, boundary, split)
    total = measure.metric(vocabulary)
    least: list[tuple[float, int]] = []
    failed: list[tuple[int, str]] = []

    def predicted(sample: Sample) -> Segments:
        truth = sample.truth if segmenter.uses_truth else None
        return segmenter.segment(sample.image, task, augment=augment, truth=truth, key=sample.key)

    for done, (index, reading) in enumerate(ahead(dataset.__getitem__, shard, workers), 1):
        try:
            sample = reading.result()
            answer = measure.answer(predicted(sample))
        except ImageError as error:
            failed.append((index, str(error)))
        else:
            own = total.update(measure.truth(sample, vocabulary), answer, index)
            if own is not None:
                least = sorted([*least, (own, index)])[:worst]
        if progress is not None:
            progress(done, len(shard))

    if gather is not None:
        found, total = gather([total]), measure.metric(vocabulary)
        for one in chain.from_iterable(found):
            total.merge(one)
        least = sorted(chain.from_iterable(gather(least)))[:worst]
        failed = sorted(chain.from_iterable(gather(failed)))
    seconds = time.perf_counter() - start

    scores = total.scores()
    for place, (score, index) in enumerate(least, 1):
        if worst_dir is not None and index % world == rank:
            sample = dataset[index]
            truth = tasks.targets(sample.truth, vocabulary, task)
            title = f"{keys[index]}: {scores.headline} {_percent(score)}"
            page = draw.side_by_side(sample.image, truth, predicted(sample), vocabulary, title, task)
            draw.write_overlay(Path(worst_dir) / f"worst-{place:02d}.jpg", page)

    return Evaluation(
        scores,
        [(keys[index], score) for score, index in least],
        [(keys[index], error) for index, error in failed],
        len(dataset) - len(failed),
        seconds,
    )


def measure_of(task: str, vocabulary: Vocabulary, boundary: bool = False, split: Split | None = None) -> Measure:
    """How `task` is scored; with `boundary`, which only the semantic one has, by boundary IoU, too.

    With `split`, for seen and unseen classes apart, or for the unseen alone. Raises UserError where the vocabulary has no
    things for the task, or lacks an unseen name.
    """
    tasks.check_known(task)
    if task == "instance" and not vocabulary.things:
        raise UserError(
            "the vocabulary has no things, and instances are counted of things only; mark them with `thing: true`"
        )
    if boundary and task != "semantic":
        raise UserError(f"boundary IoU is of label maps: the {task} task has none; leave --boundary out")
    measure = BORDERS if boundary else MEASURES[task]
    if split is None:
        return measure
    unseen_of(sorted(split.unseen), vocabulary)
    if split.only:
        return replace(measure, metric=lambda words: Only(measure.metric(words), words, split.unseen))
    way = PUBLISHED[task] if split.as_published else Way()
    return replace(measure, metric=lambda words: SeenUnseen(measure.metric(words), split.unseen, way))


def truth_labels(sample: Sample, vocabulary: Vocabulary) -> Int64[Tensor, "H W"]:
    """The label map of `sample.truth`, without opening its masks."""
    # Where layers overlap the later segment wins, as in Segments.label_map; VOID, -1, finds the class put last.
    return torch.cat([sample.classes, torch.tensor([VOID])])[sample.ids.amax(0).long()]


def truth_map(sample: Sample, vocabulary: Vocabulary) -> SegmentMap:
    """The segments of a sample that are to be seen; where layers overlap, the later ones."""
    ids = sample.ids.amax(0)
    seen = torch.bincount(ids.flatten() + 1, minlength=len(sample.classes) + 1)[1:] > 0
    return SegmentMap(ids, sample.classes, torch.ones(len(sample.classes)), sample.crowd)[seen]


def truth_instances(sample: Sample, vocabulary: Vocabulary) -> Instances:
    """The things of a sample, crowds being among them."""
    truth = sample.truth
    return Instances.of(truth[torch.isin(truth.classes, torch.tensor(sorted(vocabulary.things)))])


MEASURES: Mapping[str, Measure] = {
    "semantic": Measure(ConfusionMatrix, truth_labels, Segments.label_map),
    "panoptic": Measure(PanopticQuality, truth_map, SegmentMap.of),
    "instance": Measure(AveragePrecision, truth_instances, Instances.of),
}
BORDERS = Measure(lambda words: Beside(ConfusionMatrix(words), BoundaryIoU(words)), truth_labels, Segments.label_map)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.2f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if math.isnan(value) else value
