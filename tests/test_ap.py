"""Average precision against pycocotools on random scenes, against reference values, and in parts against the whole."""

import contextlib
import io
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fixtures_dir import FIXTURES
from maskfirst.data.vocabulary import from_names
from maskfirst.formats.coco_instances import CocoInstances, Results
from maskfirst.formats.instances import Instances
from maskfirst.metrics.ap import AveragePrecision
from maskfirst.types import Segments

VOCABULARY = from_names(["car", "person", "dog", "unicorn"], things=["car", "person", "dog", "unicorn"])
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIZE = (160, 200)

Pair = tuple[Instances, Instances]


def instances(masks: list[np.ndarray], classes: list[int], scores: list[float], crowd: list[bool]) -> Instances:
    opened = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *SIZE, dtype=torch.bool)
    found = Instances.of(
        Segments(opened, torch.tensor(classes, dtype=torch.int64), torch.ones(len(classes)), torch.tensor(crowd) > 0)
    )
    return Instances(found.rles, found.classes, torch.tensor(scores, dtype=torch.float64), found.crowd, SIZE)


def ellipse(random: np.random.Generator, radius: float) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    top, left = random.integers(0, SIZE[0]), random.integers(0, SIZE[1])
    return ((y - top) / radius) ** 2 + ((x - left) / (radius * random.uniform(0.6, 1.6))) ** 2 < 1


def scene(seed: int, answers: int = 3) -> Pair:
    """Overlapping ellipses of all sizes, some crowds; answers moved, renamed, doubled, with scores that tie; or none."""
    random = np.random.default_rng(seed)
    masks, classes, crowd = [], [], []
    for _ in range(int(random.integers(0, 7))):
        masks.append(ellipse(random, float(random.choice([4, 12, 18, 40, 70]))))
        classes.append(int(random.integers(0, 3)))
        crowd.append(bool(random.random() < 0.2))
    guesses, names, scores = [], [], []
    if seed % 10 == 3:
        return instances(masks, classes, [1.0] * len(masks), crowd), instances([], [], [], [])
    for mask, index in zip(masks, classes, strict=True):
        for _ in range(int(random.integers(0, answers))):
            guesses.append(np.roll(mask, random.integers(-3, 4, 2), (0, 1)))
            names.append(index if random.random() < 0.85 else int(random.integers(0, 3)))
            scores.append(round(float(random.random()), 1))
    for _ in range(int(random.integers(0, 3))):
        guesses.append(ellipse(random, 15.0))
        names.append(int(random.integers(0, 4)))
        scores.append(round(float(random.random()), 1))
    return instances(masks, classes, [1.0] * len(masks), crowd), instances(
        guesses, names, scores, [False] * len(guesses)
    )


