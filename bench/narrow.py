"""ViT-Adapter's recipes, narrowed, as they train and test: `python -m bench.narrow [RECIPE...]`, a line a recipe.

Each recipe learns two made-up pictures in 50 steps, which should halve its loss (the mean of the last three losses to that of
the first three), and the weights that it leaves are read again and evaluated on the first of the pictures: as its `inference`
says, and through all of its scales, mirrored views and windows. What the network is shown is held against the frames of the
recipe as it is in the package. Overridden are, so that this takes minutes of one core:

- sizes of the parts, see NARROW: widths, heads and feed-forward parts of trunk, adapter and head; and `pretrained`, since
  nobody has trained weights of these sizes. Depths, groups of blocks, layers, queries and points stay the recipe's.
- `data`: a `folder` of these pictures, their labels the first of the recipe's classes.
- crops: 128 px on the longer side, and the limits of `fit` in training and the pads' size by the same factor. The list of
  augmentations stays, and so do `size` and `inference`: tables are of the recipe's own windows, and evaluation sees these.
- of `train` what 50 steps ask for: `steps`; `batch` 2; `lr`, since 50 steps at the recipe's rate move nothing; `precision`
  fp32, for a CPU; one evaluation, at the end. Groups, decays, schedule, whose warm-up is a fraction, and seed stay.

What decides no weight is told as well: every step is logged, nothing is drawn, and the data is read by the process itself.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from bench.measure import hardware
from maskfirst import build, recipe
from maskfirst.build import Experiment
from maskfirst.contracts import Dataset
from maskfirst.draw import to_picture, write_label_map
from maskfirst.evaluate import evaluate
from maskfirst.files import write_aside, write_json
from maskfirst.frames import Frame, Size
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.train import train
from maskfirst.types import Vocabulary

_BACKBONE = {"heads": 4, "stem": 16}
NARROW: dict[str, dict[str, dict[str, Any]]] = {
    "upernet": {
        "proposer": {"width": 32, "auxiliary_width": 16},
        "backbone": _BACKBONE,
        "trunk": {"width": 48, "heads": 2, "pretrained": False},
    },
    "mask2former": {
        "proposer": {
            "width": 128, "mask_width": 64, "heads": 4, "encoder_feedforward": 128, "decoder_feedforward": 128,
        },
        "backbone": _BACKBONE,
        "trunk": {"width": 96, "heads": 2, "pretrained": False},
    },
}  # fmt: skip
"""What the parts are told: by the proposer's kind, and each part by its key in the recipe. Names after a Mask2Former learn as
slowly as embeddings, at 0.07 of the rate on a trunk of 24 blocks: narrower than here, 50 steps do not bring them to say no
object.
"""
RATES = {"upernet": 1e-2, "mask2former": 1.5e-3}
"""Learning rates, by the proposer's kind."""
CROP = 128
"""The longer side of a crop in training, px."""
FEW = 3
"""Steps, at the start and at the end, whose losses are averaged."""
HALF = 0.5
TRAIN = {
    "steps": 50, "batch": 2, "precision": "fp32", "evaluate_every": 1.0, "log_steps": 1, "pictures": 0, "workers": 0,
}  # fmt: skip
PICTURES = 2
COLORS = torch.tensor([[30.0, 60.0, 220.0], [40.0, 200.0, 40.0], [230.0, 40.0, 30.0]])
"""RGB 0..255 of the classes in the pictures."""
SIZE = (384, 512)
"""Of the pictures, px, about as large as those of ADE20K and COCO; every recipe brings them to a size of its own."""


