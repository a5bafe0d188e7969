"""Scoring files: each format and layout, what we write read back as 100, and every mistake in its one line."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures_dir import FIXTURES
from maskfirst import draw
from maskfirst.data.vocabulary import from_names, load
from maskfirst.errors import UserError
from maskfirst.formats import rle
from maskfirst.formats.coco_instances import InstancesWriter
from maskfirst.formats.coco_panoptic import PanopticWriter
from maskfirst.score import score
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary
from test_cli import Outcome, run_main

NAMES = ["sky", "road", "car", "person"]
VOCABULARY = from_names(NAMES, things=["car", "person"])
FRAMES = ("aachen_000000_000019", "bonn_000001_000019")
Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder; says its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_main([str(each) for each in arguments], capsys.readouterr)


def label_map(seed: int, classes: int = 4, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    """Patches of classes, and of 255."""
    coarse = np.random.default_rng(seed).integers(-1, classes, (size[0] // 5, size[1] // 5))
    return np.where(coarse < 0, 255, coarse).repeat(5, 0).repeat(5, 1).astype(np.uint8)


def save(path: str | Path, values: np.ndarray) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def maps(folder: str, changes: Mapping[str, np.ndarray] | None = None) -> None:
    """Three label maps, in a folder and one below."""
    for name, values in ({"a": label_map(0), "b": label_map(1), "east/c": label_map(2)} | dict(changes or {})).items():
        save(f"{folder}/{name}.png", values)


def scene(seed: int, size: tuple[int, int] = (24, 32)) -> SegmentMap:
    """Sky over road, and a few things on it that do not overlap."""
    random = np.random.default_rng(seed)
    ids = np.zeros(size, np.int32)
    ids[size[0] // 2 :] = 1
    classes = [0, 1]
    for place in range(int(random.integers(1, 4))):
        ids[6 : 6 + int(random.integers(5, 12)), 9 * place : 9 * place + int(random.integers(4, 9))] = len(classes)
        classes.append(int(random.integers(2, 4)))
    ids[-2:, -3:] = VOID
    count = len(classes)
    scores = torch.from_numpy(random.random(count).astype(np.float32))
    return SegmentMap(torch.from_numpy(ids), torch.tensor(classes), scores, torch.zeros(count, dtype=torch.bool))


def panoptic(
    path: str, pictures: Mapping[int, SegmentMap], vocabulary: Vocabulary = VOCABULARY, name: str = "{}"
) -> str:
    writer = PanopticWriter(path, vocabulary)
    for key, found in pictures.items():
        writer.add(key, name.format(key) + ".jpg", found)
    writer.close()
    return path


def things(found: SegmentMap) -> Segments:
    return found.segments[found.classes > 1]


def coco(path: str, pictures: Mapping[int, Segments], vocabulary: Vocabulary = VOCABULARY, name: str = "{}") -> str:
    writer = InstancesWriter(path, vocabulary)
    for key, found in pictures.items():
        writer.add(key, name.format(key) + ".jpg", found)
    writer.close()
    return path


def results(path: str, pictures: Mapping[int, Segments]) -> str:
    """A bare list, as COCO's server takes it."""
    rows = [
        {"image_id": key, "category_id": VOCABULARY.ids[index], "segmentation": mask, "score": value}
        for key, found in pictures.items()
        for index, mask, value in zip(
            found.classes.tolist(), rle.encode(found.masks), found.scores.tolist(), strict=True
        )
    ]
    Path(path).write_text(json.dumps(rows))
    return path


def change(path: str, edit: Callable[[Any], object]) -> str:
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))
    return path


SCENES = {key: scene(key) for key in (3, 5, 8)}
CARS = {key: things(found) for key, found in SCENES.items()}


def told(ended: Outcome) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_label_maps_score_100_against_themselves(run: Run) -> None:
    maps("truth")
    maps("guess")
    content = told(run("score", "truth", "guess", "--task", "semantic", "--json"))
    assert content["mIoU"] == content["aAcc"] == content["mAcc"] == 1
    assert content["IoU"] == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert (content["images"], content["warnings"]) == (3, [])
    assert {entry["key"] for entry in content["worst"]} == {"a", "b", "east/c"}


