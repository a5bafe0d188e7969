"""DCNv3 beside its definition, and InternImage beside the original: `python -m bench.dcnv3`, saved with the hardware.

The operator alone, as each stage of InternImage-T has it of 512 x 512 px, beside loops over its points: one that gathers each
neighbour, and one that leaves sampling to torch's grid_sample; then InternImage-T with UperNet at 512 px, fp32, random
weights; and what InternImage-H with Mask2Former takes at 896 px. Needs two idle cores for figures that compare, 16 GiB, and
about ten minutes; `--busy` takes processor time of one thread instead. The original's figures were measured in the same unit on
a 2-core AMD EPYC with AVX-512, torch 2.13, with its own DCNv3 in plain torch.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.adapter import given
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
from bench.segvit import batch
from maskfirst import recipe
from maskfirst.build import Experiment
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.ops.dcnv3 import Window, dcnv3, dcnv3_by_gather
from maskfirst.segmenter import Segmenter

NAME = "internimage-t-upernet-ade20k"
SIDE = 512
STAGES = {"stride 4": (128, 4, 4), "stride 8": (64, 8, 4), "stride 16": (32, 16, 18), "stride 32": (16, 32, 4)}
"""Name -> side of the map, groups, and blocks that have such."""
CHANNELS = 16
POINTS = 9
GIANT, GIANT_SIDE = "internimage-h-mask2former-ade20k", 896
ORIGINAL = {"backbone": 165.9, "network": 599.3}
"""T.P of the original code."""
ORIGINAL_MIB = {"network": 1129}
GROUPS = ("operator", "network", "training", "giant")
Given = tuple[Tensor, Tensor, Tensor]


def case(stage: str) -> Given:
    """Random values, offsets of about a pixel, and weights that sum to 1, the same at every call."""
    torch.manual_seed(0)
    side, groups, _ = STAGES[stage]
    value = torch.randn(1, side, side, groups, CHANNELS)
    offsets = torch.randn(1, side, side, groups, POINTS, 2)
    return value, offsets, torch.rand(1, side, side, groups, POINTS).softmax(-1)


def by_loop(value: Tensor, offsets: Tensor, weights: Tensor, window: Window) -> Tensor:
    """As a text book has it: point by point, neighbour by neighbour, each a whole map of rows, weighted and added."""
    _, height, width, groups, channels = value.shape
    table = value.reshape(-1, channels)
    places = window.places(offsets)
    corner = places.floor()
    total = torch.zeros_like(value)
    for point in range(POINTS):
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = (corner[..., point, axis] + step for axis, step in enumerate((dx, dy)))
            near = (1 - (places[..., point, 0] - x).abs()) * (1 - (places[..., point, 1] - y).abs())
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            index = row.long() * groups + torch.arange(groups)
            total = total + (near * inside * weights[..., point])[..., None] * table[index]
    return total.flatten(3)


def by_grid_sample(value: Tensor, offsets: Tensor, weights: Tensor, window: Window) -> Tensor:
    """Point by point, each a whole map that torch's grid_sample makes."""
    _, height, width, groups, _ = value.shape
    maps = value.permute(0, 3, 4, 1, 2).flatten(0, 1)
    places = (window.places(offsets) + 0.5) / offsets.new_tensor([width, height]) * 2 - 1
    total = torch.zeros_like(maps)
    for point in range(POINTS):
        grid = places[..., point, :].permute(0, 3, 1, 2, 4).flatten(0, 1)
        shares = weights[..., point].permute(0, 3, 1, 2).flatten(0, 1)[:, None]
        total = total + shares * F.grid_sample(maps, grid, align_corners=False)
    return total.unflatten(0, (-1, groups)).flatten(1, 2).permute(0, 2, 3, 1)


LOOPS = {"loop": by_loop, "grid_sample": by_grid_sample}


def work(stage: str) -> dict[str, float]:
    """Of one call: multiply-adds of the four neighbours of every sample, millions, and bytes that have to be moved, MiB.

    Bytes: values, offsets and weights once, the sums once, and each neighbour's row once.
    """
    side, groups, _ = STAGES[stage]
    samples = side * side * groups * POINTS
    tokens = side * side * groups * CHANNELS
    moved = 4 * (2 * tokens + 3 * samples + 4 * samples * CHANNELS)
    return {"mega_multiply_adds": 4 * samples * CHANNELS / 1e6, "mib": moved / 2**20}


def operator(repeats: int, clock: Clock) -> tuple[dict[str, Timing], float]:
    """Each stage's call in four ways, and by how much the fast one differs from the loops at most."""
    window, timings, error = Window(), {}, 0.0
    for stage in STAGES:
        arguments = case(stage)
        with torch.inference_mode():
            found = dcnv3(*arguments, window)
            for loop in LOOPS.values():
                error = max(error, float((found - loop(*arguments, window)).abs().max()))
        ways = {"": dcnv3, ", gather": dcnv3_by_gather} | {f", {name}": loop for name, loop in LOOPS.items()}
        runs = {
            f"{stage}{name}": inference(lambda way=way, arguments=arguments: way(*arguments, window))
            for name, way in ways.items()
        }
        timings |= interleaved(runs, repeats, clock)
    return timings, error


