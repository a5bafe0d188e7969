"""Names never seen in training, learnt on scenes: a colour and a form are known, and of two pairs there are no labels."""

from pathlib import Path
from typing import Any

import pytest

from maskfirst import weights
from maskfirst.build import Experiment
from maskfirst.recipe import load
from maskfirst.train import train

FLOORS = {"embeddings": 0.08, "pading": 0.12}
"""Harmonic means of the IoU of seen and of unseen names; seed 0 reached twice as much or more."""
SMALL = [
    "size=[64, 96]",
    "data.train.data.size=[64, 96]",
    "data.val.size=[64, 96]",
    "data.val.length=32",
    "train.workers=0",
    "train.pictures=0",
]


def trained(name: str, out: Path, *changes: str) -> dict[str, Any]:
    """Trains a recipe on small scenes, and returns what its best weights reach on the pictures for validation."""
    train(Experiment(load(name, [*SMALL, *changes])), out, progress=False, loggers=())
    return weights.read(out).scores


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage of PADing, with whose masks embeddings begin, too."""
    out = tmp_path_factory.mktemp("runs") / "first"
    scores = trained("shapes-zeroshot", out, "train.steps=200", "train.evaluate_every=1.0")
    assert scores["seen"]["IoU"] > 0.2
    assert scores["unseen"]["IoU"] == 0, "a class head gives unseen names to nothing"
    return out


def second(first: Path, out: Path, *changes: str) -> float:
    places = [f"proposer.weights={first}", f"namer.weights={first}", f"phase.cache={first.parent / 'queries'}"]
    scores = trained("shapes-zeroshot-pading", out, *places, "train.steps=160", "train.evaluate_every=1.0", *changes)
    return scores["harmonic"]["IoU"]


def test_embeddings_name_what_they_never_saw(first: Path, tmp_path: Path) -> None:
    changes = (f"proposer.weights={first}", "train.steps=100", "train.evaluate_every=1.0")
    scores = trained("shapes-zeroshot-embeddings", tmp_path, *changes)
    assert scores["harmonic"]["IoU"] > FLOORS["embeddings"]


def test_made_queries_teach_names_and_noise_makes_them(first: Path, tmp_path: Path) -> None:
    noisy = second(first, tmp_path / "noisy")
    assert noisy > FLOORS["pading"]
    still = second(first, tmp_path / "still", "namer.synthesis.noise=0.0")
    assert abs(noisy - still) > 0.005, "without noise one query is made of a class, whatever the step"
