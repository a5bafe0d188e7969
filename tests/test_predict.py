"""Prediction of files: what is written, under which names, and what happens to files that cannot be read."""

import json
import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfirst.ahead import ahead
from maskfirst.data.images import ImageError, read_image, read_label_map
from maskfirst.errors import UserError
from maskfirst.files import DiskError
from maskfirst.formats import yolo
from maskfirst.formats.coco_instances import CocoInstances
from maskfirst.formats.coco_panoptic import CocoPanoptic
from maskfirst.predict import predict_files
from maskfirst.segmenter import Inference
from maskfirst.sources.files import find_pictures
from maskfirst.types import SegmentMap, Segments
from test_sources import frames, video
from threshold import VOCABULARY, Threshold


def save(path: Path, dark: float = 0.25, size: tuple[int, int] = (30, 40)) -> Path:
    """A picture of `size` (height, width) px, its upper part dark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((*size, 3), 220, np.uint8)
    values[: round(dark * size[0])] = 30
    Image.fromarray(values).save(path, quality=95)
    return path


def names(paths: list[Path], below: Path | None = None) -> dict[str, str]:
    """What each picture found is called."""
    return {str(each.file.relative_to(below) if below else each.file): each.name for each in find_pictures(paths)}


def written(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_a_folder_becomes_label_maps_overlays_and_a_summary(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "deep" / "b.png", dark=1.0, size=(20, 24))
    out = tmp_path / "out"
    summary = predict_files(Threshold(), [tmp_path / "in"], out)
    assert written(out) == [
        "labels/a.png",
        "labels/deep/b.png",
        "overlays/a.jpg",
        "overlays/deep/b.jpg",
        "summary.json",
    ]
    labels = read_label_map(out / "labels/a.png")
    assert labels.shape == (30, 40)
    assert (labels[:8] == 0).all()
    assert (labels[8:] == 1).all()
    overlay = read_image(out / "overlays/a.jpg")
    assert overlay.shape[1] > 30, "the legend lies below the picture"
    share = 8 / 30
    assert json.loads((out / "summary.json").read_text()) == summary.as_json() == {
        "images": [
            {
                "file": str(tmp_path / "in" / "a.png"),
                "labels": "labels/a.png",
                "overlay": "overlays/a.jpg",
                "height": 30,
                "width": 40,
                "classes": {"bright": round(1 - share, 6), "dark": round(share, 6)},
            },
            {
                "file": str(tmp_path / "in" / "deep" / "b.png"),
                "labels": "labels/deep/b.png",
                "overlay": "overlays/deep/b.jpg",
                "height": 20,
                "width": 24,
                "classes": {"dark": 1.0},
            },
        ],
        "failed": [],
    }  # fmt: skip


def test_void_has_no_share(tmp_path):
    Image.fromarray(np.repeat(np.uint8([[[0] * 3], [[255] * 3]]), 4, axis=1)).save(tmp_path / "a.png")
    summary = predict_files(Threshold(), [tmp_path / "a.png"], tmp_path / "out")
    assert summary.images[0]["classes"] == {"bright": 0.5}
    assert read_label_map(tmp_path / "out/labels/a.png").tolist() == [[255] * 4, [1] * 4]


def test_overlays_can_be_left_out_and_coloured(tmp_path):
    save(tmp_path / "a.png", dark=1.0)
    bare = predict_files(Threshold(), [tmp_path / "a.png"], tmp_path / "bare", overlays=False)
    assert written(tmp_path / "bare") == ["labels/a.png", "summary.json"]
    assert bare.images[0]["overlay"] is None
    colors = ((0, 255, 0), (1, 1, 1), (2, 2, 2))
    predict_files(Threshold(), [tmp_path / "a.png"], tmp_path / "out", opacity=1.0, colors=colors)
    assert read_image(tmp_path / "out/overlays/a.jpg")[:, 10, 20].tolist() == pytest.approx([0, 255, 0], abs=6)


def test_a_corrupt_file_is_named_and_the_rest_is_done(tmp_path):
    for name in ("a.png", "c.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "b.jpg").write_bytes(b"\xff\xd8\xff and then nothing of use")
    (tmp_path / "in" / "d.png").write_bytes(b"")
    told = []
    summary = predict_files(
        Threshold(), [tmp_path / "in"], tmp_path / "out", progress=lambda *numbers: told.append(numbers)
    )
    assert [Path(entry["file"]).name for entry in summary.images] == ["a.png", "c.png"]
    assert [entry["file"] for entry in summary.failed] == [str(tmp_path / "in" / name) for name in ("b.jpg", "d.png")]
    assert all(entry["file"] in entry["error"] for entry in summary.failed)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert json.loads((tmp_path / "out/summary.json").read_text())["failed"] == summary.failed


def test_files_folders_and_globs_give_pictures_once_and_in_order(tmp_path):
    for name in ("a.png", "b.JPG", "deep/c.webp", ".hidden.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    every = {"a.png": "a", "b.JPG": "b", "deep/c.webp": "deep/c"}
    assert names([tmp_path], tmp_path) == every
    assert names([tmp_path / "**" / "*"], tmp_path) == every
    assert names([tmp_path / "*"], tmp_path) == {"a.png": "a", "b.JPG": "b"}
    assert names([tmp_path / "deep" / "c.webp", tmp_path], tmp_path) == {"deep/c.webp": "c", "a.png": "a", "b.JPG": "b"}
    assert names([tmp_path / "[ab].*"], tmp_path) == {"a.png": "a", "b.JPG": "b"}


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    assert names([save(tmp_path / "shot [1].png")], tmp_path) == {"shot [1].png": "shot [1]"}


def test_a_file_given_by_name_is_tried_whatever_its_ending(tmp_path):
    (tmp_path / "a.data").write_bytes(save(tmp_path / "a.png").read_bytes())
    summary = predict_files(Threshold(), [tmp_path / "a.data"], tmp_path / "out")
    assert summary.images[0]["labels"] == "labels/a.png"


def test_names_that_clash_are_told_apart(tmp_path):
    files = [save(tmp_path / name) for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/y.png", "c/z.png", "c/Z.png")]
    assert names(files, tmp_path) == {
        "a/x.png": "a/x",
        "b/x.png": "b/x.png",
        "b/x.jpg": "b/x.jpg",
        "b/y.png": "y",
        "c/z.png": "c/z.png",
        "c/Z.png": "c/Z.png-2",
    }
    assert names([tmp_path / "a", tmp_path / "b"], tmp_path) == {
        "a/x.png": "a/x",
        "b/x.png": "b/x.png",
        "b/x.jpg": "b/x.jpg",
        "b/y.png": "y",
    }
    assert names([tmp_path / "a"], tmp_path) == {"a/x.png": "x"}


def test_pictures_whose_names_clash_all_arrive(tmp_path):
    save(tmp_path / "x.png", dark=0.5)
    save(tmp_path / "x.jpg", dark=1.0)
    summary = predict_files(Threshold(), [tmp_path / "x.png", tmp_path / "x.jpg"], tmp_path / "out")
    assert [entry["labels"] for entry in summary.images] == ["labels/x.png.png", "labels/x.jpg.png"]
    assert (read_label_map(tmp_path / "out/labels/x.jpg.png") == 0).all()
    assert (read_label_map(tmp_path / "out/labels/x.png.png")[-1] == 1).all()


def test_own_output_is_not_taken_for_input(tmp_path):
    save(tmp_path / "a.png")
    for _ in range(2):
        summary = predict_files(Threshold(), [tmp_path], tmp_path / "out")
        assert [entry["labels"] for entry in summary.images] == ["labels/a.png"]


def test_pictures_and_output_may_share_a_folder(tmp_path):
    save(tmp_path / "a.png")
    for _ in range(2):
        for path in (tmp_path, tmp_path / "**" / "*"):
            assert [entry["labels"] for entry in predict_files(Threshold(), [path], tmp_path).images] == [
                "labels/a.png"
            ]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("strete.png", "strete.png: no such file or folder. Did you mean 'street.png'?"),
        ("nowhere/a.png", "nowhere/a.png: no such file or folder."),
        ("empty", "empty: no picture found here; looked for names that end in .jpg, .jpeg, .png"),
        ("*.gif", "*.gif: no picture found here"),
    ],
)
def test_nothing_to_read_is_said_in_a_sentence(tmp_path, monkeypatch, path, sentence):
    save(tmp_path / "street.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        predict_files(Threshold(), ["street.png", path], "out")
    assert str(caught.value).startswith(sentence)
    assert not Path("out").exists()


def test_resume_does_what_is_missing_and_nothing_else(tmp_path):
    for name in "abcd":
        save(tmp_path / "in" / f"{name}.png", dark=0.5)
    out, segmenter = tmp_path / "out", Threshold()
    whole = predict_files(segmenter, [tmp_path / "in"], out, resume=True)
    assert len(segmenter.calls) == 4
    (out / "summary.json").unlink()
    (out / "labels/a.png").unlink()
    (out / "labels/b.png").write_bytes((out / "labels/c.png").read_bytes()[:60])
    (out / "overlays/c.jpg").unlink()
    told = []
    again = predict_files(segmenter, [tmp_path / "in"], out, resume=True, progress=lambda *n: told.append(n))
    assert len(segmenter.calls) == 7
    assert told == [(2, 4), (3, 4), (4, 4)]
    assert again == whole
    assert json.loads((out / "summary.json").read_text()) == whole.as_json()


def test_resume_does_not_take_another_pictures_output(tmp_path):
    segmenter = Threshold()
    predict_files(segmenter, [save(tmp_path / "a" / "x.png")], tmp_path / "out", resume=True)
    predict_files(segmenter, [save(tmp_path / "b" / "x.png")], tmp_path / "out", resume=True)
    save(tmp_path / "b" / "x.png", dark=0.9, size=(50, 50))
    changed = predict_files(segmenter, [tmp_path / "b" / "x.png"], tmp_path / "out", resume=True)
    assert len(segmenter.calls) == 3
    assert changed.images[0]["height"] == 50


def test_without_resume_all_is_done_anew(tmp_path):
    segmenter, path = Threshold(), save(tmp_path / "a.png")
    for _ in range(2):
        predict_files(segmenter, [path], tmp_path / "out")
    assert len(segmenter.calls) == 2


def test_an_output_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DiskError, match="out"):
        predict_files(Threshold(), [save(tmp_path / "a.png")], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_files_get_the_rights_that_open_would_give(tmp_path):
    before = os.umask(0)
    os.umask(before)
    predict_files(Threshold(), [save(tmp_path / f"in/{i}.png").parent for i in range(20)], tmp_path / "out", workers=4)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~before for path in (tmp_path / "out/labels").iterdir())


def test_reading_hides_behind_the_model(tmp_path, monkeypatch):
    """While the model sees a picture, the next one is read."""
    count = 6
    begun = [threading.Event() for _ in range(count)]
    seen = iter(range(count))

    class Patient(Threshold):
        def segment_many(self, images, task="semantic", **given):
            behind = begun[min(next(seen) + 1, count - 1)]
            assert behind.wait(60), "the next picture is not read before this one is done"
            return super().segment_many(images, task, **given)

    def watched_read(path):
        begun[int(path.stem)].set()
        return read_image(path)

    monkeypatch.setattr("maskfirst.sources.as_rgb", watched_read)
    for index in range(count):
        save(tmp_path / "in" / f"{index}.png")
    predict_files(Patient(), [tmp_path / "in"], tmp_path / "out")


def test_ahead_keeps_the_order_and_stays_bounded():
    started, lock = [], threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    for index, (item, job) in enumerate(ahead(work, range(30), workers=3)):
        assert isinstance(job, Future)
        assert (item, job.result()) == (index, index * index)
        assert max(started) <= index + 4


def test_ahead_stops_reading_when_the_caller_does():
    started = []
    jobs = ahead(lambda item: started.append(item) or time.sleep(0.01), range(1000), workers=2)
    next(jobs)
    jobs.close()
    assert len(started) < 10


def test_what_is_wrong_with_one_picture_of_a_pass_stays_with_it(tmp_path):
    class Picky(Threshold):
        def segment_many(self, images, task="semantic", **given):
            if any(image.shape[1] == 9 for image in images):
                raise ImageError("nine rows are too few")
            return super().segment_many(images, task, **given)

    model = Picky()
    model.inference = Inference(batch=3)
    for index, height in enumerate((8, 9, 8, 10)):
        save(tmp_path / "in" / f"{index}.png", size=(height, 12))
    (tmp_path / "in" / "4.png").write_bytes(b"no picture")
    steps = []
    summary = predict_files(model, [tmp_path / "in"], tmp_path / "out", progress=lambda *step: steps.append(step))
    assert [Path(each["file"]).name for each in summary.images] == ["0.png", "2.png", "3.png"]
    assert [(Path(each["file"]).name, each["error"].split(": ")[-1][:10]) for each in summary.failed] == [
        ("1.png", "nine rows "),
        ("4.png", "not a JPEG"),
    ]
    assert steps == [(done, 5) for done in range(1, 6)]


def test_a_bug_in_the_model_is_no_failed_file(tmp_path):
    class Broken(Threshold):
        def segment_many(self, images, task="semantic", **given):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        predict_files(Broken(), [save(tmp_path / "a.png")], tmp_path / "out")


class Scene(Threshold):
    """Answers any picture with a bright square over a dark ground, and a faint bright copy of half of it."""

    def segment_many(self, images, task="semantic", **given):
        super().segment_many(images, task, **given)
        return [self.scene(image, task) for image in images]

    def scene(self, image, task):
        masks = torch.zeros(3, *image.shape[1:], dtype=torch.bool)
        masks[0] = True
        masks[1, 5:15, 10:30] = masks[2, 5:15, 20:35] = True
        found = Segments(masks, torch.tensor([0, 1, 1]), torch.tensor([0.95, 0.8, 0.3]), torch.zeros(3).bool())
        if task == "instance":
            return found[1:]
        return SegmentMap.of(found[:2]).segments if task == "panoptic" else found[:1]


def test_panoptic_files_are_cocos_and_the_summary_tells_every_segment(tmp_path):
    for name in ("000000000139.png", "deep/000000000285.png"):
        save(tmp_path / "in" / name)
    out = tmp_path / "out"
    summary = predict_files(Scene(), [tmp_path / "in"], out, task="panoptic")
    assert written(out) == [
        "overlays/000000000139.jpg",
        "overlays/deep/000000000285.jpg",
        "panoptic.json",
        "panoptic/000000000139.png",
        "panoptic/deep/000000000285.png",
        "summary.json",
    ]
    share = 200 / 1200
    assert summary.images[0] == {
        "file": str(tmp_path / "in" / "000000000139.png"),
        "panoptic": "panoptic/000000000139.png",
        "overlay": "overlays/000000000139.jpg",
        "height": 30,
        "width": 40,
        "classes": {"dark": round(1 - share, 6), "bright": round(share, 6)},
        "segments": [
            {"class": "dark", "score": 0.95, "share": round(1 - share, 6), "box": [0, 0, 40, 30]},
            {"class": "bright", "score": 0.8, "share": round(share, 6), "box": [10, 5, 30, 15]},
        ],
    }
    found = CocoPanoptic(out / "panoptic.json")
    assert found.vocabulary == VOCABULARY
    assert {key: image.file_name for key, image in found.images.items()} == {
        139: "000000000139.png",
        285: "deep/000000000285.png",
    }
    for key in found.images:
        picture = found.read(key)
        assert picture.classes.tolist() == [0, 1]
        assert picture.scores.tolist() == pytest.approx([0.95, 0.8])
        assert (picture.ids[5:15, 10:30] == 1).all()


def test_instance_files_have_all_and_the_rest_what_is_sure(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png")
    out = tmp_path / "out"
    summary = predict_files(Scene(), [tmp_path / "in"], out, task="instance", yolo=True)
    assert written(out) == [
        "instances.json",
        "instances/a.json",
        "instances/b.json",
        "overlays/a.jpg",
        "overlays/b.jpg",
        "summary.json",
        "yolo.yaml",
        "yolo/a.txt",
        "yolo/b.txt",
    ]
    found = CocoInstances(out / "instances.json")
    assert {key: image.file_name for key, image in found.images.items()} == {1: "a.png", 2: "b.png"}
    instances = found.read(2)
    assert instances.scores.tolist() == [0.8, 0.3]
    assert instances.boxes.tolist() == [[10, 5, 30, 15], [20, 5, 35, 15]]
    assert (instances.segments.masks[0] & instances.segments.masks[1]).sum() == 100, "they may overlap"
    share = round(200 / 1200, 6)
    assert summary.images[1]["segments"] == [{"class": "bright", "score": 0.8, "share": share, "box": [10, 5, 30, 15]}]
    assert summary.images[1]["classes"] == {"bright": share}
    polygons = yolo.read(out / "yolo/b.txt", (30, 40), VOCABULARY.names).segments
    assert torch.equal(polygons.masks, instances.segments.masks[:1])
    assert "1: bright" in (out / "yolo.yaml").read_text()

    every = predict_files(Scene(), [tmp_path / "in"], tmp_path / "every", task="instance", least_score=0.0)
    assert len(every.images[0]["segments"]) == 2
    assert every.images[0]["classes"] == {"bright": round(250 / 1200, 6)}, "what they share counts once"
    assert not (tmp_path / "every" / "yolo").exists()


def test_instances_below_the_least_score_are_not_painted(tmp_path):
    picture = save(tmp_path / "a.png", dark=0.0, size=(60, 200))
    predict_files(Scene(), [picture], tmp_path / "out", task="instance", opacity=1.0)
    overlay = read_image(tmp_path / "out/overlays/a.jpg").float()
    bright = torch.tensor(VOCABULARY.colors[1]).view(3, 1, 1)
    near = (overlay - bright).abs().amax(0) < 40
    assert near[6:14, 11:29].all()
    assert not near[6:14, 31:35].any()


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_resume_keeps_what_cocos_files_say(tmp_path, task):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png", dark=0.5)
    out, segmenter = tmp_path / "out", Scene()
    options = {"task": task, "yolo": task == "instance", "resume": True}
    whole = predict_files(segmenter, [tmp_path / "in"], out, **options)
    file = out / ("panoptic.json" if task == "panoptic" else "instances.json")
    content = file.read_bytes()
    file.unlink()
    ending = "png" if task == "panoptic" else "json"
    damaged = file.with_suffix("") / f"b.{ending}"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (out / "overlays" / "c.jpg").unlink()
    again = predict_files(segmenter, [tmp_path / "in"], out, **options)
    assert len(segmenter.calls) == 5
    assert again == whole
    assert file.read_bytes() == content
    if task == "instance":
        (out / "yolo" / "a.txt").unlink()
    else:
        (file.with_suffix("") / "a.png").unlink()
    predict_files(segmenter, [tmp_path / "in"], out, **options)
    assert len(segmenter.calls) == 6


def test_another_task_in_the_same_folder_is_done_anew(tmp_path):
    segmenter, path = Scene(), save(tmp_path / "a.png")
    for task in ("panoptic", "instance", "semantic", "panoptic"):
        predict_files(segmenter, [path], tmp_path / "out", task=task, resume=True)
    assert len(segmenter.calls) == 3
    assert [entry for entry in written(tmp_path / "out") if "/" not in entry] == [
        "instances.json",
        "panoptic.json",
        "summary.json",
    ]


def test_pictures_that_cannot_be_read_are_not_in_cocos_files(tmp_path):
    save(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "a.png").write_bytes(b"")
    summary = predict_files(Scene(), [tmp_path / "in"], tmp_path / "out", task="panoptic")
    assert len(summary.failed) == 1
    assert list(CocoPanoptic(tmp_path / "out/panoptic.json").images) == [2]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("000000000139.png", "7.png"), [139, 7]),
        (("139.png", "deep/0139.png"), [1, 2]),
        (("139.png", "a.png"), [1, 2]),
        (("²³.png",), [1]),
    ],
)
def test_pictures_are_called_by_their_number_where_all_have_one(tmp_path, names, keys):
    assert [each.key for each in find_pictures([save(tmp_path / name) for name in names])] == keys


def test_polygons_are_of_instances(tmp_path):
    with pytest.raises(UserError, match="polygons are of instances, not of the panoptic task"):
        predict_files(Scene(), [save(tmp_path / "a.png")], tmp_path / "out", task="panoptic", yolo=True)


def test_the_task_and_augmentation_reach_the_model(tmp_path):
    segmenter = Threshold()
    predict_files(segmenter, [save(tmp_path / "a.png")], tmp_path / "out", task="panoptic", augment=True)
    assert [(call["task"], call["augment"]) for call in segmenter.calls] == [("panoptic", True)]


def test_videos_are_pictures_frame_by_frame(tmp_path):
    street = video(tmp_path / "street.mp4", 12)
    save(tmp_path / "7.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    given = [street, tmp_path / "7.png", tmp_path / "broken.mp4"]
    summary = predict_files(Threshold(), given, out, frames=5)
    found = [f"street/{number:06d}" for number in range(5)]
    assert written(out) == sorted(
        [
            f"{folder}{name}.{ending}"
            for name in (*found, "7")
            for folder, ending in (("labels/", "png"), ("overlays/", "jpg"))
        ]
        + ["summary.json"]
    )
    assert [entry.get("frame") for entry in summary.images] == [0, 1, 2, 3, 4, None]
    assert [each["file"] for each in summary.failed] == [str(tmp_path / "broken.mp4")]
    for name, frame in zip(found, frames(street), strict=False):
        right = Threshold().segment(torch.from_numpy(frame).permute(2, 0, 1)).label_map()
        assert np.array_equal(read_label_map(out / f"labels/{name}.png"), right.numpy())
    # What is there is kept, and frames that are missing are found in the middle of the video.
    before = (out / "labels/street/000000.png").stat().st_mtime_ns
    (out / "labels/street/000003.png").unlink()
    again = predict_files(Threshold(), given, out, frames=5, resume=True)
    assert (out / "labels/street/000000.png").stat().st_mtime_ns == before
    assert again.images == summary.images
    assert np.array_equal(
        read_label_map(out / "labels/street/000003.png"),
        Threshold().segment(torch.from_numpy(frames(street)[3]).permute(2, 0, 1)).label_map().numpy(),
    )


def test_files_of_many_pictures_are_for_shards(tmp_path):
    with pytest.raises(
        UserError, match=r"b\.tar: a file of many pictures is segmented to shards; say --shards parquet"
    ):
        predict_files(Threshold(), [tmp_path / "b.tar"], tmp_path / "out")


def test_cocos_files_tell_frames_apart(tmp_path):
    predict_files(
        Threshold(), [video(tmp_path / "a.mp4", 2), video(tmp_path / "b.mkv", 2)], tmp_path / "out", "panoptic"
    )
    coco = CocoPanoptic(tmp_path / "out" / "panoptic.json")
    names = ["a/000000.png", "a/000001.png", "b/000000.png", "b/000001.png"]
    assert [coco.images[key].file_name for key in (1, 2, 3, 4)] == names


def test_a_camera_is_watched_until_it_ends_or_there_is_enough(tmp_path, monkeypatch):
    source = ("testsrc=size=40x30:rate=5:duration=2", "lavfi")
    monkeypatch.setattr("maskfirst.sources.video._device", lambda address: source)
    summary = predict_files(Threshold(), ["camera:0", save(tmp_path / "5.png")], tmp_path / "some", frames=3)
    assert [(entry["file"], entry.get("frame")) for entry in summary.images[1:]] == [("camera:0", n) for n in range(3)]
    assert (tmp_path / "some" / "overlays" / "camera-0" / "000002.jpg").is_file()
    assert len(predict_files(Threshold(), ["camera:0"], tmp_path / "all").images) == 10


def test_a_camera_stops_when_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr("maskfirst.sources.video._device", lambda address: ("testsrc=size=40x30:rate=5", "lavfi"))

    def told(done: int, total: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    summary = predict_files(Threshold(), ["camera:0"], tmp_path / "out", progress=told)
    assert 4 <= len(summary.images) < 10
    assert (tmp_path / "out" / "summary.json").is_file()