def test_names_void_and_borders_of_label_maps(run: Run) -> None:
    save("truth/a.png", np.array([[0, 0, 1, 255]], np.uint8))
    save("guess/a.png", np.array([[0, 255, 1, 1]], np.uint8))
    Path("names.txt").write_text("\n".join(NAMES))
    content = told(
        run("score", "truth", "guess", "--task", "semantic", "--vocabulary", "names.txt", "--boundary", "--json")
    )
    assert content["IoU"] == {"sky": 0.5, "road": 1, "car": None, "person": None}
    assert content["BIoU"] == content["IoU"]
    assert content["aAcc"] == pytest.approx(2 / 3)
    save("zero/a.png", np.array([[3, 0, 1, 0]], np.uint8))
    content = told(
        run("score", "zero", "guess", "--task", "semantic", "--vocabulary", "names.txt", "--ignore", "0", "--json")
    )
    assert content["IoU"] == {"sky": None, "road": 1, "car": None, "person": 0}


def test_what_predict_writes_of_hundreds_of_classes_is_read(run: Run) -> None:
    words = from_names([f"class {index}" for index in range(300)])
    labels = torch.arange(300).reshape(10, 30).long()
    labels[0, 0] = VOID
    for folder in ("truth", "guess"):
        draw.write_label_map(Path(folder, "a.png"), labels, words)
    Path("names.txt").write_text("\n".join(words.names))
    for more in ((), ("--vocabulary", "names.txt")):
        content = told(run("score", "truth", "guess", "--task", "semantic", "--json", *more))
        assert content["mIoU"] == 1
        assert sum(value == 1 for value in content["IoU"].values()) == 299


def test_ids_are_told_from_indices(run: Run) -> None:
    Path("words.yaml").write_text("[{name: sky, id: 1}, {name: road, id: 2}, {name: car, id: 3}]")
    words, index = ("--vocabulary", "words.yaml", "--json", "--task", "semantic"), np.array([[0, 1, 2, 1]], np.uint8)
    save("ids/a.png", index + 1)
    save("indices/a.png", index)
    save("void/a.png", np.where(index == 2, 255, index).astype(np.uint8))
    assert told(run("score", "ids", "ids", *words))["mIoU"] == 1
    both = told(run("score", "ids", "indices", *words))
    assert (both["mIoU"], both["warnings"]) == (1, [])
    assert told(run("score", "void", "indices", *words))["mIoU"] == 1
    # Without 255, without 3 and with a 0, these could be ids of which 0 is void.
    unclear = told(run("score", "indices", "indices", *words))
    assert unclear["mIoU"] == 1
    (warning,) = unclear["warnings"]
    assert warning.startswith("1 label maps (truth) that could hold indices of classes as well as the vocabulary's ids")
    assert not told(run("score", "indices", "indices", "--truth-values", "index", *words))["warnings"]
    assert told(run("score", "indices", "indices", "--truth-values", "ids", *words))["mIoU"] == 0
    save("odd/a.png", np.array([[0, 1, 3, 9]], np.uint8))
    assert told(run("score", "odd", "ids", *words))["warnings"] == [
        "1 pixels (truth) that hold 9, which is the id of no class: taken as void"
    ]


def test_a_picture_without_a_prediction_is_missed_and_told(run: Run) -> None:
    maps("truth")
    maps("guess")
    Path("guess/b.png").unlink()
    ended = run("score", "truth", "guess", "--task", "semantic", "--json")
    content = told(ended)
    truth = [label_map(seed) for seed in range(3)]
    kept = sum((values != 255).sum() for values in (truth[0], truth[2]))
    assert content["aAcc"] == pytest.approx(kept / sum((values != 255).sum() for values in truth))
    assert content["warnings"] == ["1 pictures without a prediction: all that is in them counts as missed"]
    assert ended.err.strip() == f"maskfirst: warning: {content['warnings'][0]}"


def test_pictures_are_paired_by_their_names_where_folders_differ(run: Run) -> None:
    maps("truth")
    maps("out/labels/val")
    assert told(run("score", "truth", "out", "--task", "semantic", "--json"))["mIoU"] == 1
    assert told(run("score", "truth/a.png", "out/labels/val/a.png", "--task", "semantic", "--json"))["images"] == 1


