"""What is wrong with data sets, found before a GPU is rented: every picture and all of its truth is read once."""

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from maskfirst.contracts import Dataset
from maskfirst.data.annotated import Annotated
from maskfirst.data.coding import UNKNOWN, Code, Coding, distinct, first
from maskfirst.data.folder import Pair, Paired
from maskfirst.data.images import ImageError, read_image, read_label_map
from maskfirst.draw import contact_sheet
from maskfirst.errors import UserError, listed
from maskfirst.files import write_aside
from maskfirst.types import VOID, Sample, Vocabulary

Kind = Literal[
    "unreadable",
    "no label",
    "no image",
    "size",
    "annotation",
    "value",
    "ignore",
    "shift",
    "absent",
    "leak",
    "vocabulary",
]
SHEET = 12
"""Pictures on the contact sheet."""
_MANY = 20
"""Unreadable files that are told one by one; more of them, as of a download that was cut off, are told as one."""
_AT_ONCE = 256
"""Pictures that are asked for before the first answer is awaited, so that stopping does not wait for all."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where`: the split or splits; `items`: all files or classes concerned."""

    kind: Kind
    where: str
    message: str
    remedy: str
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy}"


@dataclass(frozen=True)
class Frequency:
    """How often a class occurs in a split: pixels, and pictures with at least one of them."""

    name: str
    pixels: int
    images: int


