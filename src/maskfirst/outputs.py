"""What is written of a segmented picture beside its overlay: a label map, or COCO's panoptic or instance files and YOLO's."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import yaml
from PIL.PngImagePlugin import PngImageFile

from maskfirst import draw
from maskfirst.data.images import read_label_map
from maskfirst.files import write_aside, write_json
from maskfirst.formats import coco_instances, coco_panoptic, rle
from maskfirst.formats import yolo as yolo_files
from maskfirst.formats.instances import Instances
from maskfirst.frames import Size
from maskfirst.sources.files import Found
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary

T = TypeVar("T")
SOURCE = "Source"
"""The note in a PNG that says what it was made from."""
SEGMENTS = "Segments"
"""The note in a panoptic PNG that has what the JSON says of it, so that a run can be resumed."""


@dataclass(frozen=True)
class Told:
    """What the summary says of a picture. `shares`: 0..1 by class; `segments`: class, score, share and box of each, if told."""

    size: Size
    shares: Mapping[int, float]
    segments: Sequence[Mapping[str, Any]] | None = None


class Output(ABC, Generic[T]):
    """The files of one task; all but `reduced` is called from many threads."""

    task: str
    captions: bool
    """Whether names and scores are written on the segments of an overlay."""

    @abstractmethod
    def files(self, found: Found) -> dict[str, str]:
        """The files of a picture by what they are, below the output folder."""

    @abstractmethod
    def reduced(self, segments: Segments) -> T:
        """What of an answer waits to be written, so that no masks do."""

    @abstractmethod
    def shown(self, answer: T) -> SegmentMap:
        """What an overlay shows."""

    @abstractmethod
    def told(self, answer: T) -> Told:
        """What the summary says."""

    @abstractmethod
    def write(self, found: Found, answer: T) -> None:
        """Writes the files of one picture, the one that `finished` looks for last. Raises DiskError."""

    @abstractmethod
    def finished(self, found: Found) -> Told | None:
        """Of a picture that an earlier run has written, what it told; it is then part of this run. Else None."""

    @abstractmethod
    def close(self) -> None:
        """Writes the files that speak of all pictures. Raises DiskError."""


class LabelMaps(Output[SegmentMap]):
    """`labels/NAME.png`: a class a pixel."""

    task, captions = "semantic", False

    def __init__(self, out: Path, vocabulary: Vocabulary) -> None:
        self.out, self.vocabulary = out, vocabulary

    def files(self, found: Found) -> dict[str, str]:
        return {"labels": f"labels/{found.name}.png"}

    def reduced(self, segments: Segments) -> SegmentMap:
        return SegmentMap.of(segments)

    def shown(self, answer: SegmentMap) -> SegmentMap:
        return answer

    def told(self, answer: SegmentMap) -> Told:
        return self._told(self._labels(answer))

    def write(self, found: Found, answer: SegmentMap) -> None:
        labels = torch.from_numpy(self._labels(answer))
        notes = {SOURCE: found.source(self.task)}
        draw.write_label_map(self.out / self.files(found)["labels"], labels, self.vocabulary, notes)

    def finished(self, found: Found) -> Told | None:
        path = self.out / self.files(found)["labels"]
        if _notes(path).get(SOURCE) != found.source(self.task):
            return None
        try:
            values = read_label_map(path)
        except ValueError:
            return None
        labels = values.astype(np.int32)
        labels[labels == np.iinfo(values.dtype).max] = VOID
        return self._told(labels) if labels.max() < len(self.vocabulary) else None

    def close(self) -> None:
        """Nothing speaks of all pictures but the summary."""

    def _labels(self, answer: SegmentMap) -> np.ndarray:
        classes = np.append(answer.classes.numpy(), VOID).astype(np.int32)
        return classes.take(answer.ids.numpy(), mode="wrap")

    def _told(self, labels: np.ndarray) -> Told:
        counts = np.bincount(labels.ravel() + 1, minlength=len(self.vocabulary) + 1)[1:].tolist()
        return Told(labels.shape, {index: count / labels.size for index, count in enumerate(counts) if count})


class PanopticFiles(Output[SegmentMap]):
    """`panoptic.json` and `panoptic/NAME.png`, in COCO's format."""

    task, captions = "panoptic", True

    def __init__(self, out: Path, vocabulary: Vocabulary) -> None:
        self.out, self.vocabulary = out, vocabulary
        self.writer = coco_panoptic.PanopticWriter(out / "panoptic.json", vocabulary)

    def files(self, found: Found) -> dict[str, str]:
        return {"panoptic": f"panoptic/{found.name}.png"}

    def reduced(self, segments: Segments) -> SegmentMap:
        return SegmentMap.of(segments)

    def shown(self, answer: SegmentMap) -> SegmentMap:
        return answer

    def told(self, answer: SegmentMap) -> Told:
        size = (answer.ids.shape[0], answer.ids.shape[1])
        return self._told(size, coco_panoptic.records(answer, self.vocabulary))

    def write(self, found: Found, answer: SegmentMap) -> None:
        told = json.dumps(coco_panoptic.records(answer, self.vocabulary))
        notes = {SOURCE: found.source(self.task), SEGMENTS: told}
        self.writer.add(found.key, found.file_name, answer, notes)

    def finished(self, found: Found) -> Told | None:
        path = self.out / self.files(found)["panoptic"]
        notes = _notes(path)
        if notes.get(SOURCE) != found.source(self.task):
            return None
        try:
            height, width = read_label_map(path, colors=True).shape
            records = json.loads(notes[SEGMENTS])
            told = self._told((height, width), records)
        except (ValueError, KeyError, TypeError):
            return None
        self.writer.add_records(found.key, found.file_name, told.size, records)
        return told

    def close(self) -> None:
        self.writer.close()

    def _told(self, size: Size, records: Sequence[Mapping[str, Any]]) -> Told:
        shares: dict[int, float] = {}
        for record in records:
            index = self.vocabulary.ids.index(record["category_id"])
            shares[index] = shares.get(index, 0) + record["area"] / (size[0] * size[1])
        return Told(size, shares, _segments(size, records, self.vocabulary))


