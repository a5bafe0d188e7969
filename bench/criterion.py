"""Criterion `set` beside dense mask losses: `python -m bench.criterion`, time and peak memory of one run.

One picture of 1024 x 1024 px with 50 segments, 100 proposals on a grid of 256 x 256: matching, losses and gradients of one
guess. Dense: the same losses of masks enlarged to the picture, as autograd keeps them. `--busy` takes processor time.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from bench.measure import Check, as_json, hardware, interleaved, options, peak_memory, settle
from maskfirst.criteria.matched import Matched
from maskfirst.data.vocabulary import from_names
from maskfirst.files import write_json
from maskfirst.frames import resize
from maskfirst.types import Names, Proposals, Segments

SIDE, SEGMENTS, QUERIES, CLASSES = 1024, 50, 100, 150


def _given() -> tuple[Proposals, Names, Segments]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(1, QUERIES, SIDE // 4, SIDE // 4, generator=generator).requires_grad_()
    logits = torch.randn(1, QUERIES, CLASSES + 1, generator=generator).requires_grad_()
    truth = torch.zeros(SEGMENTS, SIDE, SIDE, dtype=torch.bool)
    for index, mask in enumerate(truth):
        y, x = divmod(index, 8)
        mask[y * 128 : y * 128 + 120, x * 128 : x * 128 + 120] = True
    classes = torch.arange(SEGMENTS)
    return Proposals(masks), Names(logits), Segments(truth, classes, torch.ones(SEGMENTS), classes < 0)


def points() -> Callable[[], object]:
    """At 12544 points a mask."""
    proposals, names, truth = _given()
    criterion = Matched(from_names([str(index) for index in range(CLASSES)]))

    def step() -> None:
        proposals.masks.grad = None
        torch.stack(list(criterion(proposals, names, [truth]).values())).sum().backward()

    return step


def dense() -> Callable[[], object]:
    """Of every pixel, with the first proposals matched in order, so without the cost of a dense matching."""
    proposals, _, truth = _given()

    def step() -> None:
        proposals.masks.grad = None
        x, inside = resize(proposals.masks[0, :SEGMENTS], (SIDE, SIDE)), truth.masks.float()
        p = x.sigmoid()
        shared = 2 * (p * inside).sum((1, 2)) + 1
        dice = 1 - shared / (p.sum((1, 2)) + inside.sum((1, 2)) + 1)
        mask = F.binary_cross_entropy_with_logits(x, inside)
        (5 * mask + 5 * dice.mean()).backward()

    return step


def main() -> None:
    """Reads the command line."""
    arguments = options(__doc__, repeats=5).parse_args()
    clock = settle(arguments)
    ways = {"points": points, "dense": dense}
    timings = interleaved({name: make() for name, make in ways.items()}, arguments.repeats, clock)
    memory = {}
    for name, make in ways.items():
        peak, base = peak_memory(make)
        memory[name] = {"peak_mib": round(peak), "base_mib": round(base), "added_mib": round(peak - base)}
        print(f"{name:<8}{timings[name].work:8.1f} T.P, adds {memory[name]['added_mib']} MiB to {round(base)}")
    shares = {
        "time of points / dense": timings["points"].work / timings["dense"].work,
        "memory of points / dense": memory["points"]["added_mib"] / memory["dense"]["added_mib"],
    }
    checks = [Check(name, share, 0.5) for name, share in shares.items()]
    for check in checks:
        print(check)
    if arguments.out is not None:
        told = [check.as_json() for check in checks]
        found = {"hardware": hardware(), "clock": clock.__name__, "timings": as_json(timings), "memory": memory}
        write_json(arguments.out, found | {"checks": told})


if __name__ == "__main__":
    main()
