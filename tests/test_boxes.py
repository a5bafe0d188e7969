"""Boxes and points in files as data sets: rectangles in layers, what lies outside, and all that can be wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskfirst.data.check import check
from maskfirst.data.coco import COCOBoxes
from maskfirst.data.coding import DataError
from maskfirst.formats import FormatError
from maskfirst.types import VOID

HEIGHT, WIDTH = 12, 16
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def picture(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def box(number: int, category: int, told: Any, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": number, "category_id": category, "bbox": told, "segmentation": [[0, 0, 1]]} | more


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A picture of two boxes that overlap and a crowd, and one without any."""
    for number in (139, 285):
        picture(tmp_path / f"val2017/{number:012d}.jpg")
    write(
        tmp_path / "annotations/instances_val2017.json",
        {
            "images": [
                {"id": n, "file_name": f"{n:012d}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
                for n in (139, 285)
            ],
            "annotations": [
                box(139, 18, [2, 1, 6.4, 5]),
                box(139, 1, [6, 4, 6, 6]),
                box(139, 1, [12, 0, 4, 3], iscrowd=1),
            ],
            "categories": CATEGORIES,
        },
    )
    return tmp_path


def rewrite(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["annotations"])
    write(path, content)


# --- COCO ---------------------------------------------------------------------------------------------------------


def test_boxes_are_filled_rectangles_in_layers(coco: Path) -> None:
    data = COCOBoxes(str(coco), "val")
    assert list(data.keys()) == ["000000000139", "000000000285"]
    assert data.vocabulary.names == ("dog", "person")
    sample = data[0]
    assert sample.classes.tolist() == [0, 1, 1]
    assert sample.crowd.tolist() == [False, False, True]
    assert sample.ids.shape == (2, HEIGHT, WIDTH), "what overlaps needs another layer, the rest does not"
    assert sample.truth.boxes.tolist() == [[2, 1, 8, 6], [6, 4, 12, 10], [12, 0, 16, 3]]
    assert sample.truth.masks.sum((1, 2)).tolist() == [30, 36, 12]
    assert (data[1].ids == VOID).all()
    assert not data.warnings


def test_boxes_without_a_pixel_are_counted_and_left_out(coco: Path) -> None:
    extra = [[3, 3, 0, 5], [3, 3, 0.3, 5], [WIDTH, 0, 4, 4], [-9, 0, 8.9, 4], [-6, 0, 8, 4], [4, 4, 90, 90]]
    rewrite(coco, lambda annotations: annotations.extend(box(285, 18, told) for told in extra))
    data = COCOBoxes(str(coco), "val")
    assert data[1].truth.boxes.tolist() == [[0, 0, 2, 4], [4, 4, WIDTH, HEIGHT]]
    assert data.warnings == {
        "boxes without a pixel in their picture, left out": 4,
        "boxes that reach outside of their picture, cut off there": 2,
    }
    problems = [problem.message for problem in check({"val": data}).problems if problem.kind == "annotation"]
    assert problems == [
        "boxes that reach outside of their picture, cut off there: 2",
        "boxes without a pixel in their picture, left out: 4",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"annotations\[1\]: bbox should be \[x, y, width, height\] in px, got \[1.0, 2.0, 3.0\]"),
        ({"bbox": [1, 2, 3, "4"]}, r"annotations\[1\]: bbox should be"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"annotations\[1\]: bbox should be .* got \[1.0, 2.0, nan, 4.0\]"),
        ({"bbox": [1, 2, -3, 4]}, r"annotations\[1\]: bbox should be"),
        ({"bbox": None}, r"annotations\[1\]: bbox should be .* got None"),
        ({"iscrowd": 2}, r"annotations\[1\]: iscrowd should be 0 or 1, got 2"),
        ({"image_id": 7}, r"annotations\[1\]: image_id 7 is none of the 2 pictures"),
        ({"category_id": 3}, r"annotations\[1\]: category_id 3 is not among the categories \(1, 18\)"),
    ],
)
def test_wrong_boxes_are_told_with_their_place(coco: Path, change: dict[str, Any], message: str) -> None:
    rewrite(coco, lambda annotations: annotations[1].update(change))
    with pytest.raises(FormatError, match=message):
        COCOBoxes(str(coco), "val")


def test_a_row_without_a_box_is_told(coco: Path) -> None:
    rewrite(coco, lambda annotations: annotations[2].pop("bbox"))
    with pytest.raises(FormatError, match=r"annotations\[2\]: should be an object with `image_id`, .* and `bbox`"):
        COCOBoxes(str(coco), "val")


def test_another_size_than_the_picture_has_is_told(coco: Path) -> None:
    picture(coco / "val2017/000000000139.jpg", (WIDTH, HEIGHT))
    with pytest.raises(DataError, match=r"has 16 x 12 px, but it has 12 x 16 px; was it annotated before its EXIF"):
        COCOBoxes(str(coco), "val")[0]
