"""Processes of this machine that do parts; one that dies costs the part in its hand, which is done again by another."""

import contextlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from maskfirst.errors import UserError
from maskfirst.shards.manifest import Planned
from maskfirst.shards.worker import TRIES, Job, Outcome, Worker

DEAD = 3
"""Processes that die one after the other, with nothing done between, after which all ends."""


@dataclass(frozen=True, eq=False)
class _Hand:
    process: BaseProcess
    pipe: Connection
    device: str


def in_processes(job: Job, parts: Sequence[Planned], count: int, devices: Sequence[str]) -> Iterator[Outcome]:
    """The outcomes of all parts, as they come, by `count` processes that share the `devices` out.

    Raises UserError where the model cannot be loaded, or where one process after another dies.
    """
    waiting, tries, dead = deque(parts), Counter[int](), 0
    threads = max(1, torch.get_num_threads() // count)
    busy: dict[Connection, tuple[_Hand, Planned]] = {}
    idle: list[_Hand] = []
    try:
        free = [devices[index % len(devices)] for index in range(min(count, len(parts)))]
        while waiting or busy:
            while waiting and (idle or free):
                hand = idle.pop() if idle else _hired(job, free.pop(), threads)
                planned = waiting.popleft()
                tries[planned.number] += 1
                busy[hand.pipe] = (hand, planned)
                # One that is dead already shows below, when its pipe ends.
                with contextlib.suppress(OSError):
                    hand.pipe.send(planned)
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                hand, planned = busy.pop(pipe)
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    hand.process.join()
                    pipe.close()
                    free.append(hand.device)
                    how = _ending(hand.process.exitcode)
                    dead += 1
                    if dead >= DEAD:
                        raise UserError(f"{dead} processes {how}, one after the other; {planned.part.source}") from None
                    if tries[planned.number] < TRIES:
                        waiting.appendleft(planned)
                    else:
                        sentence = f"{planned.part.source}: not done: the process that did it {how}, {TRIES} times"
                        yield Outcome(planned.number, error=sentence)
                    continue
                if isinstance(told, str):
                    raise UserError(told)
                dead = 0
                idle.append(hand)
                yield told
    finally:
        # Nothing is in the hands of the idle ones, and of the others there are only where all ends early.
        for hand in (*idle, *(hand for hand, _ in busy.values())):
            hand.process.kill()
            hand.process.join()
            hand.pipe.close()


def _hired(job: Job, device: str, threads: int) -> _Hand:
    # Spawned: a forked process would inherit threads' locks and a GPU's context.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job, device, threads), daemon=True)
    process.start()
    # Or the pipe would not end with the process.
    theirs.close()
    return _Hand(process, ours, device)


def _work(pipe: Connection, job: Job, device: str, threads: int) -> None:
    # Ctrl-C is for the one who hired, who ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        worker = Worker(job, device)
    except UserError as error:
        pipe.send(str(error))
        return
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(worker.attempt(pipe.recv()))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (", as by a system out of memory" if name == "SIGKILL" else "")
    return f"ended by itself with {code}"
