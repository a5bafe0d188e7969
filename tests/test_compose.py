"""Composed models: names by points for the masks of others, the matrix of both, and points that are named alone."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from maskfirst import build, compose, weights
from maskfirst.build import Experiment
from maskfirst.contracts import NoNamesError
from maskfirst.data.images import read_image
from maskfirst.errors import UserError
from maskfirst.evaluate import evaluate
from maskfirst.namers.blend import Blend
from maskfirst.namers.given import Given
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from test_cli import Run, demo, run, trained

__all__ = ["demo", "run", "trained"]

POINTS = {
    "size": [32, 32],
    "vocabulary": "shapes",
    "proposer": {"kind": "oracle"},
    "namer": {
        "kind": "vit_p",
        "trunk": {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 16, "depth": 1, "heads": 2},
        "point": "center",
    },
    "phase": {"kind": "points", "count": 8},
}


@pytest.fixture(scope="module")
def pointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a ViT-P of shapes, as it is initialised, its head away from 0."""
    torch.manual_seed(0)
    recipe = Recipe(POINTS, "pointed.yaml")
    model = Experiment(recipe).segmenter()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    path = tmp_path_factory.mktemp("pointed") / "pointed.safetensors"
    weights.save(path, model, recipe.tree, model.vocabulary)
    return path


@pytest.fixture
def model(pointed: Path) -> Segmenter:
    return build.load(pointed)


