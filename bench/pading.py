"""A step of PADing's second stage: its share in the frozen network, and without it: `python -m bench.pading`.

Two pictures of 928 px, as `pading-panoptic-coco` has them, random weights, fp32: both turns of a step whose network runs, and
of one that finds on disk what the network has made. Needs two idle cores for figures that compare, 4 GiB, and about two
minutes; `--busy` takes processor time of one thread instead.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import Check, Clock, as_json, at_once, hardware, interleaved
from maskfirst import recipe
from maskfirst.build import Experiment
from maskfirst.frames import Frame
from maskfirst.phases.pading import PADingPhase
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch, Segments

NAME = "pading-panoptic-coco"
SIDE, PICTURES, SEGMENTS = 928, 2, 8


def pictures(model: Segmenter, phase: PADingPhase) -> Batch:
    """Random pixels, with rectangles of seen classes for truth."""
    random = torch.Generator().manual_seed(0)
    truth = []
    for _ in range(PICTURES):
        masks = torch.zeros(SEGMENTS, SIDE, SIDE, dtype=torch.bool)
        for mask in masks:
            y, x = torch.randint(SIDE // 2, (2,), generator=random).tolist()
            mask[y : y + SIDE // 2, x : x + SIDE // 2] = True
        classes = torch.tensor(phase.synthesis.seen[:SEGMENTS])
        truth.append(Segments(masks, classes, torch.ones(SEGMENTS), torch.zeros(SEGMENTS, dtype=torch.bool)))
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    pixels = torch.rand(PICTURES, 3, SIDE, SIDE, generator=random) * 255
    keys = tuple(f"picture {index}" for index in range(PICTURES))
    return Batch(pixels, ("panoptic",) * PICTURES, (frame,) * PICTURES, keys, tuple(truth))


def measure(repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures, printed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept")
        experiments = [Experiment(recipe.load(NAME, settings)) for settings in ([], [f"phase.cache={kept}"])]
        torch.manual_seed(0)
        model = experiments[0].segmenter(bare=True).train()
        model.proposer.requires_grad_(False)
        model.namer.get_buffer("synthesis.vectors.table").normal_()
        phases = [experiment.phase(model) for experiment in experiments]

        def step(phase: PADingPhase, given: Batch) -> Callable[[], object]:
            def run() -> None:
                for turn, losses in zip(phase.optimizers, phase.turns(given), strict=True):
                    optimizer = phase.optimizers[turn]
                    optimizer.zero_grad()
                    torch.stack([*losses.values()]).sum().backward()
                    optimizer.step()

            return run

        assert all(isinstance(phase, PADingPhase) for phase in phases)
        plain, fast = (phase for phase in phases if isinstance(phase, PADingPhase))
        given = pictures(model, plain)
        runs = {
            "step": step(plain, given),
            "frozen network": lambda: plain.look(given),
            "step, network's queries kept": step(fast, given),
        }
        timings = interleaved(runs, repeats, clock)
        mib = sum(path.stat().st_size for path in kept.rglob("*.safetensors")) / 2**20 / PICTURES
    ratio = timings["step"].work / timings["step, network's queries kept"].work
    share = 1 - 1 / ratio
    check = Check("times as fast with queries kept", ratio, 5, most=False)
    for name, timing in timings.items():
        print(f"{name:<32}{timing.work:8.1f} T.P{timing.ms:9.0f} ms{timing.repeats:4d}")
    print(f"the frozen network is {share:.0%} of a step; {mib:.2f} MiB a picture on disk")
    print(check)
    return {
        "hardware": hardware(),
        "clock": clock.__name__,
        "recipe": NAME,
        "timings": as_json(timings),
        "share_of_the_network": round(share, 3),
        "mib_a_picture": round(mib, 3),
        "checks": [check.as_json()],
    }


def main() -> None:
    """Reads the command line."""
    at_once(__doc__, 5, measure)


if __name__ == "__main__":
    main()