def reference(pairs: list[Pair]) -> np.ndarray:
    """pycocotools' twelve figures, -1 for none."""
    truth: dict[str, Any] = {
        "info": {},
        "images": [{"id": index, "height": SIZE[0], "width": SIZE[1]} for index in range(len(pairs))],
        "categories": [{"id": index, "name": name} for index, name in enumerate(VOCABULARY.names)],
        "annotations": [],
    }
    results = []
    for index, (one, two) in enumerate(pairs):
        for rle, label, crowd, area in zip(
            one.rles, one.classes.tolist(), one.crowd.tolist(), one.areas.tolist(), strict=True
        ):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": index,
                    "category_id": label,
                    "segmentation": rle,
                    "iscrowd": int(crowd),
                    "area": area,
                }
            )
        for rle, label, score in zip(two.rles, two.classes.tolist(), two.scores.tolist(), strict=True):
            results.append({"image_id": index, "category_id": label, "segmentation": rle, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def counted(pairs: list[Pair]) -> AveragePrecision:
    metric = AveragePrecision(VOCABULARY)
    for index, pair in enumerate(pairs):
        metric.update(*pair, index)
    return metric


def figures(metric: AveragePrecision) -> list[float]:
    means = metric.scores().means
    return [-1 if math.isnan(means[name]) else means[name] for name in FIGURES]


@pytest.mark.parametrize("first", [0, 60, 120])
def test_figures_are_pycocotools_on_random_scenes(first):
    pairs = [scene(seed) for seed in range(first, first + 60)]
    assert any(not len(truth) for truth, _ in pairs)
    assert any(not len(guess) and len(truth) for truth, guess in pairs)
    expected = reference(pairs)
    assert (expected > 0.05).all()
    assert figures(counted(pairs)) == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_class_has_pycocotools_precision_of_its_own():
    pairs = [scene(seed) for seed in range(40)]
    per_class = counted(pairs).scores().content["per_class"]

    def only(instances: Instances, index: int) -> Instances:
        kept = (instances.classes == index).nonzero().flatten()
        return Instances(
            [instances.rles[place] for place in kept.tolist()],
            instances.classes[kept],
            instances.scores[kept],
            instances.crowd[kept],
            instances.size,
        )

    for index, name in enumerate(VOCABULARY.names[:3]):
        expected = reference([(only(truth, index), only(guess, index)) for truth, guess in pairs])[:6]
        assert list(per_class[name].values()) == pytest.approx(expected.tolist(), abs=1e-12)
    assert all(math.isnan(value) for value in per_class["unicorn"].values())


def test_more_than_a_hundred_answers_of_a_class_are_cut_as_pycocotools_cuts_them():
    random = np.random.default_rng(3)
    truth, _ = scene(5)
    masks = [np.roll(ellipse(random, 18.0), 1, 0) for _ in range(130)]
    scores = np.round(random.random(130), 2).tolist()
    best = masks[int(np.argmin(scores))]
    pairs = [
        (instances([best], [0], [1.0], [False]), instances(masks, [0] * 130, scores, [False] * 130)),
        (truth, instances(masks[:12], [1] * 12, scores[:12], [False] * 12)),
    ]
    assert figures(counted(pairs)) == pytest.approx(reference(pairs).tolist(), abs=1e-12)
    assert len(counted(pairs).matches[0].scores) == 100


def test_told_areas_sort_truth_into_sizes():
    random = np.random.default_rng(0)
    mask = ellipse(random, 12.0)
    truth = instances([mask], [0], [1.0], [False])
    told = Instances(
        truth.rles, truth.classes, truth.scores, truth.crowd, SIZE, torch.tensor([5000.0], dtype=torch.float64)
    )
    pairs = [(told, truth)]
    assert figures(counted(pairs)) == pytest.approx(reference(pairs).tolist(), abs=1e-12)
    assert counted(pairs).scores().means["APm"] == pytest.approx(1)
    assert counted([(truth, truth)]).scores().means["APs"] == pytest.approx(1)


def test_the_truth_itself_scores_100_and_nothing_0():
    pairs = [scene(seed) for seed in range(8)]
    plain = [Instances(t.rles, t.classes, t.scores, torch.zeros_like(t.crowd), SIZE) for t, _ in pairs]
    assert counted([(truth, truth) for truth in plain]).scores().value == pytest.approx(1)
    none = instances([], [], [], [])
    assert counted([(truth, none) for truth in plain]).scores().value == 0


def test_without_truth_there_is_no_score():
    metric = AveragePrecision(VOCABULARY)
    none, answer = instances([], [], [], []), instances([ellipse(np.random.default_rng(0), 9.0)], [0], [0.5], [False])
    assert metric.update(none, none, 0) is None
    assert metric.update(none, answer, 1) is None
    assert all(math.isnan(value) for value in metric.scores().means.values())


def test_a_picture_has_the_precision_that_it_would_have_alone():
    for seed in range(12):
        pair = scene(seed)
        metric = AveragePrecision(VOCABULARY)
        own = metric.update(*pair, 7)
        alone = metric.scores().value
        assert (own is None) == math.isnan(alone)
        assert own is None or own == pytest.approx(alone)


def test_parts_in_any_order_are_the_whole_to_the_last_bit():
    pairs = [scene(seed) for seed in range(30)]
    parts = [AveragePrecision(VOCABULARY) for _ in range(3)]
    for index, pair in enumerate(pairs):
        parts[index % 3].update(*pair, index)
    merged = AveragePrecision(VOCABULARY)
    for part in reversed(parts):
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert json.dumps(merged.scores().content) == json.dumps(counted(pairs).scores().content)


def test_what_is_kept_of_a_picture_is_small():
    pair = scene(4, answers=12)
    assert len(pair[1]) > 20
    assert len(pickle.dumps(counted([pair]))) < 2000 + 100 * len(pair[1])


def test_a_picture_counts_once():
    metric = counted([scene(1)])
    with pytest.raises(ValueError, match="picture 0 was added before"):
        metric.update(*scene(2), 0)
    with pytest.raises(ValueError, match="picture 0 is in both"):
        metric.merge(counted([scene(3)]))
    none = Instances([], torch.zeros(0).long(), torch.zeros(0), torch.zeros(0) > 0, (3, 4))
    with pytest.raises(ValueError, match=r"truth is \(160, 200\) px, the prediction \(3, 4\)"):
        metric.update(scene(1)[0], none, 1)


if FIXTURES:

    def test_instance_scores_meet_the_reference():
        folder = FIXTURES / "metrics"
        expected = json.loads((folder / "expected.json").read_text())["instance"]
        truth = CocoInstances(folder / "gt_instances.json")
        results = Results(folder / "pred_instances.json", truth)
        metric = AveragePrecision(truth.vocabulary)
        assert len(truth.images) == 24
        for index, key in enumerate(truth.images):
            metric.update(truth.read(key), results[key], index)
        assert metric.scores().means == pytest.approx(expected, abs=1e-6)
