"""The server beside the bare model: `python -m bench.serve`, saved with the hardware.

A scene of 360 x 480 px as a JPEG goes to `maskfirst serve camvid-small` from 1, 8 and 64 clients, each of which asks again as
soon as it is answered. Told are pictures a second as a share of what the bare model does in a loop, measured before and after
each, how long answers take, and the server's memory while it answers `--requests` of a smaller scene. Needs two idle cores for
figures that compare, and some minutes.
"""

import io
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from bench.measure import Check, hardware, options, settle
from maskfirst import build
from maskfirst.data.shapes import Shapes
from maskfirst.draw import to_picture
from maskfirst.files import write_json
from maskfirst.segmenter import Segmenter

MODEL, SIZE, SMALLER = "camvid-small", (360, 480), (90, 120)
CLIENTS = (1, 8, 64)


def main() -> None:
    """Reads the command line, measures, prints, writes."""
    parser = options(__doc__, 3)
    parser.add_argument("--requests", type=int, default=5000, help="while the memory is watched")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    given = parser.parse_args()
    settle(given)
    image = Shapes("val", 1, SIZE)[0].image
    body, smaller = encoded(image), encoded(Shapes("val", 1, SMALLER)[0].image)
    model = build.load(MODEL)
    told: dict[str, Any] = {}
    with served(given.threads) as (port, process):
        for clients in CLIENTS:
            rounds = [round_of(model, image, port, body, clients, given.seconds) for _ in range(given.repeats)]
            told[f"{clients} clients"] = middle(rounds)
            print(f"{clients:>3} clients: {told[f'{clients} clients']}", flush=True)
        memory = watched(port, smaller, process.pid, given.requests)
    print(f"memory, MiB, over {given.requests} requests: {memory}")
    checks = [
        Check("share of the bare model's rate with 8 clients", told["8 clients"]["share"], 0.9, most=False),
        Check("MiB more at the end than after a tenth", memory["end"] - memory["after a tenth"], 64),
    ]
    print(*checks, sep="\n")
    if given.out:
        content = {"model": MODEL, "size": SIZE, "clients": told, "memory_mib": memory, "requests": given.requests}
        write_json(given.out, {"hardware": hardware(), **content, "checks": [each.as_json() for each in checks]})


def encoded(image: Any) -> bytes:
    """As a JPEG."""
    file = io.BytesIO()
    to_picture(image).save(file, "JPEG", quality=92)
    return file.getvalue()


@contextmanager
def served(threads: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The server in a process of its own; its port."""
    command = [
        sys.executable,
        "-c",
        "from maskfirst.cli import main; main()",
        "serve",
        MODEL,
        "--port",
        "0",
        "--requests",
        "128",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        try:
            yield port, process
        finally:
            process.terminate()


def round_of(model: Segmenter, image: Any, port: int, body: bytes, clients: int, seconds: float) -> dict[str, float]:
    """Pictures a second, bare before and after, and the seconds that answers took."""
    before = bare(model, image, seconds / 3)
    start = time.perf_counter()
    took = asked(port, body, clients, start + seconds)
    rate = len(took) / (time.perf_counter() - start)
    after = bare(model, image, seconds / 3)
    took.sort()
    return {
        "share": rate / ((before + after) / 2),
        "pictures_per_second": rate,
        "p50_ms": 1000 * took[len(took) // 2],
        "p99_ms": 1000 * took[min(len(took) - 1, len(took) * 99 // 100)],
    }


def bare(model: Segmenter, image: Any, seconds: float) -> float:
    """Pictures a second of the model in a loop."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not count:
        model.segment(image)
        count += 1
    return count / (time.perf_counter() - start)


def asked(port: int, body: bytes, clients: int, end: float, most: int | None = None) -> list[float]:
    """Seconds of each answer to clients that ask until `end`, or until there are `most`."""
    left, lock = [sys.maxsize if most is None else most], threading.Lock()

    def client(_: int) -> list[float]:
        took: list[float] = []
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() < end:
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    break
            start = time.perf_counter()
            connection.request("POST", "/predict", body, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            took.append(time.perf_counter() - start)
        connection.close()
        return took

    with ThreadPoolExecutor(clients) as pool:
        return [each for part in pool.map(client, range(clients)) for each in part]


def watched(port: int, body: bytes, process: int, requests: int) -> dict[str, float]:
    """Resident MiB of the server after a tenth, at most, and at the end."""
    seen = []
    for _ in range(10):
        asked(port, body, 8, float("inf"), requests // 10)
        seen.append(resident(process))
    return {"after a tenth": seen[0], "most": max(seen), "end": seen[-1]}


def resident(process: int) -> float:
    """MiB."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: float(f"{statistics.median(each[key] for each in rounds):.4g}") for key in rounds[0]}


if __name__ == "__main__":
    main()
