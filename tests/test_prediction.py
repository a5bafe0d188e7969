"""The Python API: pictures of any kind in, predictions out that draw themselves and turn into what other tools read."""

import io
import threading
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference

import maskfirst
from maskfirst import recipe
from maskfirst.ahead import ahead, groups
from maskfirst.build import Experiment
from maskfirst.data.images import ImageError, TooLargeError, as_rgb, read_image, read_label_map
from maskfirst.data.shapes import Shapes
from maskfirst.formats.coco_panoptic import CocoPanoptic, PanopticWriter
from maskfirst.prediction import Prediction
from maskfirst.types import SegmentMap, Segments, Vocabulary
from threshold import Threshold

WORDS = Vocabulary(("ground", "square"), frozenset({1}), ((0, 120, 0), (200, 0, 0)), (3, 7))
SCENE = Shapes("val", length=3)


def found(task: str = "instance") -> Prediction:
    """A large square, a small one on its corner, and a faint one, on a picture 20 px high and 30 wide."""
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 6:9, 6:9] = masks[1, 2:12, 2:12] = masks[2, :, 25:] = True
    scores = torch.tensor([0.9, 0.8, 0.2])
    segments = Segments(masks, torch.tensor([1, 1, 1]), scores, torch.zeros(3).bool())
    return Prediction(torch.full((3, 20, 30), 90, dtype=torch.uint8), segments, WORDS, task, "a.png")


@pytest.fixture(scope="module")
def model() -> maskfirst.Segmenter:
    return maskfirst.load("camvid-small")


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


def test_pictures_of_every_kind_are_one_picture(tmp_path: Path) -> None:
    image = SCENE[0].image
    array = as_array(image)
    png = io.BytesIO()
    Image.fromarray(array).save(png, "PNG")
    (tmp_path / "a.png").write_bytes(png.getvalue())
    alpha = np.concatenate([array, np.full_like(array[..., :1], 7)], 2)
    kinds = [
        image, array, alpha, array[:, ::-1][:, ::-1], Image.fromarray(array), Image.open(io.BytesIO(png.getvalue())),
        png.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png"),
    ]  # fmt: skip
    for kind in kinds:
        assert torch.equal(as_rgb(kind), image), type(kind)
    grey = torch.from_numpy(array[..., 0].copy()).expand(3, -1, -1)
    for kind in (array[..., 0], array[..., :1], Image.fromarray(array[..., 0])):
        assert torch.equal(as_rgb(kind), grey)


