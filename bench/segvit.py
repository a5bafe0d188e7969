"""SegViT ViT-B beside the original: `python -m bench.segvit`, ratios of one run, saved with the hardware.

Needs two idle cores for figures that compare, and about ten minutes. `--busy` takes processor time of one thread instead, for
a look at ratios on a machine that does other things. The original's figures were measured in the same unit on a 2-core AMD
EPYC with AVX-512 and bf16 instructions, torch 2.13.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bench.measure import (
    Check,
    Clock,
    Timing,
    as_json,
    hardware,
    inference,
    interleaved,
    options,
    peak_memory,
    settle,
    steps,
)
from maskfirst import recipe
from maskfirst.build import Experiment, load
from maskfirst.data.images import read_image
from maskfirst.files import write_json
from maskfirst.frames import Frame, Size
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.predict import predict_files
from maskfirst.segmenter import Segmenter
from maskfirst.sources.files import find_pictures
from maskfirst.tasks import Order, read_out
from maskfirst.types import Batch, Segments

RECIPE = "segvit-vit-b-ade20k"
SIDE = 512
STREET = (1024, 2048)
ORIGINAL = {
    "trunk": 307.7,
    "masks first": 401.1,
    "trunk, bf16": 196.0,
    "masks first, bf16": 257.0,
    "training step": 1908.3,
    "sliding window": 8673.1,
}
"""T.P of the original code. Its bf16 figures are from another process, where fp32 took 392.3."""
ORIGINAL_MIB = {"training step": 7992, "sliding window": 3436}
GROUPS = ("latency", "agreement", "training", "sliding", "files")


def segmenter(*overrides: str) -> Segmenter:
    """The model with random weights, the same at every call."""
    torch.manual_seed(0)
    return Experiment(recipe.load(RECIPE, ["proposer.backbone.trunk.pretrained=false", *overrides])).segmenter()


def picture(size: Size, seed: int = 0) -> Tensor:
    """A smooth made-up picture, uint8 (3, H, W)."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    fine = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)) * 0.02
    smooth = F.interpolate(noise, size=size, mode="bicubic") + fine
    return (smooth[0] * 255).clamp_(0, 255).to(torch.uint8)


def batch(images: int = 1, truth: bool = False) -> Batch:
    """Pictures of 512 px; the truth is ten squares of ten classes in each."""
    pixels = torch.stack([picture((SIDE, SIDE), seed) for seed in range(images)]).float()
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    segments = tuple(_squares() for _ in range(images)) if truth else None
    return Batch(pixels, ("semantic",) * images, (frame,) * images, ("",) * images, segments)


def _squares() -> Segments:
    masks = torch.zeros(10, SIDE, SIDE, dtype=torch.bool)
    for index, mask in enumerate(masks):
        y, x = divmod(index, 4)
        mask[y * 128 : y * 128 + 120, x * 128 : x * 128 + 120] = True
    return Segments(masks, torch.arange(10) * 3, torch.ones(10), torch.zeros(10, dtype=torch.bool))


def latency(repeats: int, clock: Clock) -> dict[str, Timing]:
    """One picture of 512 px: the bare trunk, the network, and to logits in both orders; fp32 and bf16."""
    model, given = segmenter().eval(), batch()

    def trunk() -> object:
        with fast_on_cpu():
            return model.proposer.get_submodule("backbone")(given.pixels)

    def logits(order: Order) -> Tensor:
        proposals, names = model(given)
        return read_out(proposals, names, 0, (SIDE, SIDE), order).fetch(0, SIDE)

    parts: dict[str, Callable[[], object]] = {
        "trunk": trunk,
        "network": lambda: model(given),
        "masks first": lambda: logits("masks_first"),
        "names first": lambda: logits("names_first"),
    }
    items = {name: inference(run) for name, run in parts.items()}
    items |= {
        f"{name}, bf16": inference(run, lambda: torch.autocast("cpu", torch.bfloat16)) for name, run in parts.items()
    }
    return interleaved(items, repeats, clock)


def training_step() -> Callable[[], object]:
    """Forward, losses, backward and AdamW for two pictures of 512 px, dropout and drop-path on."""
    model, given = segmenter().train(), batch(2, truth=True)
    return steps(model, given, Experiment(recipe.load(RECIPE)).training())


def sliding() -> Callable[[], object]:
    """The labels of a picture of 1024 x 2048 px by 18 windows of 512 px, two thirds apart."""
    fit = "inference.fit={long: null, short: null, least: null}"
    model, image = segmenter(fit).eval(), picture(STREET)
    return lambda: model.segment(image)


