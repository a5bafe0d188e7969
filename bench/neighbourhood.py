"""Neighbourhood attention beside its definition, and DiNAT-L whole: `python -m bench.neighbourhood`, saved with the hardware.

The operator alone, as the stages of OneFormer's DiNAT-L have it of 640 x 640 px, near and dilated, beside a loop over its 121
neighbours, which makes scores and sums neighbour by neighbour; forward and backward of one of them; then the backbone, fp32,
random weights. Needs two idle cores for figures that compare, 4 GiB, and about five minutes; `--busy` takes processor time of
one thread instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
)
from maskfirst.backbones.dinat import DiNAT
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.ops.neighbourhood_attention import neighbourhood_attention, neighbours

SIDE = 640
KERNEL, DEPTH = 11, 32
CASES = {
    "stride 4": (160, 6, 1, 2),
    "stride 4, dilated": (160, 6, 14, 1),
    "stride 8": (80, 12, 1, 2),
    "stride 8, dilated": (80, 12, 7, 2),
    "stride 16": (40, 24, 1, 9),
    "stride 16, dilated": (40, 24, 3, 9),
    "stride 32": (20, 48, 1, 5),
}
"""Name -> side of the map, heads, dilation, and blocks of about that dilation."""
LEARNT = "stride 16"
"""The case that is run backward, too."""
GROUPS = ("operator", "training", "backbone")
Given = tuple[Tensor, Tensor, Tensor, Tensor, int]


def case(name: str) -> Given:
    """Random maps and biases, the same at every call."""
    torch.manual_seed(0)
    side, heads, dilation, _ = CASES[name]
    queries, keys, values = (torch.randn(1, side, side, heads, DEPTH) for _ in range(3))
    return queries, keys, values, torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1), dilation


def by_loop(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Neighbour by neighbour, as a text book has it: each a whole map of keys and one of values."""

    def lines(length: int) -> list[tuple[Tensor, Tensor]]:
        """For each of a window's steps the neighbours of all places, and their biases."""
        first, own = (
            torch.tensor(each)
            for each in zip(*(neighbours(length, KERNEL, dilation, place) for place in range(length)), strict=True)
        )
        line = torch.arange(length) % dilation
        return [((first + step) * dilation + line, first + step - own + KERNEL - 1) for step in range(KERNEL)]

    rows, columns = (lines(length) for length in queries.shape[1:3])
    queries = queries * queries.shape[-1] ** -0.5
    scores = []
    for down, below in rows:
        keys_there, biases = keys.index_select(1, down), bias.index_select(1, below)
        for across, beside in columns:
            near = (queries * keys_there.index_select(2, across)).sum(-1)
            scores.append(near + biases.index_select(2, beside).permute(1, 2, 0))
    shares = iter(torch.stack(scores, -1).softmax(-1).unbind(-1))
    total = torch.zeros_like(queries)
    for down, _ in rows:
        values_there = values.index_select(1, down)
        for across, _ in columns:
            total = total + next(shares)[..., None] * values_there.index_select(2, across)
    return total.flatten(3)


WAYS: dict[str, Callable[..., Tensor]] = {"": neighbourhood_attention, ", loop": by_loop}


