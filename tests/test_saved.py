"""Masks of other tools: every form is read, what is wrong is told, and what we wrote ourselves comes back as it was."""

import io
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskfirst import tasks
from maskfirst.criteria.matched import Matched
from maskfirst.data.folder import Folder
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.evaluate import evaluate
from maskfirst.formats import FormatError, rle
from maskfirst.formats.coco_instances import InstancesWriter
from maskfirst.formats.coco_panoptic import PanopticWriter
from maskfirst.formats.saved import open_saved
from maskfirst.frames import Fit, Frame, resize
from maskfirst.namers.blend import Blend
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.known import CERTAIN
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.proposers.saved import Saved
from maskfirst.rows import whole
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.types import TASKS, VOID, Batch, Names, Proposals, SegmentMap, Segments, Vocabulary
from tiny_parts import TinyPointNamer

WORDS = Vocabulary(
    ("sky", "road", "car", "tree"), frozenset({2}), ((9, 9, 9), (1, 2, 3), (4, 5, 6), (7, 8, 9)), (3, 5, 8, 10)
)
SIZE = (12, 16)
IMAGE = torch.zeros(3, *SIZE, dtype=torch.uint8)


def boxes(*corners: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> Tensor:
    """Masks of (y0, x0, y1, x1)."""
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


TWO = boxes((1, 2, 7, 9), (4, 5, 12, 16))


def model(path: Path, names: bool = True, inference: Inference | None = None) -> Segmenter:
    return Segmenter(Saved(WORDS, str(path), names), Given(), None, WORDS, inference or Inference()).eval()


def batch(keys: Sequence[str], frames: Sequence[Frame] | None = None) -> Batch:
    frames = frames or [Frame(SIZE, SIZE, SIZE)] * len(keys)
    pixels = torch.zeros(len(keys), 3, *frames[0].outer)
    return Batch(pixels, ("panoptic",) * len(keys), tuple(frames), tuple(keys))


def coco(path: Path, *annotations: dict[str, Any], names: Sequence[str] = ("car", "sky"), **more: Any) -> Path:
    """A file of pictures `a/one.jpg` and `two.jpg`, whose categories are numbered 1, 2, ...; masks of picture 1 are TWO."""
    told = [
        {"id": number, "image_id": 1, "segmentation": mask, **annotation}
        for number, (mask, annotation) in enumerate(zip(rle.encode(TWO), annotations, strict=False))
    ]
    pictures = [
        {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for number, name in enumerate(("a/one.jpg", "two.jpg"), 1)
    ]
    content = {
        "images": pictures,
        "annotations": told,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }
    path.write_text(json.dumps(content | more), encoding="utf-8")
    return path


def png(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def npz(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def same(found: Segments, wanted: Segments) -> bool:
    """Whether masks and classes are equal, and scores up to the rounding of single precision."""
    return (
        torch.equal(found.masks, wanted.masks)
        and found.classes.tolist() == wanted.classes.tolist()
        and torch.allclose(found.scores, wanted.scores, rtol=2e-6, atol=0)
    )


# Instance files.


def test_instances_with_a_class_and_a_score(tmp_path: Path) -> None:
    """A class is found by its name, whatever its number."""
    path = coco(tmp_path / "a.json", {"category_id": 1, "score": 0.75}, {"category_id": 2, "score": 0.5})
    found = open_saved(path, WORDS).read("a/one", SIZE)
    assert torch.equal(found.masks, TWO)
    assert found.names is not None
    assert found.names.tolist() == [[0, 0, 0.75, 0, 0.25], [0.5, 0, 0, 0, 0.5]]


def test_instances_with_a_class_alone_are_certain(tmp_path: Path) -> None:
    found = open_saved(coco(tmp_path / "a.json", {"category_id": 1}, {"category_id": 2}), WORDS).read("a/one", SIZE)
    assert found.names is not None
    assert found.names.tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_numbers_without_categories_are_the_vocabularys(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"category_id": 8}, {"category_id": 10}, categories=[])
    found = open_saved(path, WORDS).read("a/one", SIZE)
    assert found.names is not None
    assert found.names.argmax(1).tolist() == [2, 3]
    with pytest.raises(FormatError, match=r"category_id 4 is not among the categories of the vocabulary"):
        open_saved(coco(tmp_path / "b.json", {"category_id": 4}, categories=[]), WORDS)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"class_scores": [0.5, 0.25]}, [0.25, 0, 0.5, 0, 0.25]),
        ({"class_scores": {"tree": 0.5, "sky": 0.25}}, [0.25, 0, 0, 0.5, 0.25]),
        ({"class_scores": {"tree": 1, "sky": 1}}, [0.5, 0, 0, 0.5, 0]),
        ({"class_scores": {"tree": 0.5, "sky": 0.5}, "score": 0.5}, [0.25, 0, 0, 0.25, 0.5]),
        ({"class_scores": {"tree": 0}, "score": 0.5}, [0, 0, 0, 0, 1]),
        ({"class_scores": {"tree": 0.5}, "category_id": 1}, [0, 0, 0, 0.5, 0.5]),
    ],
)
def test_class_scores(tmp_path: Path, told: dict[str, Any], wanted: list[float]) -> None:
    found = open_saved(coco(tmp_path / "a.json", told), WORDS).read("a/one", SIZE)
    assert found.names is not None
    assert found.names.tolist() == [wanted]


