"""From masks and names to the answer, all three tasks: `python -m bench.post_processing`, ratios of one run.

200 proposals on a grid of 128 x 176, of which 24 are confident compact blobs and the rest no object, 150 names (100 things);
the picture has 512 x 683 px. The original's figures, in the same unit, are those of MaskFormer's own methods on masks made
alike; enlarging is part of all. Needs two idle cores for figures that compare; `--busy` takes processor time of one thread.
"""

from collections.abc import Callable
from typing import Any

import torch

from bench.measure import Check, Clock, as_json, hardware, interleaved, options, peak_memory, settle
from maskfirst import rows, tasks
from maskfirst.data.vocabulary import from_names
from maskfirst.files import write_json
from maskfirst.frames import Frame, Size
from maskfirst.types import Names, Proposals, Segments

QUERIES, CONFIDENT, CLASSES, THINGS = 200, 24, 150, 100
PICTURE = Frame((512, 683), (512, 683), (512, 704))
STREET = Frame((1024, 2048), (1024, 2048), (1024, 2048))
STRIP = 32
VOCABULARY = from_names([str(index) for index in range(CLASSES)], [str(index) for index in range(THINGS)])
ORIGINAL = {"semantic": 106.0, "instance": 89.0, "panoptic": 80.0}
"""T.P of the original code, its enlarging included."""
BOUNDS = {"semantic": 60.0, "semantic, names first": 35.0, "instance": 25.0, "panoptic": 25.0}
STREET_MIB = 900.0
"""What an answer may add to the process at 1024 x 2048; its masks as bits of 100 instances are 200 MiB, and the scores of all
proposals would be 1600."""


def scene(canvas: Size, seed: int = 0) -> tuple[Proposals, Names]:
    """Blobs with a smooth edge, drawn on a grid of a quarter of the canvas."""
    generator = torch.Generator().manual_seed(seed)
    height, width = canvas[0] // 4, canvas[1] // 4
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    masks = torch.randn(1, QUERIES, height, width, generator=generator) - 6
    logits = torch.randn(1, QUERIES, CLASSES + 1, generator=generator)
    logits[..., -1] += 9
    for query in range(CONFIDENT):
        (at_y, at_x), radius = torch.rand(2, generator=generator), 0.06 + 0.1 * torch.rand((), generator=generator)
        masks[0, query] = (radius - ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt()) * 120
        logits[0, query, -1] -= 9
        logits[0, query, int(torch.randint(CLASSES, (), generator=generator))] += 12
    return Proposals(masks), Names(logits)


def answer(task: str, frame: Frame, order: tasks.Order = "masks_first") -> Callable[[], Segments]:
    """One task on one scene, from the network's answer to segments."""
    proposals, names = scene(frame.outer)

    def semantic() -> Segments:
        scores = rows.crop(tasks.read_out(proposals, names, 0, frame.outer, order), frame.visible)
        return tasks.semantic(rows.enlarge(scores, frame.original), STRIP)

    def panoptic() -> Segments:
        return tasks.panoptic(proposals, names, 0, VOCABULARY, frame, strip=STRIP).segments

    def instance() -> Segments:
        return tasks.instance(proposals, names, 0, VOCABULARY, frame, strip=STRIP)

    return torch.inference_mode()({"semantic": semantic, "panoptic": panoptic, "instance": instance}[task])


def measure(repeats: int, clock: Clock, memory: bool) -> dict[str, Any]:
    """Times of all tasks, and what they need at 1024 x 2048."""
    items: dict[str, Callable[[], Segments]] = {task: answer(task, PICTURE) for task in ORIGINAL}
    items["semantic, names first"] = answer("semantic", PICTURE, "names_first")
    timings = interleaved(items, repeats, clock)
    checks = [Check(f"T.P of {name}", timing.work, BOUNDS[name]) for name, timing in timings.items()]
    peaks = {}
    for task in ORIGINAL if memory else ():
        peak, base = peak_memory(answer, task, STREET)
        peaks[task] = {"peak_mib": round(peak), "base_mib": round(base)}
        checks.append(Check(f"MiB that {task} adds at 1024 x 2048", peak - base, STREET_MIB))
    for name, timing in timings.items():
        told = f"{ORIGINAL[name]:8.0f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(
            f"{name:<24}{timing.work:8.1f}{timing.least:8.1f}{timing.most:8.1f}{timing.ms:9.0f}{timing.probe:6.0f}{told}"
        )
    for check in checks:
        print(check)
    return {
        "hardware": hardware(),
        "clock": clock.__name__,
        "found": {name: len(run()) for name, run in items.items()},
        "timings": as_json(timings),
        "original": {"work": ORIGINAL},
        "memory": peaks,
        "checks": [check.as_json() for check in checks],
    }


def main() -> None:
    """Reads the command line."""
    parser = options(__doc__, repeats=7)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    arguments = parser.parse_args()
    clock = settle(arguments)
    found = measure(arguments.repeats, clock, not arguments.no_memory)
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
