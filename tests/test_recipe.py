"""Recipes: what they inherit, how they are overridden and built, and the exact sentence for every mistake."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from maskfirst import recipe
from maskfirst.build import KEYS, MENUS, Experiment
from maskfirst.contracts import Criterion, Namer, Proposer
from maskfirst.recipe import Recipe, RecipeError, construct, load
from maskfirst.types import Names, Vocabulary


class Eye(nn.Module, ABC):
    @abstractmethod
    def see(self) -> int: ...


class Plain(Eye):
    def __init__(self, depth: int = 3, size: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.linear = nn.Linear(depth, depth)
        self.depth, self.size = depth, size

    def see(self) -> int:
        return self.depth


class Blind(Eye):
    pass


class Finder(nn.Module, ABC):
    pass


class Many(Finder):
    def __init__(self, backbone: Eye, queries: int = 100) -> None:
        super().__init__()
        self.backbone, self.queries = backbone, queries
        if queries < 1:
            raise ValueError(f"queries {queries} must be\nat least 1")


class Bare(Finder):
    pass


@dataclass(frozen=True)
class Step:
    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    names: Mapping[int, str] = field(default_factory=dict)
    mode: Literal["poly", "flat"] = "poly"
    micro: int | Literal["auto"] | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    inner: "Step | None" = None
    inners: Sequence["Step"] = ()
    either: "float | Step" = 0.0
    exact: bool = False


class Choice:
    """A class that is neither a network nor a dataclass."""

    def __init__(self, eyes: list[Eye], by_name: dict[str, Eye] | None = None, free: Any = None) -> None:
        self.eyes, self.by_name, self.free = eyes, by_name, free


HERE = {
    Eye: {"plain": f"{__name__}:Plain"},
    Finder: {"many": f"{__name__}:Many", "many_more": f"{__name__}:Many", "bare": f"{__name__}:Bare"},
}


def make(node: Any, wanted: Any, where: str = "proposer", **extra: Any) -> Any:
    return construct(node, wanted, menus=HERE, where=where, source="camvid.yaml", **extra)


def sentence(node: Any, wanted: Any, where: str = "proposer", **extra: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        make(node, wanted, where, **extra)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "camvid.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    return load(written(folder, text), overrides).tree


EYE = {"kind": "plain"}


@pytest.mark.parametrize(
    ("node", "wanted", "message"),
    [
        (
            {"kind": "many", "backbone": EYE, "quries": 3},
            Finder,
            "camvid.yaml: proposer: unknown key 'quries'. Did you mean 'queries'? Known: backbone, queries.",
        ),
        (
            {"kind": "many", "wieghts": "a"},
            Finder,
            "camvid.yaml: proposer: unknown key 'wieghts'. Did you mean 'weights'? Known: backbone, queries.",
        ),
        ({"kind": "bare", "zzz": 3}, Finder, "camvid.yaml: proposer: unknown key 'zzz'. It has no settings."),
        (
            {"kind": "many", "backbone": {"kind": "plain", "deph": 3}},
            Finder,
            "camvid.yaml: proposer.backbone: unknown key 'deph'. Did you mean 'depth'? Known: depth, size.",
        ),
        (
            {"kind": "mny"},
            Finder,
            "camvid.yaml: proposer: unknown kind 'mny'. Did you mean 'many'? Known: bare, many, many_more.",
        ),
        ({"queries": 3}, Finder, "camvid.yaml: proposer: 'kind' is missing. Known: bare, many, many_more."),
        ({"kind": 3}, Finder, "camvid.yaml: proposer.kind: should be a word, got 3. Known: bare, many, many_more."),
        ({"kind": "many"}, Finder, "camvid.yaml: proposer: 'backbone' is missing. Known: backbone, queries."),
        ("many", Finder, "camvid.yaml: proposer: should be a mapping, got 'many'. Write {kind: many}."),
        (None, Finder, "camvid.yaml: proposer: should be a mapping, got null."),
        (
            {"kind": "many", "backbone": EYE, "queries": "12"},
            Finder,
            "camvid.yaml: proposer.queries: should be a valid integer, got '12'.",
        ),
        (
            {"kind": "many", "backbone": EYE, "queries": True},
            Finder,
            "camvid.yaml: proposer.queries: should be a valid integer, got true.",
        ),
        (
            {"kind": "many", "backbone": EYE, "queries": None},
            Finder,
            "camvid.yaml: proposer.queries: should be a valid integer, got null.",
        ),
        (
            {"kind": "many", "backbone": EYE, "queries": 0},
            Finder,
            "camvid.yaml: proposer: queries 0 must be at least 1",
        ),
        ({}, Step, "camvid.yaml: proposer: 'rate' is missing. Known: rate, betas, names, mode, micro, share, inner, "
         "inners, either, exact."),
        ({"rate": 1, "betas": [1]}, Step, "camvid.yaml: proposer.betas.1: field required, got [1]."),
        ({"rate": 1, "betas": [1, "x"]}, Step, "camvid.yaml: proposer.betas.1: should be a valid number, got 'x'."),
        ({"rate": 1, "mode": "ploy"}, Step, "camvid.yaml: proposer.mode: should be 'poly' or 'flat', got 'ploy'."),
        (
            {"rate": 1, "micro": "all"},
            Step,
            "camvid.yaml: proposer.micro: should be a valid integer or 'auto', got 'all'.",
        ),
        ({"rate": 1, "share": 2}, Step, "camvid.yaml: proposer.share: should be less than or equal to 1, got 2."),
        ({"rate": 1, "exact": 1}, Step, "camvid.yaml: proposer.exact: should be a valid boolean, got 1."),
        ({"rate": 1, "names": {"a": "b"}}, Step, "camvid.yaml: proposer.names.a: should be a valid integer, unable to parse "
         "string as an integer, got 'a'."),
        ({"rate": 1, "names": [1]}, Step, "camvid.yaml: proposer.names: should be a mapping, got [1]."),
        ({"rate": 1, "inners": {"rate": 1}}, Step, 'camvid.yaml: proposer.inners: should be a list, got {"rate": 1}.'),
        (
            {"rate": 1, "inners": [{"rate": 1}, {"rat": 1}]},
            Step,
            "camvid.yaml: proposer.inners.1: unknown key 'rat'. Did you mean 'rate'? Known: rate, betas, names, mode, "
            "micro, share, inner, inners, either, exact.",
        ),
        ({"rate": 1, "inner": 5}, Step, "camvid.yaml: proposer.inner: should be a mapping, got 5."),
        ({"rate": 1, "either": "x"}, Step, "camvid.yaml: proposer.either: should be a valid number, got 'x'."),
        ({"eyes": [EYE], "by_name": [1]}, Choice, "camvid.yaml: proposer.by_name: should be a mapping, got [1]."),
        ({"eyes": "plain"}, Choice, "camvid.yaml: proposer.eyes: should be a list, got 'plain'."),
    ],
)  # fmt: skip
def test_a_mistake_has_its_sentence(node: Any, wanted: Any, message: str) -> None:
    assert sentence(node, wanted) == message


def test_a_long_value_is_cut_short() -> None:
    told = sentence({"rate": "x" * 1000}, Step)
    assert len(told) < 150
    assert told.endswith("xxx....")


def test_leaves_are_converted() -> None:
    step = make({"rate": 1, "betas": [1, 0.5], "names": {"7": "road"}, "micro": "auto"}, Step)
    assert (step.rate, type(step.rate)) == (1.0, float)
    assert step.betas == (1.0, 0.5)
    assert step.names == {7: "road"}
    assert step.micro == "auto"


def test_parts_are_built_inside_of_lists_mappings_and_unions() -> None:
    step = make({"rate": 1, "inner": {"rate": 2}, "inners": [{"rate": 3}], "either": {"rate": 4}}, Step)
    assert step.inner == Step(2.0)
    assert step.inners == (Step(3.0),)
    assert step.either == Step(4.0)
    assert make({"rate": 1, "inner": None, "either": 2}, Step) == Step(1.0, either=2.0)
    choice = make({"eyes": [{"kind": "plain", "depth": 5}], "by_name": {"left": EYE}, "free": {"any": [1]}}, Choice)
    assert [eye.see() for eye in choice.eyes] == [5]
    assert choice.by_name["left"].see() == 3
    assert choice.free == {"any": [1]}
    assert [eye.see() for eye in make([EYE, EYE], list[Eye])] == [3, 3]


def test_given_values_fill_what_the_node_does_not_say() -> None:
    given = {object: {"size": (4, 6)}, Finder: {"depth": 9}}
    built = make({"kind": "many", "backbone": EYE}, Finder, given=given)
    assert built.backbone.size == (4, 6)
    assert built.backbone.depth == 3, "what is given to finders is not given to the eyes inside of them"
    said = make({"kind": "many", "backbone": {"kind": "plain", "size": [1, 2]}}, Finder, given=given)
    assert said.backbone.size == (1, 2)
    told = sentence({"kind": "plain", "sie": 1}, Eye, given=given)
    assert told == "camvid.yaml: proposer: unknown key 'sie'. Did you mean 'size'? Known: depth."


def test_reserved_keys_go_to_finish_and_not_to_the_constructor() -> None:
    seen = []
    finish = {nn.Module: lambda part, reserved, where: seen.append((type(part), dict(reserved), where))}
    node = {"kind": "many", "weights": "a", "backbone": {"kind": "plain", "freeze": ["linear.*"], "weights": None}}
    make(node, Finder, finish=finish)
    assert seen == [(Plain, {"freeze": ["linear.*"]}, "proposer.backbone"), (Many, {"weights": "a"}, "proposer")]
    assert (
        sentence({"kind": "bare", "freeze": "all"}, Finder, finish=finish)
        == "camvid.yaml: proposer.freeze: should be a valid boolean or a list, got 'all'."
    )
    assert (
        sentence({"kind": "bare", "weights": 3}, Finder, finish=finish)
        == "camvid.yaml: proposer.weights: should be a valid string, got 3."
    )


def test_private_kinds() -> None:
    assert isinstance(make({"kind": f"{__name__}:Plain"}, Eye), Plain)
    assert sentence({"kind": f"{__name__}:Plain"}, Eye, trusted=False) == (
        f"camvid.yaml: proposer: kind '{__name__}:Plain' would run code of its own, "
        "which weights may only if trusted (--trust)."
    )
    assert sentence({"kind": f"{__name__}:Many"}, Eye) == (
        f"camvid.yaml: proposer: kind '{__name__}:Many' is no Eye; make it a subclass of {__name__}.Eye."
    )
    assert sentence({"kind": f"{__name__}:Blind"}, Eye) == (
        f"camvid.yaml: proposer: kind '{__name__}:Blind' lacks what every Eye has: see."
    )
    assert sentence({"kind": f"{__name__}:Gone"}, Eye) == (
        f"camvid.yaml: proposer: kind '{__name__}:Gone': module '{__name__}' has no attribute 'Gone'."
    )
    assert sentence({"kind": "no_such_pkg.heads:MyHead"}, Eye) == (
        "camvid.yaml: proposer: kind 'no_such_pkg.heads:MyHead': there is no module 'no_such_pkg'; "
        "install it or put its folder on PYTHONPATH."
    )


def test_a_private_module_with_a_broken_import_keeps_its_traceback(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_private.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        make({"kind": "broken_private:Head"}, Eye)


def test_yaml_reads_as_its_core_schema_says(tmp_path: Path) -> None:
    text = """
    rate: 1e-4
    more: [1.5, .5, 5., -2E3, +1, 0x1f, 0o17, 010, .inf, -.INF, .nan]
    words: [on, off, yes, no, 'true', 2024-01-02, 1:30, 1_000, e4, "12"]
    flags: [true, False]
    none: [null, ~, ]
    empty:
    7: number as a key
    true: word as a key
    """
    tree = read(tmp_path, text)
    assert tree["rate"] == 1e-4
    assert tree["more"][:8] == [1.5, 0.5, 5.0, -2000.0, 1, 31, 15, 10]
    assert tree["more"][8:10] == [math.inf, -math.inf]
    assert math.isnan(tree["more"][10])
    assert tree["words"] == ["on", "off", "yes", "no", "true", "2024-01-02", "1:30", "1_000", "e4", "12"]
    assert tree["flags"] == [True, False]
    assert tree["none"] == [None, None]
    assert tree["empty"] is None
    assert tree["7"] == "number as a key"
    assert tree["true"] == "word as a key"


def test_merge_keys_are_overridden_by_what_stands_beside_them(tmp_path: Path) -> None:
    tree = read(tmp_path, "a: &x {one: 1, two: 2}\nb: {two: 3, <<: *x}\n")
    assert tree["b"] == {"one": 1, "two": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1}\na: 2\n", "line 3: key 'a' occurs twice, first in line 1."),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: key 'b' occurs twice, first in line 2."),
        ("a: {b: 1, b: 2}\n", "line 1: key 'b' occurs twice, first in line 1."),
        ("a: [1\nb: 2\n", "line 2: expected ',' or ']', but got ':'."),
        ("? [1, 2]\n: 3\n", "line 1: a key should be a word."),
        ("a: {<<: 3}\n", "line 1: '<<' should be given a mapping."),
        ("a: &a [*a]\n", "line 1: found unconstructable recursive node."),
        ("a: !!python/object/apply:os.system [ls]\n", None),
        ("", "should be a mapping, got null."),
        ("- 1\n", "should be a mapping, got [1]."),
        ("base: [a]\n", 'base: should be a recipe\'s name or file, got ["a"].'),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str | None) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    if message is None:
        assert "could not determine a constructor for the tag" in str(caught.value)
    else:
        assert str(caught.value) == f"{path}: {message}"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "camvid.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8 text"):
        load(path)
    path.write_bytes(b"a: \x00")
    with pytest.raises(RecipeError, match="not YAML"):
        load(path)


def test_a_recipe_inherits_and_a_new_kind_replaces(tmp_path: Path) -> None:
    written(
        tmp_path,
        "size: 8\nproposer: {kind: atm, width: 4, backbone: {kind: taps, depths: [1]}}\naugment: [1, 2]\n",
        "a.yaml",
    )
    written(tmp_path, "base: a.yaml\nproposer: {width: 5, backbone: {kind: taps, more: 1}}\naugment: [3]\n", "b.yaml")
    text = "base: ./b.yaml\nsize: null\nproposer: {backbone: {kind: other}}\ntask: semantic\n"
    assert read(tmp_path, text) == {
        "size": None,
        "proposer": {"kind": "atm", "width": 5, "backbone": {"kind": "other"}},
        "augment": [3],
        "task": "semantic",
    }
    assert load(tmp_path / "b.yaml").tree["proposer"] == {
        "kind": "atm",
        "width": 5,
        "backbone": {"kind": "taps", "depths": [1], "more": 1},
    }
    assert load(tmp_path / "b.yaml", ["proposer.kind=dense"]).tree["proposer"] == {"kind": "dense"}


def test_a_recipe_inherits_from_a_bundled_one(tmp_path: Path) -> None:
    tree = read(tmp_path, "base: shapes\ntrain: {steps: 3}\n")
    assert tree["train"]["steps"] == 3
    assert tree["train"]["batch"] == load("shapes").tree["train"]["batch"]


def test_bases_in_a_circle(tmp_path: Path) -> None:
    a, b = written(tmp_path, "base: b.yaml\n", "a.yaml"), written(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(RecipeError) as caught:
        load(a)
    assert str(caught.value) == f"{a}: base: recipes inherit from each other in a circle: a.yaml -> b.yaml -> a.yaml."
    assert b.exists()


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, "base: campid.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: base: {tmp_path / 'campid.yaml'}: no such recipe file. Did you mean 'camvid.yaml'?"
    )


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load("shpes")
    assert str(caught.value) == (
        f"no recipe 'shpes'. Did you mean 'shapes'? `maskfirst recipes` lists the {len(recipe.names())} bundled ones; "
        "or give the path of a .yaml file."
    )
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "shapes.yaml")
    assert str(caught.value) == f"{tmp_path / 'shapes.yaml'}: no such recipe file. Did you mean 'shapes'?"


def test_overrides(tmp_path: Path) -> None:
    text = "a: {b: {c: 1, d: 2}, e: [{kind: x, f: 1}, {f: 2}]}\nnothing:\n"
    assert read(tmp_path, text, "a.b.c=5")["a"]["b"] == {"c": 5, "d": 2}
    assert read(tmp_path, text, "a.e.1.f=1e-3")["a"]["e"] == [{"kind": "x", "f": 1}, {"f": 1e-3}]
    assert read(tmp_path, text, "a.e.0.kind=y")["a"]["e"][0] == {"kind": "y"}
    assert read(tmp_path, text, "a.b={c: 7}")["a"]["b"] == {"c": 7, "d": 2}
    assert read(tmp_path, text, "a.b.c=x=y")["a"]["b"]["c"] == "x=y"
    assert read(tmp_path, text, "a.b.c=")["a"]["b"]["c"] is None
    assert read(tmp_path, text, "a.b=null")["a"]["b"] is None
    assert read(tmp_path, text, "nothing.new=1", "quite.new.path=2")["nothing"] == {"new": 1}
    assert read(tmp_path, text, "quite.new.path=2")["quite"] == {"new": {"path": 2}}
    assert read(tmp_path, text, "a.b.c=1", "a.b.c=2")["a"]["b"]["c"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "should look like proposer.queries=100."),
        ("a..b=1", "should look like proposer.queries=100."),
        ("=1", "should look like proposer.queries=100."),
        ("a.b.c=1", "there is nothing inside of 1 that 'c' could name."),
        ("a.e.2.f=1", "'2' should be one of 0..1, as the list has 2 items."),
        ("a.e.first=1", "'first' should be one of 0..1, as the list has 2 items."),
        ("a.b=[1", "line 1: expected ',' or ']', but got '<stream end>'."),
        ("a.b={c: 1, c: 2}", "line 1: key 'c' occurs twice, first in line 1."),
    ],
)
def test_an_override_that_fits_nowhere(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path, "a: {b: 1, e: [1, 2]}\n")
    with pytest.raises(RecipeError) as caught:
        load(path, [override])
    assert str(caught.value) == f"{path}: override '{override}': {message}"


# From here on the real parts.

TREE = {
    "size": 32,
    "vocabulary": ["sky", "road", "car"],
    "proposer": {
        "kind": "atm",
        "backbone": {
            "kind": "taps",
            "depths": [0, 1],
            "trunk": {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2},
        },
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
    "namer": {"kind": "class_head"},
    "criterion": {"kind": "fixed"},
}


def changed(*overrides: str, tree: Mapping[str, Any] = TREE) -> Recipe:
    for override in overrides:
        tree = recipe._overridden(dict(tree), override, "camvid.yaml")
    return Recipe(dict(tree), "camvid.yaml")


def mistake(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Experiment(changed(*overrides)).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_experiment_builds_its_segmenter() -> None:
    experiment = Experiment(changed("inference.flip=true"))
    segmenter = experiment.segmenter()
    assert segmenter.vocabulary.names == ("sky", "road", "car")
    assert segmenter.namer.get_parameter("linear.weight").shape == (4, 16)
    assert segmenter.proposer.get_parameter("backbone.trunk.vit.pos_embed").shape[1] == 2 * 2 + 1
    assert segmenter.inference.flip
    assert experiment.size == (32, 32)
    assert experiment.task == "semantic"
    assert experiment.loaded == []
    assert segmenter is not experiment.segmenter()


def test_building_on_meta_gives_the_same_tensors_without_their_memory() -> None:
    experiment = Experiment(changed("proposer.backbone.trunk.pretrained=true"))
    bare, whole = experiment.segmenter(meta=True), Experiment(changed()).segmenter()
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (bare, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("propser.queries=5", f"unknown key 'propser'. Did you mean 'proposer'? Known: {', '.join(KEYS)}."),
        ("proposer.heds=5", "proposer: unknown key 'heds'. Did you mean 'heads'? "
         "Known: backbone, width, heads, layers, queries, dropout, spread, read_out, earlier."),
        ("proposer.backbone.trunk.kind=vitt", "proposer.backbone.trunk: unknown kind 'vitt'. Did you mean 'vit'? "
         "Known: beit, uni_perceiver, vit."),
        ("proposer.heads=3", "proposer: width 16 is not divisible by 3 heads"),
        ("proposer.backbone.trunk.model=vit_tinny_patch16_224", "proposer.backbone.trunk: timm has no plain ViT "
         "'vit_tinny_patch16_224'. Did you mean 'vit_tiny_patch16_224'?"),
        ("proposer=null", "'proposer' is missing."),
        ("size=big", "size: should be a valid integer or a list, got 'big'."),
        ("size=0", "size: should be at least 1 px each way, got [0, 0]."),
        ("task=semantics", "task: unknown task 'semantics'. Did you mean 'semantic'? Known: semantic, instance, panoptic."),
        ("task=panoptic", "task: this model cannot do the panoptic task, only: semantic"),
        ("vocabulary=[a, a]", "vocabulary: names occur twice in the vocabulary: a"),
        ("data.trian.kind=folder", "data: unknown key 'trian'. Did you mean 'train'? Known: train, val, test."),
        ("data=folder", "data: should be a mapping, got 'folder'."),
        ("data.train={kind: folder, rot: x}", "data.train: unknown key 'rot'. Did you mean 'root'? "
         "Known: root, images, labels, split, shift, ignore, ids, colors, merge, instances, smallest, ending, limit."),
        ("augment=[{kind: flip, p: often}]", "augment.0.p: should be a valid number, got 'often'."),
        ("train={steps: 10, batch: 2, optimizer: {lr: fast}}", "train.optimizer.lr: should be a valid number, got 'fast'."),
        ("train={steps: 10, batch: 0}", "train: batch: 0 must be at least 1"),
        ("inference.stride=[8, 8]", "inference: stride without window; give both or neither"),
        ("inference.winow=[8, 8]", "inference: unknown key 'winow'. Did you mean 'window'? "
         "Known: fit, window, stride, multiple, pad, fill, tta_fit, scales, flip, average, order, thresholds, batch, strip."),
        ("namer.freeze=[linear]", "namer.freeze: 'linear' matches no whole name of its 2 parameters. "
         "Did you mean 'linear.bias'?"),
        ("proposer.freeze=['(']", "proposer.freeze: '(' is no regular expression: "
         "missing ), unterminated subpattern at position 0."),
    ],
)  # fmt: skip
def test_a_mistake_shows_before_data_or_gpu_is_touched(override: str, message: str) -> None:
    assert mistake(override) == f"camvid.yaml: {message}"


def test_freeze_stops_the_gradients_of_what_it_matches() -> None:
    def trained(*overrides: str) -> set[str]:
        segmenter = Experiment(changed(*overrides)).segmenter(meta=True)
        return {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}

    everything = trained()
    assert trained("proposer.backbone.freeze=true") == {n for n in everything if ".backbone." not in n}
    assert trained("namer.freeze=[linear.bias]") == everything - {"namer.linear.bias"}
    assert trained("namer.freeze=false") == everything


def test_data_of_a_split() -> None:
    node = {"kind": "shapes", "length": 3}
    experiment = Experiment(Recipe({"data": {"train": node, "val": node}}, "camvid.yaml"))
    assert len(experiment.dataset("train")) == 3
    assert experiment.dataset("train") is experiment.dataset("train")
    assert experiment.vocabulary == experiment.dataset("train").vocabulary
    with pytest.raises(RecipeError) as caught:
        experiment.dataset("test")
    assert str(caught.value) == "camvid.yaml: there is no data.test, only data.train, data.val."
    with pytest.raises(RecipeError) as caught:
        _ = Experiment(Recipe({}, "camvid.yaml")).vocabulary
    assert str(caught.value) == "camvid.yaml: there is no data.train."


def test_data_is_told_the_recipes_vocabulary(tmp_path: Path) -> None:
    for folder in ("images/train", "annotations/train"):
        (tmp_path / folder).mkdir(parents=True)
    tree = {"vocabulary": ["sky", "road"], "data": {"train": {"kind": "folder", "root": str(tmp_path)}}}
    with pytest.raises(RecipeError, match="the split is empty"):
        Experiment(Recipe(tree, "camvid.yaml")).dataset("train")
    Image.new("RGB", (4, 4)).save(tmp_path / "images/train/a.png")
    Image.new("L", (4, 4)).save(tmp_path / "annotations/train/a.png")
    assert Experiment(Recipe(tree, "camvid.yaml")).dataset("train").vocabulary.names == ("sky", "road")
    tree["data"]["train"]["root"] = str(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"camvid\.yaml: data\.train: .*nowhere"):
        Experiment(Recipe(tree, "camvid.yaml")).dataset("train")


def test_augmentations_are_given_the_size() -> None:
    experiment = Experiment(changed("augment=[{kind: crop}, {kind: flip, p: 1}]"))
    crop, flip = experiment.augmentations()
    assert vars(crop)["size"] == (32, 32)
    assert vars(flip)["p"] == 1.0
    assert Experiment(changed()).augmentations() == []


def test_a_private_part_is_one_class_and_one_line() -> None:
    segmenter = Experiment(changed(f"namer.kind={__name__}:Certain")).segmenter()
    assert isinstance(segmenter.namer, Certain)
    assert segmenter.namer.width == 16
    untrusted = Recipe(changed(f"namer.kind={__name__}:Certain").tree, "camvid.yaml", trusted=False)
    with pytest.raises(RecipeError) as caught:
        Experiment(untrusted).segmenter()
    assert str(caught.value) == (
        f"camvid.yaml: namer: kind '{__name__}:Certain' would run code of its own, "
        "which weights may only if trusted (--trust)."
    )


class Certain(Namer):
    example = {"kind": f"{__name__}:Certain"}  # noqa: RUF012

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, proposals: Any, batch: Any) -> Names:
        return Names(torch.zeros(1, 1, 2))


@pytest.mark.parametrize(("contract", "kind"), [(c, k) for c, menu in MENUS.items() for k in menu])
def test_every_kind_on_the_menu_is_there(contract: type, kind: str) -> None:
    found = recipe.import_class(MENUS[contract][kind])
    assert issubclass(found, contract)
    assert not getattr(found, "__abstractmethods__", None)


@pytest.mark.parametrize(
    ("contract", "kind"), [(c, k) for c in (Proposer, Namer, Criterion) for k in MENUS[c]], ids=lambda x: str(x)
)
def test_every_example_builds(contract: type, kind: str) -> None:
    found = recipe.import_class(MENUS[contract][kind])
    given = {object: {"vocabulary": Experiment(changed()).vocabulary, "size": (32, 32), "width": 16}}
    built = construct(found.example, contract, menus=MENUS, given=given, where="part", source="example")
    assert type(built) is found


def test_a_part_may_begin_as_one_of_another_recipe(tmp_path: Path) -> None:
    written(tmp_path, "namer: {kind: far, size: [3, 4], trunk: {depth: 12, heads: [1, 2]}}", "other.yaml")
    written(tmp_path, "base: other.yaml\nnamer: {trunk: {depth: 24}}", "deeper.yaml")
    tree = read(
        tmp_path,
        "namer:\n  kind: blend\n  second: {base: 'deeper.yaml:namer', point: peak, trunk: {heads: [8]}}\n"
        "list: [{base: 'other.yaml:namer.trunk'}]",
    )
    trunk = {"depth": 24, "heads": [8]}
    assert tree["namer"]["second"] == {"kind": "far", "size": [3, 4], "trunk": trunk, "point": "peak"}
    assert tree["list"] == [{"depth": 12, "heads": [1, 2]}]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("other.yaml", "should be a recipe and a place in it, such as vit-p-b-ade20k:namer, got 'other.yaml'."),
        ("3", "should be a recipe and a place in it, such as vit-p-b-ade20k:namer, got 3."),
        ("'oter.yaml:namer'", "{folder}/oter.yaml: no such recipe file. Did you mean 'other.yaml'?"),
        (
            "'other.yaml:namr.trunk'",
            "there is no 'namr.trunk' in {folder}/other.yaml. Did you mean 'namer'? Known: namer.",
        ),
        ("'camvid.yaml:namer'", "recipes inherit from each other in a circle"),
    ],
)
def test_a_part_that_cannot_begin_so_is_a_sentence(tmp_path: Path, base: str, message: str) -> None:
    written(tmp_path, "namer: {trunk: {depth: 12}}", "other.yaml")
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, f"namer:\n  second: {{base: {base}}}")
    assert message.format(folder=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