IMAGE = (torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def test_points_are_named_as_the_namer_names_them(model: Segmenter) -> None:
    points = torch.tensor([[0.0, 0.0], [39.0, 55.0], [10.5, 20.25]])
    namer = compose.required_points(model)
    told = 2 * points / torch.tensor([40, 56]) - 1
    expected = namer.classify(namer.stretch(IMAGE[None].float()), told[None])[0].softmax(-1)
    chances = model.name_points(IMAGE, points)
    torch.testing.assert_close(chances, expected.detach())
    torch.testing.assert_close(chances.sum(1), torch.ones(3))
    assert (chances[0] - chances[1]).abs().max() > 1e-3


def test_no_points_have_no_names(model: Segmenter) -> None:
    assert model.name_points(IMAGE, torch.zeros(0, 2)).shape == (0, len(model.vocabulary))


@pytest.mark.parametrize("point", [[-0.6, 3], [40, 3], [3, 55.6], [float("nan"), 3], [3, float("inf")]])
def test_points_that_are_none_of_the_picture_are_refused(model: Segmenter, point: list[float]) -> None:
    with pytest.raises(UserError, match=r"point y \S+, x \S+ is none of the picture, which has 40 rows and 56 columns"):
        model.name_points(IMAGE, torch.tensor([[1.0, 1.0], point]))


def test_only_a_namer_of_points_names_points_and_masks_of_others(trained: Path, model: Segmenter) -> None:
    other = build.load(trained)
    with pytest.raises(UserError, match="namer class_head names masks, not points"):
        other.name_points(IMAGE, torch.zeros(1, 2))
    with pytest.raises(UserError, match="namer class_head names its own proposer's masks alone"):
        compose.with_names(model, other)


def test_weight_zero_leaves_the_names_as_they_were(trained: Path, model: Segmenter) -> None:
    own = build.load(trained)
    blended = [compose.with_names(own, model, weight).scores(IMAGE) for weight in (0.0, 0.4)]
    before = own.scores(IMAGE)
    (same, other), plain = (rows.fetch(0, rows.height) for rows in blended), before.fetch(0, before.height)
    assert torch.equal(same, plain)
    assert not torch.allclose(other, plain)
    # Blended once more, the first names are still the model's own.
    again = compose.with_names(compose.with_names(own, model, 0.9), model, 0.4).scores(IMAGE)
    assert torch.equal(again.fetch(0, again.height), other)


def test_masks_of_others_have_the_names_of_points_or_a_blend(model: Segmenter) -> None:
    truth = OracleProposer(model.vocabulary)
    alone = compose.with_masks(model, truth)
    assert alone.namer is model.namer
    blended = compose.with_masks(model, truth, 0.25)
    assert isinstance(blended.namer, Blend)
    assert isinstance(blended.namer.first, Given)
    assert (blended.namer.second, blended.namer.weight) == (model.namer, 0.25)


def test_the_matrix_has_what_each_pairing_scores_alone(trained: Path, model: Segmenter) -> None:
    own = build.load(trained)
    dataset = Experiment(weights.read(trained).recipe).dataset("val")
    both = compose.with_names(own, model, 0.3)

    def score(which: Segmenter) -> float:
        return evaluate(which, dataset).scores.value

    found = compose.matrix(both, lambda which: evaluate(which, dataset).scores)
    assert found.headline == "mIoU"
    assert found.cells == {
        "atm": {
            "own": score(own),
            "0.3 vit_p": score(both),
            "vit_p": score(compose.with_names(own, model, 1.0)),
            "oracle": found.cells["atm"]["oracle"],
        },
        "oracle": {
            "own": None,
            "0.3 vit_p": None,
            "vit_p": score(compose.with_masks(model, OracleProposer(model.vocabulary))),
            "oracle": 1.0,
        },
    }
    with pytest.raises(NoNamesError):
        Segmenter(OracleProposer(own.vocabulary), own.namer, None, own.vocabulary, own.inference).segment(
            IMAGE, truth=dataset[0].truth
        )


def test_evaluate_prints_the_matrix(run: Run, trained: Path, pointed: Path) -> None:
    plain = json.loads(run("evaluate", trained, "--json", "--matrix").out)
    assert [*plain["cells"]["atm"]] == ["own", "oracle"]
    ended = run("evaluate", trained, "--matrix", "--namer", pointed, "--blend", "0.5", "--json", "--out", "out")
    told = json.loads(ended.out)
    assert json.loads(Path("out/matrix.json").read_text()) == told
    assert [*told["cells"]["atm"]] == ["own", "0.5 vit_p", "vit_p", "oracle"]
    assert told["cells"]["oracle"]["oracle"] == 1.0
    blended = json.loads(run("evaluate", trained, "--json", "--namer", pointed, "--blend", "0.5").out)
    assert blended["mIoU"] == told["cells"]["atm"]["0.5 vit_p"]
    table = run("evaluate", trained, "--matrix", "--namer", pointed)
    assert "0.4 vit_p" in table.out
    assert "–" in table.out


def test_the_matrix_names_what_cannot_be_read_once(run: Run, trained: Path, demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    broken = sorted((copy / "images/val").iterdir())[0]
    broken.write_bytes(b"no picture")
    ended = run("evaluate", trained, "-s", f"data.val={{kind: folder, root: {copy}, split: val}}", "--matrix")
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert broken.name in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--matrix", "--namer", "oracle"), "--matrix has the oracles already"),
        (("--blend", "0.3"), "namer class_head names its own proposer's masks alone"),
        (("--namer", "camvid-small"), "camvid-small: .*"),
    ],
)
def test_options_that_cannot_be(run: Run, trained: Path, options: tuple[str, ...], message: str) -> None:
    ended = run("evaluate", trained, *options)
    assert ended.code == 2
    assert not ended.out
    assert len(ended.err.splitlines()) == 1
    assert re.search(message, ended.err)


def test_predict_blends_and_says_what_a_model_without_masks_needs(
    run: Run, trained: Path, pointed: Path, demo: Path
) -> None:
    assert run("predict", trained, demo / "images/val", "--out", "out", "--namer", pointed).code == 0
    ended = run("predict", pointed, demo / "images/val", "--out", "out")
    assert ended.code == 2
    assert "this model is told the masks, and finds none" in ended.err


