"""COCO's formats: what is written reads back, pycocotools reads it too, and what is wrong with a file is said in a line."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from fixtures_dir import FIXTURES
from maskfirst.formats import FormatError, coco, rle
from maskfirst.formats.coco_instances import CocoInstances, InstancesWriter, Results
from maskfirst.formats.coco_panoptic import CocoPanoptic, PanopticWriter
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary

WORDS = Vocabulary(("sky", "car", "straße"), frozenset({1, 2}), ((1, 2, 3), (200, 0, 0), (0, 0, 0)), (10, 3, 7))


def scene(seed: int, count: int = 6, overlapping: bool = True) -> Segments:
    """Rectangles with holes, at random; the fourth is empty."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, 40, 2).tolist()
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for number in range(count):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)).tolist() for side in (height, width))
        masks[number, top:bottom, left:right] = True
        masks[number] &= torch.from_numpy(rng.random((height, width)) < 0.9)
    masks[3:4] = False
    classes, scores = torch.from_numpy(rng.integers(0, 3, count)), torch.from_numpy(rng.random(count, np.float32))
    found = Segments(masks, classes, scores, torch.from_numpy(rng.random(count) < 0.3))
    return found if overlapping else SegmentMap.of(found).segments


def assert_same(one: Segments, other: Segments) -> None:
    for name in ("masks", "classes", "scores", "crowd"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def visible(found: Segments) -> Segments:
    return found[found.masks.flatten(1).any(1)]


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_instances_read_back_though_they_overlap(tmp_path: Path) -> None:
    scenes = {key: scene(key) for key in range(5)} | {5: scene(5, count=0)}
    writer = InstancesWriter(tmp_path / "deep" / "a.json", WORDS)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: writer.add(key, f"{key}.jpg", scenes[key]), reversed(scenes)))
    assert not (tmp_path / "deep").exists(), "whole or absent"
    writer.close()
    found = CocoInstances(tmp_path / "deep" / "a.json")
    assert found.vocabulary == WORDS
    assert list(found.images) == list(scenes), "in the order of the keys, whoever came first"
    for key, truth in scenes.items():
        assert found.images[key] == coco.Image(f"{key}.jpg", truth.masks.shape[1], truth.masks.shape[2])
        again = found.read(key)
        assert_same(again.segments, truth)
        assert torch.equal(again.areas, truth.masks.flatten(1).sum(1).double())
        assert torch.equal(again.boxes, truth.boxes)
    assert found.warnings == {"annotations without a pixel": sum(not m.any() for s in scenes.values() for m in s.masks)}


def test_pycocotools_reads_what_is_written(tmp_path: Path) -> None:
    truth = scene(0)
    writer = InstancesWriter(tmp_path / "a.json", WORDS)
    writer.add(7, "a.jpg", truth)
    writer.close()
    theirs = COCO(str(tmp_path / "a.json"))
    annotations = theirs.loadAnns(theirs.getAnnIds(imgIds=[7]))
    assert [bool(one["iscrowd"]) for one in annotations] == truth.crowd.tolist()
    for annotation, mask, box in zip(annotations, truth.masks, truth.boxes.tolist(), strict=True):
        assert torch.equal(torch.from_numpy(theirs.annToMask(annotation)).bool(), mask)
        left, top, width, height = annotation["bbox"]
        assert [left, top, left + width, top + height] == box
    assert [one["name"] for one in theirs.loadCats([10, 3, 7])] == list(WORDS.names)
    results = theirs.loadRes([{**one, "score": 0.5} for one in annotations])
    assert len(results.anns) == len(truth)


def test_a_picture_cannot_be_added_twice(tmp_path: Path) -> None:
    writer = InstancesWriter(tmp_path / "a.json", WORDS)
    writer.add("x", "a.jpg", scene(0))
    with pytest.raises(ValueError, match="'x' is added twice"):
        writer.add("x", "b.jpg", scene(1))


