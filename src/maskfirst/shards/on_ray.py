"""Parts done by actors of a Ray cluster, through Ray Data, which starts anew what dies.

Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018.
"""

import json
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskfirst.errors import UserError
from maskfirst.files import write_aside
from maskfirst.shards.manifest import Planned
from maskfirst.shards.worker import TRIES, Job, Outcome, Worker

LOCAL = "local"
"""In place of an address: a cluster of this machine, which ends with this process."""
PATIENCE = 10.0
"""Seconds that an address may take to answer. Ray itself waits for more than ten minutes."""


class Actor:
    """A worker as Ray Data wants it: a batch of one part becomes one of its outcome, both as JSON."""

    def __init__(self, job: Job, run: str) -> None:
        """`run`: what the attempts of this run are told from those of others by."""
        import torch

        self.worker = Worker(job, "cuda" if torch.cuda.is_available() else "cpu")
        self.begun = Path(job.out) / "begun" / run

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (told,) = batch["item"]
        return {"item": [json.dumps(asdict(self._attempt(Planned.of(json.loads(told)))))]}

    def _attempt(self, planned: Planned) -> Outcome:
        # Ray begins what has killed an actor again and again, so that it is counted where the next one sees it.
        begun = self.begun / str(planned.number)
        tries = int(begun.read_text()) if begun.is_file() else 0
        if tries == TRIES:
            sentence = f"{planned.part.source}: not done: the process that did it died, {TRIES} times"
            return Outcome(planned.number, error=sentence)
        with write_aside(begun) as aside:
            aside.write_text(str(tries + 1))
        outcome = self.worker.attempt(planned)
        begun.unlink()
        return outcome


def on_ray(job: Job, parts: Sequence[Planned], address: str, count: int | None) -> Iterator[Outcome]:
    """The outcomes of all parts, as they come, by `count` actors; None: one a GPU of the cluster, or else one a CPU.

    Weights, sources and `job.out` are paths that every machine of the cluster sees. Raises UserError where Ray is missing or
    the cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'maskfirst[scale]'") from error
    local, run = address == LOCAL, uuid.uuid4().hex
    try:
        _require_answer(address)
        ray.init(address="local" if local else address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster there: {' '.join(str(error).split())}") from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        hired = min(count or gpus or int(resources.get("CPU", 1)), len(parts))
        data: Any = ray.data
        data.DataContext.get_current().enable_progress_bars = False
        table = data.from_items([{"item": json.dumps(asdict(each))} for each in parts], override_num_blocks=len(parts))
        done = table.map_batches(
            Actor,
            fn_constructor_args=(job, run),
            batch_size=1,
            concurrency=hired,
            num_cpus=0 if gpus else 1,
            num_gpus=min(1.0, gpus / hired) if gpus else 0,
        )
        for row in done.iter_rows():
            yield Outcome.of(json.loads(row["item"]))
    finally:
        shutil.rmtree(Path(job.out) / "begun" / run, ignore_errors=True)
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raises OSError where nothing listens at an address of the form HOST:PORT, which may have a scheme before it."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
