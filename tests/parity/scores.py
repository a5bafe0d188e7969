"""Scores: files of truth and of predictions, and what panopticapi, pycocotools and a plain confusion matrix say of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskfirst.data.vocabulary import from_names
from maskfirst.score import score

from .rows import Row, Tolerance, compare, failed

FRACTIONS = Tolerance(atol=1e-9)
PRECISIONS = Tolerance(atol=1e-6)
FILES = {
    "semantic": ("gt_semantic", "pred_semantic"),
    "panoptic": ("gt_panoptic.json", "pred_panoptic.json"),
    "instance": ("gt_instances.json", "pred_instances.json"),
}
"""Task -> truth and predictions."""
BESIDE = ("gt_panoptic", "pred_panoptic")
"""Folders of PNGs that the panoptic files name."""


def scores(folder: Path, path: Path) -> Iterator[Row]:
    """Every number of `expected.json`, from the verb `score`'s own function."""
    for task, expected in json.loads(path.read_text(encoding="utf-8")).items():
        if task not in FILES:
            yield failed(path.name, task, "not covered")
            continue
        truth, prediction = (folder / name for name in FILES[task])
        # Label maps name no classes; the others' files do.
        vocabulary = from_names(list(expected["IoU"])) if task == "semantic" else None
        found = score(truth, prediction, task, vocabulary).as_json()
        yield from _numbers(task, found, expected, PRECISIONS if task == "instance" else FRACTIONS)


def _numbers(name: str, ours: Any, theirs: Any, tolerance: Tolerance) -> Iterator[Row]:
    if not isinstance(theirs, Mapping):
        yield compare("expected.json", name, ours, theirs, tolerance)
        return
    for key, value in theirs.items():
        if key in ours:
            yield from _numbers(f"{name}.{key}", ours[key], value, tolerance)
        else:
            yield failed("expected.json", f"{name}.{key}", "not said")
