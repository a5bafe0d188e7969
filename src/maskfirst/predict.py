"""Pictures on disk to files of their segments, with reading and writing in the shadow of the model."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from maskfirst import draw
from maskfirst.ahead import ahead, groups
from maskfirst.data.images import ImageError, read_image
from maskfirst.errors import UserError
from maskfirst.files import write_json
from maskfirst.outputs import InstanceFiles, LabelMaps, Output, PanopticFiles, Told
from maskfirst.segmenter import Segmenter
from maskfirst.sources.files import Found, find_pictures
from maskfirst.types import SegmentMap, Segments, Vocabulary


@dataclass
class Summary:
    """What was done: one entry a picture, in the order asked for, and one for each file that could not be read."""

    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"images": self.images, "failed": self.failed}


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
    least_score: float = draw.SURE,
    yolo: bool = False,
) -> Summary:
    """Writes what `task` asks for (see `outputs`), `overlays/NAME.jpg` and `summary.json` into the folder `out`.

    `paths`: files, folders (with all below) and globs. `opacity` 0..1 and `colors`, (r, g, b) one a class in place of the
    vocabulary's, are the overlays'. `workers`: threads that read, and as many that write. `resume` keeps what an earlier
    run with the same model has finished. `augment`: test-time augmentation. `progress` is told (done, all) pictures.
    Instances below `least_score`, 0..1, are in COCO's file only. `yolo`: instances as YOLO's polygons, too.
    A file that cannot be read is listed in the summary's `failed`; the rest is done.
    Raises UserError where there is nothing to read or the task is not the model's, DiskError where `out` cannot be written.
    """
    if segmenter.uses_truth:
        raise UserError(
            "this model is told the masks, and finds none: give masks of a file (--masks), places (--points), or another model "
            "whose names these weights should better (predict OTHER --namer THESE)"
        )
    out = Path(out)
    found = find_pictures(paths, [out / folder for folder in ("labels", "panoptic", "overlays")])
    vocabulary = segmenter.vocabulary if colors is None else replace(segmenter.vocabulary, colors=tuple(colors))
    output: Output[Any]
    if yolo and task != "instance":
        raise UserError(f"YOLO's polygons are of instances, not of the {task} task; choose the task instance")
    if task == "instance":
        output = InstanceFiles(out, vocabulary, least_score, yolo)
    else:
        output = PanopticFiles(out, vocabulary) if task == "panoptic" else LabelMaps(out, vocabulary)
    writer = _Writer(out, vocabulary, output, overlays, opacity)
    summary = Summary()
    kept = {each: entry for each in found if (entry := writer.finished(each))} if resume else {}
    todo = [each for each in found if each not in kept]
    written: dict[Found, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        done = len(kept)
        for group in groups(ahead(lambda each: read_image(each.file), todo, workers), segmenter.batch):
            for each, told in _segmented(segmenter, group, task, augment):
                if isinstance(told, ImageError):
                    summary.failed.append({"file": str(each.file), "error": str(told)})
                else:
                    image, segments = told
                    # Reduced here, so that no masks wait in the queue.
                    job = pool.submit(writer.write, each, image, output.reduced(segments))
                    written[each] = job
                    waiting.append(job)
                    if len(waiting) > workers:
                        waiting.popleft().result()
                done += 1
                if progress is not None:
                    progress(done, len(found))
    for each in found:
        if each in kept:
            summary.images.append(kept[each])
        elif each in written:
            summary.images.append(written[each].result())
    output.close()
    write_json(out / "summary.json", summary.as_json())
    return summary


def _segmented(
    segmenter: Segmenter, group: Sequence[tuple[Found, Future[Tensor]]], task: str, augment: bool
) -> Iterator[tuple[Found, tuple[Tensor, Segments] | ImageError]]:
    """Pictures that go through the model together, each with its segments, or with what is wrong with it."""
    images: dict[Found, Tensor] = {}
    for each, reading in group:
        try:
            images[each] = reading.result()
        except ImageError as error:
            yield each, error
    try:
        answers = segmenter.segment_many(
            list(images.values()), task, augment=augment, keys=[each.name for each in images]
        )
    except ImageError as error:
        # Of one, whose masks are in a file that is broken, say.
        if len(group) == 1:
            yield group[0][0], error
            return
        for one in group:
            if one[0] in images:
                yield from _segmented(segmenter, [one], task, augment)
        return
    for (each, image), segments in zip(images.items(), answers, strict=True):
        yield each, (image, segments)


@dataclass(frozen=True)
class _Writer:
    """Writes the files of one picture and tells what the summary says of it. Called from several threads."""

    out: Path
    vocabulary: Vocabulary
    output: Output[Any]
    overlays: bool
    opacity: float

    def write(self, found: Found, image: UInt8[Tensor, "3 H W"], answer: Any) -> dict[str, Any]:
        told = self.output.told(answer)
        entry = self._entry(found, told)
        # The task's own file comes last: where it is, all is.
        if self.overlays:
            draw.write_overlay(self.out / entry["overlay"], self._overlay(image, self.output.shown(answer), told))
        self.output.write(found, answer)
        return entry

    def finished(self, found: Found) -> dict[str, Any] | None:
        """The summary's entry of a picture whose files are all there from an earlier run, else None."""
        if self.overlays and not (self.out / self._name(found)).is_file():
            return None
        told = self.output.finished(found)
        return None if told is None else self._entry(found, told)

    def _overlay(self, image: UInt8[Tensor, "3 H W"], shown: SegmentMap, told: Told) -> Image:
        captioned = self.output.captions
        return draw.explained(draw.to_picture(image), shown, self.vocabulary, self.opacity, captioned, told.shares)

    def _entry(self, found: Found, told: Told) -> dict[str, Any]:
        shares = draw.largest_first(told.shares)
        entry = {
            "file": str(found.file),
            **self.output.files(found),
            "overlay": self._name(found) if self.overlays else None,
            "height": told.size[0],
            "width": told.size[1],
            "classes": {self.vocabulary.names[index]: round(share, 6) for index, share in shares.items()},
        }
        return entry if told.segments is None else entry | {"segments": told.segments}

    def _name(self, found: Found) -> str:
        return f"overlays/{found.name}.jpg"