def test_panoptic_files_score_100_against_themselves(run: Run) -> None:
    content = told(
        run("score", panoptic("truth.json", SCENES), panoptic("guess.json", SCENES), "--task", "panoptic", "--json")
    )
    for group, count in (("All", 4), ("Things", 2), ("Stuff", 2)):
        assert content[group] == {"pq": 1, "sq": 1, "rq": 1, "n": count}
    assert content["per_class"].keys() == set(NAMES)
    assert (content["images"], content["warnings"]) == (3, [])


def test_panoptic_pictures_without_a_prediction_are_missed(run: Run) -> None:
    guess = panoptic("guess.json", {key: SCENES[key] for key in (3, 8)})
    content = told(run("score", panoptic("truth.json", SCENES), guess, "--task", "panoptic", "--json"))
    assert content["per_class"]["sky"] == {"pq": pytest.approx(0.8), "sq": 1, "rq": pytest.approx(0.8)}
    assert content["warnings"] == ["1 pictures without a prediction: all that is in them counts as missed"]


def test_pictures_are_matched_by_name_where_numbers_differ(run: Run) -> None:
    guess = panoptic("guess.json", SCENES, name="{}")
    change(guess, lambda content: [row.update(id=row["id"] + 100) for row in content["images"]])
    change(guess, lambda content: [row.update(image_id=row["image_id"] + 100) for row in content["annotations"]])
    content = told(run("score", panoptic("truth.json", SCENES), guess, "--task", "panoptic", "--json"))
    assert content["All"]["pq"] == 1


def test_instance_files_score_100_against_themselves(run: Run) -> None:
    truth = coco("truth.json", CARS)
    for guess in (results("results.json", CARS), coco("guess.json", CARS)):
        content = told(run("score", truth, guess, "--task", "instance", "--json"))
        assert content["AP"] == pytest.approx(1)
        assert {"AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"} < content.keys()
        assert content["per_class"].keys() == {"car", "person"}
        assert content["warnings"] == []


def test_instance_pictures_without_results_are_missed_and_those_without_truth_are_fine(run: Run) -> None:
    empty = {**CARS, 9: CARS[3][:0]}
    truth = coco("truth.json", empty)
    full = told(run("score", truth, results("results.json", CARS), "--task", "instance", "--json"))
    assert (full["images"], full["warnings"]) == (4, [])
    assert full["AP"] == pytest.approx(1)
    part = told(run("score", truth, results("part.json", {3: CARS[3]}), "--task", "instance", "--json"))
    assert part["AR100"] < 1
    assert part["warnings"] == ["2 pictures without a prediction: all that is in them counts as missed"]


def test_plain_names_will_do_for_instances(run: Run) -> None:
    Path("names.txt").write_text("\n".join(NAMES))
    truth, guess = coco("truth.json", CARS), results("results.json", CARS)
    content = told(run("score", truth, guess, "--task", "instance", "--vocabulary", "names.txt", "--json"))
    assert content["AP"] == pytest.approx(1)


def test_polygons_are_scored_as_masks(run: Run) -> None:
    truth = coco("truth.json", CARS)
    polygons = coco("polygons.json", CARS)

    def as_polygons(content: dict) -> None:
        for row in content["annotations"]:
            mask = rle.decode([row["segmentation"]])[0].numpy()
            (top, bottom), (left, right) = ((np.flatnonzero(mask.any(axis))[[0, -1]]) for axis in (1, 0))
            box = [left, top, right + 1, top, right + 1, bottom + 1, left, bottom + 1]
            row["segmentation"] = [[float(value) for value in box]]

    change(polygons, as_polygons)
    content = told(run("score", truth, polygons, "--task", "instance", "--json"))
    assert content["AP50"] == pytest.approx(1)


def streets(seed: int) -> np.ndarray:
    """Cityscapes' instance ids: road, building, cars, a group of persons, and the ego vehicle (no class)."""
    ids = np.full((20, 40), 7, np.int32)
    ids[:6] = 11
    ids[8:12, 3:9], ids[8:14, 15 : 20 + seed] = 26000, 26001
    ids[13:16, 30:36] = 24
    ids[18:] = 1
    return ids


