"""Who should name the masks? `python -m bench.naming --names fine=RUN,RUN ... [--masks WEIGHTS] --out FILE.json`

Names by points (`--names`, the runs of several seeds each) for the true masks, or for those of a stage 1 (`--masks`).

For a stage 1: semantic mIoU at every weight of the blend on the validation pictures; on the test pictures at the weight that
the validation pictures like best, with the first names alone, with the points' alone, and with true names. It sees every
picture once, and so does every namer; blends are made of what they said.

For true masks: mIoU and the share of masks named right, beside two that need no points: the class that most masks of the
training pictures have, and a linear probe, fitted to those masks, of what the same trunk makes of their patches on average.

The data is that of the first of `--names`. What `--out` has of other names already stays in it.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from bench.measure import hardware
from maskfirst import build, tasks, weights
from maskfirst.build import Experiment
from maskfirst.compose import required_points
from maskfirst.contracts import Dataset, Namer, Proposer
from maskfirst.evaluate import truth_labels
from maskfirst.files import write_json
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.namers.blend import Blend
from maskfirst.namers.oracle import OracleNamer
from maskfirst.namers.vit_p import ViTP
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.types import Batch, Names, Proposals, Sample, Vocabulary

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DECAY = 1e-3
"""Of the probe's weights, to the mean cross-entropy of a mask."""
STEPS = 200
"""Of L-BFGS, for the probe."""


class SeenOnce(Proposer):
    """The proposals of another, which is asked once a picture, however many models ask in a row."""

    def __init__(self, proposer: Proposer) -> None:
        super().__init__()
        self.inner = proposer
        self.width, self.tasks = proposer.width, proposer.tasks
        self.mean, self.multiple = proposer.mean, proposer.multiple
        self.last: tuple[tuple[str, ...], Proposals] | None = None

    def forward(self, batch: Batch) -> Proposals:
        if self.last is None or self.last[0] != batch.keys:
            self.last = batch.keys, self.inner(batch)
        return self.last[1]


class NamedOnce(Namer):
    """The names of another, which is asked once a picture."""

    def __init__(self, namer: Namer) -> None:
        super().__init__()
        self.inner = namer
        self.last: tuple[tuple[str, ...], Names] | None = None

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        if self.last is None or self.last[0] != batch.keys:
            self.last = batch.keys, self.inner(proposals, batch)
        return self.last[1]


def sweep(
    stage: Segmenter, namers: Mapping[str, ViTP], pictures: Dataset, blends: Sequence[float], what: str
) -> dict[str, Any]:
    """mIoU of a stage 1: `own` and `oracle` names, and by namer and weight."""
    proposer, own = SeenOnce(stage.proposer), NamedOnce(stage.namer)
    models = {("own", 0.0): own, ("oracle", 0.0): Blend(own, OracleNamer(stage.vocabulary), 1.0)}
    for name, namer in namers.items():
        once = NamedOnce(namer)
        models |= {(name, weight): Blend(own, once, weight) for weight in blends if weight}
    found = {
        key: (
            Segmenter(proposer, namer, None, stage.vocabulary, stage.inference).eval(),
            ConfusionMatrix(stage.vocabulary),
        )
        for key, namer in models.items()
    }
    for index in track(range(len(pictures)), what):
        sample = pictures[index]
        labels = truth_labels(sample, stage.vocabulary)
        for model, matrix in found.values():
            truth = sample.truth if model.uses_truth else None
            matrix.update(labels, model.segment(sample.image, truth=truth, key=sample.key).label_map())
    scores = {key: matrix.scores().value for key, (_, matrix) in found.items()}
    first = {name: scores.pop((name, 0.0)) for name in ("own", "oracle")}
    told = {name: {"0": first["own"]} for name in namers}
    for (name, weight), value in scores.items():
        told[name][f"{weight:g}"] = value
    return {**first, "namers": told}


def true_masks(namers: Mapping[str, ViTP], pictures: Dataset) -> dict[str, dict[str, float]]:
    """Of the true masks by namer: `right`, the share of masks named right, and mIoU."""
    words = pictures.vocabulary
    truth = OracleProposer(words)
    found = {}
    for name, namer in namers.items():
        once, matrix = NamedOnce(namer), ConfusionMatrix(words)
        model = Segmenter(truth, once, None, words, Inference()).eval()
        right = count = 0
        for index in track(range(len(pictures)), f"true masks, {name}"):
            sample = pictures[index]
            answer = model.segment(sample.image, truth=sample.truth, key=sample.key)
            assert once.last is not None
            guess = once.last[1].logits[0].argmax(1)
            classes = tasks.targets(sample.truth, words, "semantic").classes
            right, count = right + int((guess == classes).sum()), count + len(classes)
            matrix.update(truth_labels(sample, words), answer.label_map())
        found[name] = {"right": right / count, "mIoU": matrix.scores().value}
    return found


