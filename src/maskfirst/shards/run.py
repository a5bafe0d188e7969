"""Pictures without number to shards of segments: planned, shared out, and told of when all is done."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed

from maskfirst import engine, ranks
from maskfirst import weights as files
from maskfirst.errors import UserError
from maskfirst.shards.local import in_processes
from maskfirst.shards.manifest import Form, Made, Manifest, Planned, Receipt, receipt_of
from maskfirst.shards.on_ray import on_ray
from maskfirst.shards.worker import Job, Outcome, Worker, load
from maskfirst.sources import Part
from maskfirst.sources.opened import open_source
from maskfirst.tasks import check_task

SIZE = 1000
"""Pictures of a shard, where its source lets them be counted."""


@dataclass(frozen=True)
class Crew:
    """Who does the parts: `processes` of this machine, or actors at `ray`, an address or `local`.

    Under torchrun each of its processes does its share, and neither is said.
    """

    processes: int | None = None
    ray: str | None = None


@dataclass
class Summary:
    """Of all shards asked for. `kept`: those of an earlier run. `failed`: pictures that could not be read, and whole parts."""

    shards: int = 0
    kept: int = 0
    pictures: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"shards": self.shards, "kept": self.kept, "pictures": self.pictures, "failed": self.failed}

    @property
    def errors(self) -> list[str]:
        """A line for each that failed."""
        return [
            ": ".join(filter(None, (each["key"] and each["source"], each["key"], each["error"])))
            for each in self.failed
        ]

    def add(self, receipt: Receipt, source: str) -> None:
        self.shards += 1
        self.pictures += receipt.pictures
        self.failed += [{"source": source, **each} for each in receipt.failed]


def model_digest(name: str) -> str:
    """The SHA-256 of the weights, or of the .onnx file, at `name`. Raises UserError where there is none."""
    path = Path(name) if engine.is_graph(name) else files.locate(name)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def job_of(
    weights: str,
    out: Path,
    task: str | None,
    form: Form,
    size: int = SIZE,
    augment: bool = False,
    trust: bool = False,
    column: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Job:
    """What workers are told. `task`: None for the model's own. `size`: pictures of a shard, where a source lets itself be cut.

    Raises UserError where the model cannot be loaded, or cannot do the task.
    """
    model = load(weights, "cpu", trust)
    task = task or model.default_task
    check_task(task, model.proposer.tasks, model.vocabulary)
    if model.uses_truth:
        raise UserError("this model is told the masks, and finds none; give another one")
    if augment and task != "semantic":
        raise UserError(f"test-time augmentation is for the semantic task only; leave it out for {task}")
    made = Made(model_digest(weights), task, form, size, augment)
    return Job(weights, trust, str(out), made, column, precision)


def predict_shards(
    job: Job, sources: Sequence[str], crew: Crew, progress: Callable[[int, int], None] | None = None
) -> Summary:
    """Segments the pictures of `sources`, paths or globs, into shards in `job.out`; what an earlier run has done is kept.

    `progress` is told (done, all) shards. Pictures and parts that fail are in the summary, and the rest is done.
    Raises UserError for what stands in the way of all.
    """
    launched = distributed.is_torchelastic_launched()
    if launched and (crew.processes is not None or crew.ray is not None):
        raise UserError("torchrun has started the processes; leave --processes and --ray out")
    if launched:
        ranks.end_with_parent()
    parts, failed = _parts(sources, job)
    manifest = Manifest.plan(Path(job.out), job.made, parts)
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    if rank == 0:
        manifest.write()
    # Shared out by number, not among those that are missing, as another process may be done with one by now.
    ours = [planned for planned in manifest.planned if planned.number % world == rank]
    receipts = {planned.number: receipt_of(manifest.out, job.made.form, planned) for planned in ours}
    summary = Summary(failed=failed if rank == 0 else [])
    for planned in ours:
        if (receipt := receipts[planned.number]) is not None:
            summary.add(receipt, planned.part.source)
            summary.kept += 1
    missing = [planned for planned in ours if receipts[planned.number] is None]
    places = {planned.number: planned.part.source for planned in missing}
    group = ranks.met_under_torchrun() if launched else None
    done = summary.shards
    try:
        for outcome in _outcomes(job, missing, crew, launched):
            if outcome.receipt is not None:
                summary.add(outcome.receipt, places[outcome.number])
            else:
                summary.failed.append({"source": places[outcome.number], "key": "", "error": str(outcome.error)})
            done += 1
            if progress is not None:
                progress(done, len(ours))
        return _met(summary, group)
    finally:
        if launched:
            distributed.destroy_process_group()


def _parts(sources: Sequence[str], job: Job) -> tuple[list[tuple[Part, str]], list[dict[str, str]]]:
    """All parts with their fingerprints, and the sources that cannot be read. Raises UserError where none can."""
    parts: list[tuple[Part, str]] = []
    failed: list[dict[str, str]] = []
    for path in sources:
        try:
            source = open_source(path, job.column)
            parts += [(part, source.fingerprint(part)) for part in source.parts(job.made.size)]
        except UserError as error:
            failed.append({"source": path, "key": "", "error": str(error)})
    if not parts:
        raise UserError(failed[0]["error"])
    return parts, failed


def _outcomes(job: Job, parts: Sequence[Planned], crew: Crew, launched: bool) -> Iterator[Outcome]:
    if not parts:
        return
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    if crew.ray is not None:
        yield from on_ray(job, parts, crew.ray, crew.processes)
    elif crew.processes is not None and crew.processes > 1:
        yield from in_processes(job, parts, crew.processes, devices)
    else:
        device = devices[int(os.environ["LOCAL_RANK"]) % len(devices)] if launched else devices[0]
        worker = Worker(job, device)
        yield from map(worker.attempt, parts)


def _met(summary: Summary, group: distributed.ProcessGroup | None) -> Summary:
    """What all processes have done, in each of them."""
    whole = Summary()
    for each in ranks.gather(summary, group):
        whole.shards += each.shards
        whole.kept += each.kept
        whole.pictures += each.pictures
        whole.failed += each.failed
    return whole
