"""Files of COCO's two formats and YOLO's as data sets: layouts, crowds, overlaps, and all that can be wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskfirst.data.ade20k import ADE20KPanoptic
from maskfirst.data.annotated import Layers
from maskfirst.data.check import Problem, Report, check
from maskfirst.data.coco import COCOInstance, COCOPanoptic
from maskfirst.data.coding import DataError
from maskfirst.data.images import ImageError
from maskfirst.data.mapillary import MapillaryPanoptic
from maskfirst.data.vocabulary import from_names, load
from maskfirst.data.yolo import Yolo
from maskfirst.formats import FormatError, rle
from maskfirst.formats.instances import Instances
from maskfirst.tasks import targets
from maskfirst.types import TASKS, VOID, Sample, Segments

HEIGHT, WIDTH = 12, 16
SQUARE = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
"""x and y from 2 to 8, 36 px."""
BESIDE = [6.0, 4.0, 12.0, 4.0, 12.0, 10.0, 6.0, 10.0]
"""Overlaps SQUARE in 2 x 4 px."""
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def picture(path: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def listed(number: int, ending: str = "jpg") -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.{ending}", "height": HEIGHT, "width": WIDTH}


def polygon(number: int, picture: int, category: int, *polygons: list[float], **more: Any) -> dict[str, Any]:
    rest = {"id": number, "image_id": picture, "category_id": category, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
    return rest | {"segmentation": list(polygons)} | more


def runs(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[False], mask.ravel(order="F")])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], borders, [mask.size]])).tolist()}


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    """COCO 2017's layout: a picture of two overlapping instances and a crowd, one without annotations, one of a polygon."""
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[8:, 10:] = True
    annotations = [
        polygon(1, 139, 18, SQUARE),
        polygon(2, 139, 1, BESIDE),
        polygon(3, 139, 1) | {"segmentation": runs(crowd), "iscrowd": 1},
        polygon(4, 632, 18, [0.0, 0.0, 5.0, 0.0, 5.0, 3.0], SQUARE),
    ]
    for split in ("train", "val"):
        for number in (139, 285, 632):
            picture(tmp_path / f"{split}2017/{number:012d}.jpg", number + len(split))
        write(
            tmp_path / f"annotations/instances_{split}2017.json",
            {"images": [listed(n) for n in (139, 285, 632)], "annotations": annotations, "categories": CATEGORIES},
        )
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write(path, content)


def painted(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8))


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    """COCO 2017's layout: sky above, two people, one of them a crowd, and a strip of void; a picture without annotation."""
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:5] = 70000
    ids[6:, :6] = 300
    ids[6:, 6:9] = 2
    segments = [
        {"id": 2, "category_id": 1, "iscrowd": 1, "area": 18, "bbox": [6, 6, 3, 6]},
        {"id": 70000, "category_id": 187, "iscrowd": 0, "area": 80, "bbox": [0, 0, 16, 5]},
        {"id": 300, "category_id": 1, "iscrowd": 0, "area": 36, "bbox": [0, 6, 6, 6]},
    ]
    words = load("coco_133")
    categories = [
        {"id": number, "name": name, "isthing": int(index in words.things)}
        for index, (number, name) in enumerate(zip(words.ids, words.names, strict=True))
    ]
    for number in (139, 285):
        picture(tmp_path / f"val2017/{number:012d}.jpg", number)
    folder = tmp_path / "annotations/panoptic_val2017"
    folder.mkdir(parents=True)
    painted(ids).save(folder / "000000000139.png")
    annotation = {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}
    write(
        folder.with_suffix(".json"),
        {"images": [listed(139), listed(285)], "annotations": [annotation], "categories": categories},
    )
    return tmp_path


# --- instances ----------------------------------------------------------------------------------------------------


def test_instances_in_their_official_layout(instances: Path) -> None:
    data = COCOInstance(str(instances), "val")
    assert list(data.keys()) == ["000000000139", "000000000285", "000000000632"]
    assert data.vocabulary.names == ("dog", "person")
    assert data.vocabulary.ids == (18, 1)
    assert data.vocabulary.things == {0, 1}
    sample = data[0]
    assert sample.classes.tolist() == [0, 1, 1]
    assert sample.crowd.tolist() == [False, False, True]
    assert sample.ids.shape == (2, HEIGHT, WIDTH), "what overlaps needs another layer, the rest does not"
    square, beside, crowd = sample.truth.masks
    assert square[2:8, 2:8].all()
    assert square.sum() == 36
    assert beside[4:10, 6:12].all()
    assert beside.sum() == 36
    assert (square & beside).sum() == 8
    assert crowd.sum() == 24
    assert len(data[2].truth) == 1, "the polygons of an annotation are one instance"
    assert (data[2].truth.masks[0] & square).sum() == 36


