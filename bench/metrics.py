"""The metrics beside those that they equal: `python -m bench.metrics`, ratios of one run.

PQ and mIoU of one picture, decoding apart; AP of a hundred. Peers are pycocotools, which is installed, and torchmetrics and
panopticapi, where they are; those that are not are named in the JSON. The original's figures are work of panopticapi
(decoding taken off), mmseg's mIoU and pycocotools, measured in the same unit on pictures of the same kind. Needs an idle core
for figures that compare; `--busy` takes processor time.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from torch import Tensor

from bench.measure import Check, Clock, Timing, as_json, hardware, interleaved
from maskfirst.data.vocabulary import from_names
from maskfirst.files import write_json
from maskfirst.formats import rle
from maskfirst.formats.coco_panoptic import CocoPanoptic, PanopticWriter
from maskfirst.formats.instances import Instances
from maskfirst.frames import Size
from maskfirst.metrics.ap import AveragePrecision
from maskfirst.metrics.boundary import BoundaryIoU
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.metrics.pq import PanopticQuality
from maskfirst.types import VOID, SegmentMap, Vocabulary

COCO_SIZE: Size = (480, 640)
ADE_SIZE: Size = (512, 683)
PICTURES = 100
ORIGINAL = {"PQ": 2.7, "mIoU": 1.3, "AP of 100 pictures": 183.3}
"""T.P of panopticapi a picture, mmseg a picture and pycocotools, whose files were loaded before."""
BOUNDS_MS = {"PQ": 2.0, "mIoU": 1.5}
PEERS = ("torchmetrics", "panopticapi")


def vocabulary(count: int, things: int) -> Vocabulary:
    """Numbered classes, the first of which are things."""
    return from_names([str(index) for index in range(count)], [str(index) for index in range(things)])


def scene(seed: int, size: Size = COCO_SIZE, segments: int = 40, classes: int = 133) -> SegmentMap:
    """Segments of any shape that share a picture out, a twentieth of it being void."""
    random = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(random.normal(size=(size[0] // 8 + 1, size[1] // 8 + 1)), 3)
    ids = np.argsort(np.argsort(coarse.ravel())) * segments // coarse.size
    ids = ids.reshape(coarse.shape).repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    ids[: size[0] // 20] = VOID
    numbers = torch.from_numpy(random.integers(0, classes, segments))
    crowd = torch.zeros(segments, dtype=torch.bool)
    return SegmentMap(torch.from_numpy(ids.astype(np.int32)), numbers, torch.ones(segments), crowd)


def moved(truth: SegmentMap) -> SegmentMap:
    """An answer: the truth a few pixels off."""
    return SegmentMap(truth.ids.roll((2, 3), (0, 1)).contiguous(), truth.classes, truth.scores, truth.crowd)


def street(seed: int, classes: int = 80) -> tuple[Instances, Instances]:
    """Seven instances, and a hundred answers: each a few times over, and others."""
    random = np.random.default_rng(seed)

    def blob() -> np.ndarray:
        mask = np.zeros(COCO_SIZE, np.uint8)
        y, x = random.integers(0, COCO_SIZE[0] - 10), random.integers(0, COCO_SIZE[1] - 10)
        height, width = random.integers(8, 200, 2)
        grid = np.ogrid[-1 : 1 : complex(0, height), -1 : 1 : complex(0, width)]
        disc = (grid[0] ** 2 + grid[1] ** 2 < 1).astype(np.uint8)
        part = mask[y : y + height, x : x + width]
        part[:] = disc[: part.shape[0], : part.shape[1]]
        return mask

    masks = [blob() for _ in range(7)]
    truth = random.integers(0, classes, 7)
    answers = [
        np.roll(masks[place % 7], random.integers(-4, 5, 2), (0, 1)) if place < 50 else blob() for place in range(100)
    ]
    guesses = np.array([truth[place % 7] if place < 50 else random.integers(0, classes) for place in range(100)])
    return _instances(masks, truth, np.ones(7)), _instances(answers, guesses, random.random(100))


def _instances(masks: list[np.ndarray], classes: np.ndarray, scores: np.ndarray) -> Instances:
    packed = rle.encode(torch.from_numpy(np.stack(masks)).bool())
    return Instances(
        packed,
        torch.from_numpy(classes),
        torch.from_numpy(scores),
        torch.zeros(len(masks), dtype=torch.bool),
        COCO_SIZE,
    )


def panoptic(folder: Path) -> dict[str, Callable[[], object]]:
    """One picture through each count of PQ, and through panopticapi's decoding, which is part of its count."""
    words = vocabulary(133, 80)
    truth = scene(0)
    guess = moved(truth)
    metric = PanopticQuality(words)
    items: dict[str, Callable[[], object]] = {"PQ": lambda: metric.update(truth, guess)}
    if importlib.util.find_spec("torchmetrics"):
        from torchmetrics.detection import PanopticQuality as Theirs  # pyright: ignore[reportMissingImports]

        def theirs() -> object:
            count = Theirs(things=set(range(80)), stuffs=set(range(80, 134)), allow_unknown_preds_category=True)
            return count.update(*(_painted(side)[None] for side in (guess, truth)))

        items["PQ, torchmetrics"] = theirs
    if importlib.util.find_spec("panopticapi"):
        from panopticapi.evaluation import pq_compute_single_core  # pyright: ignore[reportMissingImports]

        files = [_written(folder / name, words, side) for name, side in (("truth", truth), ("guess", guess))]
        annotations = [_annotation(file) for file in files]
        categories = {number: {"id": number, "isthing": int(number < 80)} for number in range(133)}
        items["PQ, panopticapi with decoding"] = lambda: pq_compute_single_core(
            0, [tuple(annotations)], str(files[0].folder), str(files[1].folder), categories
        )
        items["decoding alone"] = lambda: [file.read(1) for file in files]
    return items


