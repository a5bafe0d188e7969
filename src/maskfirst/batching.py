"""Batching: work that comes one by one from anywhere is done some at a time by one thread."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class _Job:
    kind: str
    item: Any
    result: Future[Any] = field(default_factory=Future)


class Batcher:
    """What comes in while some is being done is done together next, as far as it is of one kind, first come first served.

    Nothing waits for company: where nobody else asks, one is done at once, alone. Where a batch fails its items are done
    again one by one, so that what is wrong with one stays with it.
    """

    def __init__(self, work: Callable[[str, Sequence[Any]], Sequence[Any]], most: int) -> None:
        """`work` is given a kind and at most `most` items, and returns as many results."""
        self.work, self.most = work, most
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batching", daemon=True)
        self._thread.start()

    def submit(self, kind: str, item: Any) -> Future[Any]:
        """The result that is to come; cancelled before work has begun, no work is done. Raises RuntimeError once closed."""
        job = _Job(kind, item)
        with self._changed:
            if self._closed:
                raise RuntimeError("this batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.result

    def close(self) -> None:
        """Returns when all that was submitted is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            begun = [job for job in jobs if job.result.set_running_or_notify_cancel()]
            if begun:
                self._do(begun)

    def _next(self) -> list[_Job]:
        """The next ones of one kind; none when all is done and no more can come."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            first = self._waiting[0].kind if self._waiting else ""
            jobs = [job for job in self._waiting if job.kind == first][: self.most]
            self._waiting = deque(job for job in self._waiting if job not in jobs)
            return jobs

    def _do(self, jobs: Sequence[_Job]) -> None:
        try:
            results = self.work(jobs[0].kind, [job.item for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
                return
            for job in jobs:
                self._do([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)