def test_pictures_without_annotations_are_legal(instances: Path) -> None:
    sample = COCOInstance(str(instances))[1]
    assert len(sample.truth) == len(sample.classes) == 0
    assert sample.ids.shape == (1, HEIGHT, WIDTH)
    for task in TASKS:
        assert len(targets(sample.truth, load("coco_80"), task)) == 0


def test_tasks_on_instances(instances: Path) -> None:
    data = COCOInstance(str(instances))
    truth = data[0].truth
    assert targets(truth, data.vocabulary, "instance").classes.tolist() == [0, 1], "crowds are not to be found"
    semantic = targets(truth, data.vocabulary, "semantic")
    assert semantic.classes.tolist() == [0, 1]
    assert semantic.masks[1].sum() == (truth.masks[1] | truth.masks[2]).sum()


def test_the_files_own_categories_or_a_vocabulary(instances: Path) -> None:
    official = COCOInstance(str(instances), vocabulary="coco_80")
    assert official.vocabulary == load("coco_80")
    assert official[0].classes.tolist() == [16, 0, 0]
    assert COCOInstance(str(instances), vocabulary=["person", "dog"])[0].classes.tolist() == [1, 0, 0]
    with pytest.raises(FormatError, match=r"annotations\[0\].*: category_id 18 is not among the categories"):
        COCOInstance(str(instances), vocabulary=["person", "cat"])
    whole = load("coco_80")
    told = [{"id": number, "name": name} for number, name in zip(whole.ids, whole.names, strict=True)]
    path = instances / "annotations/instances_val2017.json"
    rewrite(path, lambda content: content.update(categories=told))
    assert COCOInstance(str(instances), "val").vocabulary.colors == whole.colors, "its colours, which no file tells"


def test_any_other_layout(instances: Path) -> None:
    (instances / "val2017").rename(instances / "photos")
    (instances / "annotations/instances_val2017.json").rename(instances / "mine_val.json")
    data = COCOInstance(str(instances), "val", annotations="mine_{split}.json", images="photos", limit=2)
    assert len(data) == len(data.keys()) == 2
    with pytest.raises(DataError, match=r"no folder 'photo'\. Did you mean 'photos'"):
        COCOInstance(str(instances), images="photo")
    with pytest.raises(FormatError, match=r"mine_train\.json: cannot be read"):
        COCOInstance(str(instances), annotations="mine_{split}.json", images="photos")


def test_pictures_that_cannot_be(instances: Path) -> None:
    path = instances / "annotations/instances_val2017.json"
    (instances / "val2017/000000000285.jpg").unlink()
    with pytest.raises(ImageError, match=r"val2017/000000000285\.jpg: no such file"):
        COCOInstance(str(instances), "val")[1]
    picture(instances / "val2017/000000000285.jpg", 0, (WIDTH, HEIGHT))
    with pytest.raises(
        DataError, match=r"says that 000000000285\.jpg has 16 x 12 px, but it has 12 x 16 px; was it annotated before"
    ):
        COCOInstance(str(instances), "val")[1]
    rewrite(path, lambda content: content["images"][1].update(file_name="../../secret.jpg"))
    with pytest.raises(FormatError, match=r"'\.\./\.\./secret\.jpg' leads out of the folder"):
        COCOInstance(str(instances), "val")
    rewrite(path, lambda content: content["images"][1].update(file_name="000000000139.png"))
    with pytest.raises(FormatError, match=r"two pictures are called '000000000139'"):
        COCOInstance(str(instances), "val")
    rewrite(path, lambda content: content.update(images=[], annotations=[]))
    with pytest.raises(DataError, match=r"instances_val2017\.json: lists no `images`"):
        COCOInstance(str(instances), "val")


