"""The verbs from outside: what they print and where, their exit codes, and the one line of every mistake."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskfirst import build, cli, recipe, weights

SMALL = (
    "-s", "size=[32,32]", "-s", "train.steps=2", "-s", "train.batch=2", "-s", "train.workers=0",
    "-s", "data={train: {kind: shapes, length: 4, size: [32, 32]}, val: {kind: shapes, split: val, length: 3, size: [32, 32]}}",
)  # fmt: skip


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def run_main(arguments: list[str], read: Callable[[], tuple[str, str]]) -> Outcome:
    before, sys.argv = sys.argv, ["maskfirst", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.argv = before
    return Outcome(code, *read())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder; says its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_main([str(each) for each in arguments], capsys.readouterr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two steps, trained through the command line."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    ended = run_main(["train", "shapes", "--out", str(folder), *SMALL], lambda: ("", ""))
    assert ended.code == 0
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `maskfirst shapes` writes."""
    folder = tmp_path_factory.mktemp("shapes") / "demo"
    assert run_main(["shapes", "--out", str(folder), "--count", "4"], lambda: ("", "")).code == 0
    return folder


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from maskfirst import cli\n"
        "sys.argv = ['maskfirst', '--help']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'torch', 'timm', 'lightning_fabric', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for verb in ("train", "evaluate", "score", "predict", "show", "check", "convert", "recipes", "shapes"):
        assert verb in ended.stdout
    # The processor's time, as the machine may be busy with other tests.
    assert after.ru_utime - before.ru_utime < 0.5


def test_every_verb_has_help(run: Run) -> None:
    for verb in ("train", "evaluate", "score", "predict", "show", "check", "convert", "recipes", "shapes", "version"):
        assert run(verb, "--help").code == 0


def test_version(run: Run) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("version").out)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("trian", "shapes"), "'train'"), (("train", "shapes", "--otu", "x"), "--out"), (("evaluate",), "(?i)weights")],
)
def test_words_that_do_not_exist_are_met_with_those_that_do(run: Run, arguments: tuple[str, ...], hint: str) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert not ended.out
    assert re.search(hint, ended.err)


def test_training_leaves_weights_scores_and_pictures(trained: Path) -> None:
    for name in ("best.safetensors", "last.safetensors", "recipe.yaml", "scores.json", "log.jsonl"):
        assert (trained / name).is_file()
    assert list((trained / "pictures").iterdir())


def test_training_prints_json_alone(run: Run) -> None:
    ended = run("train", "shapes", "--json", *SMALL)
    told = json.loads(ended.out)
    assert told["out"] == "runs/shapes"
    assert told["steps"] == 2
    assert 0 <= told["best"] <= 1


def test_train_resumes_and_starts_from_weights(run: Run, trained: Path) -> None:
    again = run("train", "shapes", "--out", trained, "--resume", *SMALL)
    assert again.code == 0
    further = run("train", "shapes", "--out", "further", "--from", trained, "--batch", "auto", *SMALL)
    assert further.code == 0
    assert "tensors loaded" in further.err


def test_evaluate_prints_a_table_or_json(run: Run, trained: Path) -> None:
    table = run("evaluate", trained, "--out", "scores")
    assert table.code == 0
    assert "water" in table.out
    assert Path("scores/scores.json").is_file()
    assert list(Path("scores/worst").iterdir())
    told = json.loads(run("evaluate", trained, "--json", "--tta").out)
    assert told["images"] == 3
    assert 0 <= told["mIoU"] <= 1


def test_evaluate_measures_both_halves(run: Run, trained: Path) -> None:
    both = json.loads(run("evaluate", trained, "--json", "--proposer", "oracle", "--namer", "oracle").out)
    assert both["mIoU"] == 1.0
    masks = run("evaluate", trained, "--json", "--namer", "oracle")
    assert masks.code == 0
    names = run("evaluate", trained, "--proposer", "oracle")
    assert names == (2, "", names.err)
    assert "reads queries" in names.err


def test_evaluate_takes_other_data(run: Run, trained: Path) -> None:
    told = json.loads(run("evaluate", trained, "--json", "-s", "data.val.length=2").out)
    assert told["images"] == 2
    told = json.loads(
        run("evaluate", trained, "--data", "shapes", "--json", "-s", "data.test.length=1", "--split", "test").out
    )
    assert told["images"] == 1