def agreement(model: Segmenter, images: Sequence[Tensor]) -> float:
    """Share of pixels on which bf16 gives the class that fp32 gives."""
    same = []
    for image in images:
        exact = model.segment(image).label_map()
        with torch.autocast("cpu", torch.bfloat16):
            same.append((model.segment(image).label_map() == exact).float().mean().item())
    return statistics.mean(same)


def files(model: Segmenter, images: Sequence[Tensor], repeats: int) -> float:
    """The rate of `predict` from files to files, overlays included, over that of the model on decoded pictures.

    The two take turns, and the share is the median of each pair's.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "in")
        inputs.mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(inputs / f"{index:03d}.jpg", quality=92)
        shares = []
        for index in range(repeats + 1):
            bare = _seconds(lambda: [model.segment(image) for image in images])
            out = Path(folder, f"out{index}")
            whole = _seconds(lambda out=out: predict_files(model, [inputs], out))
            shares.append(bare / whole)
    return statistics.median(shares[1:])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    groups: Sequence[str], repeats: int, weights: str | None, pictures: str | None, clock: Clock
) -> dict[str, Any]:
    """All figures of some groups, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "recipe": RECIPE, "clock": clock.__name__}
    timings: dict[str, Timing] = {}
    memory: dict[str, dict[str, float]] = {}
    checks: list[Check] = []
    trained = None if weights is None else (load(weights), _read(pictures))
    if "latency" in groups:
        timings |= latency(repeats, clock)
        work = {name: timing.work for name, timing in timings.items()}
        checks += [
            Check("T.P to logits, the original's order", work["masks first"], 320),
            Check("T.P to logits, names first", work["names first"], 285),
            Check("network / bare trunk", work["network"] / work["trunk"], 1.2),
            Check(
                "bf16: times as fast, the original's order", work["masks first"] / work["masks first, bf16"], 1.7, False
            ),
        ]
    if "agreement" in groups and trained is not None:
        checks.append(Check("bf16 gives the class of fp32, share of pixels", agreement(*trained), 0.995, False))
    for group, name, make, bounds in (
        ("training", "training step", training_step, (1700, 5.5e9 / 2**20)),
        ("sliding", "sliding window", sliding, (5600, 1.6 * 1024)),
    ):
        if group in groups:
            timings |= interleaved({name: make()}, max(1, min(repeats, 3)), clock)
            peak, base = peak_memory(make)
            memory[name] = {"peak_mib": round(peak), "base_mib": round(base)}
            checks += [
                Check(f"T.P of a {name}", timings[name].work, bounds[0]),
                Check(f"peak MiB of a {name}", peak, bounds[1]),
            ]
    if "files" in groups:
        photos = [picture((512, 683), seed) for seed in range(3)]
        checks.append(
            Check("predict from files / the model alone", files(segmenter().eval(), photos, repeats), 0.9, False)
        )
        if trained is not None:
            share = files(*trained, repeats)
            checks.append(Check("the same, trained weights", share, 0.9, False))
    _print(timings, memory, checks)
    found["timings"] = as_json(timings)
    found["original"] = {"work": ORIGINAL, "peak_mib": ORIGINAL_MIB}
    found["memory"] = memory
    found["checks"] = [check.as_json() for check in checks]
    return found


def _read(pictures: str | None) -> list[Tensor]:
    if pictures is None:
        return [picture((360, 480), seed) for seed in range(4)]
    return [read_image(each.file) for each in find_pictures([pictures])[:20]]


def _print(timings: dict[str, Timing], memory: dict[str, dict[str, float]], checks: Sequence[Check]) -> None:
    print(f"\n{'':<22}{'T.P':>8}{'least':>8}{'most':>8}{'ms':>9}{'P':>6}{'n':>4}{'original':>10}{'ratio':>7}")
    for name, timing in timings.items():
        line = f"{name:<22}{timing.work:8.1f}{timing.least:8.1f}{timing.most:8.1f}{timing.ms:9.0f}{timing.probe:6.0f}"
        line += f"{timing.repeats:4d}"
        if name in ORIGINAL:
            line += f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}"
        print(line)
    for name, found in memory.items():
        print(
            f"{name}: peak {found['peak_mib']} MiB (before the call {found['base_mib']}), original {ORIGINAL_MIB[name]}"
        )
    print()
    for check in checks:
        print(check)


def main() -> None:
    """Reads the command line."""
    parser = options(__doc__, repeats=7)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="which groups of figures")
    parser.add_argument("--weights", help="trained weights, for bf16 agreement and `predict` with a small model")
    parser.add_argument("--pictures", help="a folder of pictures for them")
    arguments = parser.parse_args()
    clock = settle(arguments)
    found = measure(arguments.only, arguments.repeats, arguments.weights, arguments.pictures, clock)
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