def narrow(name: str, size: Size, folder: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and evaluates the recipe `name`, narrowed, on pictures of `size` made up in `folder`; what came of it.

    `changes`: further overrides. Times are the processor's, so that other work on the machine does not count.
    """
    whole = recipe.load(name)
    write_pictures(folder / "data", size, Experiment(whole).vocabulary)
    start = time.process_time()
    experiment = Experiment(recipe.override(whole, [*overrides(whole, folder / "data"), *changes]))
    run = folder / "run"
    train(experiment, run, loggers=(), progress=False)
    loss = losses(run / "log.jsonl", experiment.training().steps)
    segmenter, pictures = build.load(run), experiment.dataset("val")
    inference = Experiment(whole).segmenter(meta=True).inference
    seen = {
        told: shown(segmenter, pictures, inference, augment)
        for told, augment in (("plain", False), ("augmented", True))
    }
    return {
        "size": list(size),
        "lr": experiment.training().optimizer.lr,
        "loss": loss,
        **seen,
        "held": loss["ratio"] <= HALF and all(each["as_told"] for each in seen.values()),
        "minutes": round((time.process_time() - start) / 60, 2),
    }


def overrides(whole: Recipe, data: Path) -> list[str]:
    """What is changed of a recipe, see the top of this file; `data`: the folder of its pictures."""
    tree = whole.tree
    size = Experiment(whole).size
    if size is None:
        raise ValueError(f"{whole.source}: has no size that its crops could be shrunk by")
    pictures = {"kind": "folder", "root": str(data), "images": "images", "labels": "annotations"}
    told = {
        **dict(narrowed("proposer", tree["proposer"], NARROW[tree["proposer"]["kind"]])),
        **dict(shrunk(tree["augment"], size)),
        "data": {"train": pictures, "val": {**pictures, "limit": 1}},
        **{f"train.{key}": value for key, value in TRAIN.items()},
        "train.optimizer.lr": RATES[tree["proposer"]["kind"]],
    }
    # Where the data is a folder as well, none of its keys should stay.
    return ["data=null", *(f"{place}={json.dumps(value)}" for place, value in told.items())]


def narrowed(place: str, node: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The place in the recipe and the value of every size of the part `node` and of those inside of it."""
    told = sizes[place.rpartition(".")[2]]
    # Only some trunks can fetch weights.
    yield from ((f"{place}.{size}", value) for size, value in told.items() if size != "pretrained" or size in node)
    for inner in ("backbone", "trunk"):
        if inner in node:
            yield from narrowed(f"{place}.{inner}", node[inner], sizes)


def shrunk(augment: Sequence[Mapping[str, Any]], size: Size) -> Iterator[tuple[str, Any]]:
    """The place and the value of every length in the augmentations of a recipe of `size` whose crops become CROP px long."""

    def less(length: int) -> int:
        return round(length * CROP / max(size))

    for index, node in enumerate(augment):
        if node["kind"] in ("crop", "pad"):
            yield f"augment.{index}.size", [less(length) for length in node.get("size", size)]
        for key in ("long", "short", "least"):
            if node.get("fit", {}).get(key) is not None:
                yield f"augment.{index}.fit.{key}", less(node["fit"][key])


def write_pictures(folder: Path, size: Size, vocabulary: Vocabulary) -> None:
    """The pictures and their label maps as the `folder` data set reads them."""
    for index in range(PICTURES):
        picture, labels = scene(index, size)
        path = folder / "images" / f"{index}.png"
        with write_aside(path) as aside:
            to_picture(picture).save(aside, "PNG")
        write_label_map(folder / "annotations" / path.name, labels % len(vocabulary), vocabulary)


def scene(index: int, size: Size) -> tuple[UInt8[Tensor, "3 H W"], Int64[Tensor, "H W"]]:
    """Two grounds with a wave between and a disc on it, each of one colour under noise; and their classes, 0..2."""
    height, width = size
    # In heights of the picture.
    y, x = ((torch.arange(side) + 0.5) / height for side in size)
    y, middle = y[:, None], (0.35 + 0.3 * index) * width / height
    labels = (y > 0.45 + 0.1 * torch.sin(4 * x + index)).long()
    labels[torch.hypot(y - 0.5, x - middle) < 0.3] = 2
    noise = torch.randn(3, *size, generator=torch.Generator().manual_seed(index))
    return (COLORS[labels].permute(2, 0, 1) + 5 * noise).clamp(0, 255).to(torch.uint8), labels


def losses(log: Path, steps: int) -> dict[str, float]:
    """The first and the last losses of a training, averaged over a few steps, and the ratio of the last to the first."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    told = [line["loss"] for line in lines if "loss" in line]
    if len(told) != steps:
        raise ValueError(f"{log}: has the losses of {len(told)} steps, and there were {steps}")
    first, last = statistics.mean(told[:FEW]), statistics.mean(told[-FEW:])
    return {"first": round(first, 4), "last": round(last, 4), "ratio": round(last / first, 4)}


def shown(segmenter: Segmenter, pictures: Dataset, inference: Inference, augment: bool) -> dict[str, Any]:
    """Evaluates, and tells what the network was shown, and whether that is what `inference` says.

    `windows`: canvases; `views`: pictures in one size, mirrored or not; `mirrored`: views that were.
    """
    start = time.process_time()
    seen: list[Frame] = []
    hook = segmenter.register_forward_hook(lambda module, given, made: seen.extend(given[0].frames))
    found = evaluate(segmenter, pictures, augment=augment)
    hook.remove()
    seconds = time.process_time() - start
    multiple = segmenter.proposer.multiple
    told = [
        window
        for sample in (pictures[index] for index in range(len(pictures)))
        for view in inference.views((sample.image.shape[-2], sample.image.shape[-1]), multiple, augment)
        for window in inference.windows(view, multiple)
    ]
    first = [frame for frame in seen if frame.origin == (0, 0)]
    return {
        "pictures": found.count,
        "views": len(first),
        "mirrored": sum(frame.flipped for frame in first),
        "windows": len(seen),
        "as_told": seen == told,
        "mIoU": None if math.isnan(found.scores.value) else round(found.scores.value, 4),
        "seconds": round(seconds, 1),
    }


def line(name: str, row: Mapping[str, Any]) -> str:
    """What came of one recipe."""
    loss, plain, augmented = row["loss"], row["plain"], row["augmented"]
    return (
        f"{name:<46} loss {loss['first']:7.2f} -> {loss['last']:6.2f}, {loss['ratio']:.2f}; {plain['windows']:3d} windows, "
        f"mIoU {plain['mIoU']:.2f}; {augmented['windows']:3d} in {augmented['views']:2d} views, "
        f"mIoU {augmented['mIoU']:.2f}  {'held' if row['held'] else 'MISSED'}"
    )


def main() -> None:
    """Reads the command line, runs the recipes one by one, small windows first, and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; all of ViT-Adapter's by default")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("HEIGHT", "WIDTH"), help="of a picture, px")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file to write; recipes that it has are not run again")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.recipes or [name for name in recipe.names() if name.startswith("adapter-")]
    names.sort(key=lambda name: Experiment(recipe.load(name)).size or (0, 0))
    found: dict[str, Any] = {"recipes": {}}
    if given.out is not None and given.out.exists():
        found = json.loads(given.out.read_text(encoding="utf-8"))
    found, rows = {**found, "hardware": hardware()}, found["recipes"]
    for name in names:
        if name not in rows:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    rows[name] = narrow(name, (given.size[0], given.size[1]), Path(folder))
            except Exception as error:
                print(f"{name}: FAILED: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
                continue
            if given.out is not None:
                write_json(given.out, found)
        print(line(name, rows[name]), flush=True)
    missed = [name for name in names if name not in rows or not rows[name]["held"]]
    if missed:
        raise SystemExit(f"{len(missed)} of {len(names)} recipes did not hold: {', '.join(missed)}")


if __name__ == "__main__":
    main()
