"""Worker: a model in a process of its own, which turns parts into shards."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maskfirst import build, engine
from maskfirst.ahead import ahead, groups
from maskfirst.data.images import ImageError
from maskfirst.errors import UserError
from maskfirst.formats import segment_table
from maskfirst.formats.coco_instances import InstancesWriter
from maskfirst.formats.instances import Instances
from maskfirst.formats.segment_table import Notes, Row
from maskfirst.segmenter import Segmenter
from maskfirst.shards.manifest import Made, Planned, Receipt, receipt_of, shard_file, write_receipt
from maskfirst.sources import Item, Source, decoded
from maskfirst.sources.opened import open_source

IDS = 10_000_000
"""COCO's numbers of a shard's pictures begin at this times its own."""
TRIES = 2
"""Times that a part is begun, where the process that does it dies."""


@dataclass(frozen=True)
class Job:
    """What a worker is told once; plain, so that it can be sent. `weights`: as on the command line."""

    weights: str
    trust: bool
    out: str
    made: Made
    column: str | None
    precision: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Outcome:
    """A receipt, or why there is none, for one part."""

    number: int
    receipt: Receipt | None = None
    error: str | None = None

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Outcome":
        receipt = told["receipt"]
        return cls(told["number"], None if receipt is None else Receipt(**receipt), told["error"])


def load(weights: str, device: str, trust: bool) -> Segmenter:
    """The model of weights, or of an .onnx file. Raises UserError."""
    return engine.load(weights, trust) if engine.is_graph(weights) else build.load(weights, device, trust).to(device)


class Worker:
    """Does one part after another."""

    def __init__(self, job: Job, device: str, readers: int = 2) -> None:
        """`readers`: threads that decode pictures. Raises UserError where the model cannot be loaded."""
        self.job, self.device, self.readers = job, device, readers
        self.segmenter = load(job.weights, device, job.trust)
        self._sources: dict[str, Source] = {}

    def attempt(self, planned: Planned) -> Outcome:
        """As `do`, with what is wrong in words."""
        try:
            return Outcome(planned.number, self.do(planned))
        except UserError as error:
            # By another that outlived its command, say, and that has swept this one's half away.
            if (done := receipt_of(Path(self.job.out), self.job.made.form, planned)) is not None:
                return Outcome(planned.number, done)
            return Outcome(planned.number, error=f"{planned.part.source}: {error}")

    def do(self, planned: Planned) -> Receipt:
        """Makes the shard of a part and the receipt that says so, unless both are there. Raises UserError."""
        out, made = Path(self.job.out), self.job.made
        path = shard_file(out, made.form, planned.number)
        if (earlier := receipt_of(out, made.form, planned)) is not None:
            return earlier
        start = time.monotonic()
        source = self._sources.setdefault(planned.part.source, open_source(planned.part.source, self.job.column))
        failed: list[dict[str, str]] = []
        pictures = 0

        def counted() -> Iterator[Row]:
            nonlocal pictures
            for row in self._rows(planned.part.source, source.read(planned.part)):
                pictures += 1
                if isinstance(row.found, ImageError):
                    failed.append({"key": row.key, "error": str(row.found)})
                yield row

        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.job.precision == "bf16"):
            if made.form == "parquet":
                notes = Notes(made.task, self.segmenter.vocabulary.names, made.model)
                segment_table.write(path, counted(), notes)
            else:
                writer = InstancesWriter(path, self.segmenter.vocabulary)
                for index, row in enumerate(counted(), 1):
                    if not isinstance(row.found, ImageError):
                        writer.add(IDS * planned.number + index, row.key, row.found)
                writer.close()
        receipt = Receipt(planned.number, planned.fingerprint, pictures, round(time.monotonic() - start, 3), failed)
        write_receipt(out, receipt)
        # What processes left that died at it; not before, as one may be at it still.
        for half in path.parent.glob(f".{path.name}.*"):
            half.unlink(missing_ok=True)
        return receipt

    def _rows(self, source: str, items: Iterator[Item]) -> Iterator[Row]:
        for group in groups(ahead(lambda item: decoded(item.picture), items, self.readers), self.segmenter.batch):
            images: list[Tensor] = []
            broken: list[ImageError | None] = []
            for _, reading in group:
                try:
                    images.append(reading.result())
                    broken.append(None)
                except ImageError as error:
                    broken.append(error)
            answers = iter(self.segmenter.segment_many(images, self.job.made.task, augment=self.job.made.augment))
            for (item, _), error in zip(group, broken, strict=True):
                yield Row(item.name, source, Instances.of(next(answers)) if error is None else error)
