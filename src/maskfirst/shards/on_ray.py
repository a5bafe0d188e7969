"""Parts done by actors of a Ray cluster, through Ray Data, which starts anew what dies.

Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from maskfirst.errors import UserError
from maskfirst.shards.manifest import Planned
from maskfirst.shards.worker import Job, Outcome, Worker

LOCAL = "local"
"""In place of an address: a cluster of this machine, which ends with this process."""


class Actor:
    """A worker as Ray Data wants it: a batch of one part becomes one of its outcome, both as JSON."""

    def __init__(self, job: Job) -> None:
        import torch

        self.worker = Worker(job, "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (planned,) = batch["item"]
        return {"item": [json.dumps(asdict(self.worker.attempt(Planned.of(json.loads(planned)))))]}


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
    local = address == LOCAL
    try:
        ray.init(address="local" if local else address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
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
            fn_constructor_args=(job,),
            batch_size=1,
            concurrency=hired,
            num_cpus=0 if gpus else 1,
            num_gpus=min(1.0, gpus / hired) if gpus else 0,
        )
        for row in done.iter_rows():
            yield Outcome.of(json.loads(row["item"]))
    finally:
        ray.shutdown()