def test_many_instances_are_few_layers() -> None:
    """50 instances of 640 x 480 px that overlap as in a street: never 50 maps, and each is whole."""
    generator = np.random.default_rng(0)
    masks = torch.zeros(50, 480, 640, dtype=torch.bool)
    for mask in masks:
        y, x = generator.integers(0, (400, 540))
        mask[y : y + generator.integers(20, 80), x : x + generator.integers(20, 100)] = True
    nothing = torch.zeros(50, dtype=torch.bool)
    found = Layers.of(Instances.of(Segments(masks, torch.arange(50), torch.ones(50), nothing)))
    assert found.ids.shape[0] <= 6
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    truth = Sample(image, found.ids, found.classes, found.crowd, "").truth
    assert torch.equal(truth.masks, masks)


def test_instances_without_a_pixel_are_dropped_when_opened() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    nothing = torch.zeros(2, dtype=torch.bool)
    empty = Layers.of(Instances.of(Segments(masks, torch.arange(2), torch.ones(2), nothing)))
    assert empty.ids.shape == (1, 4, 4)
    masks[1, 2, 2] = True
    found = Layers.of(Instances.of(Segments(masks, torch.arange(2), torch.ones(2), nothing)))
    truth = Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), found.ids, found.classes, found.crowd, "").truth
    assert truth.classes.tolist() == [1]


# --- panoptic -----------------------------------------------------------------------------------------------------


def test_panoptic_in_its_official_layout(panoptic: Path) -> None:
    data = COCOPanoptic(str(panoptic), "val")
    assert data.vocabulary == load("coco_133"), "with the colours of the challenge"
    assert list(data.keys()) == ["000000000139", "000000000285"]
    sample = data[0]
    sky = data.vocabulary.names.index("sky-other-merged")
    assert sample.ids.shape == (1, HEIGHT, WIDTH)
    assert sample.classes.tolist() == [0, sky, 0]
    assert sample.crowd.tolist() == [True, False, False]
    assert sample.ids[0, 0, 0] == 1
    assert (sample.ids[0, 5] == VOID).all()
    assert sample.ids[0, 7, 7] == 0
    assert sample.ids[0, 11, 0] == 2
    assert targets(sample.truth, data.vocabulary, "panoptic").classes.tolist() == [sky, 0]
    assert targets(sample.truth, data.vocabulary, "instance").classes.tolist() == [0]
    assert len(data[1].truth) == 0


def test_panoptic_maps_may_lie_elsewhere(panoptic: Path) -> None:
    (panoptic / "annotations/panoptic_val2017").rename(panoptic / "maps")
    data = COCOPanoptic(str(panoptic), "val", maps="maps", vocabulary="coco_133", limit=1)
    assert len(data[0].truth) == 3
    with pytest.raises(DataError, match=r"no folder 'map'\. Did you mean 'maps'"):
        COCOPanoptic(str(panoptic), "val", maps="map")


def test_ade20k_panoptic(tmp_path: Path) -> None:
    picture(tmp_path / "images/validation/ADE_val_1.jpg", 0)
    folder = tmp_path / "ade20k_panoptic_val"
    folder.mkdir()
    painted(np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) < 40, 7, 12)).save(folder / "ADE_val_1.png")
    segments = [{"id": 12, "category_id": 12, "iscrowd": 0}, {"id": 7, "category_id": 0, "iscrowd": 0}]
    words = load("ade20k_panoptic")
    # The scripts name some classes otherwise than the data set does; the numbers are what counts.
    told = [{"id": n, "name": f"{name}, {name} too" if n % 3 else name} for n, name in enumerate(words.names)]
    content = {
        "images": [listed(0) | {"id": "ADE_val_1", "file_name": "ADE_val_1.jpg"}],
        "annotations": [{"image_id": "ADE_val_1", "file_name": "ADE_val_1.png", "segments_info": segments}],
        "categories": told,
    }
    write(tmp_path / "ade20k_panoptic_val.json", content)
    data = ADE20KPanoptic(str(tmp_path), "val")
    assert data.vocabulary == words
    assert [words.names[index] for index in data[0].classes] == ["person", "wall"]
    assert (data[0].truth.masks[1].sum(), list(data.keys())) == (40, ["ADE_val_1"])


