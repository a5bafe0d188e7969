"""Shards: every part once, whoever dies on the way, and what a second run does is what is missing."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import kills
from PIL import Image

from maskfirst import cli, weights
from maskfirst.build import load
from maskfirst.data.images import ImageError, as_rgb
from maskfirst.errors import UserError
from maskfirst.formats import segment_table
from maskfirst.formats.coco_instances import CocoInstances
from maskfirst.ranks import met_under_torchrun
from maskfirst.shards.manifest import Planned
from maskfirst.shards.on_ray import Actor
from maskfirst.shards.run import Crew, Summary, job_of, predict_shards
from maskfirst.shards.worker import Outcome, Worker
from maskfirst.sources import Part
from tiny_parts import VOCABULARY, experiment, recipe

TESTS = Path(__file__).parent
ALONE = Crew()
PROGRAM = str(Path(sys.executable).with_name("maskfirst"))


def png(seed: int, white: bool = False) -> bytes:
    array = np.random.default_rng(seed).integers(0, 200, (8, 10, 3), np.uint8)
    if white:
        array[0, 0] = 255
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Weights of the mortal model, which lives as long as its folder of deaths is empty."""
    (tmp_path / "deaths").mkdir()
    tree = recipe() | {"proposer": {"kind": "mortal:Mortal", "deaths": str(tmp_path / "deaths")}}
    torch.manual_seed(0)
    segmenter = experiment(tree | {"vocabulary": list(VOCABULARY.names)}).segmenter()
    weights.save(tmp_path / "model.safetensors", segmenter, tree, VOCABULARY)
    return str(tmp_path / "model.safetensors")


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    """Four of two pictures each; of the first the second is broken, of the third the first has a white corner."""
    paths = []
    for number in range(4):
        files = {
            f"{number}-a.png": png(2 * number, white=number == 2),
            f"{number}-b.png": b"no picture" if number == 0 else png(2 * number + 1),
        }
        paths.append(str(pack(tmp_path / f"{number}.tar", files)))
    return paths


def made(
    model: str, out: Path, sources: Sequence[str], crew: Crew = ALONE, form: Any = "parquet", **more: Any
) -> Summary:
    return predict_shards(job_of(model, out, None, form, trust=True, **more), sources, crew)


def rows(out: Path) -> dict[str, segment_table.Row]:
    """By key, each of which must be there once."""
    found = [row for file in sorted((out / "shards").glob("[0-9]*")) for row in segment_table.read(file)]
    counts = Counter(row.key for row in found)
    assert set(counts.values()) <= {1}
    return {row.key: row for row in found}


def times(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (out / "shards").glob("[0-9]*")}


def check(out: Path, model: str) -> None:
    """The shards have what the model says of every picture, and why there is nothing of one."""
    found = rows(out)
    assert sorted(found) == sorted(f"{number}-{letter}" for number in range(4) for letter in "ab")
    segmenter = load(model, trusted=True)
    for key, row in found.items():
        if key == "0-b":
            assert isinstance(row.found, ImageError)
            assert "not a JPEG, PNG" in str(row.found)
            continue
        assert not isinstance(row.found, ImageError)
        number = 2 * int(key[0]) + (key[2] == "b")
        right = segmenter.segment(as_rgb(png(number, white=key == "2-a")))
        assert torch.equal(row.found.segments.masks, right.masks)
        assert torch.equal(row.found.classes, right.classes)
        torch.testing.assert_close(row.found.scores, right.scores)


