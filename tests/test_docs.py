"""The pages do what they say: snippets run in order, keys have the defaults that are told, links lead somewhere.

Trainings are cut to two steps; the README's two commands for a fresh machine are run as they stand by .ci/run.
"""

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

import maskfirst.data
import maskfirst.proposers
import test_contracts
from maskfirst import cli, recipe
from maskfirst.build import KEYS, MENUS, Experiment
from maskfirst.contracts import Dataset, Namer, Phase, Proposer
from maskfirst.data.images import read_image
from maskfirst.data.shapes import write_demo
from maskfirst.frames import Fit
from maskfirst.namers.pading import Synthesis
from maskfirst.optim import Group, Optimizer, Schedule
from maskfirst.phases.pading import Deviations, LossWeights
from maskfirst.proposers.texts import Texts
from maskfirst.recipe import import_class
from maskfirst.segmenter import Inference
from maskfirst.tasks import Thresholds
from maskfirst.training import Training
from maskfirst.weights import locate

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w-]+)(?:: ?(?P<name>\S+))? -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
SHORT = ["-s", "train.steps=2", "-s", "train.batch=2", "-s", "train.workers=0", "-s", "train.pictures=1"]


class Block(NamedTuple):
    """A fenced block: its language, its text, and the mark above it, such as `file: mine.yaml`."""

    kind: str
    text: str
    mark: str
    name: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m["kind"], m["text"], m["mark"] or "", m["name"] or "") for m in FENCE.finditer(text)]


def only(page: str, mark: str, name: str = "") -> str:
    """The text of the one block with this mark."""
    (found,) = [block.text for block in blocks(page) if block.mark == mark and (not name or block.name == name)]
    return found


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        yield from (shlex.split(each, comments=True) for each in line.split("&&") if each.strip())


def shortened(arguments: list[str]) -> list[str]:
    """A training cut to two steps, on a handful of scenes where it is trained on scenes."""
    if arguments[0] != "train":
        return arguments
    data = recipe.load(arguments[1]).tree["data"]
    scenes = [split for split in ("train", "val") if (data.get(split) or {}).get("kind") == "shapes"]
    return [*arguments, *SHORT, *(word for split in scenes for word in ("-s", f"data.{split}.length=2"))]


def maskfirst_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["maskfirst", *shortened(arguments)])
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    assert not code, f"maskfirst {' '.join(arguments)} ended with {code}"