def test_class_scores_without_categories_are_in_the_vocabularys_order(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"class_scores": [0, 0.25, 0, 0.75]}, categories=[])
    found = open_saved(path, WORDS).read("a/one", SIZE)
    assert found.names is not None
    assert found.names.tolist() == [[0, 0.25, 0, 0.75, 0]]


def test_instances_without_classes_are_masks_alone(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"score": 0.9}, {"score": 3.5}, categories=[])
    found = open_saved(path, WORDS).read("a/one", SIZE)
    assert torch.equal(found.masks, TWO)
    assert found.names is None
    with pytest.raises(UserError, match="namer given: this proposer's masks arrive without names"):
        model(path).segment(IMAGE, key="a/one")


def test_crowds_are_left_out(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"category_id": 1, "iscrowd": 1}, {"category_id": 1})
    assert torch.equal(open_saved(path, WORDS).read("a/one", SIZE).masks, TWO[1:])


def test_foreign_names_are_listed_with_the_nearest_unless_left_out(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"category_id": 1}, {"category_id": 2}, names=("cars", "zebra"))
    wanted = r"a\.json: classes that the vocabulary does not have: 'cars' Did you mean 'car'\?, 'zebra'; its masks can"
    with pytest.raises(FormatError, match=wanted):
        model(path).segment(IMAGE, key="a/one")
    proposals = Saved(WORDS, str(path), names=False)(batch(["a/one"]))
    assert proposals.names is None
    assert torch.equal(proposals.masks[0] > 0, TWO)
    # Those that no mask is of do no harm.
    assert len(open_saved(coco(path, {"category_id": 1}, names=("car", "zebra")), WORDS).read("a/one", SIZE).masks) == 1


INSTANCES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "half named": (
        [{"category_id": 1}, {}],
        r"annotations\[1\]: no category_id and no class_scores, which others have",
    ),
    "category": ([{"category_id": "car"}], r"annotations\[0\]: category_id should be a number, got 'car'"),
    "unlisted": ([{"category_id": 7}], "category_id 7 is not among the categories; its masks can be taken without"),
    "score": ([{"category_id": 1, "score": 85}], r"annotations\[0\]: score 85.0 should lie in 0..1"),
    "score text": ([{"category_id": 1, "score": "high"}], r"annotations\[0\]: score should be a number, got 'high'"),
    "few": ([{"class_scores": [1]}], r"annotations\[0\]: class_scores should be 2 numbers, .* got 1 of them"),
    "negative": ([{"class_scores": {"car": -1}}], "class_scores should be numbers in 0..1"),
    "unknown": (
        [{"class_scores": {"care": 1}}],
        r"annotations\[0\]: class_scores: classes .* 'care' Did you mean 'car'",
    ),
    "picture": ([{"category_id": 1, "image_id": 9}], r"annotations\[0\]: image_id 9 is none of the 2 pictures"),
    "crowd": ([{"category_id": 1, "iscrowd": 2}], "iscrowd should be 0 or 1, got 2"),
    "no mask": ([{"category_id": 1, "segmentation": []}], r"annotations\[0\]: no mask"),
    "run lengths": (
        [{"category_id": 1, "segmentation": {"size": [3, 3], "counts": [9]}}],
        r"annotations\[0\]: run lengths of \[3, 3\] px \(height, width\) in a picture of \[12, 16\] px",
    ),
}


@pytest.mark.parametrize("case", INSTANCES)
def test_bad_instances_are_told(tmp_path: Path, case: str) -> None:
    annotations, message = INSTANCES[case]
    with pytest.raises(FormatError, match=rf"a\.json.*{message}"):
        open_saved(coco(tmp_path / "a.json", *annotations), WORDS).read("a/one", SIZE)


