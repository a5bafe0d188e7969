"""Sources: pictures of files, tars, tables and videos, in parts that are read alone; what is broken, hostile or missing."""

import io
import json
import struct
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from maskfirst.data import images
from maskfirst.data.images import ImageError, TooLargeError, as_rgb
from maskfirst.errors import UserError
from maskfirst.sources import Item, Part, Source, runs
from maskfirst.sources import parquet as tables
from maskfirst.sources import tar as tars
from maskfirst.sources.files import Files
from maskfirst.sources.names import Apart, harmless, without_ending
from maskfirst.sources.opened import open_source
from maskfirst.sources.parquet import ParquetTable
from maskfirst.sources.tar import TarShard
from maskfirst.sources.video import Camera, Video, watched

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "..\\..\\b",
    "C:\\windows\\b",
    "a\0b",
    "..",
    "",
    "/",
    ". ./x",
    "a\nb",
]


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 3), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def value(item: Item) -> int:
    """What `png` was told, or the colour of a frame."""
    assert not isinstance(item.picture, ImageError), item
    return int(as_rgb(item.picture)[0, 0, 0])


def all_of(source: Source, size: int = 100) -> list[Item]:
    return [item for part in source.parts(size) for item in source.read(part)]


def told(items: Sequence[Item]) -> dict[str, str | int]:
    """Names and values, or what is wrong."""
    return {item.name: str(item.picture) if isinstance(item.picture, ImageError) else value(item) for item in items}


def check_one_line(error: BaseException, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


# Names


@pytest.mark.parametrize("name", [*HOSTILE, "x" * 5000, "é" * 300, "/".join(["deep"] * 1000), "a\ud800b"])
def test_names_stay_below_the_folder_they_are_joined_to(tmp_path, name):
    made = harmless(name)
    assert made
    assert not Path(made).is_absolute()
    assert ".." not in Path(made).parts
    assert not set(made) & set("\\\0\n:")
    # What is written aside has a name that is longer by 20 bytes.
    file = tmp_path / f"{made}.abcdefgh.png.part"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    assert file.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    ("name", "made"),
    [("dir/000123", "dir/000123"), ("./a//b", "a/b"), ("a.b c", "a.b c"), ("...", "picture"), ("é/ü", "é/ü")],
)
def test_harmless_names_are_kept(name, made):
    assert harmless(name) == made


def test_the_ending_of_a_picture_is_dropped_and_no_other():
    assert [without_ending(name) for name in ("a/b.JPG", "v1.5", "c.tar.png")] == ["a/b", "v1.5", "c.tar"]


def test_names_are_told_apart_on_any_file_system():
    apart = Apart()
    assert [apart(name) for name in ("a", "A", "a", "a-1", "b")] == ["a", "A-1", "a-2", "a-1-1", "b"]


def test_runs_cover_all():
    assert runs("x", 7, 3) == [Part("x", 0, 3), Part("x", 3, 3), Part("x", 6, 1)]
    assert runs("x", 0, 3) == []
    assert runs("x", 2, 3, first=5) == [Part("x", 5, 2)]


# Tars


