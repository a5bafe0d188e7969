"""Masks as run lengths and polygons: there and back again, equal to pycocotools, and no damaged one opened."""

from array import array

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools

from maskfirst.formats import FormatError, rle, yolo
from maskfirst.formats.instances import Instances
from maskfirst.types import SegmentMap, Segments

NAMES = ("sky", "road", "car")


def random_masks(seed: int) -> torch.Tensor:
    """Up to four masks of a size of up to 24 px, from empty over blobs to full."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 25, 2).tolist()
    noise = rng.random((int(rng.integers(0, 5)), -(-height // 3), -(-width // 3)))
    blobs = noise.repeat(3, 1).repeat(3, 2)[:, :height, :width]
    return torch.from_numpy((blobs + 0.2 * rng.random(blobs.shape)) < rng.choice([0.0, 0.3, 0.6, 1.3]))


def segments(masks: torch.Tensor, crowd: bool = False) -> Segments:
    count = len(masks)
    return Segments(
        masks, torch.arange(count) % 3, torch.linspace(0.1, 1, count), torch.arange(count) % 2 == (0 if crowd else 2)
    )


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_are_those_of_pycocotools_and_come_back(seed: int) -> None:
    masks = random_masks(seed)
    found, size = rle.encode(masks), (masks.shape[1], masks.shape[2])
    theirs = [pycocotools.encode(np.asfortranarray(mask)) for mask in masks.byte().numpy()]
    assert found == [{"size": one["size"], "counts": one["counts"].decode()} for one in theirs]
    assert torch.equal(rle.decode(found, size), masks)
    assert torch.equal(rle.area(found), masks.flatten(1).sum(1))
    assert rle.read(found, size, str) == found
    flat = [{"size": list(size), "counts": runs_of(mask)} for mask in masks]
    assert rle.read(flat, size, str) == found


def runs_of(mask: torch.Tensor) -> list[int]:
    """Run lengths the slow way."""
    runs, inside = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != inside:
            runs.append(0)
            inside = pixel
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("seed", range(40))
def test_one_polygon_holds_all_parts_and_holes(seed: int) -> None:
    masks = random_masks(seed)
    size = (masks.shape[1], masks.shape[2])
    for mask in masks:
        polygon = rle.to_polygon(mask)
        assert bool(polygon) == bool(mask.any())
        if polygon:
            assert torch.equal(rle.decode([rle.from_polygons([polygon], size)])[0], mask)


def test_a_ring_beside_a_dot_is_one_polygon() -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[1:6, 1:6] = mask[3, 8] = True
    mask[3, 3] = False
    polygon = rle.to_polygon(mask)
    assert polygon[:2] == polygon[-2:]
    assert {(8, 3), (9, 4), (3, 3), (4, 4), (1, 1), (6, 6)} <= set(zip(polygon[::2], polygon[1::2], strict=True))
    assert rle.to_polygon(torch.ones(2, 3, dtype=torch.bool)) == [0, 0, 3, 0, 3, 2, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_boxes_agree_whoever_makes_them(seed: int) -> None:
    masks = random_masks(seed)
    found = segments(masks)
    told = rle.boxes(rle.encode(masks))
    assert torch.equal(Instances.of(found).boxes, found.boxes)
    assert torch.equal(told[:, :2] + told[:, 2:], found.boxes[:, 2:].double())
    flat = SegmentMap.of(found)
    assert torch.equal(flat.boxes.float(), flat.segments.boxes)
    assert torch.equal(flat.areas, flat.segments.masks.flatten(1).sum(1))


def test_boxes_are_half_open_and_0_where_nothing_is() -> None:
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    assert segments(masks).boxes.tolist() == [[2, 1, 6, 3], [0, 0, 0, 0]]


def test_instances_open_into_the_same_segments() -> None:
    masks = torch.rand(5, 6, 8) < 0.4
    found = segments(masks, crowd=True)
    again = Instances.of(found).segments
    assert all(
        torch.equal(getattr(again, name), getattr(found, name)) for name in ("masks", "classes", "scores", "crowd")
    )
    kept = Instances.of(found)[found.scores > 0.5]
    assert torch.equal(kept.segments.masks, masks[found.scores > 0.5])
    assert Instances.of(found[:0]).segments.masks.shape == (0, 6, 8)
    with pytest.raises(ValueError, match="no size"):
        rle.decode([])


def test_polygons_are_united_and_cut_off_at_the_border() -> None:
    square, far = [1.0, 1, 4, 1, 4, 4, 1, 4], [-9.0, -9, -2, -9, -2, -2]
    both = rle.from_json([square, [3.0, 3, 90, 3, 90, 90, 3, 90], far], (6, 8), "a")
    wanted = torch.zeros(6, 8, dtype=torch.bool)
    wanted[1:4, 1:4] = wanted[3:, 3:] = True
    assert torch.equal(rle.decode([both])[0], wanted)
    assert rle.from_json([array("d", square)], (6, 8), "a") == rle.from_polygons([square], (6, 8))
    assert rle.area([rle.from_json([far], (6, 8), "a")]).tolist() == [0]


PACKED = rle.encode(torch.eye(6, 8, dtype=torch.bool)[None])[0]["counts"]
BAD = {
    "too short": ({"size": [6, 8], "counts": PACKED[:-1]}, "run lengths of 36 px in all for a picture of 6 x 8 px"),
    "too long": ({"size": [6, 8], "counts": PACKED + "11"}, "run lengths of .* px in all"),
    "cut inside a number": ({"size": [6, 8], "counts": PACKED + "o"}, "no packed run lengths"),
    "empty": ({"size": [6, 8], "counts": ""}, "no packed run lengths: ''"),
    "not ASCII": ({"size": [6, 8], "counts": "ü0"}, "no packed run lengths"),
    "endless number": ({"size": [6, 8], "counts": "o" * 9 + "1"}, "no packed run lengths"),
    "below 0": ({"size": [6, 8], "counts": "`1ON"}, "below 0"),
    "another size": (
        {"size": [8, 6], "counts": PACKED},
        r"of \[8, 6\] px \(height, width\) in a picture of \[6, 8\] px",
    ),
    "no size": ({"counts": PACKED}, "need `size` and `counts`, got counts"),
    "a list that is too short": ({"size": [6, 8], "counts": [3, 4]}, "of 7 px in all for a picture of 6 x 8"),
    "a list below 0": ({"size": [6, 8], "counts": [50, -2]}, "whole numbers from 0"),
    "a list of fractions": ({"size": [6, 8], "counts": [47.5, 0.5]}, "whole numbers from 0"),
    "two points": ([[0, 0, 3, 3]], "of 2 points; it takes at least three"),
    "odd": ([[0, 0, 3, 3, 1, 1, 2]], "of 7 numbers; x and y come in pairs"),
    "second polygon": ([[0, 0, 3, 3, 1, 3], [0, 0]], "polygon 1: a polygon of 1 points"),
    "not finite": ([[0, 0, 3, float("nan"), 1, 3]], "not finite"),
    "words": ([["a", "b"]], "flat list of numbers"),
    "words of digits": ([["1", "2", "3", "4", "5", "6"]], "flat list of numbers"),
    "points as pairs": ([[[0, 0], [3, 3], [1, 3]]], "flat list of numbers"),
    "ragged": ([[[0, 0], 3, 3, 1, 3]], "flat list of numbers"),
    "miles long": ([[0, 0, 1e12, 0, 0, 1e12]], "coordinates should be px of the picture"),
    "long in many turns": ([[0, 0, 1.9e6, 0] * 20], "coordinates should be px of the picture"),
    "nothing": ([], "no mask; `segmentation` should be polygons or run lengths"),
    "null": (None, "no mask"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mask_is_told_in_a_line_with_its_place(name: str) -> None:
    value, sentence = BAD[name]
    fine = {"size": [6, 8], "counts": PACKED}
    with pytest.raises(FormatError, match=f"^truth.json: annotations.1.: .*{sentence}") as caught:
        rle.read([fine, value, fine], (6, 8), lambda index: f"truth.json: annotations[{index}]")
    assert "\n" not in str(caught.value)


def test_many_damaged_strings_are_either_refused_or_cover_the_picture() -> None:
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(500):
        letters = list(PACKED)
        letters[rng.integers(len(letters))] = chr(rng.integers(48, 112))
        try:
            found = rle.from_json({"size": [6, 8], "counts": "".join(letters)}, (6, 8), "a")
        except FormatError:
            continue
        opened += 1
        # What pycocotools would read or write beyond the picture it reports as an error, if it notices.
        assert 0 <= rle.area([found]).item() <= 48
        assert rle.decode([found]).shape == (1, 6, 8)
    assert 0 < opened < 250


@pytest.mark.parametrize("seed", range(15))
def test_yolo_files_read_back(tmp_path, seed: int) -> None:
    found = segments(random_masks(seed))
    size = (found.masks.shape[1], found.masks.shape[2])
    yolo.write(tmp_path / "a.txt", found)
    again = yolo.read(tmp_path / "a.txt", size, NAMES).segments
    visible = found[found.masks.flatten(1).any(1)]
    assert torch.equal(again.masks, visible.masks)
    assert torch.equal(again.classes, visible.classes)
    assert (again.scores == 1).all()


def test_yolo_survives_large_pictures_and_says_what_it_says(tmp_path) -> None:
    mask = torch.zeros(1, 3001, 4999, dtype=torch.bool)
    mask[0, 1000:2999, 3:4998] = True
    yolo.write(tmp_path / "a.txt", segments(mask))
    assert torch.equal(yolo.read(tmp_path / "a.txt", (3001, 4999), NAMES).segments.masks, mask)
    tiny = torch.zeros(1, 4, 8, dtype=torch.bool)
    tiny[0, 1:3, 2:6] = True
    yolo.write(tmp_path / "b.txt", segments(tiny))
    assert (tmp_path / "b.txt").read_text() == "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("3 0 0 1 0 1 1", "class '3'; a line begins with the index of a class, 0..2"),
        ("car 0 0 1 0 1 1", "class 'car'.*Did you mean 'car'"),
        ("1 0.5 0.5 0.2 0.2", "a box and no polygon"),
        ("1 0 0 1 0", "a box and no polygon"),
        ("1 0 0 1 0 1", "of 5 numbers; x and y come in pairs"),
        ("1 0 0", "of 1 points"),
        ("1 0 0 1 0 x 1", "not all numbers"),
        ("1 0 0 40 0 40 40", r"coordinates 0..40; they are shares, 0..1"),
        ("1 0 0 nan 0 1 1", "not finite"),
    ],
)
def test_a_bad_line_of_yolo_is_told_with_its_number(tmp_path, line: str, sentence: str) -> None:
    (tmp_path / "a.txt").write_text(f"0 0 0 1 0 1 1\n\n{line}\n")
    with pytest.raises(FormatError, match=f"a.txt: line 3: .*{sentence}"):
        yolo.read(tmp_path / "a.txt", (10, 10), NAMES)


def test_yolo_files_that_are_no_text_or_not_there_are_named(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"a\.txt: not a text file"):
        yolo.read(tmp_path / "a.txt", (10, 10), NAMES)
    with pytest.raises(FormatError, match=r"b\.txt: cannot be read: No such file"):
        yolo.read(tmp_path / "b.txt", (10, 10), NAMES)
    (tmp_path / "c.txt").write_text("")
    assert len(yolo.read(tmp_path / "c.txt", (10, 10), NAMES)) == 0
