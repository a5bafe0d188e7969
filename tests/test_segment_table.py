"""Tables of segments: what is written is read back; files that are none, damaged or hostile."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from maskfirst.data.images import ImageError
from maskfirst.errors import UserError
from maskfirst.files import DiskError
from maskfirst.formats import FormatError, rle, segment_table
from maskfirst.formats.instances import Instances
from maskfirst.formats.segment_table import Notes, Row, read, read_notes, write
from maskfirst.types import Segments

NOTES = Notes("instance", ("sky", "tree", "Straße"), "shapes/1")


def instances(seed: int = 0, count: int = 4, size: tuple[int, int] = (13, 17)) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, *size, generator=generator) > 0.5
    classes = torch.randint(0, 3, (count,), generator=generator)
    return Instances.of(Segments(masks, classes, torch.rand(count, generator=generator), torch.zeros(count) > 0))


def rows() -> list[Row]:
    return [
        Row("dir/a", "x.tar", instances()),
        Row("b", "y.tar", ImageError("y.tar: broken")),
        Row("c", "y.tar", instances(count=0, size=(5, 6))),
    ]


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "a.parquet", rows(), NOTES)
    assert read_notes(tmp_path / "a.parquet") == NOTES
    first, second, third = read(tmp_path / "a.parquet")
    assert (first.key, first.source) == ("dir/a", "x.tar")
    for found, meant in ((first.found, instances()), (third.found, instances(count=0, size=(5, 6)))):
        assert isinstance(found, Instances)
        assert found.size == meant.size
        assert found.rles == meant.rles
        assert found.classes.tolist() == meant.classes.tolist()
        assert found.scores.tolist() == meant.scores.tolist()
        assert found.segments.masks.equal(meant.segments.masks)
    assert isinstance(second.found, ImageError)
    assert (second.key, str(second.found)) == ("b", "y.tar: broken")


def test_other_tools_find_plain_columns(tmp_path):
    write(tmp_path / "a.parquet", rows(), NOTES)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["key", "source", "height", "width", "error", "segments"]
    kinds = {field.name: str(field.type) for field in table.schema.field("segments").type.value_type}
    box = dict.fromkeys(("left", "top", "width", "height"), "int32")
    assert kinds == {"class": "string", "score": "float", **box, "area": "int64", "counts": "string"}
    found, broken, empty = table.to_pylist()
    assert (found["height"], found["width"], found["error"], len(found["segments"])) == (13, 17, None, 4)
    assert (broken["height"], broken["width"], broken["error"], broken["segments"]) == (None, None, "y.tar: broken", [])
    assert empty["segments"] == []
    masks = instances().segments.masks
    for mask, each in zip(masks, found["segments"], strict=True):
        y, x = np.nonzero(mask.numpy())
        assert (each["left"], each["top"]) == (x.min(), y.min())
        assert (each["width"], each["height"]) == (x.max() - x.min() + 1, y.max() - y.min() + 1)
        assert each["area"] == mask.sum()
        assert rle.decode([{"size": [13, 17], "counts": each["counts"]}])[0].equal(mask)
    told = json.loads(parquet.read_schema(tmp_path / "a.parquet").metadata[b"maskfirst"])
    assert told == {"task": "instance", "names": ["sky", "tree", "Straße"], "model": "shapes/1"}
    assert parquet.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).compression == "ZSTD"


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_table, "ROWS", 16)
    asked = 0

    def many():
        nonlocal asked
        for index in range(100):
            asked += 1
            yield Row(f"{index}", "s", instances(index, 1))

    write(tmp_path / "a.parquet", many(), NOTES)
    assert asked == 100
    assert parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == 7
    assert [row.key for row in read(tmp_path / "a.parquet")] == [str(index) for index in range(100)]


def test_a_file_is_whole_or_absent(tmp_path):
    def broken():
        yield rows()[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write(tmp_path / "a.parquet", broken(), NOTES)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        write(tmp_path / "file" / "a.parquet", rows(), NOTES)


def test_a_table_of_nothing_is_a_table(tmp_path):
    write(tmp_path / "a.parquet", [], NOTES)
    assert list(read(tmp_path / "a.parquet")) == []
    assert read_notes(tmp_path / "a.parquet") == NOTES


def test_names_that_are_no_text_are_written(tmp_path):
    write(tmp_path / "a.parquet", [Row("a\udcffb", "s\udcff", ImageError("\udcff"))], NOTES)
    assert [row.key for row in read(tmp_path / "a.parquet")] == ["a?b"]


@pytest.mark.parametrize("content", [b"", b"text", np.random.default_rng(0).bytes(4000), b"PAR1" * 4])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    assert "no Parquet file, or damaged" in refusal(tmp_path / "a.parquet")


def test_a_missing_file_is_told(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "a.parquet")


def refusal(path: Path) -> str:
    """What is said of a file that cannot be read, in one line that begins with it."""
    with pytest.raises(FormatError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_of_others_is_refused(tmp_path):
    parquet.write_table(pa.table({"key": ["a"]}), tmp_path / "a.parquet")
    assert "no table of segments" in refusal(tmp_path / "a.parquet")
    schema = pa.schema([("key", pa.int64())], {b"maskfirst": b"{}"})
    parquet.write_table(pa.table({"key": [1]}, schema), tmp_path / "a.parquet")
    assert "column 'key' should hold string, got int64" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "notes",
    [
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"task": 1, "names": [], "model": ""}',
        b'{"task": "", "names": ["a", "a"], "model": ""}',
        b'{"task": "", "names": "ab", "model": ""}',
        b"\xff",
    ],
)
def test_damaged_notes_are_told(tmp_path, notes):
    change(tmp_path / "a.parquet", {}, notes)
    assert "damaged notes" in refusal(tmp_path / "a.parquet")


def change(path: Path, changes: dict[str, Any], notes: bytes | None = None, **segment: Any) -> None:
    """Writes the first row with some of its values, or those of its second segment, replaced."""
    write(path, rows()[:1], NOTES)
    table = parquet.read_table(path)
    record = table.to_pylist()[0]
    record["segments"][1] |= segment
    schema = table.schema if notes is None else table.schema.with_metadata({b"maskfirst": notes})
    parquet.write_table(pa.Table.from_pylist([record | changes], schema), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": None}, "row 0: no key"),
        ({"source": None}, "row 0: no source"),
        ({"height": None}, "height and width should be whole numbers"),
        ({"height": -3}, "height and width should be whole numbers"),
        ({"height": 2**30, "width": 2**30}, "more than the limit"),
        ({"height": 12}, "segments[0]: run lengths of 221 px in all for a picture of 12 x 17 px"),
        ({"segments": None}, "neither segments nor an error"),
        ({"segments": [None]}, "segments[0]: no class"),
    ],
)
def test_damaged_rows_are_told(tmp_path, changes, words):
    change(tmp_path / "a.parquet", changes)
    assert words in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        ({"class": "tre"}, "class 'tre' is none of the 3 names of the file's notes. Did you mean 'tree'?"),
        ({"class": None}, "segments[1]: no class"),
        ({"score": None}, "segments[1]: no score"),
        ({"score": float("nan")}, "segments[1]: score should be a number, got nan"),
        ({"counts": None}, "segments[1]: no counts"),
        ({"counts": ""}, "segments[1]: counts that are no packed run lengths"),
        ({"counts": "0" * 1000}, "segments[1]: run lengths of 0 px"),
        ({"counts": "PPPPPPPPPPPPPPPPPPPPPPP0"}, "segments[1]: counts that are no packed"),
    ],
)
def test_damaged_segments_are_told(tmp_path, segment, words):
    change(tmp_path / "a.parquet", {}, **segment)
    assert words in refusal(tmp_path / "a.parquet")


def test_damaged_pages_are_told(tmp_path):
    write(tmp_path / "a.parquet", [Row(f"{i}", "s", instances(i)) for i in range(50)], NOTES)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000:1400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(content)
    assert "row 0: damaged" in refusal(tmp_path / "a.parquet")


def test_a_missing_library_is_told_with_its_extra(tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == "pyarrow"] + ["pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    for work in (
        lambda: write(tmp_path / "a", [], NOTES),
        lambda: read_notes(tmp_path / "a"),
        lambda: list(read(tmp_path / "a")),
    ):
        with pytest.raises(UserError, match=r"pip install 'maskfirst\[scale\]'"):
            work()