def pooled(
    namer: ViTP, pictures: Dataset, what: str
) -> Iterator[tuple[Sample, Float[Tensor, "N D"], Int64[Tensor, " N"]]]:
    """What the trunk makes of a picture's patches, without any points, on average over each true mask; and its class."""
    for index in track(range(len(pictures)), what):
        sample = pictures[index]
        segments = tasks.targets(sample.truth, pictures.vocabulary, "semantic")
        with torch.inference_mode():
            tokens, grid = namer.trunk.embed(namer.stretch(sample.image[None].float()))
            for block in range(namer.trunk.depth):
                tokens = namer.trunk.block(block, tokens, grid)
            patches = namer.trunk.norm(tokens)[0, namer.trunk.prefix :]
            cover = F.interpolate(segments.masks[None].float(), grid, mode="area")[0].flatten(1)
            features = cover @ patches / cover.sum(1, keepdim=True).clamp(min=1e-6)
        yield sample, features.clone(), segments.classes


def probe(namer: ViTP, train: Dataset, pictures: Dataset) -> dict[str, float]:
    """The linear probe, fitted to the masks of `train`: the share of the masks of `pictures` that it names right, and mIoU."""
    words = train.vocabulary
    known = [(features, classes) for _, features, classes in pooled(namer, train, "probe, training")]
    features, classes = torch.cat([each[0] for each in known]), torch.cat([each[1] for each in known])
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    layer = torch.nn.Linear(features.shape[1], len(words))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer((features - mean) / spread), classes) + DECAY * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    right = count = 0
    matrix = ConfusionMatrix(words)
    for sample, seen, true in pooled(namer, pictures, "probe"):
        guess = layer((seen - mean) / spread).argmax(1)
        right, count = right + int((guess == true).sum()), count + len(true)
        matrix.update(truth_labels(sample, words), _renamed(sample, words, guess))
    return {"right": right / count, "mIoU": matrix.scores().value}


def majority(train: Dataset, pictures: Dataset) -> dict[str, Any]:
    """The class that most of the training pictures' masks have, as the name of every mask."""
    words = train.vocabulary
    counts = torch.zeros(len(words), dtype=torch.int64)
    for index in range(len(train)):
        classes = tasks.targets(train[index].truth, words, "semantic").classes
        counts += torch.bincount(classes, minlength=len(words))
    most = int(counts.argmax())
    right = count = 0
    matrix = ConfusionMatrix(words)
    for index in range(len(pictures)):
        sample = pictures[index]
        classes = tasks.targets(sample.truth, words, "semantic").classes
        right, count = right + int((classes == most).sum()), count + len(classes)
        matrix.update(truth_labels(sample, words), _renamed(sample, words, torch.full_like(classes, most)))
    return {"class": words.names[most], "right": right / count, "mIoU": matrix.scores().value}


def _renamed(sample: Sample, words: Vocabulary, classes: Int64[Tensor, " N"]) -> Int64[Tensor, "H W"]:
    segments = tasks.targets(sample.truth, words, "semantic")
    return type(segments)(segments.masks, classes, segments.scores, segments.crowd).label_map()


def best_weight(runs: Sequence[Mapping[str, float]]) -> float:
    """The weight with the highest mean over the runs."""
    return max(WEIGHTS, key=lambda weight: statistics.mean(run[f"{weight:g}"] for run in runs))


def merged(old: Any, new: Any) -> Any:
    """What is in both, and the new where both have something."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old[key], value) if key in old else value for key, value in new.items()}


def named(text: str) -> tuple[str, list[Path]]:
    """NAME=PATH,PATH of the command line."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text}: should be NAME=PATH,PATH")
    return name, [Path(path) for path in value.split(",")]


def main() -> None:
    """Reads the command line, goes through the pictures, writes the file and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", help="weights of a stage 1; the true masks by default")
    parser.add_argument("--names", nargs="+", type=named, required=True, help="NAME=RUN,RUN,... of ViT-P")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {run.name: run for _, some in given.names for run in some}
    file = weights.read(next(iter(runs.values())))
    data = Experiment(file.recipe, file.vocabulary)
    val, test = data.dataset("val"), data.dataset("test")
    namers: dict[str, ViTP] = {}
    for name, run in runs.items():
        points = required_points(build.load(run))
        assert isinstance(points, ViTP)
        namers[name] = points
    found: dict[str, Any] = {"hardware": hardware(), "runs": {name: str(run) for name, run in runs.items()}}
    if given.masks is None:
        train = data.dataset("train")
        found |= {
            "majority": {"val": majority(train, val), "test": majority(train, test)},
            "val": true_masks(namers, val),
            "test": true_masks(namers, test),
            "probe, val": {name: probe(namer, train, val) for name, namer in namers.items()},
        }
    else:
        stage = build.load(given.masks)
        swept = sweep(stage, namers, val, WEIGHTS, "val")
        best = {kind: best_weight([swept["namers"][run.name] for run in some]) for kind, some in given.names}
        found |= {
            "masks": given.masks,
            "val": swept,
            "best weight": best,
            "test": sweep(stage, namers, test, sorted({1.0, *best.values()}), "test"),
        }
    if given.out.exists():
        found = merged(json.loads(given.out.read_text(encoding="utf-8")), found)
    write_json(given.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