def _painted(side: SegmentMap) -> Tensor:
    """What torchmetrics takes: (category, number) of every pixel, void being a category of its own."""
    category = torch.cat([side.classes, torch.tensor([133])])[side.ids.long()]
    return torch.stack([category, side.ids.long() + 1], -1)


def _written(path: Path, words: Vocabulary, side: SegmentMap) -> CocoPanoptic:
    writer = PanopticWriter(path.with_suffix(".json"), words)
    writer.add(1, "1.jpg", side)
    writer.close()
    return CocoPanoptic(path.with_suffix(".json"))


def _annotation(file: CocoPanoptic) -> dict[str, Any]:
    return json.loads(file.path.read_text())["annotations"][0]


def semantic() -> dict[str, Callable[[], object]]:
    """One picture of 150 classes through each count of mIoU, and along borders."""
    words = vocabulary(150, 100)
    truth = scene(1, ADE_SIZE, 60, 150)
    labels = torch.cat([truth.classes, torch.tensor([VOID])])[truth.ids.long()]
    guess = labels.roll((2, 3), (0, 1)).contiguous()
    matrix, borders = ConfusionMatrix(words), BoundaryIoU(words)
    items: dict[str, Callable[[], object]] = {
        "mIoU": lambda: matrix.update(labels, guess),
        "boundary IoU": lambda: borders.update(labels, guess),
        "mIoU, by torch.histc as mmseg": lambda: _by_histograms(labels, guess, 150),
    }
    if importlib.util.find_spec("torchmetrics"):
        from torchmetrics.classification import MulticlassJaccardIndex  # pyright: ignore[reportMissingImports]

        theirs = MulticlassJaccardIndex(150, ignore_index=VOID, validate_args=False)
        items["mIoU, torchmetrics"] = lambda: theirs.update(guess.clamp(min=0), labels)
    return items


def _by_histograms(truth: Tensor, guess: Tensor, count: int) -> tuple[Tensor, ...]:
    """Areas of intersection, prediction and truth, a histogram each."""
    seen = truth != VOID
    truth, guess = truth[seen].float(), guess[seen].float()
    return tuple(torch.histc(values, count, 0, count - 1) for values in (guess[truth == guess], guess, truth))