def test_mapillary_panoptic(tmp_path: Path) -> None:
    picture(tmp_path / "validation/images/x_1.jpg", 0)
    folder = tmp_path / "validation/v1.2/panoptic"
    folder.mkdir(parents=True)
    painted(np.full((HEIGHT, WIDTH), 9)).save(folder / "x_1.png")
    words = load("mapillary_vistas")
    content = {
        "images": [listed(0) | {"id": "x_1", "file_name": "x_1.jpg"}],
        "annotations": [
            {"image_id": "x_1", "file_name": "x_1.png", "segments_info": [{"id": 9, "category_id": 56, "iscrowd": 1}]}
        ],
        "categories": [
            {"id": n, "name": f"some--{name.lower()}"} for n, name in zip(words.ids, words.names, strict=True)
        ],
    }
    write(folder / "panoptic_2018.json", content)
    sample = MapillaryPanoptic(str(tmp_path), "val")[0]
    assert words.names[sample.classes[0]] == "Car"
    assert sample.crowd.tolist() == [True]


# --- YOLO ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def outlines(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for index, name in enumerate(("a", "b/c")):
            picture(tmp_path / f"images/{split}/{name}.jpg", index + len(split))
        (tmp_path / f"labels/{split}").mkdir(parents=True)
        text = "1 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n0 0.25 0.5 0.75 0.5 0.75 1.0 0.25 1.0\n"
        (tmp_path / f"labels/{split}/a.txt").write_text(text)
    (tmp_path / "data.yaml").write_text("train: images/train\nnc: 2\nnames: {0: dog, 1: cat}\ndownload: import os\n")
    return tmp_path


def test_yolo(outlines: Path) -> None:
    data = Yolo(str(outlines))
    assert list(data.keys()) == ["a", "b/c"]
    assert data.vocabulary == from_names(["dog", "cat"], things=["dog", "cat"])
    sample = data[0]
    assert sample.classes.tolist() == [1, 0]
    assert sample.truth.masks[0, 3:9, 2:8].all()
    assert sample.truth.masks[0].sum() == 36
    assert sample.ids.shape[0] == 2
    assert len(data[1].truth) == 0, "no text file: nothing to see"
    assert len(targets(sample.truth, data.vocabulary, "instance")) == 2
    assert Yolo(str(outlines), split="val", vocabulary=["x", "y"], limit=1).vocabulary.names == ("x", "y")
    report = check({"train": data, "val": Yolo(str(outlines), split="val")})
    assert report.problems == []
    assert report.empty == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("names: [dog, no]", r"data\.yaml: `names` should be a list of names, .*quote those like no"),
        ("names: {0: dog, 2: cat}", r"names: the numbers should be 0\.\.1, got 0, 2"),
        ("nc: 2", r"`names` should be a list"),
        ("names: [dog", r"data\.yaml: cannot be read as YAML"),
    ],
)
def test_yolo_names_that_cannot_be(outlines: Path, names: str, message: str) -> None:
    (outlines / "data.yaml").write_text(names)
    with pytest.raises(DataError, match=message) as caught:
        Yolo(str(outlines))
    assert "\n" not in str(caught.value)


def test_yolo_without_names_or_labels(outlines: Path) -> None:
    (outlines / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"no data\.yaml or dataset\.yaml with `names` in this folder"):
        Yolo(str(outlines))
    (outlines / "labels/train/a.txt").rename(outlines / "labels/train/z.txt")
    with pytest.raises(DataError, match=r"none of the 2 pictures of .*images/train has a text file"):
        Yolo(str(outlines), vocabulary=["dog", "cat"])


# --- what check finds ---------------------------------------------------------------------------------------------


def look(root: Path, kind: type[COCOInstance] | type[COCOPanoptic]) -> Report:
    return check({"val": kind(str(root), "val")})


def faults(report: Report) -> list[Problem]:
    return [problem for problem in report.problems if problem.kind not in ("absent",)]


