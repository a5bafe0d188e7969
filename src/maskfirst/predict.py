"""Pictures on disk, videos and cameras to files of their segments, with reading and writing in the shadow of the model."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from maskfirst import draw
from maskfirst.ahead import ahead, groups
from maskfirst.data.images import ImageError, Readable
from maskfirst.errors import UserError
from maskfirst.files import write_json
from maskfirst.outputs import InstanceFiles, LabelMaps, Output, PanopticFiles, Told
from maskfirst.segmenter import Segmenter
from maskfirst.sources import Part, decoded
from maskfirst.sources.files import Found, find_pictures
from maskfirst.sources.parquet import ENDINGS as TABLES
from maskfirst.sources.tar import ENDINGS as TARS
from maskfirst.sources.video import CAMERA, Camera, Video
from maskfirst.sources.video import ENDINGS as VIDEOS
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
    frames: int | None = None,
) -> Summary:
    """Writes what `task` asks for (see `outputs`), `overlays/NAME.jpg` and `summary.json` into the folder `out`.

    `paths`: files, folders (with all below) and globs; videos by name and cameras (`camera:0`), frame by frame, the first
    `frames` of each. A camera without that ends with SIGINT, as by Ctrl-C, or SIGTERM. `opacity` 0..1 and `colors`, (r, g, b)
    one a class in place of the vocabulary's, are the overlays'. `workers`: threads that read, and as many that write. `resume`
    keeps what an earlier run with the same model has finished. `augment`: test-time augmentation. `progress` is told (done,
    all) pictures. Instances below `least_score`, 0..1, are in COCO's file only. `yolo`: instances as YOLO's polygons, too.
    A file that cannot be read is listed in the summary's `failed`; the rest is done.
    Raises UserError where there is nothing to read or the task is not the model's, DiskError where `out` cannot be written.
    """
    if segmenter.uses_truth:
        raise UserError(
            "this model is told the masks, and finds none: give masks of a file (--masks), places (--points), or another model "
            "whose names these weights should better (predict OTHER --namer THESE)"
        )
    for path in map(str, paths):
        if path.lower().endswith((*TARS, *TABLES)):
            raise UserError(f"{path}: a file of many pictures is segmented to shards; say --shards parquet, or coco")
    out = Path(out)
    summary = Summary()
    cameras = [str(path) for path in paths if str(path).startswith(CAMERA)]
    files = [path for path in paths if str(path) not in cameras]
    own = [out / folder for folder in ("labels", "panoptic", "overlays")]
    found = _with_frames(find_pictures(files, own) if files else [], frames, summary, bool(cameras))
    vocabulary = segmenter.vocabulary if colors is None else replace(segmenter.vocabulary, colors=tuple(colors))
    output: Output[Any]
    if yolo and task != "instance":
        raise UserError(f"YOLO's polygons are of instances, not of the {task} task; choose the task instance")
    if task == "instance":
        output = InstanceFiles(out, vocabulary, least_score, yolo)
    else:
        output = PanopticFiles(out, vocabulary) if task == "panoptic" else LabelMaps(out, vocabulary)
    writer = _Writer(out, vocabulary, output, overlays, opacity)
    kept = {each: entry for each in found if (entry := writer.finished(each))} if resume else {}
    todo = [each for each in found if each not in kept]
    written: dict[Found, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(workers) as pool, _watched(cameras, frames, found) as shown:
        waiting: deque[Future[dict[str, Any]]] = deque()
        done = len(kept)
        for group in groups(
            ahead(lambda given: decoded(given[1]), chain(_read(todo), shown), workers), segmenter.batch
        ):
            given = [(each, reading) for (each, _), reading in group]
            for each, told in _segmented(segmenter, given, task, augment):
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


def _with_frames(found: Sequence[Found], most: int | None, summary: Summary, among: bool) -> list[Found]:
    """The frames of videos in their place; those that cannot be read are in the summary instead.

    Keys are the pictures' own where all are files, and there are none `among` cameras.
    """
    opened: list[Found] = []
    for each in found:
        if each.file.suffix.lower() not in VIDEOS:
            opened.append(each)
            continue
        try:
            count = sum(part.count or 0 for part in Video(each.file).parts(sys.maxsize))
        except UserError as error:
            summary.failed.append({"file": str(each.file), "error": str(error)})
            continue
        opened += [replace(each, name=f"{each.name}/{frame:06d}", frame=frame) for frame in range(count)[:most]]
    pictures = all(each.frame is None for each in opened) and not among
    return opened if pictures else [replace(each, key=key) for key, each in enumerate(opened, 1)]


def _read(found: Sequence[Found]) -> Iterator[tuple[Found, Readable | ImageError]]:
    """Files by their paths, and frames, those of a video one after the other."""
    for (file, of_video), group in groupby(found, lambda each: (each.file, each.frame is not None)):
        if not of_video:
            yield from ((each, file) for each in group)
            continue
        wanted = {each.frame: each for each in group if each.frame is not None}
        first, last = min(wanted), max(wanted)
        for number, item in enumerate(Video(file).read(Part(str(file), first, last - first + 1)), first):
            if number in wanted:
                yield wanted[number], item.picture


@contextmanager
def _watched(
    cameras: Sequence[str], most: int | None, found: list[Found]
) -> Iterator[Iterator[tuple[Found, Readable | ImageError]]]:
    """Frames as they come, each added to what is found; none any more once the process is told to stop."""
    if not cameras:
        yield iter(())
        return
    # Here, as it imports Fabric, which takes as long as a first picture.
    from maskfirst.ranks import StopSignals

    with StopSignals() as stop:

        def frames() -> Iterator[tuple[Found, Readable | ImageError]]:
            for camera in cameras:
                for number, item in enumerate(Camera(camera, most).frames()):
                    name = f"{camera.replace(':', '-')}/{item.name}"
                    found.append(Found(Path(camera), name, len(found) + 1, number))
                    yield found[-1], item.picture
                    if stop.received is not None:
                        return

        yield frames()


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
            **({} if found.frame is None else {"frame": found.frame}),
            **self.output.files(found),
            "overlay": self._name(found) if self.overlays else None,
            "height": told.size[0],
            "width": told.size[1],
            "classes": {self.vocabulary.names[index]: round(share, 6) for index, share in shares.items()},
        }
        return entry if told.segments is None else entry | {"segments": told.segments}

    def _name(self, found: Found) -> str:
        return f"overlays/{found.name}.jpg"