def test_predict_writes_maps_overlays_and_shares(run: Run, trained: Path, demo: Path) -> None:
    ended = run("predict", trained, demo / "images", "--out", "pictures")
    assert ended.code == 0
    assert len(list(Path("pictures/labels").rglob("*.png"))) == 4
    assert len(list(Path("pictures/overlays").rglob("*.jpg"))) == 4
    summary = json.loads(Path("pictures/summary.json").read_text())
    assert all(abs(sum(each["classes"].values()) - 1) < 1e-3 for each in summary["images"])
    assert json.loads(
        run("predict", demo / "images", "--weights", trained, "--out", "b", "--no-overlays", "--json").out
    )


def painted(run: Run, trained: Path, demo: Path, colors: str) -> set[tuple[int, ...]]:
    """The colours in the palette of a label map of a prediction."""
    picture = next((demo / "images").rglob("*.jpg"))
    assert run("predict", trained, picture, "--out", "a", "--colors", colors, "--opacity", 0.5).code == 0
    with Image.open(next(Path("a/labels").rglob("*.png"))) as labels:
        palette = labels.getpalette() or []
    return {tuple(palette[start : start + 3]) for start in range(0, 21, 3)}


def test_predict_takes_colours_by_name_or_in_order(run: Run, trained: Path, demo: Path) -> None:
    Path("colors.yaml").write_text("[{name: sky, color: [1, 2, 3]}, {name: sea, color: [9, 9, 9]}]\n")
    assert (1, 2, 3) in painted(run, trained, demo, "colors.yaml")
    assert (9, 9, 9) not in painted(run, trained, demo, "colors.yaml")
    seven = [f"{{name: c{index}, color: [{index}, 5, 6]}}" for index in range(7)]
    Path("seven.yaml").write_text(f"[{', '.join(seven)}]\n")
    assert painted(run, trained, demo, "seven.yaml") == {(index, 5, 6) for index in range(7)}


def test_colours_that_cannot_be_taken_are_one_line(run: Run, trained: Path, demo: Path) -> None:
    def refused(colors: str) -> str:
        found = run("predict", trained, next((demo / "images").rglob("*.jpg")), "--out", "a", "--colors", colors)
        assert found.code == 2
        assert found.err.count("\n") == 1
        return found.err

    Path("six.yaml").write_text("[a, b, c, d, e, f]\n")
    assert "--colors six.yaml: 6 colours by other names than the model's 7 classes (sky, " in refused("six.yaml")
    assert "Did you mean 'ade20k'?" in refused("ade20")
    assert "Did you mean 'coco_stuff_171'?" in refused("coco_stuff")
    assert "Did you mean 'pascal_context_" in refused("pascal_context")


def test_predict_names_a_broken_file_and_does_the_rest(run: Run, trained: Path, demo: Path) -> None:
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff cut short")
    picture = next((demo / "images").rglob("*.jpg"))
    ended = run("predict", trained, "broken.jpg", picture, "--out", "pictures", "--json")
    assert ended.code == 1
    assert ended.err.startswith("maskfirst: skipped: broken.jpg: ")
    told = json.loads(ended.out)
    assert len(told["images"]) == 1
    assert [each["file"] for each in told["failed"]] == ["broken.jpg"]


def panoptic_weights() -> str:
    """A small model for all tasks, as it is initialised."""
    changes = ["task=panoptic", "proposer.queries=8", "criterion.kind=set"]
    experiment = build.Experiment(recipe.load("shapes", changes))
    torch.manual_seed(0)
    weights.save("panoptic.safetensors", experiment.segmenter(), experiment.recipe.tree, experiment.vocabulary)
    return "panoptic.safetensors"


def test_predict_does_by_default_what_the_model_was_made_for(run: Run, demo: Path) -> None:
    model = panoptic_weights()
    ended = run("predict", model, demo / "images" / "val", "--out", "pictures", "--json")
    assert ended.code == 0
    (entry,) = json.loads(ended.out)["images"]
    assert Path("pictures", entry["panoptic"]).is_file()
    assert "labels" not in entry
    assert Path("pictures/panoptic.json").is_file()
    asked = run(
        "predict", model, demo / "images", "--out", "b", "--task", "instance", "--yolo", "--least-score", "0", "--json"
    )
    assert {"instances", "yolo"} <= set(json.loads(asked.out)["images"][0])
    assert len(json.loads(Path("b/instances.json").read_text())["images"]) == 4
    assert (
        "labels"
        in json.loads(run("predict", model, demo / "images", "--out", "c", "--task", "semantic", "--json").out)[
            "images"
        ][0]
    )


