"""ViT-P-B beside the bare trunk and beside the original: `python -m bench.vit_p`, saved with the hardware.

One picture of 518 px and 250 points, random weights, fp32 and, on a processor with instructions for it, bf16; and the points
of 250 masks for a picture of 1024 x 2048 px, read on their own grid beside reading them at the picture's size. Needs two idle
cores for figures that compare, and about two minutes; `--busy` takes processor time of one thread instead. The original's
figure was measured in the same unit on a 2-core AMD EPYC with AVX-512, torch 2.13.
"""

from collections.abc import Callable
from typing import Any

import torch

from bench.adapter import bare
from bench.measure import Check, Clock, as_json, at_once, hardware, inference, interleaved
from maskfirst.build import Experiment
from maskfirst.frames import Frame
from maskfirst.namers.vit_p import ViTP
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.ranks import multiplies_bf16
from maskfirst.recipe import Recipe
from maskfirst.types import Proposals

SIDE, POINTS, CLASSES = 518, 250, 150
STREET = (1024, 2048)
ORIGINAL = {"ViT-P": 653.0, "bare trunk": 329.0}
"""T.P; the bare trunk is timm's, at the same size."""
AGREEMENT = 0.995
"""Share of points whose class bf16 leaves as it is, at least."""


def namer(read_at: str = "grid") -> ViTP:
    """ViT-P-B for 150 classes with random weights, the same at every call."""
    torch.manual_seed(0)
    trunk = {
        "kind": "vit",
        "model": "vit_base_patch14_dinov2",
        "class_token": "absent",
        "interpolate_offset": 0.1,
        "layer_scale": 1.0,
        "size": [SIDE, SIDE],
    }
    tree = {
        "vocabulary": [f"class {index}" for index in range(CLASSES)],
        "proposer": {"kind": "oracle"},
        "namer": {"kind": "vit_p", "trunk": trunk, "size": [SIDE, SIDE], "read_at": read_at},
        "criterion": {"kind": "pixel"},
    }
    found = Experiment(Recipe(tree, "bench.yaml")).segmenter().eval().namer
    assert isinstance(found, ViTP)
    return found


def measure(repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures, printed at the end."""
    model = namer()
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=random) * 255
    points = torch.rand(1, POINTS, 2, generator=random) * 2 - 1

    def numbers(low: bool) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=low)

    def fast(run: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with fast_on_cpu():
                return run()

        return call

    parts: dict[str, Callable[[], object]] = {
        "ViT-P": fast(lambda: model.classify(pixels, points)),
        "bare trunk": fast(lambda: bare(model.trunk, pixels)),
    }
    items = {name: inference(run, lambda: numbers(False)) for name, run in parts.items()}
    low = {f"{name}, bf16": inference(run, lambda: numbers(True)) for name, run in parts.items()}
    halves = low if multiplies_bf16() else {}
    # Weights are brought to bf16 once, as in `predict` and `evaluate`, all of whose pictures share one block.
    with numbers(True):
        timings = interleaved(items | halves, repeats, clock)
    checks = [Check("T.P of ViT-P-B, 250 points", timings["ViT-P"].work, 420)]
    if halves:
        with torch.inference_mode():
            exact = model.classify(pixels, points).argmax(-1)
            with numbers(True):
                same = (model.classify(pixels, points).argmax(-1) == exact).float().mean().item()
        checks += [
            Check("fp32 / bf16", timings["ViT-P"].work / timings["ViT-P, bf16"].work, 2, most=False),
            Check("points that bf16 names alike", same, AGREEMENT, most=False),
        ]

    masks = Proposals(torch.randn(1, POINTS, STREET[0] // 4, STREET[1] // 4, generator=random))
    frame = Frame(STREET, STREET, STREET)
    readers = {"points on the grid": namer(), "points at the picture's size": namer("picture")}
    timings |= interleaved(
        {name: inference(lambda reader=reader: reader.places(masks, 0, frame)) for name, reader in readers.items()},
        max(1, repeats // 3),
        clock,
    )
    for name, timing in timings.items():
        beside = f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(f"{name:<32}{timing.work:8.1f} T.P{timing.ms:9.0f} ms{timing.repeats:4d}{beside}")
    for check in checks:
        print(check)
    return {
        "hardware": hardware(),
        "clock": clock.__name__,
        "timings": as_json(timings),
        "original": {"work": ORIGINAL},
        "checks": [check.as_json() for check in checks],
    }


def main() -> None:
    """Reads the command line."""
    at_once(__doc__, 7, measure)


if __name__ == "__main__":
    main()
