"""Panoptic quality against a second, plain count of the definition, against reference values, and in parts."""

import json
import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fixtures_dir import FIXTURES
from maskfirst.data.vocabulary import from_names
from maskfirst.formats.coco_panoptic import CocoPanoptic
from maskfirst.metrics import pq
from maskfirst.metrics.pq import PanopticQuality
from maskfirst.types import VOID, SegmentMap

VOCABULARY = from_names(["sky", "road", "car", "person", "unicorn"], things=["car", "person", "unicorn"])


def segments(
    ids: Sequence[Sequence[int]] | torch.Tensor, classes: Sequence[int], crowd: Sequence[int] = ()
) -> SegmentMap:
    ids = torch.as_tensor(ids, dtype=torch.int32)
    marks = torch.tensor([index in crowd for index in range(len(classes))], dtype=torch.bool)
    return SegmentMap(ids, torch.tensor(classes, dtype=torch.int64), torch.ones(len(classes)), marks)


def scene(seed: int, crowds: bool = True, size: int = 24) -> tuple[SegmentMap, SegmentMap]:
    """Rectangles over void, some of them crowds, some without a pixel left; and an answer of shifted and renamed ones."""
    random = np.random.default_rng(seed)

    def drawn(boxes: np.ndarray, classes: list[int]) -> torch.Tensor:
        ids = np.full((size, size), VOID)
        for index, (top, left, height, width) in enumerate(boxes):
            ids[max(top, 0) : top + height, max(left, 0) : left + width] = index
        return torch.from_numpy(ids)

    count = int(random.integers(0, 9))
    boxes = np.column_stack([random.integers(0, size, (count, 2)), random.integers(3, 14, (count, 2))])
    classes = random.integers(0, 4, count).tolist()
    crowd = np.flatnonzero(random.random(count) < 0.3).tolist() if crowds else []
    kept = random.permutation(count)[: max(0, count - int(random.integers(0, 3)))]
    moved = boxes[kept] + random.integers(-1, 2, (len(kept), 4))
    renamed = [classes[k] if random.random() < 0.85 else int(random.integers(0, 4)) for k in kept]
    return segments(drawn(boxes, classes), classes, crowd), segments(drawn(moved, renamed), renamed)


def plain_count(pairs: list[tuple[SegmentMap, SegmentMap]], K: int) -> dict[str, list[float]]:
    """The paper's definition and panopticapi's rules, segment by segment, over sets of pixels."""
    found = {name: [0.0] * K for name in ("iou", "tp", "fp", "fn")}

    def pixels(side: SegmentMap, index: int) -> set[int]:
        return set(np.flatnonzero(side.ids.numpy().ravel() == index).tolist())

    for truth, guess in pairs:
        void = pixels(truth, VOID)
        true = [pixels(truth, index) for index in range(len(truth))]
        answers = [pixels(guess, index) for index in range(len(guess))]
        found_true, found_guess = set(), set()
        for t, g in np.ndindex(len(true), len(answers)):
            if truth.crowd[t] or truth.classes[t] != guess.classes[g] or not true[t] & answers[g]:
                continue
            iou = len(true[t] & answers[g]) / len((true[t] | answers[g]) - (void & answers[g]))
            if iou > 0.5:
                index = int(truth.classes[t])
                found["iou"][index] += iou
                found["tp"][index] += 1
                found_true.add(t)
                found_guess.add(g)
        for t in range(len(true)):
            if t not in found_true and not truth.crowd[t]:
                found["fn"][int(truth.classes[t])] += 1
        for g in range(len(answers)):
            index = int(guess.classes[g])
            crowds = [t for t in range(len(true)) if truth.crowd[t] and truth.classes[t] == index]
            excused = void | (true[crowds[-1]] if crowds else set())
            if g not in found_guess and answers[g] and len(answers[g] & excused) / len(answers[g]) <= 0.5:
                found["fp"][index] += 1
    return found


@pytest.mark.parametrize("crowds", [False, True])
def test_scores_are_those_of_a_plain_count(crowds):
    pairs = [scene(seed, crowds) for seed in range(150)]
    metric = PanopticQuality(VOCABULARY)
    for pair in pairs:
        metric.update(*pair)
    expected = plain_count(pairs, 5)
    assert min(expected["tp"][:4]) > 20
    assert min(expected["fp"][:4]) > 5
    for column, name in enumerate(("tp", "fp", "fn"), 1):
        assert metric.sums[:, column].tolist() == expected[name]
    per_class = metric.scores().content["per_class"]
    for index, name in enumerate(VOCABULARY.names[:4]):
        iou, tp, fp, fn = (expected[key][index] for key in ("iou", "tp", "fp", "fn"))
        weight = tp + fp / 2 + fn / 2
        assert per_class[name] == pytest.approx({"pq": iou / weight, "sq": iou / tp, "rq": tp / weight}, abs=1e-9)


def score(truth: SegmentMap, guess: SegmentMap) -> dict:
    metric = PanopticQuality(VOCABULARY)
    metric.update(truth, guess)
    return metric.scores().content


def test_half_is_no_match_and_one_pixel_more_is():
    truth = segments([[0, 0, 0, VOID]], [2])
    assert (
        score(segments([[0, 0, 1, 1]], [2, 0]), segments([[0, VOID, VOID, VOID]], [2]))["per_class"]["car"]["pq"] == 0
    )
    found = score(truth, segments([[0, 0, VOID, VOID]], [2]))["per_class"]["car"]
    assert found == pytest.approx({"pq": 2 / 3, "sq": 2 / 3, "rq": 1})