class InstanceFiles(Output[Instances]):
    """`instances.json` in COCO's format, the same of each picture in `instances/NAME.json`, and with `yolo` `yolo/NAME.txt`.

    COCO's files have every instance; overlays, the summary and YOLO's, which knows no scores, those from `least` on.
    """

    task, captions = "instance", True

    def __init__(self, out: Path, vocabulary: Vocabulary, least: float, yolo: bool) -> None:
        self.out, self.vocabulary, self.least, self.yolo = out, vocabulary, least, yolo
        self.writer = coco_instances.InstancesWriter(out / "instances.json", vocabulary)

    def files(self, found: Found) -> dict[str, str]:
        polygons = {"yolo": f"yolo/{found.name}.txt"} if self.yolo else {}
        return {"instances": f"instances/{found.name}.json"} | polygons

    def reduced(self, segments: Segments) -> Instances:
        return Instances.of(segments)

    def shown(self, answer: Instances) -> SegmentMap:
        sure = answer[answer.scores >= self.least]
        # The smaller in front; put in order while compressed, as torch would start threads of its own to move masks.
        return SegmentMap.of(sure[rle.area(sure.rles).argsort(descending=True, stable=True)].segments)

    def told(self, answer: Instances) -> Told:
        return self._told(answer.size, coco_instances.records(answer, self.vocabulary))

    def write(self, found: Found, answer: Instances) -> None:
        files, records = self.files(found), coco_instances.records(answer, self.vocabulary)
        if self.yolo:
            yolo_files.write(self.out / files["yolo"], answer[answer.scores >= self.least])
        self.writer.add_records(found.key, found.file_name, answer.size, records)
        height, width = answer.size
        content = {"source": found.source(self.task), "height": height, "width": width, "annotations": records}
        write_json(self.out / files["instances"], content)

    def finished(self, found: Found) -> Told | None:
        files = self.files(found)
        if not all((self.out / file).is_file() for file in files.values()):
            return None
        try:
            content = json.loads((self.out / files["instances"]).read_text(encoding="utf-8"))
            if content["source"] != found.source(self.task):
                return None
            told = self._told((content["height"], content["width"]), content["annotations"])
        except (ValueError, KeyError, TypeError):
            return None
        self.writer.add_records(found.key, found.file_name, told.size, content["annotations"])
        return told

    def close(self) -> None:
        self.writer.close()
        if self.yolo:
            with write_aside(self.out / "yolo.yaml") as aside:
                names = {"names": dict(enumerate(self.vocabulary.names))}
                aside.write_text(yaml.safe_dump(names, allow_unicode=True, sort_keys=False), encoding="utf-8")

    def _told(self, size: Size, records: Sequence[Mapping[str, Any]]) -> Told:
        sure = [record for record in records if record["score"] >= self.least and record["area"]]
        masks: dict[int, list[rle.Rle]] = {}
        for record in sure:
            masks.setdefault(self.vocabulary.ids.index(record["category_id"]), []).append(record["segmentation"])
        shares = {index: rle.area([rle.union(each)]).item() / (size[0] * size[1]) for index, each in masks.items()}
        return Told(size, shares, _segments(size, sure, self.vocabulary))


def _segments(size: Size, records: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """What the summary says of each record of COCO's."""
    segments = []
    for record in records:
        left, top, width, height = record["bbox"]
        segments.append(
            {
                "class": vocabulary.names[vocabulary.ids.index(record["category_id"])],
                "score": round(record["score"], 4),
                "share": round(record["area"] / (size[0] * size[1]), 6),
                "box": [int(left), int(top), int(left + width), int(top + height)],
            }
        )
    return segments


def _notes(path: Path) -> Mapping[Any, Any]:
    """The notes of a PNG, none where there is no such file or it is damaged."""
    try:
        with PngImageFile(path) as png:
            return png.info
    except (OSError, SyntaxError, ValueError):
        return {}