def test_predict_without_pictures_says_so(run: Run, trained: Path) -> None:
    assert "no pictures" in run("predict", trained, "--out", "pictures").err


def test_show_prints_the_recipe_and_the_cost(run: Run, trained: Path) -> None:
    shown = run("show", "segvit-vit-b-ade20k", "-s", "train.steps=7")
    assert "steps: 7" in shown.out
    assert "120.9 G" in shown.out
    assert "108.7 M" in shown.out
    smaller = json.loads(run("show", "segvit-vit-b-ade20k", "--size", "256x384", "--json").out)["cost"]
    assert smaller["size"] == [256, 384]
    assert smaller["parameters"] == 108736279
    assert smaller["multiply_adds"] < 60e9
    assert smaller["training_bytes"]["per_image"] > 0
    assert "steps: 2" in run("show", trained).out


def test_check_reports_and_draws(run: Run, demo: Path) -> None:
    fine = run("check", demo, "--out", "report")
    assert fine.code == 0
    assert "nothing wrong" in fine.out
    assert Path("report/sheet.png").is_file()
    labels = next((demo / "annotations" / "val").rglob("*.png"))
    kept = labels.read_bytes()
    try:
        Image.fromarray(np.full(np.array(Image.open(labels)).shape, 37, np.uint8)).save(labels)
        wrong = run("check", demo)
        assert wrong.code == 1
        assert "37" in wrong.out
        assert json.loads(run("check", demo, "--json").out)["problems"]
    finally:
        labels.write_bytes(kept)


def test_stages_train_one_after_another(run: Run) -> None:
    Path("second.yaml").write_text("base: shapes\nproposer: {weights: runs/shapes, freeze: true}\n")
    stages = json.loads(run("train", "shapes", "second.yaml", "--json", *SMALL).out)
    assert [each["out"] for each in stages] == ["runs/shapes", "runs/second"]
    first, second = (weights.read(f"runs/{name}.safetensors").tensors for name in ("shapes/best", "second/last"))
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("proposer."))
    assert any(not torch.equal(first[key], second[key]) for key in first if key.startswith("namer."))
    shutil.rmtree("runs/second")
    before = Path("runs/shapes/last.safetensors").read_bytes()
    again = run("train", "shapes", "second.yaml", "--resume", *SMALL)
    assert again.code == 0
    assert Path("runs/second/last.safetensors").is_file()
    assert Path("runs/shapes/last.safetensors").read_bytes() == before
    for option in (("--out", "x"), ("--from", "runs/shapes"), ("--devices", "2")):
        assert (
            "is for one recipe, and these are 2; train one at a time" in run("train", "shapes", "shapes", *option).err
        )
    assert "no recipe 'shpes'" in run("train", "shapes", "shpes").err


def test_recipes_are_listed_and_counted(run: Run) -> None:
    (published,) = json.loads(run("recipes", "segvit-vit-l", "shrunk-ade20k", "--json").out)
    assert published["name"] == "segvit-vit-l-shrunk-ade20k"
    assert "parameters" not in published
    listed = run("recipes").out
    assert all(each in listed for each in ("ade_51.3.pth", *recipe.names()))
    (counted,) = json.loads(run("recipes", "segvit-vit-b", "--count", "--json").out)
    assert counted["parameters"] == counted["published"]["parameters"]
    assert abs(counted["gflops"] - counted["published"]["gflops"]) < 0.05
    assert "108.7" in run("recipes", "segvit-vit-b", "--count").out
    wrong = run("recipes", "segvit", "vit-h")
    assert wrong.code == 2
    assert "no recipe's name has segvit, vit-h in it; there are" in wrong.err


def write_recipe(text: str) -> str:
    Path("mine.yaml").write_text(text)
    return "mine.yaml"


def folder(labels: int = 1, value: int = 0) -> str:
    """A data folder of one picture of one class, and the recipe for it."""
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            Path("data", kind, split).mkdir(parents=True)
        if labels:
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(f"data/images/{split}/a.png")
            Image.fromarray(np.full((32, 32), value, np.uint8)).save(f"data/annotations/{split}/a.png")
    data = "{kind: folder, root: data, vocabulary: camvid}"
    return write_recipe(f"base: camvid-segvit\ndata: {{train: {data}, val: {data}}}\ntrain: {{steps: 1, workers: 0}}\n")


