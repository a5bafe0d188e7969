"""Shards whose makers are killed: `python -m bench.kills`, saved with the hardware.

Tars of scenes of 90 x 120 px are segmented by `maskfirst predict camvid-small --shards parquet` with two processes, two actors
of Ray, and two processes of torchrun. Every few seconds SIGKILL ends one that works, the command itself, or the command with
all that it has begun, as where a machine fails; it is given again until it ends well. Then every picture must be there once,
with the segments of a run in which nobody died, no shard that had its receipt may have been made anew, and no process may have
outlived its command. Linux only.
"""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measure import Check, hardware, options, settle
from bench.shards import MODEL
from maskfirst.data.images import ImageError
from maskfirst.data.shapes import Shapes
from maskfirst.draw import to_picture
from maskfirst.files import write_json
from maskfirst.formats import segment_table
from maskfirst.formats.segment_table import Row

SIZE = (90, 120)
PROGRAM = str(Path(sys.executable).with_name("maskfirst"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
LONGEST = 60
"""Times that the command is given before it is taken for one that never ends."""
PAUSE = (0.5, 4.0)
"""Seconds between the first shard of a run, or the last kill, and a kill, at least and at most."""
KINDS = ("worker", "command", "worker", "machine", "worker", "start")
"""What is killed, in turn; `start`: the command, as soon as it has workers, which have done nothing yet."""


@dataclass(frozen=True)
class Way:
    """How the work is done: what is begun, with which options, and what in its command line tells a worker."""

    start: tuple[str, ...]
    options: tuple[str, ...]
    worker: str

    def command(self, tars: Sequence[str], out: Path) -> list[str]:
        given = ("predict", MODEL, *tars, "--shards", "parquet", "--out", str(out), "--json")
        return [*self.start, *given, *self.options]


WAYS = {
    "2 processes": Way((PROGRAM,), ("--processes", "2"), "multiprocessing.spawn"),
    "2 actors of Ray": Way((PROGRAM,), ("--ray", "local", "--processes", "2"), "ray::MapWorker"),
    "torchrun, 2 processes": Way((TORCHRUN, "--nproc-per-node", "2", "--no-python", PROGRAM), (), f"{PROGRAM} predict"),
}


@dataclass
class Story:
    """What has happened in one way. `killed`: of each kind; `kept`: shards that had a receipt at a kill; `seconds`: of all."""

    runs: int = 0
    killed: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    """Reads the command line, measures, prints, writes."""
    parser = options(__doc__, 1)
    parser.add_argument("--tars", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=20, help="in each tar")
    parser.add_argument("--kills", type=int, default=12, help="in each way")
    given = parser.parse_args()
    settle(given)
    told: dict[str, Any] = {}
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tars = [write(place / f"{number:03d}.tar", number, given.pictures) for number in range(given.tars)]
        start = time.perf_counter()
        subprocess.run(
            WAYS["2 processes"].command(tars, place / "calm"), env=environment(), check=True, capture_output=True
        )
        calm = round(time.perf_counter() - start, 1)
        right = rows(place / "calm")
        print(f"nobody killed, 2 processes: {len(right)} pictures in {calm} s", flush=True)
        for number, (name, way) in enumerate(WAYS.items()):
            out = place / str(number)
            story = attacked(way, tars, out, given.kills)
            story.faults += differences(rows(out), right)
            told[name] = asdict(story)
            checks += [
                Check(f"{name}: kills", sum(story.killed.values()), given.kills, most=False),
                Check(f"{name}: faults", len(story.faults), 0),
            ]
            print(f"{name}: {told[name]}", flush=True)
    print(*checks, sep="\n")
    if given.out:
        content = {"model": MODEL, "size": SIZE, "tars": given.tars, "pictures": given.pictures, "calm_seconds": calm}
        checked = [each.as_json() for each in checks]
        write_json(given.out, {"hardware": hardware(), **content, "ways": told, "checks": checked})


def write(path: Path, seed: int, count: int) -> str:
    """A tar of scenes, all of them unlike."""
    scenes = Shapes("val", (seed + 1) * count, SIZE)
    with tarfile.open(path, "w") as tar:
        for index in range(seed * count, (seed + 1) * count):
            file = io.BytesIO()
            to_picture(scenes[index].image).save(file, "JPEG", quality=92)
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    return str(path)


def environment() -> dict[str, str]:
    """One thread a worker, by which the numbers of all are the same."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def attacked(way: Way, tars: Sequence[str], out: Path, kills: int) -> Story:
    """Gives the command until it ends well, and kills what does the work meanwhile, so many times."""
    story, chance = Story(), random.Random(0)
    kept: dict[str, int] = {}
    seen: dict[int, str] = {}
    start, ended = time.perf_counter(), ""
    while story.runs < LONGEST:
        story.runs += 1
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                way.command(tars, out), env=environment(), stdout=log, stderr=log, start_new_session=True
            )
            before = receipts(out)
            while process.poll() is None and (number := sum(story.killed.values())) < kills:
                begun = dict(descendants(process.pid))
                seen |= begun
                ready = any(way.worker in command for command in begun.values())
                kind = KINDS[number % len(KINDS)]
                if not ready or (kind != "start" and not receipts(out) - before):
                    time.sleep(0.2)
                    continue
                if kind != "start":
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(chance.uniform(*PAUSE))
                        break
                kept = {name: shard(out, name) for name in receipts(out)} | kept
                if kill(way, process, kind, chance):
                    story.killed[kind] = story.killed.get(kind, 0) + 1
            process.wait()
            log.seek(0)
            ended = log.read().decode(errors="replace")
        if process.returncode == 0:
            break
    else:
        story.faults.append(f"not done after {LONGEST} runs: {ended[-500:]}")
    story.seconds = round(time.perf_counter() - start, 1)
    story.faults += [f"{command[:60]} has outlived its command" for command in left(seen)]
    story.kept = len(kept)
    story.faults += [f"shard {name} was made again" for name, time in kept.items() if shard(out, name) != time]
    return story


def shard(out: Path, name: str) -> int:
    """When the shard of this name was written, ns."""
    return (out / "shards" / f"{name}.parquet").stat().st_mtime_ns


def receipts(out: Path) -> set[str]:
    """The names of the shards that are done."""
    return {path.stem for path in (out / "receipts").glob("[0-9]*.json")}


def kill(way: Way, process: subprocess.Popen[bytes], kind: str, chance: random.Random) -> bool:
    """Ends something by SIGKILL; says whether there was anything of that kind."""
    begun = dict(descendants(process.pid))
    workers = [one for one, command in begun.items() if way.worker in command]
    if not workers:
        return False
    chosen = {"worker": [chance.choice(workers)], "machine": [process.pid, *begun]}.get(kind, [process.pid])
    for one in chosen:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    return True


def descendants(process: int) -> Iterator[tuple[int, str]]:
    """Whatever a process has begun, and what that has begun, each with its command line."""
    # It may end while it is looked at.
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                yield child, said(child)
                yield from descendants(child)


def left(seen: Mapping[int, str], seconds: float = 60) -> list[str]:
    """Command lines of the processes that are still there after so many seconds."""
    end = time.monotonic() + seconds
    while found := [command for one, command in seen.items() if command and said(one) == command]:
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return found


def said(process: int) -> str:
    """Its command line, or nothing where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def rows(out: Path) -> list[Row]:
    """Of all shards, in their order."""
    return [row for file in sorted((out / "shards").glob("[0-9]*.parquet")) for row in segment_table.read(file)]


def differences(found: Sequence[Row], right: Sequence[Row]) -> list[str]:
    """A line for each picture that is missing, there twice, or other than it should be."""
    counts = Counter(row.key for row in found)
    faults = [f"{row.key} is there {counts[row.key]} times" for row in right if counts[row.key] != 1]
    answers = {row.key: row.found for row in found}
    for row in right:
        one, other = row.found, answers.get(row.key)
        assert not isinstance(one, ImageError)
        if other is None:
            continue
        if isinstance(other, ImageError):
            faults.append(f"{row.key}: {other}")
        elif not (torch.equal(one.segments.masks, other.segments.masks) and torch.equal(one.classes, other.classes)):
            faults.append(f"{row.key} has other segments")
    return faults


if __name__ == "__main__":
    main()