def test_pixels_without_truth_do_not_count_against_a_match():
    # Of six pixels four lie on void: IoU is 2 / 2.
    found = score(segments([[0, 0, VOID, VOID, VOID, VOID]], [2]), segments([[0] * 6], [2]))
    assert found["per_class"]["car"]["pq"] == 1


def test_an_answer_on_void_is_not_false_and_one_on_half_of_it_is():
    truth = segments([[0, 0, VOID, VOID, VOID, VOID]], [0])
    nothing = score(truth, segments([[1, 1, VOID, 0, 0, 0]], [2, 0]))
    assert math.isnan(nothing["per_class"]["car"]["pq"])
    assert nothing["All"]["n"] == 1
    half = score(truth, segments([[VOID, 0, 0, VOID, VOID, VOID]], [2]))
    assert half["per_class"]["car"] == {"pq": 0, "sq": 0, "rq": 0}
    assert half["All"]["n"] == 2


def test_crowds_are_neither_found_nor_missed_and_excuse_their_own_class():
    truth = segments([[0, 0, 0, 0, 1, 1]], [3, 0], crowd=[0])
    missed = score(truth, segments([[VOID] * 4 + [0, 0]], [0]))
    assert missed["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}
    person = score(truth, segments([[1, 1, 1, VOID, 0, 0]], [0, 3]))
    assert math.isnan(person["per_class"]["person"]["pq"])
    car = score(truth, segments([[1, 1, 1, VOID, 0, 0]], [0, 2]))
    assert car["per_class"]["car"] == {"pq": 0, "sq": 0, "rq": 0}


def test_segments_without_a_pixel_are_missed_in_truth_and_nothing_in_an_answer():
    found = score(segments([[0, 0]], [0, 2]), segments([[0, 0]], [0, 3]))
    assert found["per_class"]["car"]["rq"] == 0
    assert math.isnan(found["per_class"]["person"]["rq"])


def test_groups_are_means_over_the_classes_that_occur():
    found = score(segments([[0, 0, 1, 1, 2, 2]], [0, 2, 3]), segments([[0, 0, 1, 1, VOID, VOID]], [0, 2]))
    assert {group: (found[group]["pq"], found[group]["n"]) for group in ("All", "Things", "Stuff")} == {
        "All": (pytest.approx(2 / 3), 3),
        "Things": (0.5, 2),
        "Stuff": (1, 1),
    }
    assert math.isnan(found["per_class"]["unicorn"]["pq"])


def test_nothing_at_all_is_nan_and_no_score():
    metric = PanopticQuality(VOCABULARY)
    assert metric.update(segments([[VOID, VOID]], []), segments([[VOID, VOID]], [])) is None
    assert metric.update(segments(torch.zeros(0, 4), []), segments(torch.zeros(0, 4), [])) is None
    scores = metric.scores()
    assert math.isnan(scores.value)
    assert scores.content["All"]["n"] == 0


def test_a_picture_has_its_own_score():
    metric = PanopticQuality(VOCABULARY)
    truth = segments([[0, 0, 1, 1]], [0, 2])
    assert metric.update(truth, truth) == 1
    assert metric.update(truth, segments([[0, 0, VOID, VOID]], [0])) == 0.5
    assert metric.scores().value == pytest.approx((1 + 2 / 3) / 2)


def test_parts_in_any_order_are_the_whole_to_the_last_bit():
    pairs = [scene(seed) for seed in range(40)]
    whole, parts = PanopticQuality(VOCABULARY), [PanopticQuality(VOCABULARY) for _ in range(3)]
    for index, pair in enumerate(pairs):
        whole.update(*pair)
        parts[index % 3].update(*pair)
    merged = PanopticQuality(VOCABULARY)
    for part in reversed(parts):
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert json.dumps(merged.scores().content) == json.dumps(whole.scores().content)


def test_thousands_of_segments_are_counted_without_a_table_of_all_pairs(monkeypatch):
    ids = torch.arange(40 * 40, dtype=torch.int32).view(40, 40)
    many = segments(ids, [2] * 1600)
    moved = segments(ids.roll(1, 0), [2] * 1600)
    expected = score(many, moved)
    assert len(many) ** 2 > pq.DENSE
    monkeypatch.setattr(pq, "DENSE", 2**30)
    assert json.dumps(score(many, moved)) == json.dumps(expected)
    assert expected["per_class"]["car"]["pq"] == 1


@pytest.mark.parametrize(
    ("truth", "guess", "sentence"),
    [
        (segments([[0, 1]], [2]), segments([[0, 0]], [2]), r"truth holds 1; its 1 segments are 0\.\."),
        (segments([[0, 0]], [2]), segments([[0, -2]], [2]), r"prediction holds -2"),
        (segments([[0, 0]], [2]), segments([[0]], [2]), r"truth is \(1, 2\) px, the prediction \(1, 1\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(truth, guess, sentence):
    with pytest.raises(ValueError, match=sentence):
        PanopticQuality(VOCABULARY).update(truth, guess)


if FIXTURES:

    def test_panoptic_scores_meet_the_reference():
        folder = FIXTURES / "metrics"
        expected = json.loads((folder / "expected.json").read_text())["panoptic"]
        truth = CocoPanoptic(folder / "gt_panoptic.json")
        guess = CocoPanoptic(folder / "pred_panoptic.json", vocabulary=truth.vocabulary)
        metric = PanopticQuality(truth.vocabulary)
        keys = truth.keys()
        assert len(keys) == 24
        for key in keys:
            metric.update(truth.read(key), guess.read(key))
        found = metric.scores().content
        for group in ("All", "Things", "Stuff"):
            assert found[group] == pytest.approx(expected[group], abs=1e-9)
        for name, values in expected["per_class"].items():
            assert found["per_class"][name] == pytest.approx(values, abs=1e-9)
