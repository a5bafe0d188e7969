"""Time and memory in units that travel: a call's time is told in work of a matrix product timed around it.

T.P, GFLOP-equivalents: milliseconds of a call times the rate of the probe, an fp32 product of 1024x768 by 768x3072, as it
was right before and after that call. It says how much of the probe's work fits into the call, on any machine. A busy
machine wants processor time in place of wall time, with one thread: `Clock` of `time.process_time`.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from maskfirst.files import write_json
from maskfirst.optim import parameter_groups
from maskfirst.segmenter import Segmenter
from maskfirst.training import Training
from maskfirst.types import Batch

MIB = 2**20
PROBE = (1024, 768, 3072)
GFLOP = 2 * PROBE[0] * PROBE[1] * PROBE[2] / 1e9
TIMES = 9
"""The probe's rate is the median of so many products."""
Clock = Callable[[], float]
"""Seconds: `time.perf_counter`, or `time.process_time` for one thread on a busy machine."""


class Probe:
    """The matrix product whose rate is the unit."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        rows, inner, columns = PROBE
        self.left, self.right = torch.randn(rows, inner), torch.randn(inner, columns)

    def rate(self) -> float:
        """GFLOP/s, now."""
        seconds = []
        with torch.autocast("cpu", enabled=False):
            for _ in range(TIMES):
                start = self.clock()
                torch.mm(self.left, self.right)
                seconds.append(self.clock() - start)
        return GFLOP / statistics.median(seconds)


@dataclass(frozen=True)
class Timing:
    """One item over all repeats: `work` in GFLOP-equivalents (median, least, most), `ms` and `probe` GFLOP/s (medians)."""

    work: float
    least: float
    most: float
    ms: float
    probe: float
    repeats: int


def interleaved(
    items: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Times the items in turn, round after round, so that a busy spell of the machine meets all; one warm call each first."""
    probe = Probe(clock)
    for run in items.values():
        run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in items}
    for _ in range(repeats):
        for name, run in items.items():
            before = probe.rate()
            start = clock()
            run()
            seconds = clock() - start
            found[name].append((seconds, (before + probe.rate()) / 2))
    return {name: _timing(calls) for name, calls in found.items()}


def _timing(calls: Sequence[tuple[float, float]]) -> Timing:
    work = sorted(seconds * rate for seconds, rate in calls)
    return Timing(
        statistics.median(work),
        work[0],
        work[-1],
        1e3 * statistics.median(seconds for seconds, _ in calls),
        statistics.median(rate for _, rate in calls),
        len(calls),
    )


@dataclass(frozen=True)
class Check:
    """A figure and what it should be at most, or at least."""

    name: str
    value: float
    bound: float
    most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        sign, verdict = ("<=" if self.most else ">="), ("met" if self.met else "MISSED")
        return f"  {self.name:<44}{self.value:9.4g} {sign} {self.bound:<8g}{verdict}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": float(f"{self.value:.4g}"), "bound": self.bound, "met": self.met}


def options(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """What every bench can be told on its command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="processor time of one thread")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    return parser


def by_groups(
    description: str | None,
    repeats: int,
    groups: Sequence[str],
    measure: Callable[[Sequence[str], int, Clock], dict[str, Any]],
) -> None:
    """The command line of a bench whose figures come in groups, `--only` some of them: runs `measure`, writes its JSON."""
    parser = options(description, repeats)
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, help="which groups of figures")
    _written(parser.parse_args(), lambda given, clock: measure(given.only, given.repeats, clock))


def at_once(description: str | None, repeats: int, measure: Callable[[int, Clock], dict[str, Any]]) -> None:
    """The command line of a bench that has no groups: runs `measure`, writes its JSON."""
    _written(options(description, repeats).parse_args(), lambda given, clock: measure(given.repeats, clock))


def _written(arguments: argparse.Namespace, measure: Callable[[argparse.Namespace, Clock], dict[str, Any]]) -> None:
    found = measure(arguments, settle(arguments))
    if arguments.out is not None:
        write_json(arguments.out, found)


def memory_as_json(memory: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, int]]:
    """MiB at most and before, by name, as `peak_memory` tells them."""
    return {name: {"peak_mib": round(peak), "base_mib": round(base)} for name, (peak, base) in memory.items()}


def settle(arguments: argparse.Namespace) -> Clock:
    """Takes the threads that were asked for; returns the clock."""
    torch.set_num_threads(1 if arguments.busy else arguments.threads)
    return time.process_time if arguments.busy else time.perf_counter


def inference(
    run: Callable[[], object], context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Callable[[], object]:
    """`run` without anything kept for a backward pass, inside of a `context` of its own."""

    def call() -> object:
        with torch.inference_mode(), context():
            return run()

    return call


def steps(model: Segmenter, batch: Batch, training: Training) -> Callable[[], object]:
    """One training step a call: forward, losses, backward, optimizer."""
    optimizer = training.optimizer.build(
        parameter_groups(dict(model.named_parameters()), training.optimizer, training.groups)
    )

    def step() -> object:
        optimizer.zero_grad()
        loss = torch.stack(list(model.losses(batch).values())).sum()
        loss.backward()
        optimizer.step()
        return loss

    return step


def peak_memory(make: Callable[..., Callable[[], object]], *args: Any) -> tuple[float, float]:
    """MiB that a process of its own holds at its peak during the third call of `make(*args)()`, and before it.

    Linux only: the peak is the kernel's, reset before the call; imports and weights are part of it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), make, args).result()


def _peak(threads: int, make: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> tuple[float, float]:
    torch.set_num_threads(threads)
    run = make(*args)
    run()
    run()
    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    run()
    return _status("VmHWM"), base


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def hardware() -> dict[str, Any]:
    """What the figures were measured on; `load` is what kept the machine busy in the minute before."""
    cpu: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    flags = cpu.get("flags", "").split()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in known if flag in flags],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def as_json(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """Timings as plain numbers of four digits."""
    return {
        name: {key: float(f"{value:.4g}") for key, value in asdict(timing).items()} for name, timing in timings.items()
    }
