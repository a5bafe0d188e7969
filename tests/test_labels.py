"""Cheap labels as data sets: named points, Objects365's boxes, coarse maps, and several data sets mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskfirst.build import MENUS
from maskfirst.contracts import Dataset
from maskfirst.data.cityscapes import CityscapesCoarse
from maskfirst.data.coding import DataError
from maskfirst.data.mixed import Mixed
from maskfirst.data.objects365 import Objects365
from maskfirst.data.points_csv import PointsCSV
from maskfirst.data.shapes import Shapes
from maskfirst.data.vocabulary import load
from maskfirst.formats import FormatError
from maskfirst.recipe import RecipeError, check
from maskfirst.types import VOID
from test_boxes import HEIGHT, WIDTH, picture, write
from test_cityscapes import street
from test_cityscapes import write as write_street

NAMES = ["sky", "road", "car"]


def table(root: Path, *lines: str, head: str = "image,y,x,class") -> Path:
    for name in ("a.jpg", "b.jpg"):
        picture(root / "images/train" / name)
    (root / "points_train.csv").write_text("\n".join((head, *lines)) + "\n", encoding="utf-8")
    return root


# Points


def test_points_are_single_pixels_of_their_class(tmp_path: Path) -> None:
    data = PointsCSV(str(table(tmp_path, "a.jpg,2,3,road", "b.jpg,0,0,sky", "a.jpg,5.4,7,car")), vocabulary=NAMES)
    assert list(data.keys()) == ["a", "b"]
    sample = data[0]
    assert sample.classes.tolist() == [1, 2]
    assert sample.truth.boxes.tolist() == [[3, 2, 4, 3], [7, 5, 8, 6]]
    assert (sample.ids != VOID).sum() == 2


def test_a_radius_makes_squares_that_end_at_the_border(tmp_path: Path) -> None:
    data = PointsCSV(str(table(tmp_path, "a.jpg,0,8,sky")), vocabulary=NAMES, radius=2)
    assert data[0].truth.boxes.tolist() == [[6, 0, 11, 3]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg,2,3,rode", r"points_train\.csv: line 3: unknown class 'rode'\. Did you mean 'road'\?"),
        ("a.jpg,nan,3,road", r"line 3: y and x should be numbers of px, got 'nan' and '3'"),
        ("a.jpg,2,,road", r"line 3: y and x should be numbers"),
        ("../a.jpg,2,3,road", r"line 3: image '\.\./a\.jpg' should be a path in the folder"),
    ],
)
def test_wrong_lines_are_told_by_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PointsCSV(str(table(tmp_path, "a.jpg,0,0,sky", line)), vocabulary=NAMES)


@pytest.mark.parametrize("place", [f"{HEIGHT},0", f"0,{WIDTH}", "-1,0"])
def test_points_outside_of_their_picture_are_told(tmp_path: Path, place: str) -> None:
    data = PointsCSV(str(table(tmp_path, f"a.jpg,{place},sky")), vocabulary=NAMES)
    with pytest.raises(DataError, match=r"line 2: .* lies outside of a\.jpg, which has 12 rows and 16 columns"):
        data[0]


def test_tables_without_a_column_or_a_point_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'class'; it should name image, y, x, class, and has image, y, x"):
        PointsCSV(str(table(tmp_path, "a.jpg,0,0", head="image,y,x")), vocabulary=NAMES)
    with pytest.raises(DataError, match="no pictures here"):
        PointsCSV(str(table(tmp_path)), vocabulary=NAMES)


def test_a_table_that_is_no_text_or_not_there_is_told(tmp_path: Path) -> None:
    path = table(tmp_path) / "points_train.csv"
    path.write_bytes(b"image,y,x,class\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"points_train\.csv: cannot be read as CSV"):
        PointsCSV(str(tmp_path), vocabulary=NAMES)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read as CSV: No such file"):
        PointsCSV(str(tmp_path), vocabulary=NAMES)


# Objects365


def samples(root: Path, annotations: Any, path: str = "patch0/1.jpg") -> Path:
    picture(root / path)
    told = [
        {"media": {"media_path": path}, "annotations": annotations},
        {"media": {"media_path": "x.jpg"}, "annotations": []},
    ]
    write(root / "dsdl_Det_full/set-train/train_samples.json", {"samples": told})
    return root


def test_samples_files_tell_boxes_and_no_names(tmp_path: Path) -> None:
    root = samples(tmp_path, [{"bbox": [2, 1, 5, 4], "category_id": 6}, {"bbox": [9, 9, 0, 2], "category_id": 1}])
    data = Objects365(str(root))
    assert list(data.keys()) == ["patch0/1"], "a picture without annotations is left out"
    assert len(data.vocabulary) == 365
    sample = data[0]
    assert [data.vocabulary.names[index] for index in sample.classes] == ["Car"]
    assert sample.truth.boxes.tolist() == [[2, 1, 7, 5]]
    assert data.warnings == {"boxes without a pixel in their picture, left out": 1}


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"bbox": [0, 0, 2, 2], "category_id": 366}], r"samples\[0\]\.annotations\[0\]: category_id 366"),
        ([{"bbox": [0, 0, 2], "category_id": 1}], r"samples\[0\]\.annotations\[0\]: bbox should be"),
        ([{"category_id": 1}], r"samples\[0\]\.annotations\[0\]: should be an object with"),
    ],
)
def test_wrong_samples_are_told_with_their_place(tmp_path: Path, annotations: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Objects365(str(samples(tmp_path, annotations)))


def test_a_picture_outside_of_the_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"file_name '\.\./1\.jpg' leads out of the folder"):
        Objects365(str(samples(tmp_path, [{"bbox": [0, 0, 2, 2], "category_id": 1}], "../1.jpg")))


def test_the_form_of_coco_is_read_with_its_own_names(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 1, 3, 3], "iscrowd": 0}],
        "categories": [{"id": 7, "name": "lamp"}],
    }
    write(tmp_path / "objv2_train.json", content)
    data = Objects365(str(tmp_path), annotations="objv2_{split}.json", images="images")
    assert data.vocabulary.names == ("lamp",)
    assert data[0].truth.boxes.tolist() == [[1, 1, 4, 4]]


def test_the_names_are_numbered_from_1_in_order() -> None:
    words = load("objects365")
    assert words.ids == tuple(range(1, 366))
    assert words.things == frozenset(range(365))


# Coarse maps


def test_coarse_maps_are_those_of_train_extra_but_for_the_broken_one(tmp_path: Path) -> None:
    write_street(tmp_path, "Coarse", "train_extra", "augsburg", 7, street())
    write_street(tmp_path, "Coarse", "train_extra", "troisdorf", 0, street())
    broken = "troisdorf_000000_000073"
    for folder, ending in (("leftImg8bit", "leftImg8bit"), ("gtCoarse", "gtCoarse_labelIds")):
        city = tmp_path / folder / "train_extra" / "troisdorf"
        for path in list(city.glob(f"troisdorf_000000_000019_{ending}*")):
            path.rename(city / path.name.replace("troisdorf_000000_000019", broken))
    data = CityscapesCoarse(str(tmp_path))
    assert len(data) == 1
    assert "augsburg" in data.keys()[0]
    assert data.vocabulary.names[data[0].classes[0]] == "road"
    assert len(np.unique(data[0].ids)) > 2


# Mixtures


def test_a_mixture_is_checked_without_its_data() -> None:
    part = {"kind": "cityscapes", "root": "nowhere"}
    told = {"menus": MENUS, "where": "data.train", "source": "mine.yaml"}
    check({"kind": "mixed", "parts": [part, {"kind": "cityscapes_coarse"}]}, Dataset, **told)
    with pytest.raises(
        RecipeError, match=r"mine\.yaml: data\.train\.parts\.1: unknown key 'rot'\. Did you mean 'root'\?"
    ):
        check({"kind": "mixed", "parts": [part, {"kind": "cityscapes_coarse", "rot": "x"}]}, Dataset, **told)


def scenes(length: int) -> Dataset:
    return Shapes(length=length, size=(32, 32))


def test_weights_are_how_often_an_epoch_sees_each() -> None:
    first, second = scenes(4), scenes(6)
    data = Mixed([first, second], [0.5, 2.0])
    assert len(data) == 2 + 12
    assert list(data.keys())[:2] == [first.keys()[0], first.keys()[2]]
    assert sorted(set(data.keys()[2:])) == sorted(second.keys())
    assert data[3].key == data.keys()[3]
    assert list(Mixed([first, second]).keys()) == [*first.keys(), *second.keys()]


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "1 for 2 parts"), ([1.0, 0.0], "leaves nothing"), ([1.0, float("inf")], "leaves nothing"),
     ([1.0, float("nan")], "leaves nothing"), ([1.0, 0.01], "leaves nothing of 3 samples")],
)  # fmt: skip
def test_wrong_weights_are_told(weights: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mixed([scenes(3), scenes(3)], weights)


def test_parts_of_other_names_or_none_are_told(tmp_path: Path) -> None:
    other = PointsCSV(str(table(tmp_path, "a.jpg,0,0,sky")), vocabulary=NAMES)
    with pytest.raises(DataError, match=r"parts\[1\]: its 3 names are not the"):
        Mixed([scenes(1), other])
    with pytest.raises(DataError, match="none; give data sets to mix"):
        Mixed([])