def tar(
    path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode="w", format=tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(path, mode, format=format) as file:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_a_tar_gives_the_picture_of_every_sample(tmp_path):
    members = {"dir/000123.jpg": png(1), "dir/000123.json": b"{}", "dir/000124.cls": b"7", "dir/000124.png": png(2)}
    path = tar(tmp_path / "a.tar", members)
    source = TarShard(path)
    assert source.parts(1) == [Part(str(path), 0, None)]
    assert told(all_of(source)) == {"dir/000123": 1, "dir/000124": 2}


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_forms_of_tars_and_names_are_read(tmp_path, name, mode, format):
    long = f"{'folder/' * 20}{'x' * 90}"
    names = [long, "ü", "plain"]
    path = tar(tmp_path / name, [(f"{each}.png", png(index)) for index, each in enumerate(names)], mode, format)
    source = open_source(str(path))
    assert isinstance(source, TarShard)
    assert told(all_of(source)) == {each: index for index, each in enumerate(names)}


def test_samples_end_at_the_first_dot_and_hidden_files_are_none(tmp_path):
    members = {
        "a.png": png(1),
        "a.mask.png": png(2),
        "b.PNG": png(3),
        "v.1/c.png": png(4),
        "._a.png": b"",
        "d/.png": b"",
        "e.txt": b"",
        "noending": b"",
    }
    assert told(all_of(TarShard(tar(tmp_path / "a.tar", members)))) == {"a": 1, "b": 3, "v.1/c": 4}


def test_pictures_of_one_name_are_told_apart(tmp_path):
    members = [("a.png", png(1)), ("a.jpg", png(2)), ("A.png", png(3)), ("a.png", png(4))]
    assert told(all_of(TarShard(tar(tmp_path / "a.tar", members)))) == {"a": 1, "a-1": 2, "A-2": 3, "a-3": 4}


def test_links_and_folders_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, kind in (("d.png", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png(5))
        file.addfile(info, io.BytesIO(png(5)))
    assert told(all_of(TarShard(tmp_path / "a.tar"))) == {"a": 5}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_tars_cannot_leave_the_output_folder(tmp_path, format):
    members = [(f"{name}/x.png", png(index)) for index, name in enumerate(HOSTILE)]
    items = all_of(TarShard(tar(tmp_path / "a.tar", members, format=format)))
    assert len({item.name for item in items}) == len(items) >= len(HOSTILE) - 1
    for item in items:
        assert (tmp_path / "out" / item.name).resolve().is_relative_to(tmp_path / "out")
        assert not set(item.name) & set("\\\0\n")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = bytes(1024)


def test_a_member_of_ten_billion_bytes_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header("a.png", len(png(1))) + padded(png(1)) + header("b.png", 10**10) + png(2))
    first, large, end = all_of(TarShard(path))
    assert value(first) == 1
    assert large.name == "b"
    assert isinstance(large.picture, ImageError)
    check_one_line(large.picture, "member 'b.png'", "10000000000 bytes", "not read")
    assert isinstance(end.picture, ImageError)
    check_one_line(end.picture, "ends within member 'b.png'")


def test_what_follows_a_member_too_large_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST", 2000)
    found = told(all_of(TarShard(tar(tmp_path / "a.tgz", {"a.png": bytes(3000), "b.png": png(2)}, "w:gz"))))
    assert "3000 bytes, more than the limit of 2000" in str(found.pop("a"))
    assert found == {"b": 2}


def test_headers_of_any_length_are_not_taken(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        header("a.png", len(png(1))) + padded(png(1)) + header("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME)
    )
    first, last = all_of(TarShard(path))
    assert value(first) == 1
    check_one_line(last.picture, "a header of 8589934592 bytes after member 'a.png'")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (512 * 3 + 60, "ends within member 'b.png', after 60 of its"),
        (512 * 3, "ends within member 'b.png', after 0 of its"),
        (512 * 2 + 100, "ends after member 'a.png'"),
        (512 * 2, "ends after member 'a.png'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_cut_short_gives_what_was_whole_and_tells_where(tmp_path, keep, words, packed):
    content = tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)}).read_bytes()[:keep]
    path = tmp_path / "cut.tar"
    if packed:
        import gzip

        path = tmp_path / "cut.tgz"
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
    first, last = all_of(TarShard(path))
    assert (first.name, value(first)) == ("a", 1)
    assert isinstance(last.picture, ImageError)
    check_one_line(last.picture, str(path), words)


def test_a_packed_tar_cut_short_tells_where(tmp_path):
    noise = np.random.default_rng(0).bytes
    members = {"a.png": png(1), "b.png": noise(20000), "c.png": noise(20000)}
    content = tar(tmp_path / "a.tgz", members, "w:gz").read_bytes()
    (tmp_path / "a.tgz").write_bytes(content[:30000])
    items = all_of(TarShard(tmp_path / "a.tgz"))
    assert [item.name for item in items] == ["a", "b", "a.tgz"]
    assert isinstance(items[-1].picture, ImageError)
    check_one_line(items[-1].picture, "within member 'c.png'", "gzip")
    (tmp_path / "a.tgz").write_bytes(content[:25000] + bytes(2000) + content[27000:])
    items = all_of(TarShard(tmp_path / "a.tgz"))
    assert isinstance(items[-1].picture, ImageError)