@pytest.mark.parametrize("seed", range(10))
def test_panoptic_scenes_read_back(tmp_path: Path, seed: int) -> None:
    truth = SegmentMap.of(scene(seed, count=[0, 1, 6, 30][seed % 4]))
    writer = PanopticWriter(tmp_path / "a.json", WORDS)
    writer.add(5, "deep/x.jpg", truth, {"Source": "straße.jpg"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "the JSON is whole or absent"
    writer.close()
    found = CocoPanoptic(tmp_path / "a.json")
    assert found.vocabulary == WORDS
    assert found.keys() == [5]
    again = found.read(5)
    assert_same(again.segments, visible(truth.segments))
    assert again.ids.shape == (found.images[5].height, found.images[5].width) == truth.ids.shape
    assert found.warnings == {}
    segments = json.loads((tmp_path / "a.json").read_text())["annotations"][0]["segments_info"]
    assert [one["area"] for one in segments] == visible(truth.segments).masks.flatten(1).sum(1).tolist()
    for one, box in zip(segments, visible(truth.segments).boxes.tolist(), strict=True):
        left, top, width, height = one["bbox"]
        assert [left, top, left + width, top + height] == box
    with Image.open(tmp_path / "a" / "deep" / "x.png") as png:
        assert (png.mode, png.info["Source"]) == ("RGB", "straße.jpg")


def test_more_segments_than_a_byte_holds(tmp_path: Path) -> None:
    ids = torch.arange(900, dtype=torch.int32).view(30, 30).repeat_interleave(2, 1)
    ids[0, :4] = VOID
    truth = SegmentMap(ids, torch.arange(900) % 3, torch.ones(900), torch.zeros(900, dtype=torch.bool))
    writer = PanopticWriter(tmp_path / "a.json", WORDS)
    writer.add(1, "x.png", truth)
    writer.close()
    again = CocoPanoptic(tmp_path / "a.json").read(1)
    assert len(again) == 898
    assert torch.equal(again.ids, torch.where(ids < 0, ids, ids - 2))
    assert torch.equal(again.classes, truth.classes[2:])


def test_numbers_show_as_the_colours_of_classes_and_are_never_void(tmp_path: Path) -> None:
    ids = torch.arange(4, dtype=torch.int32).view(1, 4)
    truth = SegmentMap(ids, torch.tensor([1, 1, 2, 2]), torch.ones(4), torch.zeros(4, dtype=torch.bool))
    writer = PanopticWriter(tmp_path / "a.json", WORDS)
    writer.add(1, "x.png", truth)
    with Image.open(tmp_path / "a" / "x.png") as png:
        first, second, *black = np.asarray(png)[0].tolist()
    assert first == [200, 0, 0]
    assert second != first
    assert np.abs(np.subtract(second, first)).max() < 40
    assert [0, 0, 0] not in black, "black is no segment"
    assert black[0] != black[1]


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """COCO's own layout: numbers of any size, PNGs in a folder named as the JSON, pixels without a segment, crowds."""
    ids = np.array([[4325578, 4325578, 0], [66, 66, 0]])
    (tmp_path / "val").mkdir()
    save_numbers(tmp_path / "val" / "000000000139.png", ids)
    segments = [
        {"id": 66, "category_id": 7, "iscrowd": 1, "bbox": [0, 1, 2, 1], "area": 2},
        {"id": 4325578, "category_id": 3, "iscrowd": 0, "bbox": [0, 0, 2, 1], "area": 2},
    ]
    content = {
        "info": {"year": 2018},
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 2, "width": 3}],
        "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}],
        "categories": [
            {"id": 3, "name": "car", "isthing": 1, "supercategory": "vehicle", "color": [5, 6, 7]},
            {"id": 7, "name": "road", "isthing": 0},
        ],
    }
    found = CocoPanoptic(write_json(tmp_path / "val.json", content))
    assert found.vocabulary.things == {0}
    assert found.vocabulary.colors[0] == (5, 6, 7)
    assert found.vocabulary.colors[1] != (5, 6, 7)
    picture = found.read(139)
    assert picture.ids.tolist() == [[1, 1, VOID], [0, 0, VOID]]
    assert picture.classes.tolist() == [1, 0]
    assert picture.crowd.tolist() == [True, False]
    writer = PanopticWriter(tmp_path / "again.json", found.vocabulary)
    writer.add(139, found.images[139].file_name, picture)
    writer.close()
    again = CocoPanoptic(tmp_path / "again.json")
    assert (again.vocabulary, again.images) == (found.vocabulary, found.images)
    assert torch.equal(again.read(139).ids, picture.ids)
    assert_same(again.read(139).segments, picture.segments)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    elsewhere = CocoPanoptic(tmp_path / "val.json", tmp_path / "elsewhere")
    assert torch.equal(elsewhere.read(139).ids, picture.ids)


