"""The confusion matrix against brute force, against reference values, and in parts against the whole."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures_dir import FIXTURES
from maskfirst.data.vocabulary import from_names
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.types import VOID

NAMES = ("sky", "road", "tree", "car", "unicorn")


def matrix_of(classes: int) -> ConfusionMatrix:
    return ConfusionMatrix(from_names([*NAMES, *(f"class {index}" for index in range(5, classes))][:classes]))


def maps(seed: int, classes: int = 4, height: int = 13, width: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth, prediction = torch.randint(VOID, classes, (2, height, width), generator=generator)
    return truth, torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, prediction)


def brute_force(pairs: list[tuple[torch.Tensor, torch.Tensor]], num_classes: int) -> dict:
    """The definitions, pixel by pixel and class by class, on Python integers."""
    pixels = [
        (t, p)
        for truth, guess in pairs
        for t, p in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True)
    ]
    pixels = [(t, p) for t, p in pixels if t != VOID]
    iou, accuracy = [], []
    for index in range(num_classes):
        hit = sum(t == index and p == index for t, p in pixels)
        union = sum(t == index or p == index for t, p in pixels)
        truth = sum(t == index for t, p in pixels)
        iou.append(hit / union if union else math.nan)
        accuracy.append(hit / truth if truth else math.nan)
    return {
        "IoU": iou,
        "Acc": accuracy,
        "mIoU": np.nanmean(iou),
        "mAcc": np.nanmean(accuracy),
        "aAcc": sum(t == p for t, p in pixels) / len(pixels),
    }


def test_scores_are_the_definitions():
    pairs = [maps(seed) for seed in range(3)]
    matrix = matrix_of(5)
    for truth, prediction in pairs:
        matrix.update(truth, prediction)
    scores, expected = matrix.scores().content, brute_force(pairs, 5)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-12)
    for name in ("IoU", "Acc"):
        assert list(scores[name]) == list(NAMES)
        assert list(scores[name].values()) == pytest.approx(expected[name], abs=1e-12, nan_ok=True)
    assert math.isnan(scores["IoU"]["unicorn"])
    assert matrix.counts.sum() == sum(int((truth != VOID).sum()) for truth, _ in pairs)


def test_predicted_void_is_a_missed_pixel_and_nobodys_false_one():
    matrix = matrix_of(2)
    matrix.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, VOID, 1, 1]]))
    scores = matrix.scores().content
    assert scores["IoU"] == {"sky": 0.5, "road": 1.0}
    assert scores["aAcc"] == 0.75


def test_a_class_predicted_where_there_is_none_has_iou_0_and_no_accuracy():
    matrix = matrix_of(3)
    matrix.update(torch.tensor([[0, 0]]), torch.tensor([[0, 2]]))
    scores = matrix.scores().content
    assert scores["IoU"]["tree"] == 0.0
    assert math.isnan(scores["Acc"]["tree"])
    assert math.isnan(scores["IoU"]["road"])
    assert (scores["mIoU"], scores["mAcc"]) == (0.25, 0.5)


def test_nothing_seen_is_nan_not_an_error():
    matrix = matrix_of(2)
    matrix.update(torch.full((2, 2), VOID), torch.zeros(2, 2, dtype=torch.int64))
    assert all(math.isnan(matrix.scores().content[name]) for name in ("mIoU", "mAcc", "aAcc"))


def test_parts_add_up_to_the_whole():
    pairs = [maps(seed) for seed in range(5)]
    whole, parts = matrix_of(4), (matrix_of(4), matrix_of(4))
    for index, pair in enumerate(pairs):
        whole.update(*pair)
        parts[index % 2].update(*pair)
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert torch.equal(parts[0].counts, whole.counts)


def test_a_picture_has_the_score_of_the_classes_in_its_truth():
    matrix = matrix_of(3)
    assert matrix.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 2]])) == pytest.approx((2 / 3 + 0) / 2)
    assert matrix.update(torch.full((1, 4), VOID), torch.zeros(1, 4, dtype=torch.int64)) is None


def test_the_table_has_iou_accuracy_and_share_of_every_class():
    matrix = matrix_of(2)
    matrix.update(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 1]]))
    scores = matrix.scores()
    assert scores.columns == ("IoU", "Acc", "share")
    assert scores.rows == [("sky", pytest.approx((2 / 3, 2 / 3, 3 / 4))), ("road", (0.5, 1.0, 0.25))]
    assert scores.below[0][1][:2] == (scores.means["mIoU"], scores.means["mAcc"])
    assert (scores.headline, scores.value) == ("mIoU", scores.content["mIoU"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_counts_alike(dtype):
    truth, prediction = maps(0, classes=100)
    expected, matrix = matrix_of(100), matrix_of(100)
    expected.update(truth, prediction)
    matrix.update(truth.to(dtype), prediction)
    assert torch.equal(matrix.counts, expected.counts)


@pytest.mark.parametrize(("where", "value"), [("truth", 3), ("truth", -2), ("prediction", 255), ("prediction", -2)])
def test_a_value_that_is_no_class_is_refused_by_name(where, value):
    labels = {"truth": torch.zeros(2, 2, dtype=torch.int64), "prediction": torch.zeros(2, 2, dtype=torch.int64)}
    labels[where][0, 1] = value
    with pytest.raises(ValueError, match=f"{where} holds {value}; 3 classes are 0..2"):
        matrix_of(3).update(**labels)


if FIXTURES:

    def test_semantic_scores_meet_the_reference():
        expected = json.loads((FIXTURES / "metrics" / "expected.json").read_text())["semantic"]
        names = list(expected["IoU"])
        matrix = ConfusionMatrix(from_names(names))
        files = sorted((FIXTURES / "metrics" / "gt_semantic").glob("*.png"))
        assert len(files) == 24
        for file in files:
            truth = torch.from_numpy(np.array(Image.open(file))).long()
            prediction = torch.from_numpy(
                np.array(Image.open(FIXTURES / "metrics" / "pred_semantic" / file.name))
            ).long()
            matrix.update(*(labels.masked_fill(labels == 255, VOID) for labels in (truth, prediction)))
        scores = matrix.scores().content
        for name in ("mIoU", "aAcc", "mAcc"):
            assert scores[name] == pytest.approx(expected[name], abs=1e-9)
        assert scores["IoU"] == pytest.approx(expected["IoU"], abs=1e-9)