def test_nothing_is_wrong(instances: Path) -> None:
    report = look(instances, COCOInstance)
    assert report.problems == []
    assert report.images == {"val": 3}
    assert report.empty == {"val": 1}
    dog, person = report.frequencies["val"]
    assert (dog.images, person.images) == (2, 1)
    assert person.pixels == 36 + 24
    assert report.void["val"] == 3 * HEIGHT * WIDTH - (36 + 36 - 8 + 24 - 4) - dog.pixels + 36


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0, 1.0, 4.0, 4.0]], "a polygon of 2 points; it takes at least three"),
        (
            {"size": [WIDTH, HEIGHT], "counts": [0, 192]},
            r"run lengths of \[16, 12\] px .* in a picture of \[12, 16\] px",
        ),
        ({"size": [HEIGHT, WIDTH], "counts": [0, 191]}, "191 px in all for a picture of 12 x 16 px"),
        ([], "no mask"),
    ],
)
def test_masks_that_are_none(instances: Path, value: Any, message: str) -> None:
    path = instances / "annotations/instances_val2017.json"
    rewrite(path, lambda content: content["annotations"][1].update(segmentation=value))
    with pytest.raises(FormatError, match=rf"instances_val2017\.json: annotations\[1\]: .*{message}"):
        COCOInstance(str(instances), "val")[0]
    (problem,) = faults(look(instances, COCOInstance))
    assert (problem.kind, len(problem.items)) == ("annotation", 1)
    assert "pictures whose annotations are wrong: 1 of 3 (" in problem.message
    assert str(path) in problem.message
    assert look(instances, COCOInstance).frequencies["val"][0].images == 1, "the rest goes on"


def test_polygons_outside_and_masks_without_a_pixel_are_counted(instances: Path) -> None:
    path = instances / "annotations/instances_val2017.json"
    away = [20.0, 20.0, 30.0, 20.0, 30.0, 30.0]
    rewrite(path, lambda content: content["annotations"].append(polygon(9, 285, 1, away)))
    outside, empty = faults(look(instances, COCOInstance))
    assert outside.kind == empty.kind == "annotation"
    assert outside.message == "polygons that reach outside of their picture, cut off there: 1"
    assert empty.message == "annotations without a pixel: 1"


def test_what_a_panoptic_file_can_have_wrong(panoptic: Path) -> None:
    path = panoptic / "annotations/panoptic_val2017.json"
    png = path.with_suffix("") / "000000000139.png"
    assert faults(look(panoptic, COCOPanoptic)) == []

    kept = path.read_text()
    extra = {"id": 5, "category_id": 18, "iscrowd": 0}
    rewrite(path, lambda content: content["annotations"][0]["segments_info"].append(extra))
    (problem,) = faults(look(panoptic, COCOPanoptic))
    assert problem.message == "segments without a pixel in their PNG: 1"

    path.write_text(kept)
    rewrite(path, lambda content: content["annotations"][0]["segments_info"].pop())
    (problem,) = faults(look(panoptic, COCOPanoptic))
    assert "36 px of a segment 300 that panoptic_val2017.json does not describe" in problem.message

    for change, message in (
        ({"category_id": 12}, r"segments_info\[0\]: category_id 12 is not among the categories"),
        ({"id": 300}, r"segments_info\[2\]: id 300 occurs twice in picture 139"),
    ):
        path.write_text(kept)
        rewrite(path, lambda content, change=change: content["annotations"][0]["segments_info"][0].update(change))
        with pytest.raises(FormatError, match=message):
            COCOPanoptic(str(panoptic), "val")

    path.write_text(kept)
    png.unlink()
    (problem,) = faults(look(panoptic, COCOPanoptic))
    assert f"picture 139: {png}: no such file" in problem.message
    assert look(panoptic, COCOPanoptic).empty == {"val": 1}


def test_pictures_that_cannot_be_read_are_named(instances: Path) -> None:
    (instances / "val2017/000000000139.jpg").write_bytes(b"")
    report = look(instances, COCOInstance)
    assert [problem.kind for problem in faults(report)] == ["unreadable"]
    assert "000000000139.jpg: the file is empty" in faults(report)[0].message
    assert report.frequencies["val"][0].images == 1


def test_rasteriser_is_cocos(instances: Path) -> None:
    """A polygon between pixels covers what pycocotools says it does."""
    outline = [2.3, 1.7, 9.6, 3.2, 7.1, 10.9]
    path = instances / "annotations/instances_val2017.json"
    rewrite(path, lambda content: content["annotations"][0].update(segmentation=[outline]))
    mask = COCOInstance(str(instances), "val")[0].truth.masks[0]
    assert torch.equal(mask, rle.decode([rle.from_polygons([outline], (HEIGHT, WIDTH))])[0])