def run_page(page: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Writes the files and runs the commands and the Python of a page, in its order, where we are. Returns how many."""
    count = 0
    for block in blocks(page):
        if block.mark == "file":
            Path(block.name).parent.mkdir(parents=True, exist_ok=True)
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.kind == "python" and not block.mark:
            exec(compile(block.text, page, "exec"), {})
            count += 1
        elif block.kind == "bash" and block.mark != "ci":
            for command in commands(block.text):
                assert command[0] == "maskfirst"
                maskfirst_command(command[1:], monkeypatch)
                count += 1
    return count


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def test_readme(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the first command, on what that leaves behind and on a photo of the reader's own."""
    main = [command for command in commands(only("README.md", "ci", "main")) if command[0] == "maskfirst"]
    assert [command[1] for command in main] == ["train", "evaluate", "shapes", "predict"]
    for command in main:
        maskfirst_command(command[1:], monkeypatch)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save("street.jpg")
    assert run_page("README.md", monkeypatch) == 16
    assert Path("scenes/panoptic.json").is_file()
    assert Path("out/overlays/street.jpg").is_file()


def test_ci_runs_the_commands_of_the_readme() -> None:
    assert [command[0] for command in commands(only("README.md", "ci", "main"))] == ["pip", *["maskfirst"] * 4]
    assert [command[0] for command in commands(only("README.md", "ci", "tests"))] == ["pip", "pytest"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme main" in script
    assert "readme tests" in script


def test_tutorial(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page("docs/tutorial.md", monkeypatch) == 13
    assert len(list(Path("pictures/overlays").iterdir())) == 3


def add(page: str, contract: type, package: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Adds the part of a page: its one file to the package, its one line to the menu. Returns its kind and its module."""
    (file,) = [block for block in blocks(page) if block.mark == "file" and block.kind == "python"]
    (scratch / "added").mkdir()
    (scratch / "added" / file.name).write_text(file.text, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(scratch / "added")])
    ((kind, place),) = yaml.safe_load("{" + only(page, "menu", contract.__name__) + "}").items()
    monkeypatch.setitem(MENUS[contract], kind, place)
    return kind, file.text


def test_a_head_is_one_file_and_one_line(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/add-a-head.md"
    kind, _ = add(page, Proposer, maskfirst.proposers, scratch, monkeypatch)
    assert run_page(page, monkeypatch) == 3
    assert locate("runs/two-layers").is_file()
    (trio,) = eval("[" + only(page, "trio") + "]")
    assert trio[0] == kind
    test_contracts.test_menu_entries_keep_their_contract(Proposer, kind)
    for size in test_contracts.SIZES:
        test_contracts.test_losses_are_finite_and_reach_every_parameter(trio, size)
        test_contracts.test_answers_are_home_sized(trio, size, lambda seen: seen)
    test_contracts.test_a_batch_is_its_pictures_one_by_one(trio)
    test_contracts.test_truth_without_a_class_has_finite_losses(trio)
    for task in ("semantic", "instance", "panoptic"):
        test_contracts.test_tasks_are_done_or_refused_in_a_sentence(trio, task, lambda seen: seen)


def test_a_head_of_ones_own_needs_no_line(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/add-a-head.md"
    (file,) = [block for block in blocks(page) if block.mark == "file" and block.kind == "python"]
    (scratch / "my_package").mkdir()
    (scratch / "my_package" / "heads.py").write_text(file.text, encoding="utf-8")
    monkeypatch.syspath_prepend(scratch)
    own = only(page, "file", "two-layers.yaml").replace("kind: two_layers", "kind: my_package.heads:TwoLayers")
    Path("own.yaml").write_text(own, encoding="utf-8")
    maskfirst_command(["train", "own.yaml", "--out", "own"], monkeypatch)
    maskfirst_command(["evaluate", "own", "--trust"], monkeypatch)
    with pytest.raises(AssertionError, match="ended with 2"):
        maskfirst_command(["evaluate", "own"], monkeypatch)
    assert "--trust" in capsys.readouterr().err


def test_a_data_set_is_one_file_and_one_line(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/add-a-dataset.md"
    kind, _ = add(page, Dataset, maskfirst.data, scratch, monkeypatch)
    test_contracts.test_menu_entries_keep_their_contract(Dataset, kind)
    assert run_page(page, monkeypatch) == 2
    assert locate("runs/stripes").is_file()


def test_data_sets(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page("docs/datasets.md", monkeypatch) == 3


def test_python(scratch: Path) -> None:
    """The page's blocks are one program, as a notebook's cells are."""
    write_demo("demo")
    names: dict[str, Any] = {}
    for block in blocks("docs/python.md"):
        exec(compile(block.text, "docs/python.md", "exec"), names)
    assert names["skipped"] == []
    assert read_image("found.jpg").shape[2] == 256
    assert read_image("labels.png").shape == (3, 192, 256)


def test_scale(scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page("docs/scale.md", monkeypatch) == 3
    assert "Instances(" in capsys.readouterr().out


def test_zero_shot(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page("docs/zero-shot.md", monkeypatch) == 3


OTHERS = {(Namer, "oracle"): "oracle (namer)", (Phase, "pading"): "pading (phase)"}
"""Titles of kinds that two menus have."""
SECTIONS: dict[str, Callable[..., Any]] = {
    OTHERS.get((contract, kind), kind): import_class(path)
    for contract, menu in MENUS.items()
    for kind, path in menu.items()
} | {
    kind.__name__: kind
    for kind in (Texts, Synthesis, LossWeights, Deviations, Inference, Thresholds, Fit, Training, Optimizer, Group, Schedule)
}  # fmt: skip
GIVEN = ("vocabulary", "size", "unseen", "width", "segmenter", "settings")


def told() -> dict[str, dict[str, str]]:
    """Section of docs/recipes.md -> key -> default, as its tables have them."""
    sections: dict[str, dict[str, str]] = {}
    title = ""
    for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ").replace("`", "")
        elif row := re.match(r"\| `(\w+)` \| ([^|]*) \|", line):
            sections.setdefault(title, {})[row[1]] = row[2].strip()
    return sections


def defaults(kind: Callable[..., Any]) -> dict[str, str]:
    made = {each.name for each in fields(kind) if each.default_factory is not MISSING} if is_dataclass(kind) else set()
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            found[name] = "given" if name in GIVEN else "required"
        else:
            found[name] = f"`{plain(parameter.default, name in made)}`"
    return found


def plain(value: object, made: bool) -> str:
    """A default as YAML has it."""
    if made or is_dataclass(value):
        return "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(plain(each, False) for each in value) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_recipes_tells_every_key_and_its_default(section: str) -> None:
    assert told().get(section, {}) == defaults(SECTIONS[section])


def test_recipes_tells_every_section() -> None:
    titles = {
        line.lstrip("# ").replace("`", "")
        for line in (ROOT / "docs/recipes.md").read_text().splitlines()
        if line[:1] == "#"
    }
    assert set(SECTIONS) <= titles
    assert tuple(told()["The whole"]) == ("base", *[key for key in KEYS if key != "base"])


def test_readme_lists_what_was_published() -> None:
    rows = dict(
        re.findall(r"^\| `(segvit-[\w-]+)` \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    )
    assert set(rows) == {name for name in recipe.names() if name.startswith("segvit-")}
    for name, row in rows.items():
        published = recipe.load(name).tree["published"]
        data, scores, parameters, gflops = row.split(" | ")
        assert published["dataset"].replace(" val", "").replace(" test", "") == data
        assert scores == f"{published['scores']['mIoU']}, {published['scores']['mIoU_tta']}"
        assert parameters == f"{published['parameters'] / 1e6:.1f} M"
        assert float(gflops) == published["gflops"]


def test_vit_adapter(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page("docs/vit-adapter.md", monkeypatch) == 1


def test_the_page_of_vit_adapter_lists_what_was_published() -> None:
    page = (ROOT / "docs" / "vit-adapter.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(adapter-[\w-]+)` \| (.*) \|$", page, re.M))
    recipes = {name: recipe.load(name) for name in recipe.names() if name.startswith("adapter-")}
    assert set(rows) == {name for name, each in recipes.items() if "published" in each.tree}
    for name, row in rows.items():
        published = recipes[name].tree["published"]
        data, scores, parameters = row.split(" | ")
        assert re.sub(" (val|test)", "", published["dataset"]) == data
        assert scores == ", ".join(map(str, published["scores"].values()))
        model = Experiment(recipes[name]).segmenter(meta=True)
        assert parameters == f"{sum(each.numel() for each in model.parameters()) / 1e6:.1f} M"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page: str) -> None:
    added = {"src/maskfirst/proposers/two_layers.py", "src/maskfirst/data/stripes.py"}
    for file in re.findall(r"`((?:src|tests|bench|docs)/[\w./-]+\.\w+)`", (ROOT / page).read_text(encoding="utf-8")):
        assert file in added or (ROOT / file).is_file(), file
