"""How many pictures fit into memory at once: measured with one and two, and extrapolated."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from maskfirst.errors import UserError
from maskfirst.training import Training

GIB = 2**30
USABLE = 0.85
"""Share of the free memory to plan with: pictures differ in their number of masks, and memory falls into fragments."""
OVERHEAD = 1.5
"""On the CPU, the peak over what is kept for the backward pass alone: gradients and workspaces come on top."""


REMEDY = "take a smaller crop, a smaller model, or precision bf16"


@contextlib.contextmanager
def explained(pictures: int) -> Iterator[None]:
    """Where a GPU's memory runs out inside the block, says so in a sentence. `pictures` are taken at once."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"train.micro: out of memory with {pictures} pictures at once; set it lower, or to auto (--batch auto), or "
            f"{REMEDY}; a run that was saved goes on with --resume"
        ) from error


def settle_micro(
    settings: Training, before: int | None, share: int, run: Callable[[int], object], module: nn.Module, processes: int
) -> int:
    """Pictures that a process puts through the network at once: as asked for, as `before` a resumption, or as many as fit."""
    if settings.micro != "auto":
        return min(settings.micro or share, share)
    if before is not None:
        return min(before, share)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    reserve = settings.optimizer.moments * sum(parameter.nbytes for parameter in trained)
    return largest_micro(run, share, reserve, trained[0].device, processes)


def largest_micro(run: Callable[[int], object], share: int, reserve: int, device: torch.device, processes: int) -> int:
    """Pictures at once, at most `share`, in as few equal passes as the memory allows.

    `run(n)` does forward and backward for n pictures. `reserve`: bytes that will be needed besides (the optimizer's state).
    `processes`: how many share the machine's memory; a GPU is not shared. Raises UserError where not even one picture fits.
    """
    single = _peak(run, 1, device)
    each = max(_peak(run, 2, device) - single, 1) if share > 1 else single
    free = _free(device) // (1 if device.type == "cuda" else processes)
    most = int((free * USABLE - reserve - (single - each)) / each)
    if most < 1:
        raise UserError(
            f"train.micro: one picture needs {(single + reserve) / GIB:.2g} GiB with its gradients and the optimizer, "
            f"of {free / GIB:.2g} GiB free; {REMEDY}"
        )
    passes = -(-share // most)
    # Of several processes one alone may run out, and would leave the others waiting: they rely on the measurement.
    while not distributed.is_initialized() and passes < share:
        try:
            run(-(-share // passes))
            break
        except torch.OutOfMemoryError:
            passes += 1
    return -(-share // passes)


def _peak(run: Callable[[int], object], pictures: int, device: torch.device) -> int:
    """Bytes that `run` needs at its peak, above what is held already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(pictures)
        return torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would hold its own graph in a cycle.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(pictures)
    return int(sum(kept.values()) * OVERHEAD)


def _free(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine and the container it stands for."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    system, most, used = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if system.exists():
        told = dict(line.split(":") for line in system.read_text().splitlines())
        limits.append(int(told["MemAvailable"].split()[0]) * 1024)
    if most.exists() and most.read_text().strip() != "max":
        limits.append(int(most.read_text()) - int(used.read_text()))
    return min(limits)
