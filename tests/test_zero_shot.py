"""Zero-shot: training without the labels of unseen classes, names that come by vectors alone, scores of seen and unseen."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from maskfirst import cli, compose
from maskfirst.build import Experiment
from maskfirst.build import load as load_model
from maskfirst.contracts import Dataset
from maskfirst.data.coco_stuff import COCOStuff164K
from maskfirst.data.coding import DataError
from maskfirst.data.images import read_label_map
from maskfirst.data.shapes import Shapes, write_demo
from maskfirst.data.vocabulary import VocabularyError, from_names, load
from maskfirst.data.zero_shot import SeenNames, Withheld, WithoutUnseen, WithUnseen, names_of
from maskfirst.draw import write_label_map
from maskfirst.errors import UserError
from maskfirst.evaluate import evaluate, measure_of
from maskfirst.formats import FormatError
from maskfirst.formats.instances import Instances
from maskfirst.metrics.seen import Split, harmonic
from maskfirst.recipe import Recipe, names
from maskfirst.recipe import load as load_recipe
from maskfirst.score import score
from maskfirst.train import train
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary, collate

UNSEEN = ["star", "water"]
WORDS = load("shapes")
STAR, WATER = (WORDS.names.index(name) for name in UNSEEN)
VECTORS = {name: [1.0, float(index), float(index**2)] for index, name in enumerate(WORDS.names)}


def scenes(length: int = 12) -> Shapes:
    return Shapes(length=length, size=(48, 64))


def pixels(data: Dataset) -> dict[str, int]:
    """Of every class, in all pictures."""
    found = dict.fromkeys((*data.vocabulary.names, "void"), 0)
    for sample in (data[index] for index in range(len(data))):
        labels = sample.truth.label_map()
        for index, count in zip(*labels.unique(return_counts=True), strict=True):
            found["void" if index == VOID else data.vocabulary.names[index]] += int(count)
    return found


def test_withheld_labels_are_no_class_and_all_else_stays() -> None:
    whole, left = scenes(), Withheld(scenes(), UNSEEN)
    before, after = pixels(whole), pixels(left)
    assert before["star"]
    assert before["water"]
    assert after["void"] == before["void"] + before["star"] + before["water"]
    assert {name: count for name, count in after.items() if name not in (*UNSEEN, "void")} == {
        name: count for name, count in before.items() if name not in (*UNSEEN, "void")
    }
    assert after["star"] == after["water"] == 0
    assert list(left.keys()) == list(whole.keys())
    assert left.vocabulary is WORDS
    assert all(left.shown(index) == whole.shown(index) - {STAR, WATER} for index in range(len(whole)))


def test_pictures_with_and_without_unseen_classes_are_all_pictures() -> None:
    whole = scenes()
    seen, unseen = WithoutUnseen(scenes(), ["star"]), WithUnseen(scenes(), ["star"])
    assert 0 < len(seen) < len(whole)
    assert sorted([*seen.keys(), *unseen.keys()]) == sorted(whole.keys())
    assert not pixels(seen)["star"]
    assert pixels(unseen)["star"] == pixels(whole)["star"]
    assert pixels(unseen)["sky"]
    assert all(STAR in unseen.shown(index) and STAR in unseen[index].classes for index in range(len(unseen)))


def test_seen_names_are_a_vocabulary_of_their_own() -> None:
    whole, left = scenes(), SeenNames(Withheld(scenes(), UNSEEN), UNSEEN)
    assert left.vocabulary.names == tuple(name for name in WORDS.names if name not in UNSEEN)
    assert {left.vocabulary.names[i] for i in left.vocabulary.things} == {"circle", "square", "triangle"}
    before, after = pixels(whole), pixels(left)
    assert all(after[name] == before[name] for name in left.vocabulary.names)
    for index in range(len(whole)):
        assert {left.vocabulary.names[c] for c in left.shown(index)} == {
            WORDS.names[c] for c in whole.shown(index) - {STAR, WATER}
        }
    with pytest.raises(DataError, match=r"has labels of 'water', which should be unseen.*`withheld`.*`without_unseen`"):
        pixels(SeenNames(scenes(), ["water"]))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["stars"], r"no class 'stars'\. Did you mean 'star'\?"),
        ([], "no names"),
        (list(WORDS.names), "all 7 classes, so that nothing is left to learn from"),
        ("star", r"'star' is no list of names .* say \[star\].* Bundled: coco_15, coco_17,"),
        ("coco_71", r"Did you mean 'coco_17'\?"),
    ],
)
def test_splits_that_cannot_be_are_told(said: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Withheld(scenes(), said)


def test_a_split_without_pictures_is_told() -> None:
    with pytest.raises(DataError, match=r"unseen \('sky'\): this leaves none of 12 pictures"):
        len(WithoutUnseen(scenes(), ["sky"]))


def test_unseen_names_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "unseen.txt").write_text("star\n\nwater\n")
    assert names_of(str(tmp_path / "unseen.txt")) == ("star", "water")
    assert len(names_of("coco_17")) == 17


def tree(**more: object) -> dict[str, object]:
    data = {"kind": "shapes", "length": 4, "size": [48, 64]}
    return {
        "task": "panoptic",
        "size": [48, 64],
        "vocabulary": "shapes",
        "unseen": UNSEEN,
        "proposer": {
            "kind": "mask2former",
            "backbone": {"kind": "simple_pyramid", "width": 8, "backbone": {"kind": "stem_vit", "channels": [4, 8, 16],
                         "residuals": [1, 1], "width": 16, "depth": 1, "heads": 2, "channels_out": 8}},
            "queries": 8, "width": 16, "mask_width": 16, "heads": 2, "encoder_layers": 1, "encoder_feedforward": 16,
            "decoder_layers": 2, "decoder_feedforward": 16,
        },
        "namer": {"kind": "embeddings", "vectors": VECTORS, "length": 3},
        "criterion": {"kind": "set", "points": 64},
        "data": {"train": {"kind": "withheld", "data": data}, "val": data},
        "train": {"steps": 2, "batch": 2, "workers": 0, "pictures": 0, "optimizer": {"lr": 1e-3}},
        **more,
    }  # fmt: skip


def experiment(**more: object) -> Experiment:
    return Experiment(Recipe(tree(**more), "own.yaml"))  # pyright: ignore[reportArgumentType]


def test_training_scores_seen_and_unseen_apart_and_the_weights_need_no_vectors(tmp_path: Path) -> None:
    found = train(experiment(), tmp_path / "run", progress=False, loggers=())
    assert {"seen", "unseen", "harmonic"} <= found.scores.keys()
    assert found.scores["seen"]["n"] > 0
    model = load_model(tmp_path / "run")
    table = model.state_dict()["namer.vectors.table"]
    torch.testing.assert_close(table, torch.tensor([*VECTORS.values()]))


def test_labels_of_unseen_classes_in_training_are_refused(tmp_path: Path) -> None:
    shapes = {"kind": "shapes", "length": 12, "size": [48, 64]}
    with pytest.raises(DataError, match=r"train-000\d\d: has labels of .*'water'.* should be unseen in training"):
        train(experiment(data={"train": shapes, "val": shapes}), tmp_path / "run", progress=False, loggers=())


def test_unseen_names_that_are_none_are_told_by_check() -> None:
    with pytest.raises(UserError, match=r"own\.yaml: unseen: no class 'wter'\. Did you mean 'water'"):
        experiment(unseen=["star", "wter"]).check()


def test_unseen_names_are_no_answer_as_long_as_embeddings_learn() -> None:
    model = experiment().segmenter()
    sample = Withheld(scenes(2), UNSEEN)[0]
    batch = collate([sample], "panoptic")
    _, names = model.train()(batch)
    assert names.logits[..., [STAR, WATER]].isneginf().all()
    with torch.no_grad():
        _, names = model.eval()(batch)
    assert names.logits.isfinite().all()
    assert names.joint[..., STAR].max() > 0


def test_a_name_is_as_likely_as_its_vector_is_near() -> None:
    """Two names of one vector get the same logits, seen or not, and one of the opposite vector the opposite."""
    vectors = {**VECTORS, "star": VECTORS["circle"], "water": [-x for x in VECTORS["circle"]]}
    model = experiment(namer={"kind": "embeddings", "vectors": vectors, "length": 3}).segmenter().eval()
    with torch.no_grad():
        _, names = model(collate([scenes(1)[0]], "panoptic"))
    circle = WORDS.names.index("circle")
    torch.testing.assert_close(names.logits[..., STAR], names.logits[..., circle])
    torch.testing.assert_close(names.logits[..., WATER], -names.logits[..., circle])


def test_calibration_raises_unseen_names_when_it_is_asked_and_never_in_training() -> None:
    namer = {"kind": "embeddings", "vectors": VECTORS, "length": 3}
    plain = experiment(namer=namer).segmenter()
    raised = experiment(namer={**namer, "calibration": 1.5}).segmenter()
    raised.load_state_dict(plain.state_dict())
    batch = collate([Withheld(scenes(2), UNSEEN)[0]], "panoptic")
    with torch.no_grad():
        difference = raised.eval()(batch)[1].logits - plain.eval()(batch)[1].logits
    wanted = torch.tensor([1.5 * (name in UNSEEN) for name in WORDS.names] + [0.0])
    torch.testing.assert_close(difference, wanted.expand_as(difference), atol=1e-5, rtol=0)
    losses = raised.train().losses(batch)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in raised.parameters())
    assert raised.namer(raised.proposer(batch), batch).logits[..., STAR].isneginf().all()


@pytest.mark.parametrize(
    ("namer", "message"),
    [
        ({"vectors": {"sky": [1.0, 2.0, 3.0]}}, r"no vector for 'field', 'water'"),
        ({"vectors": {name: [1.0] * (1 + (name == "star")) for name in WORDS.names}}, r"'star' has 2 numbers"),
        ({"vectors": VECTORS, "length": 4}, r"length: 4, and the vectors of vectors have 3 numbers"),
        ({"vectors": "gone.npy"}, r"gone\.npy: cannot be read"),
    ],
)
def test_vectors_that_do_not_fit_are_told(namer: dict[str, object], message: str) -> None:
    with pytest.raises((FormatError, UserError), match=message):
        experiment(namer={"kind": "embeddings", "length": 3, **namer}).segmenter()


def test_embeddings_without_vectors_do_not_train() -> None:
    model = experiment(namer={"kind": "embeddings", "length": 3}).segmenter().train()
    with pytest.raises(UserError, match="has no class vectors"):
        model.losses(collate([scenes(1)[0]], "panoptic"))


# Scores.


THREE = Vocabulary(("a", "b", "c", "d"), frozenset({0, 1, 2}), ((0, 0, 0),) * 4, (0, 1, 2, 3))


def label_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """a: IoU 1/2; b: 1/3; c, unseen: 1/4; d: nowhere."""
    truth = torch.tensor([[0, 0, 0, 1, 1, 2, 2, VOID]])
    guess = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0]])
    return truth, guess


def test_iou_of_seen_and_unseen() -> None:
    metric = measure_of("semantic", THREE, split=Split(frozenset({"c"}))).metric(THREE)
    metric.update(*label_maps())
    told = metric.scores()
    assert told.content["seen"] == pytest.approx({"IoU": (1 / 2 + 1 / 3) / 2, "Acc": (2 / 3 + 1 / 2) / 2, "n": 2})
    assert told.content["unseen"] == pytest.approx({"IoU": 1 / 3, "Acc": 1 / 2, "n": 1})
    assert told.means["mIoU_harmonic"] == pytest.approx(2 * (5 / 12) * (1 / 3) / (5 / 12 + 1 / 3))
    assert [name for name, _ in told.below] == ["mean", "seen", "unseen", "harmonic"]
    assert told.value == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)


def test_iou_as_published_has_no_mean_where_a_class_is_absent() -> None:
    metric = measure_of("semantic", THREE, split=Split(frozenset({"c"}), as_published=True)).metric(THREE)
    metric.update(*label_maps())
    content = metric.scores().content
    assert math.isnan(content["seen"]["IoU"])
    assert content["unseen"]["IoU"] == pytest.approx(1 / 3)
    assert math.isnan(content["harmonic"]["IoU"])


def test_iou_of_unseen_classes_alone() -> None:
    metric = measure_of("semantic", THREE, split=Split(frozenset({"c"}), only=True)).metric(THREE)
    metric.update(*label_maps())
    told = metric.scores()
    # One of two pixels found; what lies on other classes is not counted.
    assert told.value == pytest.approx(1 / 2)
    assert [name for name, _ in told.rows] == ["c"]


def segment_map(ids: Sequence[Sequence[int]], classes: Sequence[int]) -> SegmentMap:
    count = len(classes)
    return SegmentMap(
        torch.tensor(ids, dtype=torch.int32), torch.tensor(classes), torch.ones(count), torch.zeros(count).bool()
    )


def test_pq_of_seen_and_unseen_by_default_and_as_published() -> None:
    truth = segment_map([[0, 0, 0, 1, 1, 1]], [0, 2])
    guess = segment_map([[0, 0, 0, 1, 1, 2]], [0, 2, 1])
    found = {}
    for published in (False, True):
        split = Split(frozenset({"c"}), as_published=published)
        metric = measure_of("panoptic", THREE, split=split).metric(THREE)
        metric.update(truth, guess)
        found[published] = metric.scores()
    # a is found, b is false, d is nowhere.
    assert found[False].content["seen"] == pytest.approx({"PQ": 1 / 2, "SQ": 1 / 2, "RQ": 1 / 2, "n": 2})
    assert found[True].content["seen"]["PQ"] == pytest.approx(1 / 3)
    assert found[False].content["unseen"]["PQ"] == found[True].content["unseen"]["PQ"] == pytest.approx(2 / 3)
    assert found[False].means["PQ_unseen"] == pytest.approx(2 / 3)
    alone = measure_of("panoptic", THREE, split=Split(frozenset({"c"}), only=True)).metric(THREE)
    alone.update(truth, guess)
    assert alone.scores().value == pytest.approx(2 / 3)


def test_ap_of_seen_and_unseen_is_called_map_as_published() -> None:
    masks = torch.zeros(2, 4, 8, dtype=torch.bool)
    masks[0, :, :4] = masks[1, :, 4:] = True
    told = Segments(masks, torch.tensor([0, 2]), torch.ones(2), torch.zeros(2).bool())
    # The unseen one is hit at an IoU of 3/4 only.
    rough = masks.clone()
    rough[1, 3] = False
    guess = Segments(rough, told.classes, torch.tensor([0.9, 0.8]), told.crowd)
    split = Split(frozenset({"c"}), as_published=True)
    metric = measure_of("instance", THREE, split=split).metric(THREE)
    metric.update(Instances.of(told), Instances.of(guess))
    scores = metric.scores()
    assert scores.content["seen"]["AP"] == pytest.approx(1)
    assert scores.content["unseen"]["AP"] == pytest.approx(0.6)
    assert scores.means["mAP_unseen"] == scores.content["unseen"]["AP50"] == pytest.approx(1)
    alone = measure_of("instance", THREE, split=Split(frozenset({"c"}), only=True)).metric(THREE)
    alone.update(Instances.of(told), Instances.of(guess))
    assert alone.scores().value == pytest.approx(0.6)


def test_processes_meet() -> None:
    split = Split(frozenset({"c"}))
    both, one, two = (measure_of("semantic", THREE, split=split).metric(THREE) for _ in range(3))
    truth, guess = label_maps()
    for metric in (both, one):
        metric.update(truth, guess)
    for metric in (both, two):
        metric.update(truth, truth)
    one.merge(two)
    assert one.scores().content["harmonic"] == both.scores().content["harmonic"]


def test_harmonic_mean_of_nothing_is_nothing() -> None:
    found = harmonic(np.array([0.0, 1.0, 0.5]), np.array([0.0, 0.0, 0.5]))
    np.testing.assert_allclose(found, [0.0, 0.0, 0.5])


def test_an_unseen_name_that_is_none_is_told() -> None:
    with pytest.raises(DataError, match="no class 'e'"):
        measure_of("semantic", THREE, split=Split(frozenset({"e"})))


def test_the_unseen_alone_are_the_only_answers() -> None:
    model = experiment(task="semantic", namer={"kind": "class_head"}, criterion={"kind": "set"}).segmenter().eval()
    alone = compose.among(model, UNSEEN)
    answer = alone.segment(scenes(1)[0].image, "semantic").label_map()
    assert set(answer.unique().tolist()) <= {STAR, WATER}
    with pytest.raises(UserError, match=r"no class 'stat'\. Did you mean 'star'"):
        compose.among(model, ["stat"])


def test_files_are_scored_by_seen_and_unseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo(tmp_path / "demo", 4, (48, 64))
    truth = tmp_path / "demo" / "annotations" / "val"
    for task, place, guess in (
        ("semantic", truth, truth),
        ("panoptic", tmp_path / "demo/coco/panoptic_val.json", None),
        ("instance", tmp_path / "demo/coco/instances_val.json", None),
    ):
        options = ["--unseen", "star", "--json"]
        words = ["--vocabulary", "shapes", "--truth-values", "ids", "--prediction-values", "ids"] if guess else []
        if task == "instance":
            results = json.loads(place.read_text())
            for row in results["annotations"]:
                row["score"] = 1.0
            (tmp_path / "results.json").write_text(json.dumps(results))
            guess = tmp_path / "results.json"
        cli.app(["score", str(place), str(guess or place), "--task", task, *words, *options], standalone_mode=False)
        told = json.loads(capsys.readouterr().out)
        assert told["seen"]["n"] >= 2
        headline = {"semantic": "IoU", "panoptic": "PQ", "instance": "AP"}[task]
        assert told["seen"][headline] == pytest.approx(1)
    with pytest.raises(UserError, match=r"--only-unseen: which classes are unseen"):
        cli.app(["score", str(truth), str(truth), "--task", "semantic", "--only-unseen"], standalone_mode=False)
    assert score(truth, truth, "semantic", WORDS, truth_values="ids", prediction_values="ids",
                 split=Split(frozenset({"star"}))).found.scores.content["seen"]["IoU"] == 1  # fmt: skip


def test_a_model_is_evaluated_on_the_unseen_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(experiment(), tmp_path / "run", progress=False, loggers=())
    capsys.readouterr()
    cli.app(["evaluate", str(tmp_path / "run"), "--json"], standalone_mode=False)
    whole = json.loads(capsys.readouterr().out)
    cli.app(["evaluate", str(tmp_path / "run"), "--json", "--only-unseen"], standalone_mode=False)
    alone = json.loads(capsys.readouterr().out)
    assert {"seen", "unseen", "harmonic"} <= whole.keys()
    assert "seen" not in alone
    assert whole["images"] == 4 > alone["images"] > 0
    # Nothing else is scored, and its pixels are no class.
    assert alone["per_class"]["circle"]["pq"] is None
    assert 0 < alone["All"]["n"] <= 2


# Recipes.


@pytest.mark.parametrize(
    ("name", "count", "unseen"),
    [
        ("pading-stage0-semantic-coco-stuff", 156, 0),
        ("pading-stage0-instance-coco-48-17", 48, 0),
        ("pading-stage0-instance-coco-65-15", 65, 0),
        ("pading-stage0-panoptic-coco", 133, 14),
        ("camvid-zeroshot-mask2former", 11, 2),
        ("camvid-zeroshot-embeddings", 11, 2),
    ],
)
def test_first_stages_have_the_names_of_their_split(name: str, count: int, unseen: int) -> None:
    assert name in names()
    told = Experiment(load_recipe(name))
    assert (len(told.vocabulary), len(told.unseen)) == (count, unseen)
    assert len(told.segmenter(meta=True).vocabulary) == count


def test_coco_stuff_can_be_had_in_the_order_of_its_split(tmp_path: Path) -> None:
    from PIL import Image

    for place in ("train2017", "stuffthingmaps/train2017"):
        (tmp_path / place).mkdir(parents=True)
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(tmp_path / "train2017" / "1.jpg")
    # person, cow (unseen), giraffe (unseen), wood; no class.
    values = np.array([[0, 20, 24, 181], [255] * 4], np.uint8)
    Image.fromarray(values).save(tmp_path / "stuffthingmaps/train2017/1.png")
    plain = COCOStuff164K(str(tmp_path))
    split = COCOStuff164K(str(tmp_path), vocabulary="coco_stuff_156_15")
    first = SeenNames(Withheld(plain, "coco_stuff_15"), "coco_stuff_15")
    assert first.vocabulary.names == load("coco_stuff_156").names == split.vocabulary.names[:156]
    found = {name: data[0].truth.label_map()[0].tolist() for name, data in (("split", split), ("first", first))}
    assert found == {"split": [0, 156, 157, 155], "first": [0, VOID, VOID, 155]}
    assert [plain.vocabulary.names[i] for i in plain[0].truth.label_map()[0]] == [
        split.vocabulary.names[i] for i in split[0].truth.label_map()[0]
    ]
    with pytest.raises(DataError, match="should have the names of coco_stuff_171"):
        COCOStuff164K(str(tmp_path), vocabulary="coco_stuff_156")


def test_a_vocabulary_may_be_of_another(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("of: camvid\nclasses: [Car, Sky]\n")
    own, whole = load("own.yaml", tmp_path), load("camvid")
    assert (own.names, own.ids, own.things) == (("Car", "Sky"), (8, 0), frozenset({0}))
    assert own.colors == (whole.colors[8], whole.colors[0])
    (tmp_path / "own.yaml").write_text("of: camvid\nclasses: [Cat]\n")
    with pytest.raises(VocabularyError, match=r"camvid has no class 'Cat'\. Did you mean 'Car'"):
        load("own.yaml", tmp_path)
    (tmp_path / "own.yaml").write_text("of: camvit\nclasses: [Car]\n")
    with pytest.raises(VocabularyError, match=r"no bundled vocabulary 'camvit'\. Did you mean 'camvid'"):
        load("own.yaml", tmp_path)


def test_write_label_map_keeps_indices(tmp_path: Path) -> None:
    """What the scoring of files above relies on."""
    labels = torch.tensor([[0, 1]])
    write_label_map(tmp_path / "x.png", labels, from_names(["a", "b"]))
    assert read_label_map(tmp_path / "x.png").tolist() == [[0, 1]]


def test_evaluate_takes_a_split() -> None:
    model = experiment().segmenter().eval()
    found = evaluate(model, scenes(2), "panoptic", split=Split(frozenset(UNSEEN)))
    assert "PQ_harmonic" in found.scores.means
    sample = scenes(1)[0]
    assert sample[torch.zeros(len(sample.classes), dtype=torch.bool)].truth.masks.shape[0] == 0