def test_a_damaged_header_is_told_and_not_taken_for_the_end(tmp_path):
    content = bytearray(tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)}).read_bytes())
    content[1024 + 10] ^= 255
    (tmp_path / "a.tar").write_bytes(content)
    first, last = all_of(TarShard(tmp_path / "a.tar"))
    assert value(first) == 1
    assert isinstance(last.picture, ImageError)
    check_one_line(last.picture, "no header after member 'a.png'")


@pytest.mark.parametrize("content", [b"8 path=a\n", b"path=a\n", b"0 path=a\n", b"12 size=-10\n", b"99999999 path=a\n"])
def test_damaged_extended_headers_are_told(tmp_path, content):
    path = tmp_path / "a.tar"
    extended = header("x", len(content), tarfile.XHDTYPE) + padded(content)
    path.write_bytes(header("a.png", 0) + extended + header("b.png", 0) + END)
    items = all_of(TarShard(path))
    assert isinstance(items[-1].picture, ImageError)
    check_one_line(items[-1].picture, "after member 'a.png'")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"no tar at all " * 100, np.random.default_rng(0).bytes(5000), b"\x1f\x8b" * 9]
)
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError) as error:
        TarShard(tmp_path / "a.tar").parts(10)
    check_one_line(error.value, "a.tar: no tar")


def test_a_tar_without_pictures_says_so(tmp_path):
    (item,) = all_of(TarShard(tar(tmp_path / "a.tar", {"a.txt": b"x"})))
    assert isinstance(item.picture, ImageError)
    check_one_line(item.picture, "a.tar: no picture in it", ".jpg")


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.mp4"])
def test_missing_files_are_named_with_the_nearest(tmp_path, name):
    (tmp_path / f"b{name[1:]}").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: no such file. Did you mean 'b{name[1:]}'\?"):
        open_source(str(tmp_path / name)).parts(10)


# Parquet


def table(path: Path, columns: Mapping[str, Any], rows: int = 1000, **kwargs: Any) -> Path:
    parquet.write_table(pa.table(dict(columns)), path, row_group_size=rows, **kwargs)
    return path


