"""Zero-shot from end to end on scenes: pairs of a colour and a form that training never sees are named by their vectors."""

from pathlib import Path
from typing import Any

import pytest

from maskfirst import recipe, weights
from maskfirst.build import Experiment
from maskfirst.train import train

FLOORS = {"embeddings": 0.10, "pading": 0.08}
"""Harmonic means of the mIoU of seen and of unseen classes that short trainings must reach; the first stage alone has 0."""


def trained(name: str, folder: Path, *changes: str) -> dict[str, Any]:
    """Means of the best weights."""
    experiment = Experiment(recipe.load(name, ["train.workers=0", "train.pictures=0", *changes]))
    train(experiment, folder / "runs" / name, loggers=(), progress=False)

    return dict(weights.read(folder / "runs" / name).scores)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first stage in it."""
    folder = tmp_path_factory.mktemp("stages")
    scores = trained("shapes-zeroshot", folder)
    assert scores["mIoU_seen"] > 0.35
    assert scores["mIoU_unseen"] == scores["mIoU_harmonic"] == 0
    return folder


def test_made_queries_teach_a_classifier_what_nobody_has_labelled(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first)
    found = trained("shapes-zeroshot-pading", first)
    assert found["mIoU_harmonic"] > FLOORS["pading"]
    silent = trained("shapes-zeroshot-pading", first / "silent", "namer.synthesis.noise=0")
    assert silent["mIoU_harmonic"] != found["mIoU_harmonic"]


def test_class_vectors_name_what_nobody_has_labelled(tmp_path: Path) -> None:
    assert trained("shapes-zeroshot-embeddings", tmp_path)["mIoU_harmonic"] > FLOORS["embeddings"]