@dataclass(frozen=True)
class Report:
    """What was found. By split: `images`, `empty` (those of them that show nothing that has a class, which is no fault),
    `void` (pixels without a class) and `frequencies`. `sheet`: the contact sheet.
    """

    problems: list[Problem]
    images: dict[str, int]
    empty: dict[str, int]
    void: dict[str, int]
    frequencies: dict[str, list[Frequency]]
    sheet: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The report in what JSON knows."""
        return asdict(self) | {"sheet": None if self.sheet is None else str(self.sheet)}


@dataclass(frozen=True)
class _Look:
    """What one picture and its truth show. `numbers`: pixels by what the label map holds; classes where there is no file."""

    place: str
    broken: tuple[str, ...] = ()
    misfit: str | None = None
    digest: bytes | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)
    firsts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """(y, x) of the first pixel of every number that is no class."""
    wrong: str | None = None
    """What is wrong with its annotations."""


def check(
    datasets: Mapping[str, Dataset],
    sheet: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    unseen: Collection[str] = (),
) -> Report:
    """Looks at all pictures of these splits; `datasets` are named train, val, ... Nothing that is wrong in a file ends it.

    `sheet`: where to write pictures of the first split under their truth, as PNG. `progress` is told how many pictures
    of how many are done. `workers`: threads, by default one a core. `unseen`: names that training data should not have.
    Raises files.DiskError for the sheet alone.
    """
    looks: dict[str, list[_Look]] = {}
    tasks = {split: _tasks(dataset) for split, dataset in datasets.items()}
    warned = {split: _warnings(dataset) for split, dataset in datasets.items()}
    total = sum(map(len, tasks.values()))
    done = 0
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for split, todo in tasks.items():
            looks[split] = []
            for start in range(0, len(todo), _AT_ONCE):
                for look in pool.map(lambda task: task(), todo[start : start + _AT_ONCE]):
                    looks[split].append(look)
                    done += 1
                    if progress:
                        progress(done, total)
    problems, frequencies, void, empty = [], {}, {}, {}
    for split, dataset in datasets.items():
        coding = dataset.coding if isinstance(dataset, Paired) else None
        if isinstance(dataset, Paired):
            problems += _lone_files(split, dataset)
        problems += _broken(split, looks[split])
        problems += _wrong(split, looks[split], _warnings(dataset) - warned[split])
        if coding:
            problems += _unknown(split, coding, looks[split])
        pixels = _per_class(coding, looks[split])
        frequencies[split], void[split] = _frequencies(dataset.vocabulary, pixels), pixels[VOID][0]
        empty[split] = _empty(coding, looks[split])
        problems += _absent(split, frequencies[split], unseen if split == "train" else ())
    problems += _misread(datasets, looks)
    problems += _leaks(looks)
    problems += _vocabularies(datasets)
    written = _draw(next(iter(datasets.values())), sheet) if sheet and datasets else None
    return Report(problems, {split: len(found) for split, found in looks.items()}, empty, void, frequencies, written)


def _tasks(dataset: Dataset) -> list[Callable[[], _Look]]:
    if isinstance(dataset, Paired):
        # Not `dataset.pairs`, which refuses images without labels: those are for the report.
        return [partial(_look_at_pair, dataset, pair) for pair in dataset.listing.pairs]
    return [partial(_look_at_sample, dataset, index) for index in range(len(dataset))]


def _samples(dataset: Dataset) -> list[Callable[[], Sample]]:
    if isinstance(dataset, Paired):
        return [partial(dataset.sample, pair) for pair in dataset.listing.pairs]
    return [partial(dataset.__getitem__, index) for index in range(len(dataset))]


def _look_at_pair(dataset: Paired, pair: Pair) -> _Look:
    broken, digest, size, misfit = [], None, None, None
    try:
        image = read_image(pair.image)
        size = tuple(image.shape[-2:])
        digest = _digest(image)
    except ImageError as error:
        broken.append(str(error))
    try:
        values = read_label_map(pair.label, dataset.coding.colors)
    except ImageError as error:
        return _Look(str(pair.label), (*broken, str(error)), digest=digest)
    if size is not None and values.shape != size:
        turned = ", as if drawn before the EXIF rotation" if values.shape == size[::-1] else ""
        misfit = f"{pair.label} has {values.shape[1]} x {values.shape[0]} px, {pair.image.name} {size[1]} x {size[0]}{turned}"
    numbers = {int(number): int(count) for number, count in zip(*distinct(values), strict=True)}
    firsts = {number: first(values, number) for number in numbers if dataset.coding.meaning(number) == UNKNOWN}
    return _Look(str(pair.label), tuple(broken), misfit, digest, numbers, firsts)


def _look_at_sample(dataset: Dataset, index: int) -> _Look:
    try:
        sample = dataset[index]
    except ImageError as error:
        return _Look(str(index), (str(error),))
    except UserError as error:
        return _Look(str(index), wrong=str(error))
    segments = torch.bincount(sample.ids.flatten() + 1, minlength=len(sample.classes) + 1)[1:].tolist()
    numbers = defaultdict(int, {VOID: int((sample.ids == VOID).all(0).sum())})
    for number, pixels in zip(sample.classes.tolist(), segments, strict=True):
        numbers[number] += pixels
    return _Look(sample.key, digest=_digest(sample.image), numbers=numbers)


def _warnings(dataset: Dataset) -> Counter[str]:
    """What the data set has counted so far."""
    return Counter(dataset.warnings) if isinstance(dataset, Annotated) else Counter()


def _digest(image: UInt8[Tensor, "3 H W"]) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


def _lone_files(split: str, dataset: Paired) -> Iterator[Problem]:
    listing = dataset.listing
    count = len(listing.pairs) + len(listing.images)
    if listing.images:
        some = listed((path.name for path in listing.images), 3)
        yield Problem(
            "no label",
            split,
            f"images without a label map: {len(listing.images)} of {count} ({some})",
            "add the label maps, named as their images, or remove the images",
            tuple(map(str, listing.images)),
        )
    if listing.labels:
        yield Problem(
            "no image",
            split,
            f"label maps without an image: {len(listing.labels)} ({listed((path.name for path in listing.labels), 3)})",
            "add the images or remove the label maps; training leaves them out",
            tuple(map(str, listing.labels)),
        )


def _broken(split: str, looks: Sequence[_Look]) -> Iterator[Problem]:
    broken = [(look.place, message) for look in looks for message in look.broken]
    if len(broken) > _MANY:
        messages = [message for _, message in broken]
        told = f"files that cannot be read: {len(broken)} ({listed(messages, 3)})"
        yield Problem("unreadable", split, told, "replace or remove them", tuple(messages))
    else:
        for place, message in broken:
            yield Problem("unreadable", split, message, "replace or remove it", (place,))
    misfits = [look for look in looks if look.misfit]
    if misfits:
        some = listed((look.misfit or "" for look in misfits), 3)
        yield Problem(
            "size",
            split,
            f"label maps of another size than their images: {len(misfits)} ({some})",
            "save the label maps at the size of their images",
            tuple(look.place for look in misfits),
        )


def _wrong(split: str, looks: Sequence[_Look], odd: Mapping[str, int]) -> Iterator[Problem]:
    """Annotations that cannot be taken, and those that can but are hardly meant."""
    wrong = [look.wrong for look in looks if look.wrong]
    if wrong:
        yield Problem(
            "annotation",
            split,
            f"pictures whose annotations are wrong: {len(wrong)} of {len(looks)} ({listed(wrong, 3)})",
            "correct the annotations, or leave the pictures out; training ends at the first",
            tuple(wrong),
        )
    for what, count in odd.items():
        yield Problem("annotation", split, f"{what}: {count}", "correct them if that is not as it should be")


def _unknown(split: str, coding: Code, looks: Sequence[_Look]) -> Iterator[Problem]:
    """The numbers that are no class, as one problem with the setting that would put it right."""
    numbers = sorted({number for look in looks for number in look.firsts})
    if not numbers:
        return
    guilty = [look for look in looks if look.firsts]
    pixels = sum(look.numbers[number] for look in guilty for number in look.firsts)
    number, (y, x) = next(iter(guilty[0].firsts.items()))
    named = f" {coding.name(number)}" if len(numbers) > 1 else ""
    kind, remedy = _setting(coding, numbers, {number for look in looks for number in look.numbers})
    yield Problem(
        kind,
        split,
        f"no class of {coding}: {listed((coding.name(number) for number in numbers), 5)} "
        f"in {len(guilty)} of {len(looks)} label maps ({pixels} px), first{named} at (y {y}, x {x}) of {guilty[0].place}",
        remedy,
        tuple(look.place for look in guilty),
    )


def _setting(coding: Code, unknown: list[int], seen: set[int]) -> tuple[Kind, str]:
    """The setting that gives every number of `seen` a meaning, if there is one."""
    count = len(coding.vocabulary)
    if not isinstance(coding, Coding):
        return "value", "correct the label maps, or leave them out"
    if coding.colors:
        return "value", "give the vocabulary the colours that the label maps are painted in, black for no class"
    if coding.ids is not None:
        return "value", f"add to `ids` what {listed(map(str, unknown), 5)} stand for, null for no class"
    classes = seen - {coding.ignore}
    shifts = [
        shift
        for shift in (-1, 0)
        if shift != coding.shift
        and max(classes) == count - 1 - shift
        and UNKNOWN not in {Coding(coding.vocabulary, shift, coding.ignore).meaning(number) for number in classes}
    ]
    shift = f"set `shift: {shifts[0]}`" if shifts else ""
    ignore = f"set `ignore: {unknown[0]}`" if len(unknown) == 1 else ""
    if shift and (0 not in seen or not ignore or coding.ignore in seen):
        return "shift", shift + (" (0 is then no class, and classes count from 1)" if shifts[0] == -1 else "")
    if shift:
        return "shift", f"{ignore} if {unknown[0]} marks pixels without a class, or {shift} if 0 does"
    if ignore:
        return "ignore", f"{ignore} if {unknown[0]} marks pixels without a class, or correct the label maps"
    many = "; are they numbers of instances?" if len(unknown) > count else ""
    return "value", f"correct the label maps, or say in `ids` what each number stands for{many}"


def _misread(datasets: Mapping[str, Dataset], looks: Mapping[str, Sequence[_Look]]) -> Iterator[Problem]:
    """Settings under which every number has a meaning, but hardly the one that was meant."""
    seen = {number for found in looks.values() for look in found for number in look.numbers}
    for split, dataset in datasets.items():
        coding, names = dataset.coding if isinstance(dataset, Paired) else None, dataset.vocabulary.names
        if not isinstance(coding, Coding) or coding.ids is not None or coding.colors:
            continue
        pixels: dict[int, int] = defaultdict(int)
        for look in looks[split]:
            for number, amount in look.numbers.items():
                pixels[number] += amount
        everything = sum(pixels.values())
        hidden = coding.ignore + coding.shift
        if pixels[coding.ignore] and 0 <= hidden < len(names):
            share = pixels[coding.ignore] / everything
            yield Problem(
                "ignore",
                split,
                f"`ignore: {coding.ignore}` hides class {hidden}, '{names[hidden]}': {share:.0%} of all pixels",
                "set `ignore` to the number of pixels without a class, 255 in most data sets",
            )
        if coding.shift == -1 and pixels[0] and len(names) not in seen:
            yield Problem(
                "shift",
                split,
                f"with `shift: -1`, 0 is no class ({pixels[0] / everything:.0%} of all pixels) and the last class, "
                f"'{names[-1]}', never occurs",
                f"leave `shift` out if 0 stands for '{names[0]}'",
            )


def _per_class(coding: Code | None, looks: Sequence[_Look]) -> dict[int, list[int]]:
    """[pixels, pictures] of every class that occurs, and of VOID."""
    found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for look in looks:
        here: dict[int, int] = defaultdict(int)
        for number, pixels in look.numbers.items():
            here[coding.meaning(number) if coding else number] += pixels
        for index, pixels in here.items():
            found[index][0] += pixels
            found[index][1] += pixels > 0
    return found


def _frequencies(vocabulary: Vocabulary, found: Mapping[int, list[int]]) -> list[Frequency]:
    return [Frequency(name, *found.get(index, (0, 0))) for index, name in enumerate(vocabulary.names)]


def _empty(coding: Code | None, looks: Sequence[_Look]) -> int:
    """How many of the pictures that could be read have no pixel with a class."""
    read = [look.numbers for look in looks if look.numbers]
    return sum(all((coding.meaning(n) if coding else n) < 0 for n, pixels in seen.items() if pixels) for seen in read)


def _absent(split: str, frequencies: Sequence[Frequency], expected: Collection[str]) -> Iterator[Problem]:
    missing = [each.name for each in frequencies if not each.pixels and each.name not in expected]
    if missing:
        yield Problem(
            "absent",
            split,
            f"classes that never occur: {len(missing)} of {len(frequencies)} ({listed(missing, 5)})",
            "they can be neither learned nor scored here: add pictures that show them, or leave them out of the vocabulary",
            tuple(missing),
        )


def _leaks(looks: Mapping[str, Sequence[_Look]]) -> Iterator[Problem]:
    places = {split: {look.digest: look.place for look in found if look.digest} for split, found in looks.items()}
    for one, other in itertools.combinations(places, 2):
        same = [(place, places[other][digest]) for digest, place in places[one].items() if digest in places[other]]
        if same:
            pairs = [f"{Path(first).name} = {Path(second).name}" for first, second in same]
            yield Problem(
                "leak",
                f"{one}, {other}",
                f"pictures that are in both splits: {len(same)} ({listed(pairs, 3)})",
                f"remove them from one, or the score on {other} says little",
                tuple(itertools.chain.from_iterable(same)),
            )


def _vocabularies(datasets: Mapping[str, Dataset]) -> Iterator[Problem]:
    for (one, first_set), (other, second_set) in itertools.pairwise(datasets.items()):
        if first_set.vocabulary.names != second_set.vocabulary.names:
            yield Problem(
                "vocabulary",
                f"{one}, {other}",
                f"their vocabularies differ ({len(first_set.vocabulary)} and {len(second_set.vocabulary)} names)",
                "give both the same names in the same order",
            )


def _draw(dataset: Dataset, path: Path) -> Path | None:
    """Pictures from all over the data set under their truth; None where not one can be read."""
    samples = _samples(dataset)
    shown = []
    for take in samples[:: max(1, len(samples) // SHEET)][:SHEET]:
        try:
            sample = take()
        except UserError:
            continue  # it is in the report
        shown.append((sample.image, sample.truth, sample.key))
    if not shown:
        return None
    page = contact_sheet(shown, dataset.vocabulary)
    with write_aside(path) as aside:
        page.save(aside, "PNG")
    return path