def gt_fine() -> None:
    for seed, frame in enumerate(FRAMES):
        place = f"gtFine/val/{frame.split('_')[0]}/{frame}_gtFine"
        ids = streets(seed)
        save(f"{place}_instanceIds.png", ids.astype(np.uint16))
        save(f"{place}_labelIds.png", np.where(ids < 1000, ids, ids // 1000).astype(np.uint8))
        save(f"{place}_color.png", np.zeros((*ids.shape, 3), np.uint8))


def street_map(seed: int, words: Vocabulary) -> SegmentMap:
    """The segments of `streets` that a perfect answer has."""
    ids = streets(seed)
    kept = [number for number in np.unique(ids).tolist() if number >= 1000 or number in (7, 11)]
    kept = [number for number in kept if (number // 1000 or number) in words.ids]
    classes = torch.tensor([words.ids.index(number // 1000 or number) for number in kept])
    found = np.full(ids.shape, VOID, np.int32)
    for index, number in enumerate(kept):
        found[ids == number] = index
    return SegmentMap(torch.from_numpy(found), classes, torch.full((len(kept),), 0.9), torch.zeros(len(kept)) > 0)


def test_cityscapes_label_maps_with_ids_and_with_train_ids(run: Run) -> None:
    gt_fine()
    words = load("cityscapes")
    for seed, frame in enumerate(FRAMES):
        labels = np.where(streets(seed) < 1000, streets(seed), streets(seed) // 1000).astype(np.uint8)
        index = np.array([words.ids.index(n) if n in words.ids else 255 for n in range(256)], np.uint8)
        save(f"ids/{frame}_leftImg8bit.png", labels)
        save(f"train/{frame}_pred.png", index[labels])
    for folder in ("ids", "train"):
        content = told(run("score", "gtFine/val", folder, "--task", "semantic", "--json"))
        assert content["mIoU"] == 1
        assert content["IoU"]["car"] == 1
        assert (content["images"], content["warnings"]) == (2, [])


def test_cityscapes_scenes_and_instances(run: Run) -> None:
    gt_fine()
    words, cars = load("cityscapes"), load("cityscapes_things")
    scenes = {seed: street_map(seed, words) for seed in range(2)}
    writer, instances = PanopticWriter("scenes.json", words), InstancesWriter("cars.json", cars)
    for seed, frame in enumerate(FRAMES):
        writer.add(seed, f"{frame}_leftImg8bit.png", scenes[seed])
        instances.add(seed, f"{frame}_leftImg8bit.png", street_map(seed, cars).segments)
    writer.close()
    instances.close()
    content = told(run("score", "gtFine", "scenes.json", "--task", "panoptic", "--json"))
    assert content["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 3}
    assert told(run("score", "gtFine", "cars.json", "--task", "instance", "--json"))["AP"] == pytest.approx(1)


def test_cityscapes_own_results(run: Run) -> None:
    gt_fine()
    for seed, frame in enumerate(FRAMES):
        lines = []
        for number in (26000, 26001):
            save(f"results/masks/{frame}_{number}.png", (streets(seed) == number).astype(np.uint8) * 255)
            lines.append(f"masks/{frame}_{number}.png 26 0.{number % 10 + 5}")
        Path(f"results/{frame}_pred.txt").write_text("\n".join(lines) + "\n\n")
    content = told(run("score", "gtFine", "results", "--task", "instance", "--json"))
    assert content["AP"] == pytest.approx(1)
    Path(f"results/{FRAMES[0]}_pred.txt").write_text("../gtFine/x.png 26 0.5\n")
    Path(f"results/{FRAMES[1]}_pred.txt").write_text("")
    assert "leads out of" in run("score", "gtFine", "results", "--task", "instance").err
    Path(f"results/{FRAMES[0]}_pred.txt").write_text("masks/a.png car 0.5\n")
    assert (
        "line 1: should be the path of a mask, a label id and a score"
        in run("score", "gtFine", "results", "--task", "instance").err
    )


def test_table_and_file(run: Run) -> None:
    ended = run(
        "score", panoptic("truth.json", SCENES), "truth.json", "--task", "panoptic", "--out", "scores/panoptic.json"
    )
    assert ended.code == 0
    assert all(word in ended.out for word in ("person", "Things", "100.00 %", "3 pictures"))
    assert json.loads(Path("scores/panoptic.json").read_text())["All"]["pq"] == 1


def test_what_shapes_writes_scores_100_in_every_task(run: Run) -> None:
    run("shapes", "--out", "demo", "--count", "4")
    words = ("--vocabulary", "demo/classes.yaml", "--json")
    assert told(run("score", "demo/annotations", "demo/annotations", "--task", "semantic", *words))["mIoU"] == 1
    scenes, instances = "demo/coco/panoptic_train.json", "demo/coco/instances_train.json"
    assert told(run("score", scenes, scenes, "--task", "panoptic", *words))["All"]["pq"] == 1
    assert told(run("score", scenes, scenes, "--task", "panoptic", "--json"))["All"]["pq"] == 1
    change(instances, lambda content: [row.update(score=0.5) for row in content["annotations"]])
    assert told(run("score", instances, instances, "--task", "instance", *words))["AP"] == pytest.approx(1)


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for folder in ("truth", "guess"):
        save(tmp_path / folder / "a.png", label_map(0))
        save(tmp_path / folder / "b.png", label_map(1))
    found = score(tmp_path / "truth", tmp_path / "guess", "semantic", progress=lambda *both: seen.append(both)).found
    assert seen == [(1, 2), (2, 2)]
    assert found.scores.value == 1
    assert math.isfinite(found.seconds)


def test_a_task_that_is_none_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", label_map(0))
    with pytest.raises(UserError, match=r"unknown task 'panoptik'\. Did you mean 'panoptic'\?"):
        score(tmp_path, tmp_path, "panoptik")


def lone(task: str, truth: str, guess: str, *more: str) -> list[str]:
    return ["score", truth, guess, "--task", task, *more]


def edited(task: str, edit: Callable[[Any], object]) -> list[str]:
    """A file of predictions with something wrong in it, beside a truth."""
    if task == "panoptic":
        return lone(task, panoptic("truth.json", SCENES), change(panoptic("guess.json", SCENES), edit))
    return lone(task, coco("truth.json", CARS), change(results("guess.json", CARS), edit))


def with_maps(changes: Mapping[str, np.ndarray], *more: str) -> list[str]:
    maps("truth")
    maps("guess", changes)
    return lone("semantic", "truth", "guess", *more)


def without_png() -> list[str]:
    arguments = lone("panoptic", panoptic("truth.json", SCENES), panoptic("guess.json", SCENES))
    Path("guess/5.png").unlink()
    return arguments


def of_another_size() -> list[str]:
    return lone("panoptic", panoptic("truth.json", SCENES), panoptic("guess.json", {**SCENES, 5: scene(5, (24, 30))}))


def street_list() -> list[str]:
    gt_fine()
    return lone("instance", "gtFine", results("guess.json", CARS))


def doubled_frames() -> list[str]:
    gt_fine()
    for name in ("a", "b"):
        save(f"guess/{FRAMES[0]}_{name}.png", label_map(0, size=(20, 40)))
    return lone("semantic", "gtFine", "guess")


MISTAKES: dict[str, tuple[Callable[[], list[str]], str]] = {
    "no such folder": (lambda: with_maps({}) and lone("semantic", "truht", "guess"), r"truht: no such .*'truth'"),
    "nothing there": (
        lambda: (Path("none").mkdir(), with_maps({}))[1] and lone("semantic", "truth", "none"),
        r"none: nothing here that ends in \.png",
    ),
    "another picture": (
        lambda: with_maps({"d": label_map(0)}),
        r"guess: 1 of 4 predictions are of pictures that truth does not have \(d\)",
    ),
    "another size": (
        lambda: with_maps({"b": label_map(1, size=(20, 25))}),
        r"guess: b: \(20, 25\) px \(height, width\), the truth has \(20, 30\)",
    ),
    "a value that is no class": (
        lambda: (Path("names.txt").write_text("a\nb\nc\n"), with_maps({}, "--vocabulary", "names.txt"))[1],
        r"truth/a\.png: value 3 at \(y \d+, x \d+\) is none of the classes 0\.\.2",
    ),
    "a picture in colour": (
        lambda: with_maps({"b": np.zeros((20, 30, 3), np.uint8)}),
        r"guess/b\.png: colours \(RGB\) in place of class numbers",
    ),
    "a folder for a file": (
        lambda: (panoptic("truth.json", SCENES), lone("panoptic", "truth.json", "truth"))[1],
        r"truth: a folder, where a JSON file .* Did you mean 'truth\.json'\?",
    ),
    "a file for a folder of streets": (
        lambda: with_maps({}) and lone("instance", "truth", "guess"),
        r"truth: no \*_gtFine_instanceIds\.png here",
    ),
    "a missing PNG": (without_png, r"guess\.json: .*guess/5\.png: no such file"),
    "a segment that is not described": (
        lambda: edited("panoptic", lambda content: content["annotations"][0]["segments_info"].pop()),
        r"guess/3\.png: \d+ px of a segment \d+ that guess\.json does not describe",
    ),
    "an unknown category": (
        lambda: edited(
            "panoptic", lambda content: content["annotations"][1]["segments_info"][0].update(category_id=77)
        ),
        r"guess\.json: .*category_id 77",
    ),
    "a panoptic picture of another size": (of_another_size, r"guess\.json: 5: \(24, 30\) px .* \(24, 32\)"),
    "results of another picture": (
        lambda: edited("instance", lambda content: content[0].update(image_id=77)),
        r"guess\.json: \[0\]: image_id 77 is none of the 3 pictures",
    ),
    "results without a score": (
        lambda: edited("instance", lambda content: content[1].pop("score")),
        r"guess\.json: \[1\]: no score",
    ),
    "run lengths of another size": (
        lambda: edited("instance", lambda content: content[0]["segmentation"].update(size=[3, 4])),
        r"guess\.json: \[0\]: run lengths of \[3, 4\]",
    ),
    "too few points": (
        lambda: edited("instance", lambda content: content[0].update(segmentation=[[1, 2, 3, 4]])),
        r"guess\.json: \[0\].*two points|2 points",
    ),
    "another file's pictures": (
        lambda: lone("instance", coco("truth.json", CARS), coco("guess.json", {77: CARS[3]})),
        r"guess\.json: 1 of 1 predictions are of pictures that truth\.json does not have \(77\)",
    ),
    "borders of instances": (
        lambda: lone("instance", coco("truth.json", CARS), results("guess.json", CARS), "--boundary"),
        r"boundary IoU is of label maps",
    ),
    "a list for streets": (street_list, r"guess\.json: a bare list of results"),
    "two answers for a street": (doubled_frames, r"guess: .* are both of aachen_000000_000019"),
    "not JSON": (
        lambda: (Path("guess.json").write_text("{"), lone("instance", coco("truth.json", CARS), "guess.json"))[1],
        r"guess\.json: not JSON",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(run: Run, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    ended = run(*arguments())
    assert ended.code == 2, ended
    assert ended.out == ""
    last = ended.err.splitlines()[-1]
    assert last.startswith("maskfirst: error: ")
    assert re.search(sentence, last), last


def test_a_segment_without_a_pixel_is_missed_and_told(run: Run) -> None:
    truth = panoptic("truth.json", SCENES)

    def add(content: dict) -> None:
        content["annotations"][0]["segments_info"].append({"id": 123456, "category_id": 3, "iscrowd": 0, "area": 4})

    guess = panoptic("guess.json", SCENES)
    content = told(run("score", change(truth, add), guess, "--task", "panoptic", "--json"))
    assert content["per_class"]["person"]["rq"] < 1
    assert any("without a pixel" in warning for warning in content["warnings"])


if FIXTURES:

    def test_the_reference_files_have_the_reference_scores(run: Run) -> None:
        folder = FIXTURES / "metrics"
        expected = json.loads((folder / "expected.json").read_text())
        found = told(
            run(
                "score",
                folder / "gt_semantic",
                folder / "pred_semantic",
                "--task",
                "semantic",
                "--vocabulary",
                "camvid",
                "--json",
            )
        )
        for name in ("mIoU", "aAcc", "mAcc", "IoU"):
            assert found[name] == pytest.approx(expected["semantic"][name], abs=1e-9)
        found = told(
            run("score", folder / "gt_panoptic.json", folder / "pred_panoptic.json", "--task", "panoptic", "--json")
        )
        for group in ("All", "Things", "Stuff"):
            assert found[group] == pytest.approx(expected["panoptic"][group], abs=1e-9)
        for name, values in expected["panoptic"]["per_class"].items():
            assert found["per_class"][name] == pytest.approx(values, abs=1e-9)
        found = told(
            run("score", folder / "gt_instances.json", folder / "pred_instances.json", "--task", "instance", "--json")
        )
        assert {name: found[name] for name in expected["instance"]} == pytest.approx(expected["instance"], abs=1e-6)
