"""Checkpoints in containers: torch's files of any name, the one in a zip archive, and what is said of all others."""

import argparse
import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from maskfirst.convert import containers
from maskfirst.convert.pickles import CheckpointError, Opened, open_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor([3])}
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2273\n"
ENDINGS = ".safetensors, .pth, .pt, .bin, .ckpt, .pth.tar, .pkl, .npz"


def torch_bytes(content: Any = WEIGHTS, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def numpy_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in WEIGHTS.items()})
    return file.getvalue()


def archive(path: Path, members: Mapping[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def assert_weights(opened: Opened) -> None:
    assert opened.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(opened.tensors[name], tensor) for name, tensor in WEIGHTS.items())


def complaint(path: Path) -> str:
    """What is said of a file, after its name; one line."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")


# ---- what is opened


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["x.pth.tar", "X.PTH.TAR", "x.v2.pth", "x.zip"])
def test_torch_s_files_are_opened_under_any_of_their_names(tmp_path: Path, name: str, zipped: bool) -> None:
    (tmp_path / name).write_bytes(torch_bytes({"state_dict": WEIGHTS}, zipped))
    opened = open_checkpoint(tmp_path / name)
    assert_weights(opened)
    assert opened.name == name


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ade.pth.tar", torch_bytes()),
        ("ade.pth.tar", torch_bytes(zipped=False)),
        ("ade.pth", torch_bytes()),
        ("ade.safetensors", save(WEIGHTS)),
        ("ade.npz", numpy_bytes()),
    ],
    ids=["tar", "legacy", "pth", "safetensors", "npz"],
)
def test_the_only_checkpoint_of_an_archive_is_opened(tmp_path: Path, name: str, content: bytes, packing: int) -> None:
    beside = {"run/": b"", "run/log.json": b"{}", "run/config.py": b"", f"__MACOSX/run/._{name}": b"\0\5\x16\7"}
    for file in ("ade.zip", "ade.pth.tar.zip", "ade.pth"):
        opened = open_checkpoint(archive(tmp_path / file, {**beside, f"run/{name}": content}, packing))
        assert_weights(opened)
        assert opened.name == name


def test_an_archive_leaves_nothing_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "x.zip", {"x.pth": torch_bytes()})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before, opened, real = set(tmp_path.rglob("*")), [], open

    def watched(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        opened.append(mode)
        return real(file, mode, *rest, **named)

    monkeypatch.setattr("builtins.open", watched)
    assert_weights(open_checkpoint(path))
    assert opened
    assert all(mode == "rb" for mode in opened)
    assert set(tmp_path.rglob("*")) == before


def test_settings_beside_the_tensors_are_plain(tmp_path: Path) -> None:
    """Trainings of the DeiT family keep what argparse gave them."""
    for name, zipped in (("x.pth", True), ("y.pth", False)):
        content = {"model": WEIGHTS, "args": argparse.Namespace(lr=5e-4, model="deit_tiny"), "epoch": 299}
        (tmp_path / name).write_bytes(torch_bytes(content, zipped))
        opened = open_checkpoint(tmp_path / name)
        assert_weights(opened)
        assert opened.beside["args"].model == "deit_tiny"


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_the_projects_wrappers_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    (tmp_path / "x.pth").write_bytes(torch_bytes({wrapper: WEIGHTS, "epoch": 3}))
    opened = open_checkpoint(tmp_path / "x.pth")
    assert_weights(opened)
    assert opened.beside == {"epoch": 3}


# ---- archives that are not


def test_several_checkpoints_are_listed(tmp_path: Path) -> None:
    two = {"run/best.pth": torch_bytes(), "run/last.pth.tar": torch_bytes(), "log.txt": b"x"}
    assert complaint(archive(tmp_path / "x.zip", two)) == (
        "holds 2 checkpoints (run/best.pth, run/last.pth.tar); unpack it and give the one you want"
    )
    many = {f"{step}.pth": b"x" for step in range(8)}
    assert complaint(archive(tmp_path / "x.zip", many)) == (
        "holds 8 checkpoints (0.pth, 1.pth, 2.pth, 3.pth, 4.pth and 3 more); unpack it and give the one you want"
    )


def test_archives_without_a_checkpoint_say_what_they_hold(tmp_path: Path) -> None:
    assert complaint(archive(tmp_path / "x.zip", {"a/README.md": b"x", "b.py": b"x"})) == (
        f"holds no checkpoint, only a/README.md, b.py; a checkpoint ends in {ENDINGS}"
    )
    assert complaint(archive(tmp_path / "x.zip", {"a/": b""})) == (
        f"holds no file at all; a checkpoint ends in {ENDINGS}"
    )


def test_archives_within_archives_are_not_opened(tmp_path: Path) -> None:
    inner = archive(tmp_path / "inner.zip", {"x.pth": torch_bytes()}).read_bytes()
    told = "an archive within an archive; unpack it and give the checkpoint that it holds"
    assert complaint(archive(tmp_path / "x.zip", {"a/inner.zip": inner})) == f"a/inner.zip: {told}"
    assert complaint(archive(tmp_path / "x.zip", {"a/inner.pth": inner})) == f"a/inner.pth: {told}"


def patched(path: Path, changes: Mapping[tuple[bytes, int], bytes]) -> Path:
    """Other bytes at an offset behind a header's signature, wherever that occurs."""
    content = bytearray(path.read_bytes())
    for (signature, offset), new in changes.items():
        start = content.find(signature)
        assert start >= 0
        content[start + offset : start + offset + len(new)] = new
    path.write_bytes(content)
    return path


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def test_an_encrypted_checkpoint_is_not_opened(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", {"a.pth": torch_bytes()}, zipfile.ZIP_DEFLATED)
    patched(path, {(LOCAL, 6): b"\1", (CENTRAL, 8): b"\1"})
    assert complaint(path) == "a.pth: encrypted; unpack it with its password and give what it holds"


def test_packings_that_do_not_keep_to_their_size_are_not_opened(tmp_path: Path) -> None:
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = archive(tmp_path / "x.zip", {"a.pth": torch_bytes()}, packing)
        assert complaint(path) == "a.pth: packed in a way that is not read here; unpack it and give what it holds"


def test_what_would_unpack_to_far_more_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its ratio, and by any size beyond the largest."""
    monkeypatch.setattr(containers, "SPARE", 1000)
    path = archive(tmp_path / "x.zip", {"a.pth": bytes(200_000)})
    weight = path.stat().st_size
    assert complaint(path) == (
        f"a.pth: would unpack to 200,000 bytes; of an archive of {weight:,} at most {weight * 20:,} are read"
    )
    monkeypatch.setattr(containers, "LARGEST", 1500)
    path = archive(tmp_path / "x.zip", {"a.pth": os.urandom(2000)})
    assert complaint(path).startswith("a.pth: would unpack to 2,000 bytes; of an archive of 2,")
    assert complaint(path).endswith("at most 1,500 are read")


def test_torch_s_own_archives_may_not_unpack_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "SPARE", 1000)
    members = {"x/data.pkl": bytes(150_000), "x/data/0": bytes(50_000)}
    path = archive(tmp_path / "x.pth", members)
    assert complaint(path).startswith("would unpack to 200,000 bytes; of an archive of ")


@pytest.mark.parametrize("declared", [100, 100_000])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_size_that_is_not_the_real_one_is_found_out(tmp_path: Path, declared: int, packing: int) -> None:
    path = archive(tmp_path / "x.zip", {"a.pth": torch_bytes()}, packing)
    patched(path, {(CENTRAL, 24): struct.pack("<I", declared)})
    assert complaint(path).startswith("damaged, or not what its suffix says (")
    assert complaint(path).endswith("); fetch it again")


def test_names_from_an_archive_cannot_break_the_line(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", {"a\nb.pth": b"x", "c\x1b[31m.pth": b"x"})
    assert complaint(path) == "holds 2 checkpoints (a?b.pth, c?[31m.pth); unpack it and give the one you want"
    path = archive(tmp_path / "x.zip", {"a\nb.pth": torch_bytes([1])})
    assert complaint(path) == "a?b.pth: holds a list and no tensors by name"


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_archive_is_no_way_around_the_allow_list(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    content = torch_bytes({"state_dict": WEIGHTS, "meta": Command(f"touch {trace}")}, zipped)
    path = archive(tmp_path / "x.zip", {"a.pth": content})
    assert complaint(path).startswith("a.pth: refused, it asks for 'posix.system', which could run code; ")
    assert not trace.exists()


# ---- what downloads bring instead


CUT = "cut off, since the archive has no end, as where a download broke; fetch it again"
PAGED = "a web page, as links bring that want a login or lead nowhere; fetch the file itself"
POINTED = "a pointer of Git LFS in place of the file; fetch the file itself, as with 'git lfs pull'"


@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.npz", "x.zip"])
def test_a_download_that_broke_is_told(tmp_path: Path, name: str) -> None:
    whole = numpy_bytes() if name == "x.npz" else torch_bytes()
    for size in (len(whole) // 2, len(whole) - 30):
        (tmp_path / name).write_bytes(whole[:size])
        assert complaint(tmp_path / name) == CUT
    (tmp_path / name).write_bytes(b"")
    assert complaint(tmp_path / name) == "the file is empty; fetch it again"


def test_an_archive_that_broke_is_told(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", {"a.pth": torch_bytes()})
    path.write_bytes(path.read_bytes()[:-40])
    assert complaint(path) == CUT
    path = archive(tmp_path / "x.zip", {"a.pth": torch_bytes()[:-30], "b.txt": b""})
    assert complaint(path) == f"a.pth: {CUT}"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pth.tar", "x.pkl", "x.npz", "x.zip"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (PAGE, PAGED),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>PublicAccessNotPermitted</Code></Error>", PAGED),
        (POINTER, POINTED),
    ],
    ids=["page", "answer", "pointer"],
)
def test_pages_and_pointers_are_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert complaint(tmp_path / name) == told
    if name != "x.zip":
        assert complaint(archive(tmp_path / "y.zip", {name: content})) == f"{name}: {told}"


def test_a_tar_archive_is_told(tmp_path: Path) -> None:
    """In spite of its name, a `.pth.tar` is none."""
    (tmp_path / "a.pth").write_bytes(torch_bytes())
    with tarfile.open(tmp_path / "x.pth.tar", "w") as file:
        file.add(tmp_path / "a.pth", "a.pth")
    assert complaint(tmp_path / "x.pth.tar") == "a tar archive; unpack it and give the checkpoint that it holds"
    (tmp_path / "x.tar").write_bytes(b"x")
    assert complaint(tmp_path / "x.tar") == (
        f"suffix '.tar' is not known. Did you mean '.pth.tar'? Known: {ENDINGS}, .zip."
    )
