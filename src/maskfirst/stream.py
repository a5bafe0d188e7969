"""The stream of training samples: endless, shuffled anew each epoch, and a function of seed and position alone.

Nothing depends on the number of workers, and with the position of the first sample a training resumes exactly.
"""

import contextlib
import hashlib
import os
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from maskfirst.contracts import Augmentation, Dataset
from maskfirst.data.images import ImageError
from maskfirst.errors import UserError
from maskfirst.types import Sample


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that mixes `parts` so well that neighbouring ones give unrelated random numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds torch, numpy and Python from `parts`."""
    seed = seed_of(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever is seeded and drawn inside the block, the caller's random states are the same after it."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Load(NamedTuple):
    """Samples on their way from a worker: few large tensors, as each tensor costs a file descriptor and a round trip."""

    images: Tensor
    ids: Tensor
    classes: Tensor
    crowd: Tensor
    shapes: tuple[tuple[int, ...], ...]
    """N, L, H, W of each sample."""
    keys: tuple[str, ...]
    unreadable: tuple[str, ...]
    """What is wrong with the pictures that were left out, a sentence each."""

    @classmethod
    def pack(cls, samples: Sequence[Sample], unreadable: Sequence[str]) -> "Load":
        return cls(
            torch.cat([sample.image.flatten() for sample in samples]),
            torch.cat([sample.ids.flatten() for sample in samples]),
            torch.cat([sample.classes for sample in samples]),
            torch.cat([sample.crowd for sample in samples]),
            tuple((len(sample.classes), *sample.ids.shape) for sample in samples),
            tuple(sample.key for sample in samples),
            tuple(unreadable),
        )

    def unpack(self, device: torch.device) -> list[Sample]:
        """The samples, on `device`."""
        numbers = [count for count, *_ in self.shapes]
        images = self.images.to(device, non_blocking=True).split([3 * h * w for _, _, h, w in self.shapes])
        ids = self.ids.to(device, non_blocking=True).split([layers * h * w for _, layers, h, w in self.shapes])
        classes = self.classes.to(device, non_blocking=True).split(numbers)
        crowd = self.crowd.to(device, non_blocking=True).split(numbers)
        return [
            Sample(images[i].view(3, h, w), ids[i].view(layers, h, w), classes[i], crowd[i], key)
            for i, ((_, layers, h, w), key) in enumerate(zip(self.shapes, self.keys, strict=True))
        ]


class Stream(TorchDataset[tuple[Sample | None, tuple[str, ...]]]):
    """The augmented sample of every position 0, 1, 2, ... of a training.

    A picture that cannot be read gives way to the next of the data set.
    """

    def __init__(self, dataset: Dataset, augment: Callable[[Sample], Sample], seed: int) -> None:
        if len(dataset) == 0:
            raise UserError("the training set is empty; look at it with 'maskfirst check'")
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def index(self, position: int) -> int:
        """The index in the data set at `position`: each epoch is a permutation of all."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self.order[place])

    def __getitem__(self, position: int) -> tuple[Sample | None, tuple[str, ...]]:
        """The sample, or None where no picture at all can be read, and a sentence for each one passed over."""
        first, unreadable = self.index(position), []
        for shift in range(len(self.dataset)):
            try:
                sample = self.dataset[(first + shift) % len(self.dataset)]
            except ImageError as error:
                unreadable.append(str(error))
                continue
            # The CPU's generator alone: seeding CUDA's as well would undo what the training has seeded there.
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(seed_of(self.seed, "augment", position))
                return self.augment(sample), tuple(unreadable)
        return None, tuple(unreadable)

    def first(self, count: int) -> "Load":
        """The first samples of the training."""
        return _readable(_collect([self[position] for position in range(count)]), self)


def chain(augmentations: Sequence[Augmentation]) -> Callable[[Sample], Sample]:
    """The augmentations one after the other."""

    def augment(sample: Sample) -> Sample:
        for augmentation in augmentations:
            sample = augmentation(sample)
        return sample

    return augment


def positions(step: int, batch: int, rank: int, world: int, micro: int) -> Iterator[list[int]]:
    """The positions of each micro-batch of process `rank` from `step` on; the processes share a batch out in order."""
    share = batch // world
    while True:
        first = step * batch + rank * share
        for start in range(first, first + share, micro):
            yield list(range(start, min(start + micro, first + share)))
        step += 1


def processors() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not pin processes
        return os.cpu_count() or 1


def load(stream: Stream, places: Iterator[list[int]], workers: int, device: torch.device) -> Generator[Load]:
    """The samples of each list of positions, loaded ahead by `workers` processes, or when asked for without any.

    Raises UserError if no picture at all can be read.
    """
    loader = DataLoader(
        stream,
        batch_sampler=_Endless(places),
        collate_fn=_collect,
        num_workers=min(workers, processors()),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator().manual_seed(0),
    )
    for load in loader:
        yield _readable(load, stream)


def _readable(load: Load, stream: Stream) -> Load:
    if not load.keys:
        raise UserError(f"none of the {len(stream.dataset)} training pictures can be read: {load.unreadable[0]}")
    return load


class _Endless:
    def __init__(self, places: Iterator[list[int]]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[list[int]]:
        return self.places


def _collect(drawn: list[tuple[Sample | None, tuple[str, ...]]]) -> Load:
    samples = [sample for sample, _ in drawn if sample is not None]
    unreadable = tuple(dict.fromkeys(sentence for _, sentences in drawn for sentence in sentences))
    if len(samples) < len(drawn):
        nothing = torch.empty(0)
        return Load(nothing, nothing, nothing, nothing, (), (), unreadable)
    return Load.pack(samples, unreadable)


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole group; the main process finishes its step, and needs its workers for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
