"""ViT-Adapter beside the original and beside its bare trunks: `python -m bench.adapter`, saved with the hardware.

ViT-B with UperNet at 512 px and BEiT-L with Mask2Former at 640 px, fp32, random weights. Needs two idle cores for figures
that compare, 10 GiB, and about ten minutes; `--busy` takes processor time of one thread instead. The original's figures were
measured in the same unit on a 2-core AMD EPYC with AVX-512, torch 2.13, with its own deformable attention in plain torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.measure import (
    Check,
    Clock,
    Timing,
    as_json,
    by_groups,
    hardware,
    inference,
    interleaved,
    memory_as_json,
    peak_memory,
    steps,
)
from bench.segvit import batch, picture
from maskfirst import recipe
from maskfirst.backbones.adapter import Adapter
from maskfirst.build import Experiment
from maskfirst.contracts import Trunk
from maskfirst.frames import Frame
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch

BASE = "adapter-deit-b-upernet-ade20k"
LARGE = "adapter-beit-l-mask2former-ade20k-640"
OVERRIDES = ("proposer.backbone.trunk.pretrained=false", "train.precision=fp32")
CHECKPOINTING = "proposer.backbone.checkpointing"
ORIGINAL = {"B backbone": 571.4, "B network": 983.2, "L backbone": 3447.9, "L network": 6716.8}
"""T.P of the original code."""
ORIGINAL_MIB = {"B network": 1638, "L network": 4892}
GROUPS = ("base", "large", "training")


def segmenter(name: str, *overrides: str) -> Segmenter:
    """The model of a recipe with random weights, the same at every call."""
    torch.manual_seed(0)
    return Experiment(recipe.load(name, [*OVERRIDES, *overrides])).segmenter()


def given(side: int) -> Batch:
    """One picture of `side` x `side` px."""
    size = (side, side)
    return Batch(picture(size)[None].float(), ("semantic",), (Frame(size, size, size),), ("",))


def bare(trunk: Trunk, pixels: Tensor) -> Tensor:
    """All blocks of a plain ViT and nothing else: what the adapter lies on."""
    tokens, grid = trunk.embed(pixels)
    for index in range(trunk.depth):
        tokens = trunk.block(index, tokens, grid)
    return tokens


def latency(letter: str, name: str, side: int, repeats: int, clock: Clock) -> dict[str, Timing]:
    """One picture: the bare trunk, the backbone and the network to mask logits."""
    model, seen = segmenter(name).eval(), given(side)
    backbone = model.proposer.get_submodule("backbone")
    assert isinstance(backbone, Adapter)
    items: dict[str, Callable[[], object]] = {
        f"{letter} trunk": lambda: bare(backbone.trunk, seen.pixels),
        f"{letter} backbone": lambda: backbone(seen.pixels),
        f"{letter} network": lambda: model(seen),
    }
    # The parts alone as the network has them.
    return interleaved({name: inference(run, fast_on_cpu) for name, run in items.items()}, repeats, clock)


def network(name: str, side: int) -> Callable[[], object]:
    """One picture to mask logits."""
    model, seen = segmenter(name).eval(), given(side)
    return inference(lambda: model(seen))


def training_step(checkpointing: bool) -> Callable[[], object]:
    """Forward, both heads' losses, backward and AdamW for two pictures of 512 px, drop-path on."""
    override = f"{CHECKPOINTING}={str(checkpointing).lower()}"
    model = segmenter(BASE, override).train()
    return steps(model, batch(2, truth=True), Experiment(recipe.load(BASE, OVERRIDES)).training())


def measure(groups: Sequence[str], repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures of some groups, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "recipes": {"B": BASE, "L": LARGE}, "clock": clock.__name__}
    timings: dict[str, Timing] = {}
    memory: dict[str, tuple[float, float]] = {}
    checks: list[Check] = []
    if "base" in groups:
        timings |= latency("B", BASE, 512, repeats, clock)
        memory["B network"] = peak_memory(network, BASE, 512)
        checks += [
            Check("T.P of ViT-B's backbone", timings["B backbone"].work, 400),
            Check("T.P of ViT-B with UperNet", timings["B network"].work, 800),
        ]
    if "large" in groups:
        timings |= latency("L", LARGE, 640, max(1, min(repeats, 3)), clock)
        memory["L network"] = peak_memory(network, LARGE, 640)
        checks.append(Check("T.P of BEiT-L with Mask2Former", timings["L network"].work, 4500))
    if "training" in groups:
        for title, checkpointing in {"B training step": False, "B training step, checkpointing": True}.items():
            timings |= interleaved({title: training_step(checkpointing)}, max(1, min(repeats, 3)), clock)
            memory[title] = peak_memory(training_step, checkpointing)
    for name, timing in timings.items():
        beside = f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(f"{name:<32}{timing.work:8.1f} T.P{timing.ms:9.0f} ms{timing.repeats:4d}{beside}")
    for name, (peak, base) in memory.items():
        print(f"{name:<32}{peak:8.0f} MiB at most, {base:.0f} before")
    for letter in "BL":
        if f"{letter} trunk" in timings:
            ratio = timings[f"{letter} backbone"].work / timings[f"{letter} trunk"].work
            found[f"{letter} backbone / bare trunk"] = float(f"{ratio:.4g}")
            print(f"{letter} backbone / bare trunk: {ratio:.2f}")
    for check in checks:
        print(check)
    found["timings"] = as_json(timings)
    found["memory"] = memory_as_json(memory)
    found["original"] = {"work": ORIGINAL, "peak_mib": ORIGINAL_MIB}
    found["checks"] = [check.as_json() for check in checks]
    return found


def main() -> None:
    """Reads the command line."""
    by_groups(__doc__, 7, GROUPS, measure)


if __name__ == "__main__":
    main()