def test_a_file_that_is_not_whole_or_no_list_of_pictures(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"category_id": 1})
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(FormatError, match=r"a\.json: not JSON: "):
        open_saved(path, WORDS)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(FormatError, match="a bare list of results does not tell its pictures' names"):
        open_saved(path, WORDS)
    path.write_text('{"annotations": []}', encoding="utf-8")
    with pytest.raises(FormatError, match="no list of `images`"):
        open_saved(path, WORDS)
    with pytest.raises(UserError, match=r"b\.json: no such file or folder of masks. Did you mean 'a\.json'\?"):
        open_saved(tmp_path / "b.json", WORDS)
    other = tmp_path / "a.txt"
    other.write_text("masks", encoding="utf-8")
    with pytest.raises(UserError, match="masks should be a JSON file of COCO's, or a folder"):
        open_saved(other, WORDS)


# Which picture.


def listing(path: Path, *names: str) -> Path:
    pictures = [{"id": n, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for n, name in enumerate(names)]
    rows = [{"image_id": n, "segmentation": rle.encode(boxes((n, 0, n + 1, 1)))[0]} for n in range(len(names))]
    path.write_text(json.dumps({"images": pictures, "annotations": rows}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("names", "key", "place"),
    [
        (("a/one.jpg", "b/two.jpg"), "b/two", 1),
        (("a/one.jpg", "b/two.jpg"), "two", 1),
        (("one.jpg", "two.jpg"), "val/two", 1),
        (("x/a/one.jpg", "x/b/one.jpg"), "b/one", 1),
        (("a/one.jpg", "b/one.jpg"), "x/b/one", 1),
        (("one.jpg", "one.png"), "one.png", 1),
        (("v1.2.jpg", "v1.3.jpg"), "v1.3", 1),
        (("./a/one.jpg", "a\\two.jpg"), "a/two", 1),
        (("a/one.jpg", "one.jpg"), "one", 1),
    ],
)
def test_pictures_are_found_by_name(tmp_path: Path, names: tuple[str, ...], key: str, place: int) -> None:
    found = open_saved(listing(tmp_path / "a.json", *names), None).read(key, SIZE)
    assert found.masks[0, place, 0]


@pytest.mark.parametrize(
    ("names", "key", "message"),
    [
        (("a/one.jpg", "b/one.jpg"), "one", r"masks of a/one.jpg, b/one.jpg could all be those of picture 'one'"),
        (("one.jpg", "one.png"), "one", r"masks of one.jpg, one.png could all be"),
        (
            ("frame_1.jpg",),
            "frame_2",
            r"a\.json: no masks of picture 'frame_2'. Did you mean 'frame_1'\? It has: frame_1.",
        ),
        ((), "one", r"no masks of picture 'one'. It has: none."),
        (("one.jpg",), "", "the picture has no name"),
    ],
)
def test_pictures_that_are_not_found(tmp_path: Path, names: tuple[str, ...], key: str, message: str) -> None:
    saved = open_saved(listing(tmp_path / "a.json", *names), None)
    with pytest.raises(UserError, match=message):
        saved.read(key, SIZE)


def test_two_pictures_cannot_have_the_same_masks(tmp_path: Path) -> None:
    saved = open_saved(listing(tmp_path / "a.json", "one.jpg"), None)
    for _ in range(2):
        assert len(saved.read("a/one", SIZE).masks) == 1
    with pytest.raises(UserError, match=r"'a/one' and 'b/one' would both have the masks of 'one.jpg'"):
        saved.read("b/one", SIZE)
    with pytest.raises(FormatError, match=r"two pictures are called 'one.jpg'"):
        open_saved(listing(tmp_path / "b.json", "one.jpg", "./one.jpg"), None)


# Panoptic files.


def panoptic(path: Path, segments: Segments, words: Vocabulary = WORDS) -> Path:
    writer = PanopticWriter(path, words)
    writer.add(7, "a/one.jpg", SegmentMap.of(segments))
    writer.close()
    return path


def segments(masks: Tensor, classes: list[int], scores: list[float], crowd: list[bool] | None = None) -> Segments:
    crowds = torch.tensor(crowd if crowd is not None else [False] * len(classes), dtype=torch.bool)
    return Segments(masks, torch.tensor(classes, dtype=torch.int64), torch.tensor(scores), crowds)


THREE = segments(boxes((0, 0, 3, 16), (3, 0, 12, 5), (3, 9, 12, 16)), [0, 2, 2], [0.9, 0.85, 0.95])


def change(path: Path, **more: Any) -> Path:
    content = json.loads(path.read_text(encoding="utf-8")) | more
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), encoding="utf-8")
    return path