def table(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_predict_names_points(run: Run, pointed: Path, demo: Path, tmp_path: Path) -> None:
    first, second = sorted((demo / "images/val").iterdir())[0], sorted((demo / "images/train").iterdir())[0]
    points = table(
        tmp_path / "points.csv",
        ["image,y,x", f"val/{first.name},3,4", f"train/{second.stem},10.5,2", f"val/{first.name},20,30"],
    )
    ended = run("predict", pointed, demo / "images", "--points", points, "--out", "out")
    assert ended.code == 0
    assert "3 points in 2 pictures named" in ended.out
    with open("out/points.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["image"] for row in found] == [f"val/{first.name}", f"train/{second.name}", f"val/{first.name}"]
    model = build.load(pointed)
    pixels = read_image(first)
    chances = model.name_points(pixels, torch.tensor([[3.0, 4.0], [20.0, 30.0]]))
    for row, expected in zip(found[::2], chances, strict=True):
        assert row["class"] == model.vocabulary.names[int(expected.argmax())]
        assert float(row["score"]) == pytest.approx(float(expected.max()), abs=1e-5)
    told = json.loads(Path("out/summary.json").read_text())
    assert sum(image["points"] for image in told["images"]) == 3
    assert read_image(f"out/overlays/val/{first.stem}.jpg").shape == pixels.shape


def test_a_table_without_points_is_an_empty_answer(run: Run, pointed: Path, demo: Path, tmp_path: Path) -> None:
    points = table(tmp_path / "points.csv", ["image,y,x"])
    assert run("predict", pointed, demo / "images", "--points", points, "--out", "out").code == 0
    assert Path("out/points.csv").read_text() == "image,y,x,class,score\n"


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (["image,y", "a,1"], 2, r"points\.csv: line 1: no column 'x'"),
        (["image,y,x", "IMAGE,nan,1"], 2, r"points\.csv: line 2: y and x should be numbers"),
        (["image,y,x", "IMAGE,1,2", "image-of-nothing,1,1"], 2, r"line 3: image 'image-of-nothing' is none of the"),
        (["image,y,x", "IMAGE,1,2", "IMAGE,5000,1"], 1, r"line 3: y 5000, x 1 is none of the picture, which has"),
        (["image,y,x", "../IMAGE,1,2"], 2, r"should be a path in the folder"),
    ],
)
def test_tables_that_are_wrong(
    run: Run, pointed: Path, demo: Path, tmp_path: Path, lines: list[str], code: int, message: str
) -> None:
    name = sorted((demo / "images/val").iterdir())[0].name
    points = table(tmp_path / "points.csv", [line.replace("IMAGE", name) for line in lines])
    ended = run("predict", pointed, demo / "images/val", "--points", points, "--out", "out")
    assert ended.code == code
    assert len(ended.err.splitlines()) == 1
    assert re.search(message, ended.err)


def others(demo: Path) -> Path:
    """Masks as of another tool: COCO's instance file of the validation pictures."""
    return demo / "coco/instances_val.json"


def test_predict_names_the_masks_of_a_file(run: Run, pointed: Path, demo: Path) -> None:
    before = json.loads(others(demo).read_text())
    ended = run("predict", pointed, demo / "images/val", "--masks", others(demo), "--task", "instance", "--out", "out")
    assert ended.code == 0
    after = json.loads(Path("out/instances.json").read_text())
    # All of them are shown, also those whose names are not sure.
    summary = json.loads(Path("out/summary.json").read_text())
    assert sum(len(each["segments"]) for each in summary["images"]) == len(after["annotations"])
    masks = [{json.dumps(each["segmentation"]) for each in told["annotations"]} for told in (before, after)]
    assert len(masks[0]) > 3
    assert masks[0] == masks[1]
    model = build.load(pointed)
    things = [
        name for name, index in zip(model.vocabulary.names, range(99), strict=False) if index in model.vocabulary.things
    ]
    names = {each["id"]: each["name"] for each in after["categories"]}
    assert {names[each["category_id"]] for each in after["annotations"]} <= set(things)
    # Blended at 0, they are called what the file calls them.
    run(
        "predict",
        pointed,
        demo / "images/val",
        "--masks",
        others(demo),
        "--blend",
        "0",
        "--task",
        "instance",
        "--out",
        "own",
    )
    own = json.loads(Path("own/instances.json").read_text())
    assert sorted((each["category_id"], json.dumps(each["segmentation"])) for each in own["annotations"]) == sorted(
        (each["category_id"], json.dumps(each["segmentation"])) for each in before["annotations"]
    )