MISTAKES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "unknown key": (
        lambda _: ["train", write_recipe("base: shapes\nproposer: {quries: 3}\n")],
        r"mine\.yaml: proposer: unknown key 'quries'\. Did you mean 'queries'\?",
    ),
    "wrong type": (lambda _: ["show", write_recipe("base: shapes\ntrain: {steps: many}\n")], r"train\.steps: .*'many'"),
    "duplicate key": (
        lambda _: ["show", write_recipe("size: 3\nsize: 4\n")],
        r"mine\.yaml: line 2: key 'size' occurs twice",
    ),
    "unknown kind": (
        lambda _: ["show", write_recipe("base: shapes\nnamer: {kind: clas_head}\n")],
        r"namer: unknown kind 'clas_head'\. Did you mean 'class_head'\?",
    ),
    "no such recipe": (lambda _: ["train", "shaeps"], r"no recipe 'shaeps'\. Did you mean 'shapes'\?"),
    "bad override": (lambda _: ["train", "shapes", "-s", "steps"], r"override 'steps'"),
    "no data folder": (lambda _: ["train", "camvid-segvit"], r"data/camvid: no such folder"),
    "no weights": (lambda _: ["evaluate", "nothing"], r"no weights 'nothing'"),
    "no pictures": (lambda run: ["predict", run, "street.jpg", "--out", "o"], r"street\.jpg: no such file or folder"),
    "empty split": (lambda _: ["train", folder(labels=0)], r"data/images/train: no pictures here"),
    "value 37": (
        lambda _: ["train", folder(value=37)],
        r"annotations/train/a\.png: value 37 at \(y 0, x 0\) is no class",
    ),
    "another vocabulary": (
        lambda run: ["evaluate", run, "--data", folder()],
        r"mine\.yaml: data\.val: the data has 11 classes, the model 7",
    ),
    "a run lies there": (lambda run: ["train", "shapes", "--out", run, *SMALL], r"holds a run already .*--resume"),
    "another recipe": (
        lambda run: ["train", "shapes", "--out", run, "--resume", *SMALL, "-s", "train.optimizer.lr=0.1"],
        r"started with another recipe: train\.optimizer\.lr",
    ),
    "polygons of label maps": (
        lambda run: ["predict", run, picture(), "--out", "o", "--yolo"],
        r"polygons are of instances, not of the semantic task; choose the task instance",
    ),
    "a task it cannot do": (
        lambda run: ["predict", run, picture(), "--out", "o", "--task", "panoptic"],
        r"cannot do the panoptic task, only: semantic",
    ),
    "a pickle": (lambda _: ["predict", pickle(), "x.png", "--out", "o"], r"model\.pth: a pickle could run code"),
    "an unknown checkpoint": (lambda _: ["convert", foreign(), "--out", "o.safetensors"], r"of no known origin"),
    "cannot be shared": (lambda _: ["train", "shapes", *SMALL, "-s", "train.batch=0"], r"batch: 0 must be at least 1"),
    "a size": (lambda _: ["show", "shapes", "--size", "big"], r"--size big: should look like 512x768"),
    "a batch": (lambda _: ["train", "shapes", "--batch", "aut"], r"--batch aut: .*Did you mean 'auto'\?"),
    "points and masks": (
        lambda run: ["predict", run, picture(), "--points", "p.csv", "--masks", "m.json", "--out", "o"],
        r"--points names places, and --masks is about masks; give one of them",
    ),
    "a file for a folder": (lambda run: ["predict", run, "a.png", "--out", picture()], r"a\.png"),
}


def pickle() -> str:
    torch.save({"a": torch.zeros(1)}, "model.pth")
    return "model.pth"


def foreign() -> str:
    save_file({"conv.weight": torch.zeros(1)}, "foreign.safetensors")
    return "foreign.safetensors"


def picture() -> str:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("a.png")
    return "a.png"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(run: Run, trained: Path, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    ended = run(*arguments(trained))
    assert ended.code == 2
    assert ended.out == ""
    last = ended.err.splitlines()[-1]
    assert last.startswith("maskfirst: error: ")
    assert re.search(sentence, last), last
    assert "Traceback" not in ended.err


def test_interruption_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskfirst.data.shapes.write_demo", interrupted)
    assert run("shapes", "--out", "demo").code == 130


def test_a_bug_is_no_users_mistake(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("maskfirst.data.shapes.write_demo", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("shapes", "--out", "demo")
