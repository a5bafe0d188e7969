"""Streets: Cityscapes in its official layout, fine and coarse, and Mapillary Vistas, for every task."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfirst.contracts import Dataset
from maskfirst.data.check import check
from maskfirst.data.cityscapes import Cityscapes, CityscapesInstance, CityscapesPanoptic
from maskfirst.data.coding import DataError
from maskfirst.data.mapillary import Mapillary, MapillaryAsCityscapes, MapillaryInstance
from maskfirst.data.vocabulary import load
from maskfirst.tasks import targets
from maskfirst.types import VOID

HEIGHT, WIDTH = 8, 12
WORDS = load("cityscapes")
ROAD, CAR, PERSON = (WORDS.names.index(name) for name in ("road", "car", "person"))


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def street() -> np.ndarray:
    """Instance ids: road, two cars, a group of cars, a person, a caravan, the ego vehicle, parking."""
    ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
    ids[0] = 1
    ids[1:3, :4] = 26000
    ids[1:3, 4:8] = 26001
    ids[4:6, :4] = 26
    ids[4:6, 4:6] = 24000
    ids[4:6, 6:8] = 29000
    ids[7] = 9
    return ids


def write(root: Path, kind: str, split: str, city: str, number: int, ids: np.ndarray) -> None:
    """A picture and its two maps as the archives have them."""
    stem = f"{city}_{number:06d}_000019"
    rng = np.random.default_rng(number + len(split))
    save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", rng.integers(0, 256, (*ids.shape, 3), np.uint8))
    maps = root / f"gt{kind}/{split}/{city}"
    save(maps / f"{stem}_gt{kind}_instanceIds.png", ids)
    labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
    save(maps / f"{stem}_gt{kind}_labelIds.png", labels)
    save(maps / f"{stem}_gt{kind}_color.png", np.zeros((*ids.shape, 4), np.uint8))
    (maps / f"{stem}_gt{kind}_polygons.json").write_text("{}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, cities in (("train", ("aachen", "zurich")), ("val", ("lindau",))):
        for number, city in enumerate(cities):
            write(tmp_path, "Fine", split, city, number, street())
    return tmp_path


def test_semantic(root: Path) -> None:
    data = Cityscapes(str(root))
    assert list(data.keys()) == ["aachen/aachen_000000_000019", "zurich/zurich_000001_000019"]
    sample = data[0]
    assert sample.classes.tolist() == [ROAD, PERSON, CAR]
    assert not sample.crowd.any()
    labels = sample.truth.label_map()
    assert (labels[[0, 7]] == VOID).all(), "what is not evaluated has no class"
    assert (labels[4:6, 6:8] == VOID).all()
    assert (labels[1:3, :8] == CAR).all()
    assert (labels[4:6, :4] == CAR).all()


def test_panoptic(root: Path) -> None:
    sample = CityscapesPanoptic(str(root), "val")[0]
    assert sample.classes.tolist() == [ROAD, PERSON, CAR, CAR, CAR]
    assert sample.crowd.tolist() == [False, False, True, False, False]
    masks = sample.truth.masks
    assert masks[2, 4:6, :4].all(), "cars drawn as a group"
    assert masks[2].sum() == 8
    assert masks[3, 1:3, :4].all()
    assert masks[3].sum() == 8
    assert masks[4, 1:3, 4:8].all()
    assert targets(sample.truth, WORDS, "panoptic").classes.tolist() == [ROAD, PERSON, CAR, CAR]
    assert targets(sample.truth, WORDS, "instance").classes.tolist() == [PERSON, CAR, CAR]
    semantic = targets(sample.truth, WORDS, "semantic")
    assert torch.equal(semantic.label_map(), Cityscapes(str(root), "val")[0].truth.label_map())


def test_instances(root: Path) -> None:
    data = CityscapesInstance(str(root), "val")
    assert data.vocabulary == load("cityscapes_things")
    sample = data[0]
    assert [data.vocabulary.names[index] for index in sample.classes] == ["person", "car", "car", "car"]
    assert sample.crowd.tolist() == [False, True, False, False]
    assert (sample.ids[0, 3] == VOID).all(), "stuff has no instances"


def test_coarse(root: Path) -> None:
    write(root, "Coarse", "train_extra", "augsburg", 7, street())
    for kind in (Cityscapes, CityscapesPanoptic, CityscapesInstance):
        assert list(kind(str(root), "train_extra", "coarse").keys()) == ["augsburg/augsburg_000007_000019"]
    with pytest.raises(DataError, match=r"cityscapes: no split 'train_extra'\. Did you mean 'train'\?"):
        Cityscapes(str(root), "train_extra")
    with pytest.raises(DataError, match=r"gtCoarse: no folder 'train'\..*It has: train_extra"):
        Cityscapes(str(root), "train", "coarse")


def test_check_knows_streets(root: Path) -> None:
    for kind in (Cityscapes, CityscapesPanoptic, CityscapesInstance):
        data: dict[str, Dataset] = {split: kind(str(root), split) for split in ("train", "val")}
        report = check(data)
        assert {problem.kind for problem in report.problems} == {"absent"}
        cars = {frequency.name: frequency for frequency in report.frequencies["train"]}["car"]
        assert (cars.pixels, cars.images) == (2 * 24, 2)


def test_numbers_that_no_label_has(root: Path) -> None:
    path = root / "gtFine/val/lindau/lindau_000000_000019_gtFine_instanceIds.png"
    ids = street()
    ids[7, 5:] = 40002
    save(path, ids)
    with pytest.raises(
        DataError, match=r"value 40002 at \(y 7, x 5\) is no class: 19 classes as label \* 1000 \+ instance"
    ):
        CityscapesPanoptic(str(root), "val")[0]
    problem = next(p for p in check({"val": CityscapesPanoptic(str(root), "val")}).problems if p.kind == "value")
    assert "value 40002 in 1 of 1 label maps (7 px), first at (y 7, x 5)" in problem.message
    path.unlink()
    (problem,) = [p for p in check({"val": CityscapesPanoptic(str(root), "val")}).problems if p.kind == "no label"]
    assert "images without a label map: 1 of 1 (lindau_000000_000019_leftImg8bit.png)" in problem.message


# --- Mapillary Vistas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "v1.2/"])
def test_mapillary(tmp_path: Path, inside: str) -> None:
    words = load("mapillary_vistas")
    road, car = words.names.index("Road"), words.names.index("Car")
    ids = np.full((HEIGHT, WIDTH), road * 256, np.uint16)
    ids[:2, :4], ids[:2, 4:8], ids[7] = car * 256, car * 256 + 1, 65 * 256
    save(tmp_path / "training/images/a.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    save(tmp_path / f"training/{inside}instances/a.png", ids)
    labels = Image.fromarray((ids // 256).astype(np.uint8))
    labels.putpalette(bytes(range(256)) * 3)
    (tmp_path / f"training/{inside}labels").mkdir()
    labels.save(tmp_path / f"training/{inside}labels/a.png")
    semantic = Mapillary(str(tmp_path))[0]
    assert semantic.classes.tolist() == [road, car]
    assert (semantic.ids[0, 7] == VOID).all()
    sample = MapillaryInstance(str(tmp_path))[0]
    assert sample.classes.tolist() == [road, car, car]
    assert not sample.crowd.any()
    assert sample.truth.masks[1, :2, :4].all()
    assert sample.truth.masks[2, :2, 4:8].all()
    assert len(targets(sample.truth, words, "instance")) == 2
    ids[3, 3] = 66 * 256
    save(tmp_path / f"training/{inside}instances/a.png", ids)
    with pytest.raises(DataError, match=r"value 16896 at \(y 3, x 3\) is no class: 65 classes as label \* 256"):
        MapillaryInstance(str(tmp_path))[0]


def write_mapillary(root: Path, part: str, name: str, labels: list[int]) -> None:
    save(root / part / "images" / f"{name}.jpg", np.zeros((1, len(labels), 3), np.uint8))
    save(root / part / "labels" / f"{name}.png", np.array([labels], np.uint8))


def test_mapillary_as_cityscapes(tmp_path: Path) -> None:
    """Riders of all kinds are one class, what Cityscapes lacks has none, and a number beyond Mapillary's is an error."""
    names = load("mapillary_vistas").names
    here = ["Road", "Manhole", "Other Rider", "Bicyclist", "On Rails", "Bird", "Ego Vehicle"]
    write_mapillary(tmp_path, "training", "a", [*map(names.index, here), 65])
    data = MapillaryAsCityscapes(str(tmp_path))
    assert data.vocabulary == load("cityscapes")
    sample = data[0]
    assert [data.vocabulary.names[index] for index in sample.classes] == ["road", "rider", "train"]
    assert sample.ids[0, 0].tolist() == [0, 0, 1, 1, 2, VOID, VOID, VOID]
    write_mapillary(tmp_path, "training", "a", [13, 66])
    with pytest.raises(DataError, match=r"value 66 at \(y 0, x 1\) is no class"):
        MapillaryAsCityscapes(str(tmp_path))[0]


@pytest.mark.parametrize("kind", [Mapillary, MapillaryAsCityscapes])
def test_mapillary_may_be_trained_on_whole(tmp_path: Path, kind: type[Mapillary] | type[MapillaryAsCityscapes]) -> None:
    for part, name in (("training", "b"), ("training", "a"), ("validation", "a")):
        write_mapillary(tmp_path, part, name, [13])
    assert list(kind(str(tmp_path), "trainval").keys()) == ["training/a", "training/b", "validation/a"]
    assert list(kind(str(tmp_path), "trainval", limit=1).keys()) == ["training/a"]
    assert list(kind(str(tmp_path), "val").keys()) == ["a"]
    with pytest.raises(DataError, match=r"no split 'trainvl'\. Did you mean 'trainval'\? Known: train, val, trainval"):
        kind(str(tmp_path), "trainvl")
