"""Parity with ViT-Adapter but for its network: its fixtures hold, and the runner that says so fails where it should."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures_dir import FIXTURES
from parity.rows import Row, table
from parity.runner import run

SUBSET = Path(__file__).parent / "fixtures" / "vit-adapter"
FOLDERS = [SUBSET] if FIXTURES is None else [SUBSET, FIXTURES / "vit-adapter"]


def failing(folder: Path) -> list[Row]:
    return [row for row in run(folder) if not row.passed]


@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "all"][: len(FOLDERS)])
def test_data_holds(folder: Path) -> None:
    """Every size, padding, flip and window of ten configs; label maps, names and colours of all data sets."""
    rows = run(folder / "data")
    assert len(rows) >= 698
    bad = [row for row in rows if not row.passed]
    assert not bad, table(bad)


def change(folder: Path, name: str, changed: Callable[[Any], None]) -> Path:
    """A folder with one file of the subset's data, changed."""
    shutil.copytree(SUBSET / "manifests", folder / "manifests")
    content = json.loads((SUBSET / "data" / name).read_text())
    changed(content)
    (folder / "data").mkdir()
    (folder / "data" / name).write_text(json.dumps(content))
    return folder / "data"


def view(content: Any) -> Any:
    return content["ade_m2f_896_ms"]["cases"][0]["views"][2]


@pytest.mark.parametrize(
    ("name", "changed", "row"),
    [
        ("test_resize_and_windows.json", lambda told: view(told)["windows"][1].__setitem__(2, 159), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: view(told).update(flip=True), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: view(told).update(img_shape=[896, 1056]), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: told["city_m2f_ss"]["cases"][1]["views"].pop(), "480x640, views"),
        ("test_resize_and_windows.json", lambda told: told["pctx_m2f_ms"].update(stride=[1, 1]), "windows and strides"),
        ("label_luts.json", lambda told: told["reduce_zero_label_lut"].__setitem__(255, 254), "reduce_zero_label_lut"),
        (
            "label_luts.json",
            lambda told: told["mapillary_to_cityscapes_trainid_lut"].__setitem__(41, 1),
            "mapillary_to_cityscapes_trainid_lut",
        ),
        ("label_luts.json", lambda told: told.update(another=[0]), "another"),
        ("coco_stuff_raw_to_train_id.json", lambda told: told["coco_stuff164k"].update({"181": 1}), "coco_stuff164k"),
        ("coco_stuff_raw_to_train_id.json", lambda told: told["coco_stuff10k"].update({"13": 1}), "coco_stuff10k"),
        ("classes_palettes.json", lambda told: told["PotsdamDataset"]["palette"].reverse(), "PotsdamDataset: colours"),
        ("classes_palettes.json", lambda told: told["ADE20KDataset"]["classes"].reverse(), "ADE20KDataset: names"),
    ],
)
def test_one_wrong_number_shows(tmp_path: Path, name: str, changed: Callable[[Any], None], row: str) -> None:
    (found,) = failing(change(tmp_path, name, changed))
    assert found.file == name
    assert found.name.endswith(row)


def test_what_it_does_not_know_fails(tmp_path: Path) -> None:
    folder = change(tmp_path, "classes_palettes.json", lambda told: told.update(LoveDADataset=told["PotsdamDataset"]))
    assert [row.note for row in failing(folder)] == ["NotCoveredError: classes of LoveDADataset"]