@pytest.mark.parametrize("more", [{}, {"categories": None}, {"categories": None, "images": None}])
def test_panoptic(tmp_path: Path, more: dict[str, Any]) -> None:
    path = change(panoptic(tmp_path / "p.json", THREE), **more)
    found = open_saved(path, WORDS).read("a/one", SIZE)
    assert torch.equal(found.masks, THREE.masks)
    assert found.names is not None
    torch.testing.assert_close(found.names[:, [0, 2, 4]].float().amax(1), torch.tensor([0.9, 0.85, 0.95]))
    assert found.names[:, :4].argmax(1).tolist() == [0, 2, 2]
    assert open_saved(path, None).read("one", SIZE).names is None


def test_panoptic_of_foreign_names_and_without_crowds(tmp_path: Path) -> None:
    words = Vocabulary(("trees", *WORDS.names[1:]), WORDS.things, WORDS.colors, WORDS.ids)
    crowded = Segments(THREE.masks, THREE.classes, THREE.scores, torch.tensor([False, True, False]))
    path = panoptic(tmp_path / "p.json", crowded, words)
    assert torch.equal(open_saved(path, None).read("a/one", SIZE).masks, THREE.masks[[0, 2]])
    with pytest.raises(FormatError, match=r"p\.json: classes .* 'trees' Did you mean 'tree'\?"):
        open_saved(path, WORDS)
    strange = change(panoptic(tmp_path / "q.json", THREE, from_names(list("wxyz"))), categories=None)
    assert len(open_saved(strange, None).read("a/one", SIZE).masks) == 3
    with pytest.raises(FormatError, match="category_id 0, 2 is not among the categories of the vocabulary"):
        open_saved(strange, WORDS)