def instance() -> tuple[dict[str, Callable[[], object]], float]:
    """AP of a hundred pictures from masks that are compressed already; and how far the two are apart."""
    words = vocabulary(80, 80)
    pairs = [street(seed) for seed in range(PICTURES)]

    def ours() -> dict[str, float]:
        metric = AveragePrecision(words)
        for index, pair in enumerate(pairs):
            metric.update(*pair, index)
        return dict(metric.scores().means)

    truth, results = _coco_files(pairs)

    def theirs() -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, results, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return np.asarray(evaluation.stats)

    apart = float(np.abs(np.array(list(ours().values())) - theirs()).max())
    return {"AP of 100 pictures": ours, "AP of 100 pictures, pycocotools": theirs}, apart


def _coco_files(pairs: list[tuple[Instances, Instances]]) -> tuple[COCO, COCO]:
    """Truth and results as pycocotools holds them."""
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for picture, (true, guessed) in enumerate(pairs):
        for found, target in ((true, rows), (guessed, results)):
            for mask, index, score, area in zip(
                found.rles, found.classes.tolist(), found.scores.tolist(), found.areas.tolist(), strict=True
            ):
                row = {"image_id": picture, "category_id": index, "segmentation": mask, "score": score}
                # No box: pycocotools would take results that have one for boxes.
                target.append(row | {"id": len(target) + 1, "iscrowd": 0, "area": area})
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": index, "height": COCO_SIZE[0], "width": COCO_SIZE[1]} for index in range(len(pairs))],
            "categories": [{"id": index, "name": str(index)} for index in range(80)],
            "annotations": rows,
        }
        truth.createIndex()
        return truth, truth.loadRes(results)


def measure(repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures, printed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        timings = interleaved(panoptic(Path(folder)) | semantic(), repeats, clock)
    items, apart = instance()
    timings |= interleaved(items, max(3, repeats // 3), clock)
    checks = [Check(f"{name} of a picture, ms", timings[name].ms, bound) for name, bound in BOUNDS_MS.items()]
    checks += [
        Check("PQ / panopticapi's work", timings["PQ"].work / ORIGINAL["PQ"], 2 / 15),
        Check("mIoU / mmseg's work", timings["mIoU"].work / ORIGINAL["mIoU"], 1.5 / 6.75),
        Check("AP / pycocotools", _ratio(timings, "AP of 100 pictures", "AP of 100 pictures, pycocotools"), 1),
        Check("AP, largest difference to pycocotools", apart, 1e-6),
    ]
    if "PQ, torchmetrics" in timings:
        checks.append(Check("PQ / torchmetrics", _ratio(timings, "PQ", "PQ, torchmetrics"), 1 / 100))
    _print(timings, checks)
    return {
        "hardware": hardware(),
        "clock": clock.__name__,
        "timings": as_json(timings),
        "original": {"work": ORIGINAL},
        "skipped": [peer for peer in PEERS if importlib.util.find_spec(peer) is None],
        "checks": [check.as_json() for check in checks],
    }


def _ratio(timings: dict[str, Timing], ours: str, theirs: str) -> float:
    return timings[ours].work / timings[theirs].work


def _print(timings: dict[str, Timing], checks: list[Check]) -> None:
    print(f"\n{'':<34}{'T.P':>9}{'least':>9}{'most':>9}{'ms':>10}{'n':>4}{'original':>10}")
    for name, timing in timings.items():
        line = f"{name:<34}{timing.work:9.4g}{timing.least:9.4g}{timing.most:9.4g}{timing.ms:10.4g}{timing.repeats:4d}"
        print(line + (f"{ORIGINAL[name]:10.4g}" if name in ORIGINAL else ""))
    print()
    for check in checks:
        print(check)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--busy", action="store_true", help="processor time, for a machine that does other things")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    # One thread: the peers use no more, and a picture is too little for two.
    torch.set_num_threads(1)
    found = measure(arguments.repeats, time.process_time if arguments.busy else time.perf_counter)
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