def cells(values: Sequence[tuple[bytes | None, str | None] | None]) -> pa.Array:
    """Hugging Face's struct."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array(
        [None if each is None else dict(zip(("bytes", "path"), each, strict=True)) for each in values], kind
    )


def test_a_table_gives_the_pictures_of_its_rows(tmp_path):
    path = table(tmp_path / "a.parquet", {"picture_bytes": [png(1), png(2)], "label": [3, 4]})
    source = open_source(str(path))
    assert isinstance(source, ParquetTable)
    assert told(all_of(source)) == {"000000": 1, "000001": 2}


def test_large_binary_and_hugging_faces_struct_are_read(tmp_path):
    large = table(tmp_path / "a.parquet", {"x": pa.array([png(1)], pa.large_binary()), "__key__": ["k/1.jpg"]})
    assert told(all_of(ParquetTable(large))) == {"k/1": 1}
    path = table(tmp_path / "b.parquet", {"image": cells([(png(1), "train/7.jpg"), (png(2), None)]), "label": [0, 1]})
    assert told(all_of(ParquetTable(path))) == {"train/7": 1, "000001": 2}


def test_names_are_of_the_first_column_that_has_them(tmp_path):
    columns = {"image": cells([(png(1), "p.png"), (png(2), "q.png")]), "path": ["x", "y"], "id": [139, 7]}
    assert told(all_of(ParquetTable(table(tmp_path / "a.parquet", columns)))) == {"139": 1, "7": 2}


def test_names_are_one_and_the_same_in_parts_of_any_size(tmp_path):
    count = 23
    names = [None if index % 7 == 3 else f"n{index % 5}.jpg" for index in range(count)]
    columns = {"image": [png(index) for index in range(count)], "key": names}
    path = table(tmp_path / "a.parquet", columns, rows=4)
    whole = told(all_of(ParquetTable(path), 1000))
    assert sorted(whole.values(), key=int) == list(range(count))
    for size in (3, 9):
        parts = ParquetTable(path).parts(size)
        assert [part.first for part in parts] == [sum(p.count or 0 for p in parts[:i]) for i in range(len(parts))]
        assert sum(part.count or 0 for part in parts) == count
        assert max(part.count or 0 for part in parts) <= size
        # Each in a process of its own.
        again = [item for part in reversed(parts) for item in ParquetTable(path).read(part)]
        assert told(again) == whole


def test_row_groups_are_cut_and_gathered_by_metadata_alone(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", {"image": [png(0)] * 10}, rows=4)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read"))
    assert [part.count for part in ParquetTable(path).parts(2)] == [2] * 5
    assert [part.count for part in ParquetTable(path).parts(3)] == [2, 2, 2, 2, 2]
    assert [part.count for part in ParquetTable(path).parts(8)] == [8, 2]


def test_only_needed_row_groups_are_read_few_rows_at_a_time(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", {"image": [png(index) for index in range(40)]}, rows=20)
    asked = []
    whole = parquet.ParquetFile.iter_batches

    def counted(self, batch_size, row_groups, columns):
        asked.append((batch_size, row_groups, columns))
        return whole(self, batch_size, row_groups, columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    items = list(ParquetTable(path).read(Part(str(path), 25, 5)))
    assert [value(item) for item in items] == [25, 26, 27, 28, 29]
    assert asked == [(8, [1], ["image"])]


def test_null_pictures_are_errors_of_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST", 500)
    columns = {"image": cells([(png(1), "a.png"), None, (None, "/etc/passwd"), (bytes(600), "d.png")])}
    first, *rest = all_of(ParquetTable(table(tmp_path / "a.parquet", columns)))
    assert value(first) == 1
    assert [item.name for item in rest] == ["000001", "etc/passwd", "d"]
    for item, words in zip(rest, ("row 1: no picture", "'/etc/passwd', which is not opened", "600 bytes"), strict=True):
        assert isinstance(item.picture, ImageError)
        check_one_line(item.picture, str(tmp_path / "a.parquet"), words)
    plain = all_of(ParquetTable(table(tmp_path / "b.parquet", {"image": pa.array([None, png(3)], pa.binary())})))
    assert isinstance(plain[0].picture, ImageError)
    assert value(plain[1]) == 3


def test_names_in_tables_cannot_leave_the_output_folder(tmp_path):
    path = table(tmp_path / "a.parquet", {"image": [png(0)] * len(HOSTILE), "key": HOSTILE})
    items = all_of(ParquetTable(path))
    assert len({item.name for item in items}) == len(HOSTILE)
    for item in items:
        assert item.name
        assert (tmp_path / "out" / item.name).resolve().is_relative_to(tmp_path / "out")


def test_the_column_is_the_one_that_is_said_or_called_so(tmp_path):
    path = table(tmp_path / "a.parquet", {"mask": [png(1)], "image": [png(2)]})
    assert told(all_of(ParquetTable(path))) == {"000000": 2}
    assert told(all_of(open_source(str(path), "mask"))) == {"000000": 1}


@pytest.mark.parametrize(
    ("columns", "column", "words"),
    [
        ({"mask": [b"x"], "depth": [b"y"]}, None, ("pictures are in 'mask', 'depth'; say which column",)),
        ({"text": ["x"], "label": [1]}, None, ("no column of pictures", "'text' (string), 'label' (int64)")),
        ({"image": [b"x"], "label": [1]}, "imagee", ("'imagee' is none of its columns", "Did you mean 'image'?")),
        ({"image": [b"x"], "label": [1]}, "label", ("'label' holds int64", "pictures are in 'image'")),
        ({"text": ["x"]}, "image", ("'image' is none of its columns", "no column of pictures")),
    ],
)
def test_a_column_that_cannot_be_meant_is_told_with_those_that_can(tmp_path, columns, column, words):
    path = table(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError) as error:
        ParquetTable(path, column).parts(10)
    check_one_line(error.value, str(path), *words)


@pytest.mark.parametrize("content", [b"", b"PAR1" * 3, np.random.default_rng(0).bytes(5000), b"text " * 100])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError) as error:
        ParquetTable(tmp_path / "a.parquet").parts(10)
    check_one_line(error.value, "a.parquet: no Parquet file, or damaged")


def test_a_damaged_row_group_costs_its_rows_and_no_others(tmp_path):
    columns = {"image": [png(index) for index in range(9)], "key": [f"k{index}" for index in range(9)]}
    path = table(tmp_path / "a.parquet", columns, rows=3, compression="snappy", use_dictionary=False)
    column = parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle - 60 : middle + 60] = bytes(120)
    path.write_bytes(content)
    for size in (2, 100):
        found = told(all_of(ParquetTable(path), size))
        assert list(found) == [f"k{index}" for index in range(9)]
        assert [found[f"k{index}"] for index in (0, 1, 2, 6, 7, 8)] == [0, 1, 2, 6, 7, 8]
        assert "row group 1: row 2: cannot be read" in str(found["k5"])


def test_a_table_of_more_rows_than_bytes_is_refused(tmp_path):
    path = table(tmp_path / "a.parquet", {"image": pa.nulls(100_000, pa.binary())}, rows=100_000)
    with pytest.raises(UserError, match="tells 100000 rows in"):
        ParquetTable(path).parts(10)


@pytest.mark.parametrize(
    ("library", "name", "extra"),
    [("pyarrow", "a.parquet", "scale"), ("av", "a.mp4", "video"), ("av", "camera:0", "video")],
)
def test_a_missing_library_is_told_with_its_extra(monkeypatch, library, name, extra):
    for module in [module for module in sys.modules if module.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"^{name}: .*pip install 'maskfirst\[{extra}\]'$"):
        open_source(name)


# Videos


def video(
    path: Path, count: int = 33, codec: str = "libx264", size: tuple[int, int] = (48, 64), **options: str
) -> Path:
    """Frames that differ, with a key frame every ten and two B-frames between others; `size` (height, width) px."""
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    rng = np.random.default_rng(0)
    noise = np.array(Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize(size[::-1]))
    with av.open(path, "w", options=movflags) as file:
        stream: Any = file.add_stream(codec, rate=10, options={"threads": "1", **options})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 10
        if codec in ("libx264", "mpeg4"):
            stream.codec_context.max_b_frames = 2
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 2 * index, 1), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[np.ndarray]:
    """Decoded all at once, by PyAV."""
    with av.open(path) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def packets(path: Path) -> list[Any]:
    """Position, size in bytes and time of each, in the order of the file."""
    with av.open(path) as file:
        return [(each.pos, each.size, each.pts) for each in file.demux(video=0) if each.size]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.mov", "mpeg4"),
        ("a.webm", "libvpx"),
        # AVI tells no times of showing.
        ("a.avi", "libx264"),
        ("a.avi", "mpeg4"),
    ],
)
def test_parts_of_any_size_give_every_frame_once_with_its_pixels(tmp_path, name, codec):
    path = video(tmp_path / name, codec=codec)
    whole = frames(path)
    assert len(whole) == 33
    for size in (7, 100):
        parts = open_source(str(path)).parts(size)
        assert [(part.first, part.count) for part in parts] == [(at, min(size, 33 - at)) for at in range(0, 33, size)]
        items = [item for part in reversed(parts) for item in reversed(list(Video(path).read(part)))][::-1]
        assert [item.name for item in items] == [f"{number:06d}" for number in range(33)]
        for item, frame in zip(items, whole, strict=True):
            assert isinstance(item.picture, np.ndarray)
            assert np.array_equal(item.picture, frame), item.name


def test_open_groups_of_pictures_are_read_whole(tmp_path):
    path = video(
        tmp_path / "a.mkv", **{"x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0"}
    )
    source = Video(path)
    items = [item for part in source.parts(3) for item in source.read(part)]
    assert all(np.array_equal(item.picture, frame) for item, frame in zip(items, frames(path), strict=True))


def test_decoding_begins_at_the_key_frame_before_the_part(tmp_path, monkeypatch):
    from maskfirst.sources import video as module

    path = video(tmp_path / "a.mp4")
    decoded = []
    kept = module._decoded

    def counted(packets, stream):
        for frame in kept(packets, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(module, "_decoded", counted)
    (item,) = Video(path).read(Part(str(path), 25, 1))
    assert item.name == "000025"
    assert len(decoded) == 6


def test_counting_decodes_nothing(tmp_path, monkeypatch):
    from maskfirst.sources import video as module

    path = video(tmp_path / "a.mp4")
    monkeypatch.setattr(module, "_decoded", lambda *_: pytest.fail("decoded"))
    assert len(Video(path).parts(10)) == 4


def test_frames_are_upright(tmp_path):
    path = video(tmp_path / "a.mp4", count=3)
    content = bytearray(path.read_bytes())
    # ISO/IEC 14496-12, 8.3.2: the matrix of a track's header, as telephones write it that are held upright.
    place = content.index(b"tkhd") + 44
    one = 1 << 16
    content[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    turned = tmp_path / "b.mp4"
    turned.write_bytes(content)
    items = all_of(Video(turned))
    assert len(items) == 3
    for item, frame in zip(items, frames(path), strict=True):
        assert np.array_equal(item.picture, np.rot90(frame, -1))


def test_frames_too_large_are_not_decoded(tmp_path, monkeypatch):
    path = video(tmp_path / "a.mp4", count=3)
    monkeypatch.setattr(images, "PIXELS", 64 * 48 - 1)
    with pytest.raises(TooLargeError) as error:
        Video(path).parts(10)
    check_one_line(error.value, "a.mp4: frames of 64 x 48 px, more than the limit", "not decoded")


def test_a_packet_that_cannot_be_decoded_costs_its_frames_and_no_others(tmp_path):
    path = video(tmp_path / "a.mp4", **{"x264-params": "b-pyramid=none"})
    whole = frames(path)
    content = bytearray(path.read_bytes())
    found = packets(path)
    # One that others are not made of, and a key frame.
    lost = [next(each for each in found if each[2] == 4 * 1024), next(each for each in found if each[2] == 20 * 1024)]
    for position, size, _ in lost:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    for size in (7, 100):
        items = all_of(Video(path), size)
        assert [item.name for item in items] == [f"{number:06d}" for number in range(33)]
        broken = [number for number, item in enumerate(items) if isinstance(item.picture, ImageError)]
        assert 4 in broken
        assert 20 in broken
        assert set(broken) <= {4, *range(18, 30)}
        check_one_line(items[20].picture, f"{path}: frame 20: cannot be decoded")  # pyright: ignore[reportArgumentType]
        for number in {*range(18), 30, 31, 32} - {4}:
            assert np.array_equal(items[number].picture, whole[number])


def test_hidden_frames_of_vp8_are_not_missed(tmp_path):
    path = video(tmp_path / "a.webm", codec="libvpx")
    content = bytearray(path.read_bytes())
    with av.open(path) as file:
        packed = [bytes(each) for each in file.demux(video=0) if each.size]
    place = content.index(packed[4])
    content[place] &= 0xEF
    path.write_bytes(content)
    items = all_of(Video(path), 7)
    assert [item.name for item in items] == [f"{number:06d}" for number in range(32)]
    assert all(isinstance(item.picture, np.ndarray) for item in items)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_of_a_video_cut_short_there_is_what_is_there(tmp_path, name):
    path = video(tmp_path / name, **({"movflags": "faststart"} if name == "a.mp4" else {}))
    whole = frames(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    items = all_of(Video(path), 7)
    good = [item for item in items if isinstance(item.picture, np.ndarray)]
    assert 10 <= len(good) < 33
    for item in good:
        assert np.array_equal(item.picture, whole[int(item.name)])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a text, not a video\n" * 100,
        np.random.default_rng(0).bytes(5000),
        b"ffconcat version 1.0\nfile good.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n",
        png(0),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_what_is_no_video_is_refused_and_opens_no_other_file(tmp_path, content, name):
    video(tmp_path / "good.mp4", count=2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Video(tmp_path / name).parts(10)
    check_one_line(error.value, f"{name}: no video, or one cut short")


def test_a_video_cut_before_its_index_is_refused(tmp_path):
    path = video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"a\.mp4: no video, or one cut short"):
        Video(path).parts(10)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as file:
        stream: Any = file.add_stream("aac", rate=8000)
        for start in range(3):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"a\.mp4: no pictures in it, only audio"):
        Video(tmp_path / "a.mp4").parts(10)


# Cameras


def test_a_camera_gives_numbered_frames_until_there_are_enough(tmp_path):
    items = list(watched("testsrc=size=64x48:rate=5", "lavfi", "camera:0", 3))
    assert [item.name for item in items] == ["000000", "000001", "000002"]
    assert [np.shape(item.picture) for item in items] == [(48, 64, 3)] * 3


def test_a_camera_that_ends_ends(tmp_path):
    assert len(list(watched("testsrc=size=64x48:rate=5:duration=1", "lavfi", "camera:0"))) == 5


def test_a_camera_has_no_parts_and_a_missing_one_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    camera = open_source("camera:987")
    assert isinstance(camera, Camera)
    with pytest.raises(UserError, match="camera:987: a camera has no end and no parts; predict it without --shards"):
        camera.parts(10)
    with pytest.raises(UserError, match="camera:987: no camera at /dev/video987"):
        next(camera.frames())
    with pytest.raises(UserError, match="camera:x: should be a number, as camera:0"):
        Camera("camera:x")


@pytest.mark.parametrize(
    ("system", "address", "file", "format"),
    [
        ("linux", "camera:2", "/dev/video2", "v4l2"),
        ("darwin", "camera:2", "2", "avfoundation"),
        ("win32", "camera:Front Camera", "video=Front Camera", "dshow"),
    ],
)
def test_cameras_are_called_as_the_system_calls_them(monkeypatch, system, address, file, format):
    monkeypatch.setattr(sys, "platform", system)
    camera = Camera(address)
    assert (camera.file, camera.format) == (file, format)


# Files, and which source a path is


def save(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


def test_files_come_in_runs_by_path(tmp_path):
    for index, name in enumerate(("x/a.png", "x/b/c.png", "x/d.png", "y/a.png")):
        save(tmp_path / name, index)
    folder, other = str(tmp_path / "x"), str(tmp_path / "y")
    source = Files([folder, other])
    assert source.parts(2) == [Part(folder, 0, 2), Part(folder, 2, 1), Part(other, 0, 1)]
    assert told(all_of(source, 2)) == {"x/a": 0, "b/c": 1, "d": 2, "y/a": 3}
    assert [item.picture for item in source.read(Part(folder, 1, 1))] == [tmp_path / "x/b/c.png"]
    assert told(list(open_source(folder).read(Part(folder, 2, None)))) == {"d": 2}


def test_a_file_of_two_paths_is_read_once(tmp_path):
    for index, name in enumerate("abc"):
        save(tmp_path / f"{name}.png", index)
    one, folder = str(tmp_path / "b.png"), str(tmp_path)
    source = Files([one, folder])
    assert source.parts(5) == [Part(one, 0, 1), Part(folder, 0, 1), Part(folder, 2, 1)]
    assert told(all_of(source)) == {"b": 1, "a": 0, "c": 2}


def test_what_is_written_meanwhile_is_no_picture_of_a_folder(tmp_path):
    save(tmp_path / "b.png", 1)
    source = Files([tmp_path], [tmp_path / "out"])
    save(tmp_path / "out/x.png", 2)
    parts = source.parts(5)
    save(tmp_path / "a.png", 3)
    assert told([item for part in parts for item in source.read(part)]) == {"b": 1}


def test_a_path_is_opened_by_its_ending(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    kinds = {
        "a.TAR": TarShard,
        "a.tar.gz": TarShard,
        "a.tgz": TarShard,
        "a.MP4": Video,
        "a.webm": Video,
        "a.png": Files,
    }
    for name, kind in {**kinds, "a.parquet": ParquetTable, "*.png": Files, "folder.tar": Files}.items():
        assert type(open_source(str(tmp_path / name))) is kind
    with pytest.raises(UserError, match=r"a.tar: a column \('x'\) is of tables"):
        open_source("a.tar", "x")


def test_parts_are_plain(tmp_path):
    part = TarShard(tar(tmp_path / "a.tar", {"a.png": png(1)})).parts(5)[0]
    assert Part(**json.loads(json.dumps(vars(part)))) == part
