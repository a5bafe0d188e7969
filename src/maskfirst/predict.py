"""Pictures on disk to label maps, overlays and a summary, with reading and writing in the shadow of the model."""

import glob
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int16, Int64, Integer, UInt8
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from maskfirst import draw
from maskfirst.data.images import IMAGE_ENDINGS, ImageError, read_image, read_label_map
from maskfirst.errors import UserError, nearest
from maskfirst.files import write_json
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Vocabulary

T = TypeVar("T")
R = TypeVar("R")
SOURCE = "Source"
"""The note in a label map that says what it was made from."""


@dataclass
class Summary:
    """What was done: one entry a picture, in the order asked for, and one for each file that could not be read."""

    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"images": self.images, "failed": self.failed}


@dataclass(frozen=True)
class Found:
    """A picture to predict, and the name of what is written for it: a path below the output folder without an ending."""

    file: Path
    name: str


def predict_files(
    segmenter: Segmenter,
    paths: Sequence[Path | str],
    out: Path | str,
    task: str = "semantic",
    overlays: bool = True,
    opacity: float = 0.5,
    colors: Sequence[draw.Color] | None = None,
    workers: int = 2,
    resume: bool = False,
    augment: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes `labels/NAME.png`, `overlays/NAME.jpg` (with a legend) and `summary.json` into the folder `out`.

    `paths`: files, folders (with all below) and globs. `opacity` 0..1 and `colors`, (r, g, b) one a class in place of the
    vocabulary's, are the overlays'. `workers`: threads that read, and as many that write. `resume` keeps what an earlier
    run with the same model has finished. `augment`: test-time augmentation. `progress` is told (done, all) pictures.
    A file that cannot be read is listed in the summary's `failed`; the rest is done.
    Raises UserError where there is nothing to read, DiskError where `out` cannot be written.
    """
    out = Path(out)
    found = find_pictures(paths, (out / "labels", out / "overlays"))
    vocabulary = segmenter.vocabulary if colors is None else replace(segmenter.vocabulary, colors=tuple(colors))
    writer = _Writer(out, vocabulary, task, overlays, opacity)
    summary = Summary()
    kept = {each: entry for each in found if (entry := writer.finished(each))} if resume else {}
    todo = [each for each in found if each not in kept]
    written: dict[Found, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for done, (each, reading) in enumerate(ahead(lambda each: read_image(each.file), todo, workers), len(kept) + 1):
            try:
                image = reading.result()
            except ImageError as error:
                summary.failed.append({"file": str(each.file), "error": str(error)})
            else:
                segments = segmenter.predict(image, task, augment=augment)
                # Reduced to one number a pixel here, so that no masks wait in the queue.
                job = pool.submit(writer.write, each, image, draw.segment_map(segments), segments.classes.cpu())
                written[each] = job
                waiting.append(job)
                if len(waiting) > workers:
                    waiting.popleft().result()
            if progress is not None:
                progress(done, len(found))
    for each in found:
        if each in kept:
            summary.images.append(kept[each])
        elif each in written:
            summary.images.append(written[each].result())
    write_json(out / "summary.json", summary.as_json())
    return summary


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, Future[R]]]:
    """Each item with its `work`, in order; `workers` threads are at most as many items ahead of the caller."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > workers:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, job in pending:
                job.cancel()


def find_pictures(paths: Sequence[Path | str], without: Sequence[Path] = ()) -> list[Found]:
    """The pictures that files, folders and globs stand for, each once, with a name that no other has.

    Folders and globs give what ends like a picture and does not begin with a dot; what lies in the folders `without` is
    left out. Raises UserError for a path that gives none.
    """
    without = [Path(os.path.realpath(folder)) for folder in without]
    names: dict[str, tuple[Path, str]] = {}
    for path in paths:
        found = _below(path, without)
        for file, name in found:
            names.setdefault(os.path.realpath(file), (file, name))
    found = list(names.values())
    return [Found(file, name) for (file, _), name in zip(found, _unique(found), strict=True)]


def _below(path: Path | str, without: Sequence[Path]) -> list[tuple[Path, str]]:
    """The pictures of one path, each with its name below that path."""
    place = Path(path)
    if place.is_file():
        return [(place, place.stem)]
    if place.is_dir():
        root, files = place, [Path(folder, file) for folder, _, files in os.walk(place) for file in files]
    elif glob.has_magic(str(path)):
        parts = list(place.parts)
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)]
    else:
        beside = [other.name for other in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder.{nearest(place.name, beside)}")
    files = [
        file
        for file in sorted(files)
        if file.suffix.lower() in IMAGE_ENDINGS
        and not file.name.startswith(".")
        and not any(Path(os.path.realpath(file)).is_relative_to(folder) for folder in without)
    ]
    if not files:
        raise UserError(f"{path}: no picture found here; looked for names that end in {', '.join(IMAGE_ENDINGS)}")
    return [(file, file.relative_to(root).with_suffix("").as_posix()) for file in files]


def _unique(found: Sequence[tuple[Path, str]]) -> list[str]:
    """Names that stay apart on any file system: those that clash get their folder, then their ending, then a number."""
    names = [name for _, name in found]

    def clashing() -> list[int]:
        counts = Counter(name.casefold() for name in names)
        return [index for index, name in enumerate(names) if counts[name.casefold()] > 1]

    files = {index: Path(os.path.abspath(found[index][0])) for index in clashing()}
    root = os.path.commonpath([file.parent for file in files.values()]) if files else ""
    for index, file in files.items():
        names[index] = file.relative_to(root).with_suffix("").as_posix()
    for index in clashing():
        names[index] += found[index][0].suffix
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 1
        while names[index].casefold() in taken:
            number += 1
            names[index] = f"{name}-{number}"
        taken.add(names[index].casefold())
    return names


@dataclass(frozen=True)
class _Writer:
    """Writes the files of one picture and tells what the summary says of it. Called from several threads."""

    out: Path
    vocabulary: Vocabulary
    task: str
    overlays: bool
    opacity: float

    def write(
        self,
        found: Found,
        image: UInt8[Tensor, "3 H W"],
        order: Int16[Tensor, "H W"],
        classes: Int64[Tensor, " N"],
    ) -> dict[str, Any]:
        labels = np.append(classes.numpy(), VOID).astype(np.int32).take(order.numpy(), mode="wrap")
        entry, shares = self._entry(found, labels)
        # The label map comes last: where it is, all is.
        if self.overlays:
            colors = draw.segment_colors(classes, self.vocabulary)
            painted = draw.paint(draw.to_picture(image), order, colors, self.opacity)
            strip = draw.legend(self.vocabulary, list(shares), list(shares.values()), width=painted.width)
            draw.write_overlay(self.out / entry["overlay"], draw.below(painted, strip))
        notes = {SOURCE: self._source(found)}
        draw.write_label_map(self.out / entry["labels"], torch.from_numpy(labels), self.vocabulary, notes)
        return entry

    def finished(self, found: Found) -> dict[str, Any] | None:
        """The summary's entry of a picture whose files are all there from an earlier run, else None."""
        path = self.out / f"labels/{found.name}.png"
        try:
            with PngImageFile(path) as png:
                source = png.info.get(SOURCE)
            values = read_label_map(path)
        except (OSError, SyntaxError, ValueError):
            return None
        labels = values.astype(np.int32)
        labels[labels == np.iinfo(values.dtype).max] = VOID
        if source != self._source(found) or labels.max() >= len(self.vocabulary):
            return None
        entry, _ = self._entry(found, labels)
        return entry if not self.overlays or (self.out / entry["overlay"]).is_file() else None

    def _entry(self, found: Found, labels: Integer[np.ndarray, "H W"]) -> tuple[dict[str, Any], dict[int, float]]:
        """The summary's entry, and the share of each class that occurs, largest first."""
        counts = np.bincount(labels.ravel() + 1, minlength=len(self.vocabulary) + 1)[1:]
        largest = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
        shares = {index: counts[index].item() / labels.size for index in largest}
        entry = {
            "file": str(found.file),
            "labels": f"labels/{found.name}.png",
            "overlay": f"overlays/{found.name}.jpg" if self.overlays else None,
            "height": labels.shape[0],
            "width": labels.shape[1],
            "classes": {self.vocabulary.names[index]: round(share, 6) for index, share in shares.items()},
        }
        return entry, shares

    def _source(self, found: Found) -> str:
        return f"{found.file}, {found.file.stat().st_size} bytes, {self.task}"
