"""The stream of samples: a function of seed and position, shared out without loss, and the caller's randomness untouched."""

import random
from itertools import islice

import numpy as np
import pytest
import torch

import tiny_parts
from maskfirst.errors import UserError
from maskfirst.stream import Load, Stream, chain, load, own_randomness, positions, seed_everything, seed_of
from maskfirst.types import Sample

CPU = torch.device("cpu")


def stream(length: int = 5, seed: int = 0) -> Stream:
    return Stream(tiny_parts.Noise(length), chain([tiny_parts.Dim()]), seed)


def test_each_epoch_is_another_permutation() -> None:
    made = stream()
    epochs = [tuple(made.index(position) for position in range(5 * e, 5 * e + 5)) for e in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert [stream().index(position) for position in (17, 3)] == [epochs[3][2], epochs[0][3]]
    assert [stream(seed=1).index(position) for position in range(20)] != [index for epoch in epochs for index in epoch]


def test_augmentation_depends_on_the_position_and_nothing_else() -> None:
    made = stream()
    torch.manual_seed(5)
    first = made[7][0]
    torch.manual_seed(6)
    before = torch.get_rng_state()
    again = stream()[7][0]
    assert first is not None
    assert again is not None
    assert torch.equal(first.image, again.image)
    assert torch.equal(before, torch.get_rng_state())
    same = next(p for p in range(5, 50) if made.index(p) == made.index(2))
    one, other = made[2][0], made[same][0]
    assert one is not None
    assert other is not None
    assert one.key == other.key
    assert not torch.equal(one.image, other.image)


@pytest.mark.parametrize("workers", [0, 2])
def test_loads_in_order_what_the_positions_say(workers: int) -> None:
    places = positions(step=3, batch=4, rank=1, world=2, micro=1)
    loader = load(stream(), places, workers, CPU)
    keys = [one.keys for one in islice(loader, 4)]
    loader.close()
    made = stream()
    assert keys == [(f"noise-{made.index(position)}",) for position in (14, 15, 18, 19)]


def test_processes_share_each_batch_out() -> None:
    for world, micro in ((1, 6), (2, 3), (3, 1), (2, 2)):
        taken = []
        for rank in range(world):
            passes = -(-6 // world // micro) if 6 // world % micro == 0 else 6 // world // micro + 1
            taken += [p for one in islice(positions(2, 6, rank, world, micro), passes) for p in one]
        assert sorted(taken) == list(range(12, 18))


def test_samples_survive_the_way_from_the_worker() -> None:
    """Sizes, layers and numbers of segments may differ, down to none."""
    samples = [
        Sample(
            torch.randint(0, 255, (3, h, w), dtype=torch.uint8),
            torch.randint(-1, max(n, 1), (layers, h, w), dtype=torch.int32),
            torch.arange(n),
            torch.arange(n) % 2 == 1,
            f"{h}x{w}",
        )
        for h, w, layers, n in ((2, 3, 1, 2), (4, 1, 2, 0), (1, 1, 1, 5))
    ]
    for before, after in zip(samples, Load.pack(samples, []).unpack(CPU), strict=True):
        assert before.key == after.key
        for name in ("image", "ids", "classes", "crowd"):
            assert torch.equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype


def test_an_empty_training_set_is_a_sentence() -> None:
    with pytest.raises(UserError, match="the training set is empty"):
        stream(length=0)


def test_what_is_seeded_inside_stays_inside() -> None:
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # pyright: ignore[reportAttributeAccessIssue]
    drawn = []
    for _ in range(2):
        with own_randomness(CPU):
            seed_everything("x", 1)
            drawn.append((random.random(), float(torch.rand(())), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert states[2] == np.random.get_state()[1].tolist()  # pyright: ignore[reportAttributeAccessIssue]


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {seed_of(a, "step", b) for a in range(10) for b in range(100)}
    assert len({seed % 2**32 for seed in seeds}) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