def segmenter() -> Segmenter:
    """InternImage-T with UperNet, whose points have left the grid."""
    torch.manual_seed(0)
    model = Experiment(recipe.load(NAME)).segmenter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"look\.part\.(offsets|weights)\.weight", name):
                parameter.normal_(0, 0.05)
    return model


def network() -> Callable[[], object]:
    """One picture to mask logits."""
    model, seen = segmenter().eval(), given(SIDE)
    return inference(lambda: model(seen))


def backbone() -> Callable[[], object]:
    """One picture to maps, as the network makes them."""
    module, pixels = segmenter().eval().proposer.get_submodule("backbone"), given(SIDE).pixels
    return inference(lambda: module(pixels), fast_on_cpu)


def training_step(checkpointing: bool) -> Callable[[], object]:
    """Forward, both heads' losses, backward and AdamW for two pictures, drop-path on."""
    told = recipe.load(NAME, [f"proposer.backbone.checkpointing={str(checkpointing).lower()}"])
    torch.manual_seed(0)
    model = Experiment(told).segmenter().train()
    return steps(model, batch(2, truth=True), Experiment(told).training())


def giant() -> Callable[[], object]:
    """One picture of 896 px through InternImage-H to mask logits."""
    model, seen = Experiment(recipe.load(GIANT)).segmenter(bare=True).eval(), given(GIANT_SIDE)
    return inference(lambda: model(seen))


def gflop(run: Callable[[], object]) -> float:
    """Twice the multiply-adds of a call, samples not counted, as the originals' have been counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def measure(groups: Sequence[str], repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures of some groups, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "recipe": NAME, "clock": clock.__name__}
    timings: dict[str, Timing] = {}
    memory: dict[str, tuple[float, float]] = {}
    checks: list[Check] = []
    if "operator" in groups:
        timings, error = operator(repeats, clock)
        found["operator"] = {stage: work(stage) for stage in STAGES}
        for stage, told in found["operator"].items():
            told["gflop_per_tp"] = 2 * told["mega_multiply_adds"] / 1e3 / timings[stage].work
            for name in LOOPS:
                told[f"{name}_ratio"] = timings[f"{stage}, {name}"].work / timings[stage].work
        blocks = {stage: count for stage, (_, _, count) in STAGES.items()}
        found["all_blocks"] = {
            way or "work": sum(
                timings[f"{stage}, {way}" if way else stage].work * count for stage, count in blocks.items()
            )
            for way in ("", *LOOPS)
        }
        told = ", ".join(f"{way} {spent:.1f}" for way, spent in found["all_blocks"].items())
        print(f"DCNv3 in all {sum(blocks.values())} blocks, T.P: {told}")
        ours = found["all_blocks"]["work"]
        checks += [
            Check("times as fast as the loop, all blocks", found["all_blocks"]["loop"] / ours, 5, most=False),
            Check("times as fast as by grid_sample", found["all_blocks"]["grid_sample"] / ours, 1, most=False),
            Check("largest difference from the loops", error, 1e-4),
        ]
    if "network" in groups:
        runs = {"backbone": backbone(), "network": network()}
        found["gflop"] = {name: gflop(run) for name, run in runs.items()}
        timings |= interleaved(runs, repeats, clock)
        memory["network"] = peak_memory(network)
        checks += [
            Check("T.P of InternImage-T's backbone", timings["backbone"].work, 100),
            Check("T.P of InternImage-T with UperNet", timings["network"].work, 530),
        ]
    if "training" in groups:
        for title, checkpointing in {"training step": False, "training step, checkpointing": True}.items():
            timings |= interleaved({title: training_step(checkpointing)}, max(1, min(repeats, 3)), clock)
            memory[title] = peak_memory(training_step, checkpointing)
    if "giant" in groups:
        memory["InternImage-H"] = peak_memory(giant)
        checks.append(Check("peak MiB of InternImage-H with Mask2Former", memory["InternImage-H"][0], 24 * 1024))
    for name, timing in timings.items():
        beside = f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(f"{name:<32}{timing.work:8.2f} T.P{timing.ms:9.1f} ms{timing.repeats:4d}{beside}")
    for stage, told in found.get("operator", {}).items():
        print(f"{stage:<32}" + "  ".join(f"{key} {value:.3g}" for key, value in told.items()))
    for name, each in found.get("gflop", {}).items():
        print(f"{name:<32}{each:8.1f} GFLOP, {each / timings[name].work:.0%} of the probe's rate")
    for name, (peak, base) in memory.items():
        print(f"{name:<32}{peak:8.0f} MiB at most, {base:.0f} before")
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