def test_an_array_is_not_looked_at_again() -> None:
    array = as_array(SCENE[0].image)[..., 0].copy()
    image = as_rgb(array)
    before = image.clone()
    array[:] = 0
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 5, 3)), r"float64 \(4, 5, 3\): a picture has bytes 0..255; \(255 \* array\).round"),
        (np.zeros((4, 5), np.int64), r"int64 .* array.astype\(np.uint8\) makes some of it"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\).*array.transpose\(1, 2, 0\) turns it"),
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\): a picture is \(height, width\)"),
        (torch.zeros(3, 4, 5), r"torch.float32 \(3, 4, 5\): .*\(255 \* tensor\).round\(\).byte\(\) makes some of it"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"shape \(4, 5, 3\): .*tensor.permute\(2, 0, 1\) turns it"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"shape \(1, 3, 4, 5\): a picture is \(3, height, width\)$"),
        (Image.new("F", (4, 5)), "this picture of Pillow's: pixels of 32 bits"),
        (b"", r"these bytes: the file is empty \(0 bytes\)"),
        (b"<html>", "these bytes: not a JPEG, PNG"),
        ("gone.jpg", "gone.jpg: no such file"),
        (".", r"\.: cannot be read: Is a directory"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_told_in_a_line(picture: object, told: str) -> None:
    with pytest.raises(ImageError, match=told):
        as_rgb(picture)  # pyright: ignore[reportArgumentType]


def test_a_picture_of_pillows_is_not_decoded_beyond_the_limit(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as lazy, pytest.raises(TooLargeError, match="40 x 30 px, more than the limit"):
        as_rgb(lazy, 1000)


def test_other_objects_are_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the check of the argument's type that only tests run with.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ImageError, match="list: no picture; give a path"):
        as_rgb([1, 2])  # pyright: ignore[reportArgumentType]


def test_predict_finds_what_segment_does(model: maskfirst.Segmenter, tmp_path: Path) -> None:
    image = SCENE[0].image
    path = tmp_path / "scene.png"
    Image.fromarray(as_array(image)).save(path)
    answer = model.predict(path)
    wanted = model.segment(image)
    assert torch.equal(answer.masks, wanted.masks)
    assert torch.equal(answer.classes, wanted.classes)
    assert answer.names == tuple(model.vocabulary.names[index] for index in wanted.classes.tolist())
    assert (answer.task, answer.key) == ("semantic", str(path))
    assert torch.equal(answer.image, image)


def test_many_pictures_in_their_order_with_the_broken_ones_told(model: maskfirst.Segmenter, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    wide = torch.cat([SCENE[1].image] * 2, 2)
    pictures = [SCENE[0].image, tmp_path / "broken.png", wide, SCENE[2].image]
    skipped: list[tuple[object, str]] = []
    for batch, workers in ((None, 2), (3, 1), (2, 0)):
        skipped.clear()
        answers = list(
            model.predict_many(
                pictures,
                batch=batch,
                workers=workers,
                skipped=lambda picture, error: skipped.append((picture, str(error))),
            )
        )
        assert [picture for picture, _ in skipped] == [tmp_path / "broken.png"]
        assert "broken.png: not a JPEG" in skipped[0][1]
        for answer, image in zip(answers, (SCENE[0].image, wide, SCENE[2].image), strict=True):
            assert torch.equal(answer.image, image)
            same = (answer.label_map() == model.segment(image).label_map()).float().mean()
            # Where two scores are as good as one, a pass of several pictures may round to the other.
            assert same > 0.999
    with pytest.raises(ImageError, match=r"broken\.png"):
        list(model.predict_many(pictures))


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_pictures_of_a_pass_do_not_see_each_other(task: str) -> None:
    torch.manual_seed(0)
    tree = recipe.load(
        "shapes-panoptic",
        ["proposer.queries=12", "inference.thresholds.object=0.0", "inference.thresholds.overlap=0.0"],
    )
    model = Experiment(tree).segmenter().eval()
    images = [SCENE[index].image for index in range(3)]
    for one, image in zip(model.segment_many(images, task, batch=3), images, strict=True):
        alone = model.segment(image, task)
        assert one.classes.tolist() == alone.classes.tolist() != []
        assert (one.masks == alone.masks).float().mean() > 0.999
        torch.testing.assert_close(one.scores, alone.scores)


def test_threads_may_share_a_model(model: maskfirst.Segmenter) -> None:
    images = [SCENE[index].image for index in range(3)]
    wanted = [model.segment(image).label_map() for image in images]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for step in range(6):
            place = (first + step) % 3
            if not torch.equal(model.predict(images[place]).label_map(), wanted[place]):
                wrong.append(place)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_next_picture_is_segmented_while_one_is_used() -> None:
    begun = [threading.Event() for _ in range(4)]

    class Watched(Threshold):
        def segment_many(self, images, task="semantic", **given):
            begun[int(images[0][0, 0, 0])].set()
            return super().segment_many(images, task, **given)

    pictures = [torch.full((3, 8, 8), index, dtype=torch.uint8) for index in range(4)]
    for index, _ in enumerate(Watched().predict_many(pictures)):
        assert begun[min(index + 1, 3)].wait(60), "the next one waits for whoever uses this one"


def test_work_without_workers_is_done_when_it_is_asked_for() -> None:
    done: list[int] = []
    jobs = ahead(done.append, range(3), 0)
    assert done == []
    next(jobs)
    assert done == [0]
    _, job = next(ahead(lambda item: 1 // item, [0], 0))
    with pytest.raises(ZeroDivisionError):
        job.result()


def test_groups_lose_nothing() -> None:
    assert list(groups(range(5), 2)) == [(0, 1), (2, 3), (4,)]


def test_a_prediction_is_taken_apart_by_scores_and_one_by_one() -> None:
    whole = found()
    sure = whole[whole.scores > 0.5]
    assert (len(whole), len(sure), sure.names) == (3, 2, ("square", "square"))
    assert [one.scores.tolist() for one in whole] == [pytest.approx([score]) for score in (0.9, 0.8, 0.2)]
    assert repr(whole) == "Prediction(instance, 30 x 20 px: 3 square)"
    assert repr(whole[:0]) == "Prediction(instance, 30 x 20 px: nothing)"
    assert whole.boxes.tolist()[0] == [6, 6, 9, 9]


def test_coco_results_are_read_by_cocos_own_tools() -> None:
    results = found().coco(image_id=5)
    assert [set(each) for each in results] == [
        {"image_id", "category_id", "segmentation", "area", "bbox", "iscrowd", "score"}
    ] * 3
    assert {(each["image_id"], each["category_id"]) for each in results} == {(5, 7)}
    for each, mask in zip(results, found().masks, strict=True):
        assert np.array_equal(reference.decode(each["segmentation"]), mask.numpy())


def test_the_panoptic_form_is_what_the_writer_writes(tmp_path: Path) -> None:
    whole = found("panoptic")
    painted, records = whole.panoptic()
    writer = PanopticWriter(tmp_path / "p.json", WORDS)
    writer.add(1, "a.jpg", SegmentMap.of(whole.segments))
    writer.close()
    assert np.array_equal(np.array(Image.open(tmp_path / "p" / "a.png")), painted)
    read = CocoPanoptic(tmp_path / "p.json").read(1)
    assert len(read) == len(records) == 2, (
        "the small square lies under the large one, as panoptic segments have an order"
    )


def test_a_smaller_instance_lies_in_front() -> None:
    painted, records = found().panoptic()
    assert len(records) == 3
    numbers = painted.astype(int) @ [1, 256, 65536]
    assert numbers[7, 7] != numbers[3, 3] != 0
    assert found().label_map()[0, 0] == -1


def test_overlays_have_names_and_a_legend(tmp_path: Path) -> None:
    whole = found()
    bare = whole.overlay(legend=False)
    assert bare.size == (30, 20)
    assert whole.overlay().height > 20
    faint = np.array(whole.overlay(legend=False, least_score=0.1))[10, 27]
    assert (np.array(bare)[15, 27] == 90).all(), "what is not sure is not drawn"
    assert not (faint == 90).all()
    assert Image.open(io.BytesIO(whole._repr_png_())).size == whole.overlay().size
    whole.save(tmp_path / "labels.png")
    assert read_label_map(tmp_path / "labels.png")[7, 7] == 1
    assert read_label_map(tmp_path / "labels.png")[19, 0] == 255
    whole.overlay().save(tmp_path / "o.png")
    assert read_image(tmp_path / "o.png").shape[1] > 20
