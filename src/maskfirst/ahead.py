"""Ahead: work on items in threads, a few items ahead of whoever takes the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, Future[R]]]:
    """Each item with its `work`, in order; `workers` threads are at most as many items ahead of the caller.

    Without workers the caller does the work, when it asks for the next item.
    """
    if workers == 0:
        for item in items:
            yield item, _done(work, item)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > workers:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, job in pending:
                job.cancel()


def groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """The items in tuples of `size`, the last one of what is left."""
    rest = iter(items)
    while group := tuple(islice(rest, size)):
        yield group


def _done(work: Callable[[T], R], item: T) -> Future[R]:
    job: Future[R] = Future()
    try:
        job.set_result(work(item))
    except Exception as error:
        job.set_exception(error)
    return job
