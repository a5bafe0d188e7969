"""What `check` finds: one data folder is spoilt in one way at a time."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskfirst import cli
from maskfirst.data.check import Problem, Report, check
from maskfirst.data.folder import Folder
from maskfirst.data.shapes import Shapes, write_demo

NAMES = ["road", "tree", "car", "sky"]


def write(root: Path, split: str, name: str, labels: np.ndarray, seed: int | None = None) -> None:
    rng = np.random.default_rng([*f"{split}{name}".encode()] if seed is None else seed)
    height, width = labels.shape
    for folder, pixels, ending in (
        ("images", rng.integers(0, 255, (height, width, 3), dtype=np.uint8), "png"),
        ("annotations", labels, "png"),
    ):
        path = root / folder / split / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of three pictures without a fault: 8 x 8 px, four classes, 255 in a corner."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "abc":
            labels = rng.permutation(np.arange(64, dtype=np.uint8) % 4).reshape(8, 8)
            labels[0, 0] = 255
            write(tmp_path, split, name, labels)
    return tmp_path


def look(root: Path, **settings: object) -> Report:
    data = {split: Folder(str(root), split=split, **({"vocabulary": NAMES} | settings)) for split in ("train", "val")}
    return check(data)


def only(report: Report) -> Problem:
    assert len(report.problems) == 1, [str(problem) for problem in report.problems]
    problem = report.problems[0]
    assert "\n" not in str(problem)
    return problem


def relabel(root: Path, change: Callable[[np.ndarray], np.ndarray], splits: tuple[str, ...] = ("train", "val")) -> None:
    for split in splits:
        for path in (root / "annotations" / split).iterdir():
            labels = change(np.array(Image.open(path)).astype(int)).astype(np.uint8)
            Image.fromarray(labels).save(path)


def test_nothing_is_wrong(root: Path) -> None:
    report = look(root)
    assert report.problems == []
    assert report.images == {"train": 3, "val": 3}
    assert report.void == {"train": 3, "val": 3}
    assert [frequency.name for frequency in report.frequencies["train"]] == NAMES
    assert sum(frequency.pixels for frequency in report.frequencies["train"]) == 3 * 63
    assert all(frequency.images == 3 for frequency in report.frequencies["val"])


def test_frequencies_count_classes_after_merging(root: Path) -> None:
    report = look(root, vocabulary=["ground", "other"], ids={0: "ground", 1: "other", 2: "other", 3: None})
    ground, other = report.frequencies["train"]
    assert 45 <= ground.pixels <= 48
    assert 93 <= other.pixels <= 96
    assert other.images == 3
    assert report.void["train"] >= 45


def test_label_out_of_range(root: Path) -> None:
    relabel(root, lambda labels: np.where((labels == 2) & (np.indices(labels.shape)[0] > 3), 37, labels), ("val",))
    problem = only(look(root))
    assert (problem.kind, problem.where) == ("ignore", "val")
    assert problem.message.startswith("no class of 4 classes, ignore 255: value 37 in 3 of 3 label maps (")
    assert " px), first at (y " in problem.message
    assert str(root / "annotations/val/a.png") in problem.message
    assert problem.remedy == "set `ignore: 37` if 37 marks pixels without a class, or correct the label maps"
    assert len(problem.items) == 3


def test_many_numbers_out_of_range(root: Path) -> None:
    relabel(root, lambda labels: np.arange(64).reshape(8, 8) + 100, ("train",))
    problem = look(root).problems[0]
    assert problem.kind == "value"
    assert (
        "value 100, value 101, value 102, value 103, value 104 and 59 more in 3 of 3 label maps (192 px)"
        in problem.message
    )
    assert "first value 100 at (y 0, x 0)" in problem.message
    assert problem.remedy.endswith("are they numbers of instances?")


def test_background_off_by_one(root: Path) -> None:
    """Classes count from 1: `shift: -1` mends it, and with it nothing is wrong."""
    relabel(root, lambda labels: np.where(labels == 255, 255, labels + 1))
    report = look(root)
    problems = [problem for problem in report.problems if problem.kind == "shift"]
    assert [problem.where for problem in problems] == ["train", "val"]
    assert problems[0].remedy == "set `shift: -1` (0 is then no class, and classes count from 1)"
    assert look(root, shift=-1).problems == []


def test_zero_for_background_and_255_for_void(root: Path) -> None:
    relabel(root, lambda labels: np.where(labels == 255, 255, (labels + 1) * (np.indices(labels.shape)[0] > 1)))
    problem = look(root).problems[0]
    assert (problem.kind, problem.remedy[:17]) == ("shift", "set `shift: -1` (")
    assert look(root, shift=-1).problems == []


def test_a_number_after_the_last_class_may_be_void_or_a_shift(root: Path) -> None:
    relabel(root, lambda labels: np.where(labels == 255, 4, labels))
    report = look(root)
    assert {problem.kind for problem in report.problems} == {"shift"}
    assert report.problems[0].remedy == (
        "set `ignore: 4` if 4 marks pixels without a class, or set `shift: -1` if 0 does"
    )
    assert look(root, ignore=4).problems == []


def test_shift_that_should_not_be(root: Path) -> None:
    report = look(root, shift=-1)
    problems = [problem for problem in report.problems if problem.kind == "shift"]
    assert [problem.where for problem in problems] == ["train", "val"]
    assert "with `shift: -1`, 0 is no class (24% of all pixels)" in problems[0].message
    assert "the last class, 'sky', never occurs" in problems[0].message
    assert problems[0].remedy == "leave `shift` out if 0 stands for 'road'"


def test_wrong_ignore(root: Path) -> None:
    report = look(root, ignore=2)
    wrong = [problem for problem in report.problems if problem.where == "train"]
    assert [problem.kind for problem in wrong] == ["ignore", "absent", "ignore"]
    assert wrong[0].remedy.startswith("set `ignore: 255` if 255 marks pixels without a class")
    assert wrong[1].items == ("car",)
    assert "`ignore: 2` hides class 2, 'car': 25% of all pixels" in wrong[2].message


def test_numbers_missing_in_ids(root: Path) -> None:
    problem = look(root, ids={0: 0, 1: 1, 2: 2}).problems[0]
    assert problem.kind == "value"
    assert problem.remedy == "add to `ids` what 3 stand for, null for no class"


def test_colours_missing_in_the_vocabulary(root: Path) -> None:
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(path)
    problem = look(root, colors=True).problems[0]
    assert "color (1, 2, 3) in 3 of 3 label maps (192 px)" in problem.message
    assert "give the vocabulary the colours" in problem.remedy


def test_images_without_labels_and_labels_without_images(root: Path) -> None:
    (root / "annotations/train/b.png").unlink()
    (root / "images/val/c.png").unlink()
    report = look(root)
    assert [(problem.kind, problem.where) for problem in report.problems] == [
        ("no label", "train"),
        ("no image", "val"),
    ]
    assert "images without a label map: 1 of 3 (b.png)" in report.problems[0].message
    assert report.problems[0].items == (str(root / "images/train/b.png"),)
    assert report.problems[1].items == (str(root / "annotations/val/c.png"),)
    assert report.images == {"train": 2, "val": 2}


def test_sizes(root: Path) -> None:
    Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (6, 2))).save(root / "annotations/train/b.png")
    problem = only(look(root))
    assert problem.kind == "size"
    assert "label maps of another size than their images: 1 (" in problem.message
    assert f"{root / 'annotations/train/b.png'} has 8 x 6 px, b.png 8 x 8" in problem.message
    write(root, "train", "b", np.arange(40, dtype=np.uint8).reshape(5, 8) % 4)
    Image.fromarray(np.arange(40, dtype=np.uint8).reshape(8, 5) % 4).save(root / "annotations/train/b.png")
    assert "as if drawn before the EXIF rotation" in only(look(root)).message


def test_classes_absent_from_one_split(root: Path) -> None:
    relabel(root, lambda labels: np.where(labels == 2, 1, labels), ("val",))
    problem = only(look(root))
    assert (problem.kind, problem.where, problem.items) == ("absent", "val", ("car",))
    assert "classes that never occur: 1 of 4 (car)" in problem.message


def test_the_same_picture_in_both_splits_under_another_name_and_format(root: Path) -> None:
    picture = Image.open(root / "images/train/b.png")
    (root / "images/val/a.png").unlink()
    picture.save(root / "images/val/a.bmp")
    problem = only(look(root))
    assert (problem.kind, problem.where) == ("leak", "train, val")
    assert "pictures that are in both splits: 1 (b.png = a.png)" in problem.message


def test_unreadable_files_are_named_and_the_rest_goes_on(root: Path) -> None:
    (root / "images/train/a.png").write_bytes(b"")
    label = root / "annotations/val/b.png"
    label.write_bytes(label.read_bytes()[:40])
    report = look(root)
    assert [problem.kind for problem in report.problems] == ["unreadable", "unreadable"]
    assert f"{root / 'images/train/a.png'}: the file is empty" in report.problems[0].message
    assert f"{label}: broken or cut short" in report.problems[1].message
    assert report.frequencies["train"][0].images == 3, "the label map of a broken picture still counts"
    assert report.frequencies["val"][0].images == 2


def test_many_unreadable_files_are_one_problem(root: Path) -> None:
    for index in range(21):
        write(root, "train", f"x{index:02d}", np.zeros((8, 8), np.uint8), seed=index)
        (root / f"images/train/x{index:02d}.png").write_bytes(b"")
    problem = only(look(root))
    assert problem.kind == "unreadable"
    assert "files that cannot be read: 21 (" in problem.message
    assert " and 18 more)" in problem.message
    assert len(problem.items) == 21


def test_pictures_without_a_class_are_counted_and_no_fault(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "de":
        write(root, "val", name, np.full((8, 8), 255, np.uint8))
    report = look(root)
    assert report.problems == []
    assert report.empty == {"train": 0, "val": 2}
    cli._print_report(report)
    assert re.search(r"nothing with a class +│ +in 0 +│ +in 2", capsys.readouterr().out)
    cli._print_report(look(root, vocabulary=[*NAMES, "more"]))
    assert "nothing wrong" not in capsys.readouterr().out


def test_vocabularies_differ(root: Path) -> None:
    report = check(
        {
            "train": Folder(str(root), vocabulary=NAMES),
            "val": Folder(str(root), split="val", vocabulary=NAMES[::-1]),
        }
    )
    assert only(report).kind == "vocabulary"


def test_data_sets_without_files() -> None:
    told: list[tuple[int, int]] = []
    report = check(
        {"train": Shapes(length=20), "val": Shapes("val", 10)}, progress=lambda done, total: told.append((done, total))
    )
    assert report.problems == []
    assert told == [(done, 30) for done in range(1, 31)]
    assert sum(frequency.pixels for frequency in report.frequencies["train"]) == 20 * 96 * 128
    same = check({"train": Shapes(length=4), "val": Shapes(length=2)})
    assert [problem.kind for problem in same.problems if problem.kind == "leak"] == ["leak"]


def test_json_and_contact_sheet(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", 8, (48, 64))
    (tmp_path / "demo/images/train/train-00001.jpg").write_bytes(b"")
    data = {split: Folder(str(tmp_path / "demo"), split=split) for split in ("train", "val")}
    report = check(data, sheet=tmp_path / "sheet.png")
    content = json.loads(json.dumps(report.as_json()))
    assert content["images"] == {"train": 6, "val": 2}
    assert content["frequencies"]["train"][0]["name"] == "sky"
    assert content["problems"][0]["kind"] == "unreadable"
    assert content["sheet"] == str(tmp_path / "sheet.png") == str(report.sheet)
    sheet = Image.open(tmp_path / "sheet.png")
    assert min(sheet.size) > 300
    assert len(sheet.convert("RGB").getcolors(10**7) or []) > 100


def test_contact_sheet_of_nothing_readable(root: Path) -> None:
    for path in root.glob("images/*/*"):
        path.write_bytes(b"")
    report = check({"train": Folder(str(root), vocabulary=NAMES)}, sheet=root / "sheet.png")
    assert report.sheet is None
    assert not (root / "sheet.png").exists()