def gflop(run: Callable[[], object]) -> float:
    """Twice the multiply-adds of a call's products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def work(name: str) -> dict[str, float]:
    """Of one call: multiply-adds, millions, by the definition and as they are made, and bytes that have to be moved, MiB.

    Bytes: queries, keys, values and sums once.
    """
    side, heads, _, _ = CASES[name]
    tokens = side * side * heads * DEPTH
    made = gflop(lambda: neighbourhood_attention(*case(name)))
    return {
        "mega_multiply_adds": 2 * tokens * KERNEL**2 / 1e6,
        "made": made * 1e3 / 2,
        "mib": 4 * 4 * tokens / 2**20,
    }


def call(name: str, way: str) -> Callable[[], object]:
    """The operator on one map."""
    arguments = case(name)
    return inference(lambda: WAYS[way](*arguments))


def learning(way: str) -> Callable[[], object]:
    """Forward and backward on one map."""
    *leaves, dilation = case(LEARNT)
    leaves = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor)]

    def step() -> object:
        return torch.autograd.grad(WAYS[way](*leaves, dilation).sum(), leaves)

    return step


def backbone() -> Callable[[], object]:
    """DiNAT-L, one picture to maps."""
    torch.manual_seed(0)
    module, pixels = DiNAT("l").eval(), torch.rand(1, 3, SIDE, SIDE) * 255
    return inference(lambda: module(pixels), fast_on_cpu)


def measure(groups: Sequence[str], repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures of some groups, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "clock": clock.__name__}
    timings: dict[str, Timing] = {}
    memory: dict[str, tuple[float, float]] = {}
    checks: list[Check] = []
    if "operator" in groups:
        error = 0.0
        for name in CASES:
            runs = {f"{name}{way}": call(name, way) for way in WAYS}
            with torch.inference_mode():
                arguments = case(name)
                difference = neighbourhood_attention(*arguments) - by_loop(*arguments)
            error = max(error, float(difference.abs().max()))
            timings |= interleaved(runs, repeats, clock)
        found["operator"] = {name: work(name) for name in CASES}
        for name, told in found["operator"].items():
            told["share_of_probe"] = 2 * told["made"] / 1e3 / timings[name].work
            told["loop_ratio"] = timings[f"{name}, loop"].work / timings[name].work
        blocks = {name: count for name, (*_, count) in CASES.items()}
        ours, loops = (
            sum(timings[f"{name}{way}"].work * count for name, count in blocks.items()) for way in ("", ", loop")
        )
        found["all_blocks"] = {"work": ours, "loop": loops}
        print(f"neighbourhood attention in all {sum(blocks.values())} blocks: {ours:.1f} T.P, by the loop {loops:.1f}")
        memory |= {f"stride 4{way}": peak_memory(call, "stride 4", way) for way in WAYS}
        checks += [
            Check("times as fast as the loop, all blocks", loops / ours, 5, most=False),
            Check("largest difference from the loop", error, 1e-4),
        ]
    if "training" in groups:
        names = {f"{LEARNT}, forward and backward{way}": way for way in WAYS}
        timings |= interleaved({name: learning(way) for name, way in names.items()}, max(1, min(repeats, 3)), clock)
        memory |= {name: peak_memory(learning, way) for name, way in names.items()}
        ours, loops = (timings[name].work for name in names)
        checks.append(Check("times as fast as the loop, backward, too", loops / ours, 5, most=False))
    if "backbone" in groups:
        run = backbone()
        found["gflop"] = {"DiNAT-L": gflop(run)}
        timings |= interleaved({"DiNAT-L": run}, max(1, min(repeats, 3)), clock)
        memory["DiNAT-L"] = peak_memory(backbone)
        share = found["gflop"]["DiNAT-L"] / timings["DiNAT-L"].work
        checks.append(Check("share of the probe's rate, DiNAT-L", share, 0.5, most=False))
    for name, timing in timings.items():
        print(f"{name:<40}{timing.work:8.2f} T.P{timing.ms:9.1f} ms{timing.repeats:4d}")
    for name, told in found.get("operator", {}).items():
        print(f"{name:<40}" + "  ".join(f"{key} {value:.3g}" for key, value in told.items()))
    for name, (peak, base) in memory.items():
        print(f"{name:<40}{peak:8.0f} MiB at most, {base:.0f} before")
    for check in checks:
        print(check)
    found["timings"] = as_json(timings)
    found["memory"] = memory_as_json(memory)
    found["checks"] = [check.as_json() for check in checks]
    return found


def main() -> None:
    """Reads the command line."""
    by_groups(__doc__, 5, GROUPS, measure)


if __name__ == "__main__":
    main()