def test_pictures_become_rows_and_a_second_run_does_what_is_missing(
    model: str, tars: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = made(model, out, tars)
    assert (summary.shards, summary.kept, summary.pictures) == (4, 0, 8)
    assert [(each["source"], each["key"]) for each in summary.failed] == [(tars[0], "0-b")]
    check(out, model)
    before = times(out)
    (out / "shards" / "000001.parquet").unlink()
    # As it is left where a process ends between a shard and its receipt.
    (out / "receipts" / "000003.json").unlink()
    again = made(model, out, tars)
    assert (again.shards, again.kept, again.pictures, again.failed) == (4, 2, 8, summary.failed)
    after = times(out)
    assert {name for name, time in after.items() if before[name] != time} == {"000001.parquet", "000003.parquet"}
    check(out, model)


def test_more_sources_may_come_and_numbers_stay(model: str, tars: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(model, out, tars[2:])
    before = times(out)
    summary = made(model, out, tars)
    assert (summary.shards, summary.kept) == (4, 2)
    assert before.items() <= times(out).items()
    check(out, model)


def test_a_source_that_cannot_be_read_is_named_and_the_rest_is_done(
    model: str, tars: list[str], tmp_path: Path
) -> None:
    (tmp_path / "no.tar").write_text("no tar")
    summary = made(model, tmp_path / "out", [*tars[:2], str(tmp_path / "no.tar"), *tars[2:], str(tmp_path / "9.tar")])
    assert summary.shards == 4
    lost = [each["error"] for each in summary.failed if not each["key"]]
    assert [error.split(": ")[1][:12] for error in lost] == ["no tar", "no such file"]
    check(tmp_path / "out", model)
    with pytest.raises(UserError, match=r"no\.tar: no tar"):
        made(model, tmp_path / "other", [str(tmp_path / "no.tar")])


def test_files_are_cut_into_shards_and_done_anew_where_they_change(model: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number))
    assert made(model, out, [str(folder)], size=2).shards == 3
    before = times(out)
    (folder / "3.png").write_bytes(png(30, white=True))
    (folder / "5.png").write_bytes(png(5))
    summary = made(model, out, [str(folder)], size=2)
    assert (summary.shards, summary.kept, summary.pictures) == (3, 1, 6)
    assert times(out)["000000.parquet"] == before["000000.parquet"]
    assert sorted(rows(out)) == [str(number) for number in range(6)]
    (folder / "5.png").unlink()
    (folder / "4.png").unlink()
    with pytest.raises(UserError, match=r"has fewer pictures than when .* was begun"):
        made(model, out, [str(folder)], size=2)


def test_shards_in_cocos_form(model: str, tars: list[str], tmp_path: Path) -> None:
    made(model, tmp_path / "coco", tars, form="coco")
    made(model, tmp_path / "table", tars)
    table = rows(tmp_path / "table")
    files = sorted((tmp_path / "coco" / "shards").iterdir())
    assert [file.name for file in files] == [f"00000{number}.json" for number in range(4)]
    seen: set[Any] = set()
    for file in files:
        coco = CocoInstances(file, scored=True)
        for key in coco.images:
            assert key not in seen
            seen.add(key)
            right = table[coco.images[key].file_name].found
            assert not isinstance(right, ImageError)
            assert torch.equal(coco.read(key).segments.masks, right.segments.masks)
    assert len(seen) == 7


def test_a_process_that_dies_costs_the_shard_in_its_hand(model: str, tars: list[str], tmp_path: Path) -> None:
    (tmp_path / "deaths" / "one").touch()
    summary = made(model, tmp_path / "out", tars, Crew(processes=2))
    assert not list((tmp_path / "deaths").iterdir())
    assert (summary.shards, summary.pictures, len(summary.failed)) == (4, 8, 1)
    check(tmp_path / "out", model)


def test_what_kills_twice_is_left_out_and_named(model: str, tars: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "deaths" / name).touch()
    summary = made(model, tmp_path / "out", tars, Crew(processes=2))
    lost = [each["error"] for each in summary.failed if not each["key"]]
    assert len(lost) == 1
    assert lost[0].startswith(f"{tars[2]}: not done: the process that did it was ended by SIGKILL")
    assert summary.shards == 3
    assert made(model, tmp_path / "out", tars).kept == 3
    check(tmp_path / "out", model)


def command(model: str, tars: Sequence[str], out: Path, *options: str) -> list[str]:
    return [
        "predict",
        "--weights",
        model,
        *tars,
        "--out",
        str(out),
        "--trust",
        "--shards",
        "parquet",
        "--json",
        *options,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}


def test_a_driver_that_is_killed_costs_the_shard_in_hand(model: str, tars: list[str], tmp_path: Path) -> None:
    (tmp_path / "deaths" / "one").touch()
    started = subprocess.run(
        [PROGRAM, *command(model, tars, tmp_path / "out")],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert started.returncode == -signal.SIGKILL, started.stderr
    assert sorted(times(tmp_path / "out")) == ["000000.parquet", "000001.parquet"]
    summary = made(model, tmp_path / "out", tars)
    assert (summary.shards, summary.kept) == (4, 2)
    check(tmp_path / "out", model)
    assert {file.name[0] for file in (tmp_path / "out" / "shards").iterdir()} == {"0"}, (
        "what was in hand is left behind"
    )


def test_two_that_are_at_the_same_part_do_it_once(
    model: str, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a command is killed and given again while what it had begun goes on."""
    given = job_of(model, tmp_path / "out", None, "parquet", trust=True)
    planned = Planned(0, Part(tars[1], 0, None), "as it is")
    one, other = Worker(given, "cpu"), Worker(given, "cpu")
    write, receipts = segment_table.write, []

    def slow(path: Path, pictures: Iterator[Any], notes: Any) -> None:
        def meanwhile() -> Iterator[Any]:
            yield from pictures
            monkeypatch.setattr(segment_table, "write", write)
            receipts.append(other.attempt(planned).receipt)

        write(path, meanwhile(), notes)

    monkeypatch.setattr(segment_table, "write", slow)
    assert one.attempt(planned) == Outcome(0, receipts[0])
    assert receipts[0].pictures == 2
    assert sorted(file.name for file in (tmp_path / "out" / "shards").iterdir()) == ["000000.parquet"]


def test_an_address_that_nobody_answers_is_told_at_once(model: str, tars: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"--ray {address}: no cluster there: .*refused"):
        made(model, tmp_path / "out", tars, Crew(ray=address))


def test_two_workers_of_ray_with_one_killed(model: str, tars: list[str], tmp_path: Path) -> None:
    (tmp_path / "deaths" / "one").touch()
    ended = subprocess.run(
        [PROGRAM, *command(model, tars, tmp_path / "out", "--ray", "local", "--processes", "2")],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert not list((tmp_path / "deaths").iterdir())
    told = json.loads(ended.stdout)
    assert (told["shards"], told["kept"], told["pictures"], len(told["failed"])) == (4, 0, 8, 1)
    check(tmp_path / "out", model)


def test_what_kills_actors_again_and_again_is_left_out(model: str, tars: list[str], tmp_path: Path) -> None:
    given = job_of(model, tmp_path / "out", None, "parquet", trust=True)
    actor = Actor(given, "run")
    told = {"item": [json.dumps(asdict(Planned(0, Part(tars[1], 0, None), "as it is")))]}
    assert json.loads(actor(told)["item"][0])["receipt"]["pictures"] == 2
    actor.begun.mkdir(parents=True, exist_ok=True)
    (actor.begun / "0").write_text("2")
    assert "1.tar: not done: the process that did it died, 2 times" in json.loads(actor(told)["item"][0])["error"]


def test_processes_of_torchrun_share_the_parts_out(model: str, tars: list[str], tmp_path: Path) -> None:
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        PROGRAM,
    ]
    ended = subprocess.run(
        [*run, *command(model, tars[1:], tmp_path / "out")],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["shards"], told["pictures"], told["failed"]) == (3, 6, [])
    assert len(rows(tmp_path / "out")) == 6


def test_what_torchrun_has_started_ends_with_it(tmp_path: Path) -> None:
    wait = "import time; from maskfirst.ranks import end_with_parent; end_with_parent(0.1); print('up', flush=True)"
    begin = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", begin, f"{wait}; time.sleep(60)"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
        start = time.monotonic()
        # The pipe ends when the last who holds it does.
        assert parent.stdout.read() == b""
    assert time.monotonic() - start < 10


def test_what_the_long_test_would_find(model: str, tars: list[str], tmp_path: Path) -> None:
    made(model, tmp_path / "out", tars[1:3])
    right = kills.rows(tmp_path / "out")
    assert [row.key for row in right] == ["1-a", "1-b", "2-a", "2-b"]
    assert kills.differences(right, right) == []
    twice, missing = [*right, right[0]], right[1:]
    assert kills.differences(twice, right) == ["1-a is there 2 times"]
    assert kills.differences(missing, right) == ["1-a is there 0 times"]
    other = [replace(right[0], found=right[2].found), *right[1:-1], replace(right[3], found=ImageError("broken"))]
    assert kills.differences(other, right) == ["1-a has other segments", "2-b: broken"]


def test_torchrun_that_is_gone_is_waited_for_by_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"torchrun, or a process that it has started, is gone: .*refused"):
        met_under_torchrun()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "parquet", "--yolo"], "--shards writes all segments and nothing else; leave --yolo out"),
        (["--per-shard", "5"], "--per-shard is of shards; say --shards parquet, too"),
        (["--ray", "local"], "--ray is of shards"),
        (["--shards", "coco", "--column", "jpg"], "a column ('jpg') is of tables"),
        (["--shards", "coco", "--task", "panoptic"], "cannot do the panoptic task"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, model: str, tars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as told:
        cli.app(
            ["predict", "--weights", model, *tars, "--out", str(tmp_path / "out"), "--trust", *options],
            standalone_mode=False,
        )
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_folder_begun_with_other_settings_is_refused(model: str, tars: list[str], tmp_path: Path) -> None:
    made(model, tmp_path / "out", tars[:1])
    with pytest.raises(UserError, match=r"manifest\.json: begun with another form; give another --out"):
        made(model, tmp_path / "out", tars, form="coco")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: no manifest of ours, or damaged"):
        made(model, tmp_path / "out", tars)