def test_files_of_predictions_are_scored(run: Run, pointed: Path, demo: Path) -> None:
    run("predict", pointed, demo / "images/val", "--masks", others(demo), "--task", "instance", "--out", "out")
    ended = run("score", others(demo), "out/instances.json", "--task", "instance", "--json")
    assert ended.code == 0
    assert 0 <= json.loads(ended.out)["AP"] <= 1


def test_evaluate_takes_the_masks_of_a_file(run: Run, trained: Path, pointed: Path, demo: Path) -> None:
    data = f"data.val={{kind: folder, root: {demo}, split: val}}"
    panoptic = demo / "coco/panoptic_val.json"
    own = json.loads(
        run("evaluate", pointed, "-s", data, "--masks", panoptic, "--blend", "0", "--task", "semantic", "--json").out
    )
    assert own["mIoU"] == 1.0
    named = json.loads(run("evaluate", pointed, "-s", data, "--masks", panoptic, "--task", "semantic", "--json").out)
    told = json.loads(
        run(
            "evaluate", trained, "-s", data, "--masks", panoptic, "--namer", pointed, "--blend", "0.4", "--matrix",
            "--task", "semantic", "--json",
        ).out
    )  # fmt: skip
    assert [*told["cells"]] == ["atm", "saved", "oracle"]
    assert told["cells"]["saved"]["own"] == 1.0
    assert told["cells"]["saved"]["oracle"] == 1.0
    assert named["mIoU"] < 1.0


def test_a_picture_without_masks_is_named_and_the_rest_goes_on(run: Run, pointed: Path, demo: Path) -> None:
    ended = run("predict", pointed, demo / "images", "--masks", others(demo), "--out", "out")
    assert ended.code == 1
    lost, there = (len(list((demo / f"images/{split}").iterdir())) for split in ("train", "val"))
    lines = ended.err.splitlines()
    assert len(lines) == lost
    assert "instances_val.json: no masks of picture 'train/" in lines[0]
    assert len(list(Path("out/labels").rglob("*.png"))) == there


@pytest.mark.parametrize(
    ("weights", "masks", "options", "message"),
    [
        ("pointed", "nothing.json", (), "nothing.json: no such file or folder of masks"),
        ("trained", "coco/instances_val.json", (), "namer class_head names its own proposer's masks alone"),
        (
            "pointed",
            "foreign.json",
            ("--blend", "0.4"),
            "classes that the vocabulary does not have: 'sqare' Did you mean",
        ),
    ],
)
def test_masks_that_cannot_be_named(
    run: Run, trained: Path, pointed: Path, demo: Path, weights: str, masks: str, options: tuple[str, ...], message: str
) -> None:
    told = json.loads(others(demo).read_text())
    for each in told["categories"]:
        each["name"] = each["name"].replace("square", "sqare")
    (demo / "foreign.json").write_text(json.dumps(told))
    model = {"trained": trained, "pointed": pointed}[weights]
    ended = run("predict", model, demo / "images/val", "--masks", demo / masks, "--out", "out", *options)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err


def test_true_names_leave_to_the_model_which_masks_are_objects(trained: Path) -> None:
    own, dataset = build.load(trained), Experiment(weights.read(trained).recipe).dataset("val")
    seen = dataset[0]
    named: list[torch.Tensor] = []
    for model in (own, compose.with_true_names(own)):
        hook = model.namer.register_forward_hook(lambda module, given, made: named.append(made.void))
        model.segment(seen.image, truth=seen.truth)
        hook.remove()
    torch.testing.assert_close(named[0], named[1])
    assert compose.with_true_names(own).uses_truth