def test_panoptic_whose_png_has_another_size(tmp_path: Path) -> None:
    path = panoptic(tmp_path / "p.json", THREE)
    with pytest.raises(FormatError, match=r"the masks of 'a/one.jpg' have 16 x 12 px, but the picture has 12 x 16 px"):
        open_saved(path, WORDS).read("a/one", (16, 12))
    png(tmp_path / "p" / "a" / "one.png", np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(FormatError, match=r"one\.png: \[5, 5\] px \(height, width\); p\.json says \[12, 16\]"):
        open_saved(path, WORDS).read("a/one", SIZE)


def test_a_broken_panoptic_file(tmp_path: Path) -> None:
    path = panoptic(tmp_path / "p.json", THREE)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-30], encoding="utf-8")
    with pytest.raises(FormatError, match=r"p\.json: not JSON: "):
        open_saved(path, WORDS)
    for odd in ([{"id": [], "name": "sky"}], [{"id": 3}], "sky"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(FormatError, match=r"p\.json: "):
            open_saved(change(path, categories=odd), WORDS)


# Folders of arrays.


@pytest.mark.parametrize(
    "masks",
    [TWO.numpy(), TWO.numpy().astype(np.uint8) * 255, TWO.numpy() * np.float32(0.8), TWO.numpy().astype(np.int64)],
)
def test_arrays(tmp_path: Path, masks: np.ndarray) -> None:
    npz(tmp_path / "a" / "one.npz", masks=masks)
    found = open_saved(tmp_path, WORDS).read("a/one", SIZE)
    assert torch.equal(found.masks, TWO)
    assert found.names is None


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"classes": np.array([2, 0])}, [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]),
        ({"classes": np.array(["tree", "sky"])}, [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]),
        ({"classes": np.array([2, 0]), "scores": np.array([0.5, 0.25])}, [[0, 0, 0.5, 0, 0.5], [0.25, 0, 0, 0, 0.75]]),
        ({"class_scores": np.array([[0.25] * 4, [0, 0.5, 0, 0]])}, [[0.25] * 4 + [0], [0, 0.5, 0, 0, 0.5]]),
        (
            {"class_scores": np.array([[0.25] * 4, [0, 0.5, 0, 0]]), "scores": np.array([0.5, 1.0])},
            [[0.125] * 4 + [0.5], [0, 1, 0, 0, 0]],
        ),
    ],
)
def test_arrays_with_names(tmp_path: Path, arrays: dict[str, np.ndarray], wanted: list[list[float]]) -> None:
    npz(tmp_path / "one.npz", masks=TWO.numpy(), **arrays)
    found = open_saved(tmp_path, WORDS).read("one", SIZE)
    assert found.names is not None
    assert found.names.tolist() == wanted
    assert open_saved(tmp_path, None).read("one", SIZE).names is None


ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no masks": ({"scores": np.ones(2)}, "no array 'masks'"),
    "typo": ({"masks": TWO.numpy(), "score": np.ones(2)}, "unknown array 'score'. Did you mean 'scores'"),
    "one mask": ({"masks": TWO[0].numpy()}, r"masks of shape \(12, 16\); it should be \(N, height, width\)"),
    "text": ({"masks": np.array([[["a"]]])}, "masks: an array of <U1; it should hold true and false, or numbers"),
    "logits": ({"masks": TWO.numpy() * 9.0 - 4}, "floats should lie in 0..1; of logits save `masks > 0`"),
    "nan": ({"masks": TWO.numpy() * np.nan}, "floats should lie in 0..1"),
    "few scores": ({"masks": TWO.numpy(), "scores": np.ones(3)}, r"scores of shape \(3,\); 2 masks need \(2,\)"),
    "flat": (
        {"masks": TWO.numpy(), "class_scores": np.ones(2)},
        r"class_scores of shape \(2,\); 2 masks need \(2, 4\)",
    ),
    "narrow": ({"masks": TWO.numpy(), "class_scores": np.ones((2, 3))}, "mask 0: class_scores should be 4 numbers"),
    "class": ({"masks": TWO.numpy(), "classes": np.array([2, 4])}, "classes that the vocabulary does not have: 4;"),
    "name": ({"masks": TWO.numpy(), "classes": np.array(["car", "cat"])}, "'cat' Did you mean 'car'"),
    "half": (
        {"masks": TWO.numpy(), "classes": np.array([1.5, 2])},
        "classes: an array of float64; it should hold indices",
    ),
    "percent": (
        {"masks": TWO.numpy(), "classes": np.array([1, 2]), "scores": np.array([99, 1])},
        "mask 0: score 99.0 should",
    ),
    "objects": ({"masks": TWO.numpy().astype(object)}, "masks: holds pickled objects, which are not read"),
    "object names": ({"masks": TWO.numpy(), "classes": np.array(["car", None])}, "classes: holds pickled objects"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays_are_told(tmp_path: Path, case: str) -> None:
    arrays, message = ARRAYS[case]
    npz(tmp_path / "one.npz", **arrays)
    with pytest.raises(FormatError, match=rf"one\.npz: .*{message}"):
        open_saved(tmp_path, WORDS).read("one", SIZE)


def claiming(path: Path, shape: str, version: bytes = b"\x01\x00", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive whose array says that it has that shape, and holds 100 bytes."""
    header = f"{{'descr': '|b1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("masks.npy", b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + bytes(100))
    return path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(2000, 100000, 100000)", "2000 masks of 100000 x 100000 px; the limits are"),
        ("(10000000000000000000000, 1, 1)", "1(0{22}) masks of 1 x 1 px; the limits are"),
        ("(1000, 1000, 1000)", "masks: claims 1000000000 bytes, and 228 are there; not read"),
        ("(-1, 5, 5)", "broken or cut short"),
        ("(1, 2, 'x')", "broken or cut short"),
    ],
)
def test_arrays_that_claim_to_be_gigantic_are_not_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, message: str
) -> None:
    claiming(tmp_path / "one.npz", shape)
    if "claims" in message or "limits" in message:
        monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(FormatError, match=rf"one\.npz: {message}"):
        open_saved(tmp_path, WORDS).read("one", SIZE)


def test_archives_that_lie_about_their_size_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = claiming(tmp_path / "one.npz", "(1000, 1000, 1000)", compression=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    # The size before compression, in the archive's own list of its files.
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 2**31 - 1)
    path.write_bytes(data)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(FormatError, match=r"masks: claims 1000000000 bytes, and .* are there; not read"):
        open_saved(tmp_path, WORDS).read("one", SIZE)


@pytest.mark.parametrize("keep", [0, 10, 60])
def test_broken_archives(tmp_path: Path, keep: int) -> None:
    path = npz(tmp_path / "one.npz", masks=TWO.numpy())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"one\.npz: broken or cut short"):
        open_saved(tmp_path, WORDS).read("one", SIZE)


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    claiming(tmp_path / "one.npz", "(1, 5, 20)", compression=zipfile.ZIP_LZMA)
    claiming(tmp_path / "two.npz", "(1, 5, 20)", version=b"\x09\x00")
    buffer = io.BytesIO()
    np.save(buffer, TWO.numpy())
    (tmp_path / "three.npz").write_bytes(buffer.getvalue())
    saved = open_saved(tmp_path, WORDS)
    with pytest.raises(FormatError, match="compressed in a way that numpy does not"):
        saved.read("one", (5, 20))
    with pytest.raises(FormatError, match=r"two\.npz: "):
        saved.read("two", (5, 20))
    with pytest.raises(FormatError, match=r"three\.npz: broken or cut short"):
        saved.read("three", SIZE)


def test_arrays_of_another_size(tmp_path: Path) -> None:
    npz(tmp_path / "one.npz", masks=TWO.numpy())
    with pytest.raises(FormatError, match="the masks of 'one' have 16 x 12 px, but the picture has 12 x 16 px"):
        open_saved(tmp_path, WORDS).read("one", (16, 12))


# Folders of PNGs.


def test_a_png_a_picture(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint16)
    values[1:4], values[6:] = 700, 3
    png(tmp_path / "one.png", values)
    png(tmp_path / "a" / "two.png", np.zeros(SIZE, np.uint8))
    saved = open_saved(tmp_path, WORDS)
    found = saved.read("one", SIZE)
    assert torch.equal(found.masks, boxes((6, 0, 12, 16), (1, 0, 4, 16)))
    assert found.names is None
    assert saved.read("a/two", SIZE).masks.shape == (0, *SIZE)
    with pytest.raises(FormatError, match="the masks of 'a/two' have 16 x 12 px, but the picture has 16 x 13 px"):
        saved.read("a/two", (13, 16))


def test_pngs_in_folders_are_a_picture_each_where_one_has_several_masks(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[1:4], values[6:] = 1, 2
    png(tmp_path / "city" / "one.png", values)
    assert len(open_saved(tmp_path, WORDS).read("city/one", SIZE).masks) == 2


def test_a_folder_a_picture(tmp_path: Path) -> None:
    for number, mask in enumerate(TWO.numpy()):
        png(tmp_path / "a" / "one" / f"{number}.png", mask.astype(np.uint8) * 255)
    png(tmp_path / "two" / "0.png", TWO[0].numpy())
    (tmp_path / "three").mkdir()
    saved = open_saved(tmp_path, WORDS)
    found = saved.read("a/one", SIZE)
    assert torch.equal(found.masks, TWO)
    assert found.names is None
    assert torch.equal(saved.read("two", SIZE).masks, TWO[:1])
    assert saved.read("three", SIZE).masks.shape == (0, *SIZE)
    with pytest.raises(FormatError, match=r"two/0\.png: a mask of 16 x 12 px, but the picture 'two' has 12 x 16 px"):
        open_saved(tmp_path, WORDS).read("two", (16, 12))


def test_a_folder_a_picture_with_a_map_among_its_masks(tmp_path: Path) -> None:
    for number in range(21):
        png(tmp_path / f"{number:02d}" / "0.png", TWO[0].numpy())
    png(tmp_path / "99" / "0.png", np.arange(12 * 16, dtype=np.uint8).reshape(SIZE))
    with pytest.raises(FormatError, match=r"99/0\.png: holds the numbers 1, 2, 3 and 188 more"):
        open_saved(tmp_path, WORDS).read("99", SIZE)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no masks here; looked for .npz files and PNGs"):
        open_saved(tmp_path, WORDS)
    png(tmp_path / "one.png", np.zeros(SIZE, np.uint8))
    npz(tmp_path / "two.npz", masks=TWO.numpy())
    with pytest.raises(UserError, match=r"has .npz files as well as PNGs"):
        open_saved(tmp_path, WORDS)


def test_a_png_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"GIF")
    with pytest.raises(UserError, match=r"one\.png: not a JPEG, PNG"):
        open_saved(tmp_path, WORDS).read("one", SIZE)


# On a canvas.

FRAMES = {
    "as it is": Frame(SIZE, SIZE, SIZE),
    "mirrored": Frame(SIZE, SIZE, SIZE, flipped=True),
    "padded": Frame(SIZE, SIZE, (16, 20)),
    "window": Frame(SIZE, SIZE, (6, 8), (3, 4)),
    "window at the border": Frame(SIZE, SIZE, (6, 8), (8, 10)),
    "doubled": Frame(SIZE, (24, 32), (24, 32)),
    "doubled, mirrored window": Frame(SIZE, (24, 32), (10, 12), (4, 6), flipped=True),
}


@pytest.mark.parametrize("name", FRAMES)
def test_masks_lie_on_the_canvas_as_the_picture_does(tmp_path: Path, name: str) -> None:
    frame = FRAMES[name]
    npz(tmp_path / "one.npz", masks=TWO.numpy(), classes=np.array([2, 0]))
    proposals = Saved(WORDS, str(tmp_path))(batch(["one"], [frame]))
    assert set(proposals.masks.unique().tolist()) <= {-CERTAIN, CERTAIN}
    wanted = torch.zeros(2, *frame.outer, dtype=torch.bool)
    # By hand: a box of whole pixels stays one where its borders are doubled.
    scale = frame.inner[0] // SIZE[0]
    for mask, (top, left, bottom, right) in zip(wanted, ((1, 2, 7, 9), (4, 5, 12, 16)), strict=True):
        for y in range(frame.visible[0]):
            for x in range(frame.visible[1]):
                column = x + frame.origin[1]
                column = frame.inner[1] - 1 - column if frame.flipped else column
                inside = top * scale <= y + frame.origin[0] < bottom * scale and left * scale <= column < right * scale
                mask[y, x] = inside
    corner = resize(TWO.float(), frame.inner) == 0.5
    assert not corner.any()
    if scale == 1:
        assert torch.equal(proposals.masks[0] > 0, wanted)
    else:
        # Enlarging rounds the corners of a box, by a pixel each.
        assert ((proposals.masks[0] > 0) != wanted).flatten(1).sum(1).max() <= 4
        assert wanted.any()


def test_batches_of_pictures_with_unlike_counts(tmp_path: Path) -> None:
    npz(tmp_path / "one.npz", masks=TWO.numpy(), classes=np.array([2, 0]), scores=np.array([0.25, 1.0]))
    npz(tmp_path / "none.npz", masks=TWO[:0].numpy())
    proposals = Saved(WORDS, str(tmp_path))(batch(["one", "none"]))
    assert proposals.masks.shape == (2, 2, *SIZE)
    assert not (proposals.masks[1] > 0).any()
    assert proposals.names is not None
    torch.testing.assert_close(proposals.names.joint[0], torch.tensor([[0, 0, 0.25, 0], [1.0, 0, 0, 0]]))
    torch.testing.assert_close(proposals.names.void, torch.tensor([[0.75, 0], [1, 1]]))
    npz(tmp_path / "bare.npz", masks=TWO.numpy())
    with pytest.raises(UserError, match="says what the masks of some pictures are, not of others"):
        Saved(WORDS, str(tmp_path))(batch(["one", "bare"]))
    assert Saved(WORDS, str(tmp_path))(batch(["bare", "none"])).names is None
    assert Saved(WORDS, str(tmp_path), names=False)(batch(["one", "bare"])).names is None


# Answers.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("namer", ["given", "point", "oracle"])
def test_no_masks_is_an_empty_answer(tmp_path: Path, task: str, namer: str) -> None:
    npz(tmp_path / "none.npz", masks=TWO[:0].numpy())
    segmenter = model(tmp_path, names=namer == "given")
    if namer != "given":
        segmenter.namer = TinyPointNamer(WORDS, (8, 8)) if namer == "point" else OracleNamer(WORDS)
    truth = segments(TWO, [0, 2], [1.0, 1.0])
    for inference in (Inference(), Inference(window=(8, 8), stride=(4, 4)), Inference(fit=Fit(short=7))):
        segmenter.inference = inference
        answer = segmenter.segment(IMAGE, task, key="none", truth=truth)
        assert answer.masks.shape == (0, *SIZE)


@pytest.mark.parametrize("task", TASKS)
def test_no_masks_in_any_form(tmp_path: Path, task: str) -> None:
    for path in (coco(tmp_path / "a.json"), panoptic(tmp_path / "p.json", THREE[:0])):
        key = "two" if path.stem == "a" else "a/one"
        assert len(model(path).segment(IMAGE, task, key=key)) == 0


@pytest.mark.parametrize(
    "inference", [Inference(), Inference(window=(8, 8), stride=(5, 5)), Inference(fit=Fit(short=24))]
)
def test_pixels_without_a_mask_have_no_class(tmp_path: Path, inference: Inference) -> None:
    npz(tmp_path / "one.npz", masks=TWO.numpy(), classes=np.array([0, 3]), scores=np.array([0.25, 0.5]))
    labels = model(tmp_path, inference=inference).segment(IMAGE, key="one").label_map()
    wanted = torch.full(SIZE, VOID)
    wanted[TWO[0]] = 0
    wanted[TWO[1]] = 3
    differ = labels != wanted
    # Enlarging rounds corners.
    assert differ.sum() <= (0 if inference.fit.short is None else 4)
    assert (labels == VOID).any()


def test_scores_of_zero_are_void_only_where_all_are() -> None:
    scores = torch.tensor([[[0.0, 0.0, 2.0]], [[0.0, -1.0, 0.0]]])
    assert tasks.semantic(whole(scores)).label_map().tolist() == [[VOID, 0, 0]]


def test_our_own_instances_come_back(tmp_path: Path) -> None:
    found = segments(boxes((0, 0, 6, 6), (2, 2, 9, 9), (0, 0, 6, 6)), [2, 2, 2], [0.987, 0.5, 0.0625])
    writer = InstancesWriter(tmp_path / "instances.json", WORDS)
    writer.add(3, "a/one.jpg", found)
    writer.close()
    assert same(model(tmp_path / "instances.json").segment(IMAGE, "instance", key="a/one"), found)


def test_our_own_panoptic_segments_come_back(tmp_path: Path) -> None:
    panoptic(tmp_path / "p.json", THREE)
    assert same(model(tmp_path / "p.json").segment(IMAGE, "panoptic", key="a/one"), THREE)


def scene(seed: int) -> tuple[Proposals, Names]:
    """Blobs that overlap, each with one likely name."""
    random = torch.Generator().manual_seed(seed)
    masks = resize(torch.randn(1, 8, 4, 5, generator=random) * 9, SIZE)
    logits = torch.randn(1, 8, 5, generator=random)
    logits[0, torch.arange(8), torch.randint(4, (8,), generator=random)] += 6
    return Proposals(masks), Names(logits)


@pytest.mark.parametrize("seed", range(5))
def test_what_the_tasks_answer_comes_back(tmp_path: Path, seed: int) -> None:
    given = (*scene(seed), 0, WORDS, Frame(SIZE, SIZE, SIZE))
    found = tasks.panoptic(*given, tasks.Thresholds(overlap=0.1)).segments
    assert len(found) > 1
    panoptic(tmp_path / "p.json", found)
    assert same(model(tmp_path / "p.json").segment(IMAGE, "panoptic", key="a/one"), found)

    found = tasks.instance(*given)
    found = found[found.scores > 0]
    assert len(found) == 8, "one answer of each proposal is a thing"
    writer = InstancesWriter(tmp_path / "i.json", WORDS)
    writer.add(3, "a/one.jpg", found)
    writer.close()
    assert same(model(tmp_path / "i.json").segment(IMAGE, "instance", key="a/one"), found)


def test_our_own_semantic_segments_come_back(tmp_path: Path) -> None:
    found = segments(THREE.masks, [0, 1, 3], [0.5, 0.75, 0.125])
    for path in (panoptic(tmp_path / "p.json", found), tmp_path / "arrays"):
        npz(
            tmp_path / "arrays" / "one.npz", masks=found.masks.numpy(), classes=np.array([0, 1, 3]), scores=found.scores
        )
        assert same(model(path).segment(IMAGE, "semantic", key="one"), found)


def test_a_blend_keeps_how_sure_the_file_is_and_chooses_among_its_names(tmp_path: Path) -> None:
    shares = np.array([[0.5, 0.5, 0, 0]])
    npz(tmp_path / "one.npz", masks=TWO[:1].numpy(), class_scores=shares, scores=np.array([0.75]))
    torch.manual_seed(0)
    blend = Blend(Given(), TinyPointNamer(WORDS, (8, 8)), weight=0.4)
    names = Segmenter(Saved(WORDS, str(tmp_path)), blend, None, WORDS, Inference())(batch(["one"]))[1]
    torch.testing.assert_close(names.void, torch.tensor([[0.25]]))
    joint = names.joint[0, 0]
    assert joint[2] == joint[3] == 0
    assert joint[0] != joint[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_as_saved_masks_is_perfect(tmp_path: Path, task: str) -> None:
    for number in range(2):
        labels = np.full((20, 30), 255, np.uint8)
        labels[:5], labels[9:14, 3 : 9 + number], labels[9:14, 15:20], labels[16:] = 0, 2, 2, 1
        png(tmp_path / "images" / "val" / "city" / f"{number}.png", np.zeros((20, 30, 3), np.uint8))
        png(tmp_path / "annotations" / "val" / "city" / f"{number}.png", labels)
    (tmp_path / "classes.yaml").write_text("[sky, road, {name: car, thing: true}, tree]", encoding="utf-8")
    data = Folder(str(tmp_path), split="val", instances="components")
    for sample in map(data.__getitem__, range(2)):
        truth = sample.truth
        npz(tmp_path / "masks" / f"{sample.key}.npz", masks=truth.masks.numpy(), classes=truth.classes.numpy())
    words = data.vocabulary
    segmenter = Segmenter(Saved(words, str(tmp_path / "masks")), Given(), None, words, Inference()).eval()
    assert evaluate(segmenter, data, task).scores.value == 1.0


def test_criterion_set_takes_pictures_without_proposals() -> None:
    truth = segments(TWO, [0, 2], [1.0, 1.0])
    for count, true in ((0, truth), (0, truth[:0])):
        masks = torch.zeros(1, count, *SIZE, requires_grad=True)
        logits = torch.zeros(1, count, 5, requires_grad=True)
        losses = Matched(WORDS, points=16)(Proposals(masks), Names(logits), [true])
        assert all(value.isfinite() for value in losses.values())
        torch.stack(list(losses.values())).sum().backward()


def test_the_oracle_takes_a_picture_without_truth() -> None:
    none = Segments(TWO[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    segmenter = Segmenter(OracleProposer(WORDS), Given(), None, WORDS, Inference(fit=Fit(short=24)))
    for task in TASKS:
        assert segmenter.segment(IMAGE, task, truth=none).masks.shape == (0, *SIZE)