def test_predictions_without_pictures_and_categories_need_a_vocabulary(tmp_path: Path) -> None:
    panoptic(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    path = write_json(tmp_path / "a.json", {"annotations": content["annotations"]})
    with pytest.raises(FormatError, match="has no `categories`; say which vocabulary"):
        CocoPanoptic(path)
    found = CocoPanoptic(path, vocabulary=WORDS)
    assert found.images == {}
    assert found.keys() == [1]
    assert found.read(1).classes.tolist() == [1, 2]


def test_pictures_without_annotations_are_empty(tmp_path: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 2, "width": 3}], "annotations": []}
    content["categories"] = coco.as_categories(WORDS)
    path = write_json(tmp_path / "a.json", content)
    nothing = CocoPanoptic(path).read(1)
    assert (nothing.ids == VOID).all()
    assert nothing.ids.shape == (2, 3)
    assert len(nothing) == 0
    assert CocoInstances(path).read(1).segments.masks.shape == (0, 2, 3)


def save_numbers(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(path)


def panoptic(folder: Path, ids: tuple[tuple[int, ...], ...] = ((1, 1, 0), (2, 2, 2)), **changes: object) -> Path:
    """A small file with the segments 1 and 2; `changes` to its one annotation, its one picture or the file."""
    (folder / "a").mkdir(exist_ok=True)
    save_numbers(folder / "a" / "x.png", np.array(ids))
    segments = [{"id": 1, "category_id": 3, "iscrowd": 0}, {"id": 2, "category_id": 7, "iscrowd": 0}]
    annotation = {"image_id": 1, "file_name": "x.png", "segments_info": segments}
    picture = {"id": 1, "file_name": "x.jpg", "height": 2, "width": 3}
    for key in changes.keys() & annotation.keys():
        annotation[key] = changes[key]
    for key in changes.keys() & picture.keys() - annotation.keys():
        picture[key] = changes[key]
    content = {"images": [picture], "annotations": [annotation], "categories": coco.as_categories(WORDS)}
    return write_json(folder / "a.json", content | {k: v for k, v in changes.items() if k in content})


BAD_SEGMENTS = {
    "number twice": ([{"id": 1, "category_id": 3}] * 2, r"segments_info\[1\]: id 1 occurs twice in picture 1"),
    "number 0": ([{"id": 0, "category_id": 3}], r"id 0; a PNG can hold 1\.\.16777215, 0 is no segment"),
    "number too large": ([{"id": 2**24, "category_id": 3}], "id 16777216; a PNG can hold"),
    "unknown category": ([{"id": 1, "category_id": 4}], r"category_id 4 is not among the categories \(3, 7, 10\)"),
    "no category": ([{"id": 1}], "should be an object with an `id` and a `category_id`"),
    "crowd": ([{"id": 1, "category_id": 3, "iscrowd": 2}], "iscrowd should be 0 or 1, got 2"),
    "score": ([{"id": 1, "category_id": 3, "score": "high"}], "score should be a number, got 'high'"),
    "no list": ({"id": 1}, "no list of `segments_info`"),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_bad_segments_are_told_when_the_file_is_opened(tmp_path: Path, name: str) -> None:
    segments, sentence = BAD_SEGMENTS[name]
    with pytest.raises(FormatError, match=rf"^{re.escape(str(tmp_path))}/a\.json: annotations\[0\]: .*{sentence}"):
        CocoPanoptic(panoptic(tmp_path, segments_info=segments))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 2}, "image_id 2 is none of the 1 pictures"),
        ({"file_name": "../../x.png"}, "leads out of the folder"),
        ({"image_id": None}, "should have `image_id` and `file_name`, got None"),
        ({"height": -1}, r"images\[0\] \(x.jpg\): height and width should be whole numbers of px, got -1 and 3"),
        ({"height": 10**9, "width": 10**9}, "more than the limit of 178 million"),
        ({"images": [5]}, r"images\[0\]: should have `id` and `file_name`"),
        ({"annotations": {}}, "no list of `annotations`"),
        ({"annotations": [[]]}, r"annotations\[0\]: should have `image_id`"),
        ({"categories": []}, "categories: a vocabulary needs at least one name"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"\[1\] \(b\): id 1 is that of a already"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "names occur twice"),
        ({"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\]: should have a number as `id` and a `name`"),
    ],
)
def test_a_bad_file_is_told_when_it_is_opened(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence) as caught:
        CocoPanoptic(panoptic(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_two_annotations_of_a_picture_are_told(tmp_path: Path) -> None:
    content = json.loads(panoptic(tmp_path).read_text())
    with pytest.raises(FormatError, match=r"annotations\[1\]: picture 1 has an annotation already, x\.png"):
        CocoPanoptic(write_json(tmp_path / "a.json", content | {"annotations": content["annotations"] * 2}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b'{"images": [', "not JSON: "),
        (b"\xff\xfe", "not JSON: "),
        (b"[" * 100_000, "nested without end"),
        (b"[1, 2]", "has no `categories`"),
        (b"5", "has no `categories`"),
    ],
)
def test_what_is_no_such_json_is_told(tmp_path: Path, text: bytes, sentence: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    for kind in (CocoPanoptic, CocoInstances):
        with pytest.raises(FormatError, match=sentence):
            kind(tmp_path / "a.json")
    with pytest.raises(FormatError, match=r"b\.json: cannot be read: No such file"):
        CocoPanoptic(tmp_path / "b.json")


def test_a_missing_png_is_told_when_it_is_read(tmp_path: Path) -> None:
    found = CocoPanoptic(panoptic(tmp_path, file_name="y.png"))
    with pytest.raises(FormatError, match=r"a\.json: picture 1: .*y\.png: no such file"):
        found.read(1)


def test_a_png_of_another_size_is_told(tmp_path: Path) -> None:
    found = CocoPanoptic(panoptic(tmp_path, ids=((1, 1, 2),)))
    with pytest.raises(FormatError, match=r"x\.png: \[1, 3\] px \(height, width\); a\.json says \[2, 3\]"):
        found.read(1)


def test_numbers_that_the_json_lacks_are_told(tmp_path: Path) -> None:
    found = CocoPanoptic(panoptic(tmp_path, ids=((1, 300, 300), (2, 2, 300))))
    with pytest.raises(FormatError, match=r"x\.png: 3 px of a segment 300 that a\.json does not describe"):
        found.read(1)


def test_numbers_that_the_png_lacks_are_counted_and_kept(tmp_path: Path) -> None:
    found = CocoPanoptic(panoptic(tmp_path, ids=((2, 2, 2), (0, 0, 2))))
    picture = found.read(1)
    assert picture.areas.tolist() == [0, 4]
    assert found.warnings == {"segments without a pixel in their PNG": 1}


def instances(folder: Path, *annotations: dict, **changes: object) -> Path:
    pictures = [{"id": 1, "file_name": "x.jpg", "height": 6, "width": 8}]
    content = {"images": pictures, "annotations": list(annotations), "categories": coco.as_categories(WORDS)}
    return write_json(folder / "i.json", content | changes)


SQUARE = [[1, 1, 4, 1, 4, 4, 1, 4]]


def test_polygons_areas_and_crowds_of_others_are_read(tmp_path: Path) -> None:
    runs = {"size": [6, 8], "counts": [0, 48]}
    first = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": SQUARE, "area": 8.5, "bbox": [0, 0, 0, 0]}
    path = instances(tmp_path, first, {"image_id": 1, "category_id": 7, "segmentation": runs, "iscrowd": 1})
    found = CocoInstances(path).read(1)
    assert found.areas.tolist() == [8.5, 48], "as the file says, or counted"
    assert rle.area(found.rles).tolist() == [9, 48]
    assert found.boxes.tolist() == [[1, 1, 4, 4], [0, 0, 8, 6]]
    assert found.classes.tolist() == [1, 2]
    assert found.crowd.tolist() == [False, True]
    assert found.scores.tolist() == [1, 1]


def test_oddities_of_polygons_are_counted(tmp_path: Path) -> None:
    row = {"image_id": 1, "category_id": 3}
    outside, beyond = [[20, 20, 30, 20, 30, 30]], [[-5, 1, 4, 1, 4, 4]]
    path = instances(tmp_path, *(row | {"segmentation": polygons} for polygons in (SQUARE, outside, beyond)))
    found = CocoInstances(path)
    assert rle.area(found.read(1).rles).tolist()[1] == 0
    assert found.warnings == {
        "polygons that reach outside of their picture, cut off there": 2,
        "annotations without a pixel": 1,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category_id": 4}, "category_id 4 is not among the categories"),
        ({"category_id": True}, "category_id True is not"),
        ({"image_id": 9}, "image_id 9 is none of the 1 pictures"),
        ({"image_id": [1]}, r"image_id \[1\] is none"),
        ({"iscrowd": "no"}, "iscrowd should be 0 or 1"),
        ({"area": float("nan")}, "area should be a number, got nan"),
        ({"score": "0.5"}, "score should be a number, got '0.5'"),
        ({"segmentation": [[1, 1, 2, 2]]}, "of 2 points; it takes at least three"),
        ({"segmentation": [["a"] * 6]}, "flat list of numbers"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, r"run lengths of \[8, 6\] px"),
    ],
)
def test_a_bad_annotation_is_told_with_its_place(tmp_path: Path, change: dict, sentence: str) -> None:
    row = {"image_id": 1, "category_id": 3, "segmentation": SQUARE}
    with pytest.raises(FormatError, match=rf"i\.json: annotations\[1\]: .*{sentence}"):
        CocoInstances(instances(tmp_path, row, row | change)).read(1)
    with pytest.raises(FormatError, match=r"annotations\[0\]: should be an object with an `image_id`"):
        CocoInstances(instances(tmp_path, {"image_id": 1}))


def test_results_are_a_list_or_a_file_like_the_truth(tmp_path: Path) -> None:
    truth = CocoInstances(instances(tmp_path, {"image_id": 1, "category_id": 3, "segmentation": SQUARE}))
    mask = rle.from_polygons(SQUARE, (6, 8))
    row = {"image_id": 1, "category_id": 7, "segmentation": mask, "score": 0.123456789012}
    listed = Results(write_json(tmp_path / "r.json", [row, row | {"category_id": 3}]), truth)
    assert list(listed) == [1]
    assert listed[1].classes.tolist() == [2, 1]
    assert listed[1].scores.tolist() == [0.123456789012] * 2, "to the last digit"
    assert listed[1].rles == [mask, mask]

    assert len(Results(write_json(tmp_path / "none.json", []), truth)[1]) == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            [{"image_id": 1, "category_id": 3, "segmentation": SQUARE}],
            r"r\.json: \[0\]: no score; predictions need one each",
        ),
        ([{"image_id": 2, "category_id": 3, "segmentation": SQUARE, "score": 1}], r"\[0\]: image_id 2 is none"),
        ([{"image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2], "score": 1}], r"\[0\]: no mask"),
        ([5], r"\[0\]: should be an object"),
        ({"annotations": []}, "results should be a list"),
    ],
)
def test_bad_results_are_told(tmp_path: Path, content: object, sentence: str) -> None:
    truth = CocoInstances(instances(tmp_path))
    with pytest.raises(FormatError, match=sentence):
        Results(write_json(tmp_path / "r.json", content), truth)[1]


def test_predictions_in_a_file_like_the_truth_have_classes_by_name_and_scores(tmp_path: Path) -> None:
    theirs = Vocabulary(("straße", "car", "sky"), frozenset({0, 1}), ((9, 9, 9),) * 3, (0, 1, 2))
    writer = InstancesWriter(tmp_path / "w.json", theirs)
    writer.add(77, "folder/x.png", scene(0)[:2])
    writer.close()
    found = CocoInstances(tmp_path / "w.json", WORDS, scored=True).read(77)
    assert [WORDS.names[index] for index in found.classes] == [theirs.names[index] for index in scene(0).classes[:2]]
    assert torch.equal(found.scores.float(), scene(0).scores[:2])
    bare = {"image_id": 1, "category_id": 3, "segmentation": SQUARE}
    with pytest.raises(FormatError, match=r"i\.json: annotations\[0\]: no score; predictions need one each"):
        CocoInstances(instances(tmp_path, bare), scored=True)


def test_categories_meet_a_vocabulary_by_number_unless_names_say_otherwise() -> None:
    content = {"categories": [{"id": 1, "name": "sky"}, {"id": 2, "name": "auto"}, {"id": 3, "name": "tree"}]}

    def words(*names: str, ids: tuple[int, ...]) -> Vocabulary:
        return Vocabulary(names, frozenset(), ((0, 0, 0),) * len(names), ids)

    def index(vocabulary: Vocabulary) -> dict[int, int]:
        return coco.categories(content, "a.json", vocabulary)[1]

    assert index(words("sky", "car", ids=(1, 2))) == {1: 0, 2: 1}, "the car is renamed"
    assert index(words("tree", "sky", ids=(0, 1))) == {3: 0, 1: 1}, "other numbers: names count"
    assert index(words("sky", "tree", ids=(1, 2))) == {1: 0, 3: 1}, "one that contradicts is enough"
    assert index(words("himmel", ids=(1,))) == {1: 0}
    assert coco.categories({}, "a.json", WORDS)[1] == {10: 0, 3: 1, 7: 2}


if FIXTURES is not None:

    def test_the_files_of_the_reference_evaluators_hold_what_they_are_said_to() -> None:
        assert FIXTURES is not None
        folder = FIXTURES / "metrics"
        truth, predicted = (
            CocoPanoptic(folder / "gt_panoptic.json"),
            json.loads((folder / "pred_panoptic.json").read_text()),
        )
        found = CocoPanoptic(folder / "pred_panoptic.json", vocabulary=truth.vocabulary)
        assert list(truth.images) == found.keys() == truth.keys()
        told = {
            row["image_id"]: row["segments_info"]
            for row in json.loads((folder / "gt_panoptic.json").read_text())["annotations"]
        }
        for key in truth.images:
            picture = truth.read(key)
            assert picture.areas.tolist() == [segment["area"] for segment in told[key]]
            assert picture.crowd.tolist() == [bool(segment["iscrowd"]) for segment in told[key]]
        assert sum(len(found.read(key)) for key in truth.images) == sum(
            len(row["segments_info"]) for row in predicted["annotations"]
        )
        assert truth.warnings == found.warnings == {}

        instances = CocoInstances(folder / "gt_instances.json")
        results = Results(folder / "pred_instances.json", instances)
        theirs = COCO(str(folder / "gt_instances.json"))
        assert sum(map(len, results.values())) == len(json.loads((folder / "pred_instances.json").read_text()))
        for key in instances.images:
            masks = [theirs.annToMask(row) for row in theirs.loadAnns(theirs.getAnnIds(imgIds=[key]))]
            opened = instances.read(key).segments.masks
            assert opened.tolist() == [mask.astype(bool).tolist() for mask in masks]
