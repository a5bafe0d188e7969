"""Many pictures beside the bare model: `python -m bench.shards`, saved with the hardware.

Scenes of 180 x 240 px, as JPEGs in a folder and in tars, are segmented by `maskfirst predict camvid-small` to label maps, and
half of them to Parquet shards by one process and two, and by one actor of Ray and two. Told are pictures a second, of all that
a command takes, as a share of what the bare model does with the same scenes in a loop of one thread around it. Needs two idle
cores for figures that compare.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import Check, hardware, options, settle
from maskfirst import build
from maskfirst.data.shapes import Shapes
from maskfirst.draw import to_picture
from maskfirst.files import write_json

MODEL, SIZE, TARS = "camvid-small", (180, 240), 8
SHARDED = ("--shards", "parquet")
WAYS: dict[str, tuple[str, ...]] = {
    "label maps": ("--no-overlays",),
    "shards, 1 process": SHARDED,
    "shards, 2 processes": (*SHARDED, "--processes", "2"),
    "shards, 1 actor of Ray": (*SHARDED, "--ray", "local", "--processes", "1"),
    "shards, 2 actors of Ray": (*SHARDED, "--ray", "local", "--processes", "2"),
}


def main() -> None:
    """Reads the command line, measures, prints, writes."""
    parser = options(__doc__, 1)
    parser.add_argument("--pictures", type=int, default=2000)
    given = parser.parse_args()
    settle(given)
    model = build.load(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = write(place, given.pictures)
        tars = sorted(map(str, place.glob("*.tar")))[: TARS // 2]
        told: dict[str, Any] = {}
        for name, more in WAYS.items():
            shares, rates = [], []
            source, count = (
                (tars, given.pictures // 2) if SHARDED[0] in more else ([str(place / "pictures")], given.pictures)
            )
            for number in range(given.repeats):
                before = bare(model, images)
                rates.append(count / seconds([MODEL, *source, "--out", str(place / f"{name} {number}"), *more]))
                shares.append(2 * rates[-1] / (before + bare(model, images)))
            told[name] = {
                "pictures": count,
                "share": round(statistics.median(shares), 3),
                "pictures_per_second": round(statistics.median(rates), 2),
            }
            print(f"{name}: {told[name]}", flush=True)
    two = told["shards, 2 actors of Ray"]["share"] / told["shards, 1 actor of Ray"]["share"]
    checks = [
        Check("share of the bare model's rate, label maps", told["label maps"]["share"], 0.9, most=False),
        Check("two actors of Ray, times one", two, 1.5, most=False),
    ]
    print(*checks, sep="\n")
    if given.out:
        content = {"model": MODEL, "size": SIZE, "ways": told}
        write_json(given.out, {"hardware": hardware(), **content, "checks": [each.as_json() for each in checks]})


def write(place: Path, count: int) -> list[Any]:
    """The pictures in a folder and in tars, all of which have as many; returns those that they are."""
    (place / "pictures").mkdir()
    scenes = Shapes("val", 16, SIZE)
    encoded = []
    for index in range(len(scenes)):
        file = io.BytesIO()
        to_picture(scenes[index].image).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
    for number in range(TARS):
        with tarfile.open(place / f"{number}.tar", "w") as tar:
            for index in range(number, count, TARS):
                content = encoded[index % len(encoded)]
                (place / "pictures" / f"{index:06d}.jpg").write_bytes(content)
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [scenes[index].image for index in range(len(scenes))]


def seconds(arguments: list[str]) -> float:
    """That a command takes, from its start to its end."""
    command = [sys.executable, "-c", "from maskfirst.cli import main; main()", "predict", *arguments, "--json"]
    start = time.perf_counter()
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    took = time.perf_counter() - start
    assert not json.loads(ended.stdout)["failed"]
    return took


def bare(model: Any, images: Sequence[Any], least: float = 5) -> float:
    """Pictures a second of the model in a loop over all."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        for image in images:
            model.segment(image)
        count += len(images)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
