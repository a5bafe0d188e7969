"""Points drawn by one sort beside one look at the picture a point: `python -m bench.points`, time of 250 points a picture.

Label maps of 518 x 518 and 518 x 1036 px, the sizes of ViT-P's recipes, with 20 classes in patches and a tenth without any.
One by one: the pixels of the class that was drawn are looked for in all of the map, for each point, as the original does.
`--busy` takes processor time.
"""

from collections.abc import Callable

import numpy as np
import torch

from bench.measure import Check, as_json, hardware, interleaved, options, settle
from maskfirst.data.points import draw
from maskfirst.files import write_json
from maskfirst.types import VOID, Sample

SIZES = ((518, 518), (518, 1036))
COUNT, CLASSES, PATCH = 250, 20, 37


def scene(size: tuple[int, int]) -> Sample:
    """Patches of classes, and of none."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (side // PATCH for side in size)
    patches = torch.randint(0, CLASSES, (1, rows, columns), generator=generator, dtype=torch.int32)
    patches[torch.rand(patches.shape, generator=generator) < 0.1] = VOID
    ids = patches.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    return Sample(image, ids, torch.arange(CLASSES), torch.zeros(CLASSES, dtype=torch.bool), "scene")


def sorted_once(sample: Sample) -> Callable[[], object]:
    """As the phase `points` does it."""
    return lambda: draw(sample, COUNT)


def one_by_one(sample: Sample) -> Callable[[], object]:
    """A comparison of the whole map a point, which is in 8 bits, as label maps on disk are."""
    labels = sample.ids[0].numpy().astype(np.int8)
    random = np.random.default_rng(0)

    def run() -> list[tuple[int, int]]:
        present = np.unique(labels)
        present = present[present != VOID]
        points = []
        for _ in range(COUNT):
            rows, columns = np.where(labels == random.choice(present))
            place = random.integers(len(rows))
            points.append((int(rows[place]), int(columns[place])))
        return points

    return run


def main() -> None:
    """Reads the command line."""
    arguments = options(__doc__, repeats=5).parse_args()
    clock = settle(arguments)
    scenes = {f"{height}x{width}": scene((height, width)) for height, width in SIZES}
    ways = {"sorted once": sorted_once, "one by one": one_by_one}
    items = {f"{way} {name}": make(sample) for name, sample in scenes.items() for way, make in ways.items()}
    timings = interleaved(items, arguments.repeats, clock)
    for name, timing in timings.items():
        print(f"{name:<24}{timing.ms:9.2f} ms, {timing.work:9.3f} T.P")
    checks = [
        Check(f"time of one by one / sorted once, {name}", ratio, 50, most=False)
        for name in scenes
        for ratio in [timings[f"one by one {name}"].work / timings[f"sorted once {name}"].work]
    ]
    for check in checks:
        print(check)
    if arguments.out is not None:
        told = [check.as_json() for check in checks]
        found = {"hardware": hardware(), "clock": clock.__name__, "timings": as_json(timings)}
        write_json(arguments.out, found | {"checks": told})


if __name__ == "__main__":
    main()
