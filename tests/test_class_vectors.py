"""Class vectors: every form is read to the same numbers, and each mistake in one is one line that says where it is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskfirst.data.vocabulary import load
from maskfirst.formats import FormatError, class_vectors
from maskfirst.formats.class_vectors import ClassVectors

NAMES = ["sky", "traffic light", "car"]
VECTORS = torch.tensor([[1.0, 0.25], [-2.0, 3.0], [0.5, 1e-3]])


def _npy(folder: Path) -> Path:
    np.save(folder / "own.npy", VECTORS.numpy())
    (folder / "own.names.txt").write_text("\n".join(NAMES))
    return folder / "own.npy"


def _columns(folder: Path) -> Path:
    np.savetxt(folder / "own.txt", VECTORS.numpy().T, delimiter=",")
    (folder / "own.names.txt").write_text("\n".join(NAMES))
    return folder / "own.txt"


def _table(folder: Path) -> Path:
    rows = [f"{name},{x!r},{y!r}" for name, (x, y) in zip(NAMES, VECTORS.tolist(), strict=True)]
    (folder / "own.csv").write_text("\n".join(["name,tall,wide", *rows]))
    return folder / "own.csv"


def _safetensors(folder: Path) -> Path:
    class_vectors.write(folder / "own.safetensors", ClassVectors((*NAMES,), VECTORS, notes={"encoder": "by hand"}))
    return folder / "own.safetensors"


@pytest.mark.parametrize("form", [_npy, _columns, _table, _safetensors])
def test_every_form_is_read_in_the_order_that_is_asked_for(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    found = class_vectors.read(form(tmp_path), ["car", "sky"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, VECTORS[[2, 0]])


def test_what_made_them_is_kept(tmp_path: Path) -> None:
    assert class_vectors.read_all(_safetensors(tmp_path)).notes == {"encoder": "by hand"}


@pytest.mark.parametrize(("count", "words"), [(66, "coco_48_17"), (81, "coco_65_15")])
def test_published_tables_need_no_names(tmp_path: Path, count: int, words: str) -> None:
    table = np.random.default_rng(0).normal(size=(300, count))
    np.savetxt(tmp_path / "word_w2v_withbg.txt", table, delimiter=",")
    found = class_vectors.read(tmp_path / "word_w2v_withbg.txt", load(words).names)
    np.testing.assert_allclose(found.numpy(), table[:, 1:].T.astype(np.float32))
    assert class_vectors.read_all(tmp_path / "word_w2v_withbg.txt").names[0] == "background"


def test_another_table_of_as_many_columns_needs_names(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "own.txt", np.ones((299, 66)), delimiter=",")
    with pytest.raises(FormatError, match=r"own\.txt: its names should be in own\.names\.txt beside it"):
        class_vectors.read_all(tmp_path / "own.txt")


def test_camvid_has_a_table_of_attributes_that_tells_its_classes_apart() -> None:
    names = load("camvid").names
    found = class_vectors.read("camvid_attributes", names)
    assert class_vectors.read_all("camvid_attributes").names == names
    likeness = torch.nn.functional.normalize(found, dim=1)
    likeness = likeness @ likeness.T - 2 * torch.eye(len(names))
    assert likeness.max() < 0.95
    near = {name: names[int(index)] for name, index in zip(names, likeness.argmax(1), strict=True)}
    assert (near["Bicyclist"], near["SignSymbol"], near["Sidewalk"]) == ("Pedestrian", "Pole", "Road")


def test_classes_without_a_vector_are_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no vector for 'cars' \('car' is near\), 'zebra'; it has 3 names"):
        class_vectors.read(_table(tmp_path), ["cars", "sky", "zebra"])


def _written(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "own.csv").write_text(text)
        return folder / "own.csv"

    return write


def _array(array: np.ndarray, names: str = "a\nb") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "own.npy", array, allow_pickle=True)
        (folder / "own.names.txt").write_text(names)
        return folder / "own.npy"

    return write


def _tensors(metadata: dict[str, str], **tensors: torch.Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(tensors, folder / "own.safetensors", metadata)
        return folder / "own.safetensors"

    return write


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (_written("name,x,y\na,1,2\nb,3\n"), r"line 3: 1 numbers, where the first line has 2"),
        (_written("name,x\na,nan\n"), r"line 2: number 1 is nan; all should be finite"),
        (_written("name,x,y\na,1,\n"), r"line 2: number 2 is ''"),
        (_written("name,x\na,1\na,2\n"), r"'a' occurs twice"),
        (_written("name,x\n,1\n"), r"a vector without a name"),
        (_written("name,x,x\na,1,2\n"), r"line 1: attribute 'x' occurs twice"),
        (_written("name\na\n"), r"line 1: no attributes"),
        (_written("name,x\n"), r"no line of numbers"),
        (_written(""), r"nothing in it"),
        (_array(np.ones((3, 2), np.float32)), r"2 names for 3 vectors of 2 numbers"),
        (_array(np.ones(2, np.float32)), r"vectors of shape \[2\]"),
        (_array(np.array([[1.0, np.inf], [0, 0]])), r"not finite: 'a'"),
        (_array(np.array([{}, {}], object)), r"no array of numbers"),
        (_array(np.array([["x"], ["y"]])), r"an array of <U1"),
        (_tensors({"names": '["a"]'}, other=torch.ones(1, 2)), r"should have a tensor `vectors`"),
        (_tensors({"names": '["a", 1]'}, vectors=torch.ones(2, 2)), r"should be a JSON list of text"),
        (_tensors({"names": "["}, vectors=torch.ones(2, 2)), r"damaged"),
        (_bytes("own.safetensors", b"\xff" * 64), r"damaged"),
        (_bytes("own.npy", b"\x93NUMPY\x01\x00"), r"no array of numbers"),
        (_bytes("own.txt", b"\xff\xfe,"), r"cannot be read as text"),
        (_bytes("own.bin", b""), r"should end in \.safetensors, \.npy, \.csv, \.txt"),
        (lambda folder: folder / "gone.npy", r"gone\.npy: cannot be read: No such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, form: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(FormatError, match=message) as told:
        class_vectors.read_all(form(tmp_path))
    assert "\n" not in str(told.value)


def test_an_array_that_claims_more_than_is_there_is_not_made(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.ones((2, 2), np.float32))
    content = (tmp_path / "own.npy").read_bytes().replace(b"(2, 2)", b"(99999999999, 2)"[:16])
    (tmp_path / "own.npy").write_bytes(content)
    (tmp_path / "own.names.txt").write_text("a\nb")
    with pytest.raises(FormatError, match="no array of numbers"):
        class_vectors.read_all(tmp_path / "own.npy")
