"""One process or many: starts them through Fabric, and lets them agree."""

import contextlib
import logging
import os
import platform
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed

from maskfirst.errors import UserError


@contextlib.contextmanager
def processes(devices: int, nodes: int, precision: Literal["fp32", "bf16"]) -> Iterator[Fabric]:
    """The processes of a run: started here, or found where torchrun or SLURM has started them.

    On a machine without GPUs they talk through gloo. Where this process fails, those it has started end too.
    """
    if distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    # Its greetings ("Initializing distributed ...", "Using bfloat16 ...") say nothing that a user has not asked for.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Where SLURM is installed, it is a choice not to start through srun.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        try:
            fabric = Fabric(
                devices=devices,
                num_nodes=nodes,
                strategy="ddp" if devices * nodes > 1 else "auto",
                precision="bf16-mixed" if precision == "bf16" else "32-true",
            )
            fabric.launch()
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise UserError(f"--devices {devices} --nodes {nodes}: {error}") from error
    try:
        yield fabric
    except BaseException:
        # Only the launcher that starts scripts again has processes; the others belong to torchrun or SLURM.
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.kill()
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()


def multiplies_bf16() -> bool:
    """Whether what a run would run on has instructions for products of bf16.

    By others they take some 70 times as long as fp32's (AVX2, torch 2.14).
    """
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mean(values: Tensor) -> Tensor:
    """`values` averaged over the processes."""
    return total(values) / (distributed.get_world_size() if distributed.is_initialized() else 1)


def total(values: Tensor) -> Tensor:
    """`values` summed over the processes, on the device where they were."""
    if not distributed.is_initialized():
        return values
    # NCCL knows GPUs only.
    held = values.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(held)
    return held.to(values.device)


def gather(value: Any, group: distributed.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every process, in the order of their ranks. Returns when all have come here. `group`: None for all."""
    values = [value] * (distributed.get_world_size(group) if distributed.is_initialized() else 1)
    if distributed.is_initialized():
        distributed.all_gather_object(values, value, group)
    return values


def met_under_torchrun() -> distributed.ProcessGroup:
    """The processes that torchrun has started, once all are here; in this group they wait for each other as long as it takes.

    Raises UserError where torchrun, or a process, is gone.
    """
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # Or each would wait for what torchrun keeps for all.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=10).close()
        distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
    except (OSError, RuntimeError) as error:
        raise UserError(f"torchrun, or a process that it has started, is gone: {error}") from error
    assert isinstance(group, distributed.ProcessGroup)
    return group


def end_with_parent(every: float = 1.0) -> None:
    """From now on this process ends, as by SIGKILL, within `every` seconds of the end of the one that has started it.

    What torchrun has started goes on without it, and would wait for others that are gone. Not on Windows, where a process keeps
    the number of a parent that has ended.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class StopSignals:
    """Takes note of SIGTERM and SIGINT inside the block; a second signal acts as it did before."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python gives signals to the main thread only; a training in another one ends with its process.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()


def hardware(fabric: Fabric) -> str:
    """What a run runs on, in words."""
    if fabric.device.type == "cuda":
        return f"{fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}"
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        told = (line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name"))
        name = next(told, name)
    return f"{name}, {fabric.world_size} x {torch.get_num_threads()} threads"
