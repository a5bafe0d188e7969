"""Schedules, parameter groups and the running average: the originals' numbers exactly, mistakes as sentences."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixtures_dir import FIXTURES
from maskfirst.errors import UserError
from maskfirst.optim import Average, Group, Optimizer, Schedule, parameter_groups
from maskfirst.training import Training

HERE = Path(__file__).parent / "fixtures" / "segvit"
FOLDERS = [HERE] if FIXTURES is None else [HERE, FIXTURES / "segvit"]
SEGVIT_RULES = (
    Group(r"decode_head\..*", lr=10.0, decay=0.01),
    Group(r".*(norm|ln).*", decay=0.0),
)


def named(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(1)) for name in names}


def settings_of(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "all"][: len(FOLDERS)])
def test_learning_rates_are_those_of_segvit(folder: Path) -> None:
    """Both columns at every recorded iteration of all three schedules."""
    recorded = json.loads((folder / "lr_schedule.json").read_text())["lr"]
    lengths = {"ade20k_160k_power1": (160_000, 1.0), "cocostuff10k_80k_power2": (80_000, 2.0)}
    lengths["pascal_context_80k_power1"] = (80_000, 1.0)
    assert set(recorded) == set(lengths)
    groups = parameter_groups(named("backbone.a", "decode_head.a"), Optimizer(lr=2e-5), [SEGVIT_RULES[0]])
    optimizer = Optimizer(lr=2e-5).build(groups)
    for run, (steps, power) in lengths.items():
        schedule = Schedule(power=power, warmup=1500 / steps)
        for step, expected in recorded[run].items():
            schedule.apply(optimizer, int(step), steps)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "all"][: len(FOLDERS)])
def test_groups_are_those_of_segvit(folder: Path) -> None:
    """Rate and decay of every parameter of the full-size models, as the original's optimizer had them."""
    for model in json.loads(gzip.decompress((folder / "optim_groups.json.gz").read_bytes())).values():
        groups = parameter_groups(named(*model["lr_wd"]), Optimizer(lr=2e-5, decay=0.01), SEGVIT_RULES)
        found = settings_of(groups)
        assert set(found) == set(model["lr_wd"])
        for name, (lr, decay) in model["lr_wd"].items():
            assert found[name] == pytest.approx((lr, decay), rel=1e-12), name
        assert len(groups) == 3


def test_of_each_field_the_first_rule_that_sets_it_wins() -> None:
    rules = [Group("head.*", lr=10.0), Group(".*norm.*", decay=0.0), Group("head.*", lr=3.0, decay=0.5)]
    found = settings_of(
        parameter_groups(named("body.norm", "head.norm", "head.linear", "body.linear"), Optimizer(lr=1.0), rules)
    )
    assert found == {
        "body.norm": (1.0, 0.0),
        "head.norm": (10.0, 0.0),
        "head.linear": (10.0, 0.5),
        "body.linear": (1.0, 0.01),
    }


def test_rules_match_whole_names() -> None:
    found = settings_of(parameter_groups(named("a.norm", "a.normal"), Optimizer(lr=1.0), [Group("a.norm", lr=0.0)]))
    assert found == {"a.norm": (0.0, 0.01), "a.normal": (1.0, 0.01)}


def test_early_layers_learn_slower() -> None:
    names = ["vit.cls_token", "vit.patch_embed.proj.weight", "vit.blocks.0.a", "vit.blocks.1.a", "vit.norm.a", "head.a"]
    rules = [Group(r"vit\..*", layer_decay=0.5), Group(".*", lr=2.0)]
    found = settings_of(parameter_groups(named(*names), Optimizer(lr=1.0), rules))
    assert [found[name][0] for name in names] == [2 * 0.5**3, 2 * 0.5**3, 2 * 0.5**2, 2 * 0.5, 2.0, 2.0]


def test_blocks_of_all_stages_are_counted_through() -> None:
    stages = ["0.entrance", "0.blocks.0", "0.blocks.1", "0.norm", "1.entrance", "1.blocks.0", "1.norm"]
    names = [f"stages.{each}.a" for each in stages]
    found = settings_of(parameter_groups(named(*names), Optimizer(lr=1.0), [Group(".*", layer_decay=0.5)]))
    assert [found[name][0] for name in names] == [0.5**4, 0.5**3, 0.5**2, 0.5, 0.5, 0.5, 1.0]


def test_some_learn_as_slowly_as_the_embeddings_wherever_they_lie() -> None:
    names = ["vit.pos_embed", "vit.blocks.0.a", "vit.blocks.1.a", "head.queries", "head.a", "name.a"]
    rules = [Group(r"vit\..*|head\.queries|name\..*", layer_decay=0.5, first=r"head\..*|name\..*")]
    found = settings_of(parameter_groups(named(*names), Optimizer(lr=1.0), rules))
    assert [found[name][0] for name in names] == [0.5**3, 0.5**2, 0.5, 0.5**3, 1.0, 0.5**3]
    with pytest.raises(UserError, match=r"train\.groups\[0\]\.first: 'had\.\*' fits none of the 3 names"):
        parameter_groups(named(*names), Optimizer(), [Group(r"vit\..*", layer_decay=0.5, first="had.*")])
    with pytest.raises(UserError, match="first: says which names are the first layer of a layer_decay"):
        Group(".*", first="head")
    with pytest.raises(UserError, match=r"first: '\(' is no regular expression"):
        Group(".*", layer_decay=0.5, first="(")


def test_rules_may_be_for_so_many_dimensions_alone() -> None:
    parameters = {"a.weight": nn.Parameter(torch.zeros(2, 2)), "a.bias": nn.Parameter(torch.zeros(2))}
    found = settings_of(parameter_groups(parameters, Optimizer(lr=1.0), [Group(".*", dims=1, decay=0.0)]))
    assert found == {"a.weight": (1.0, 0.01), "a.bias": (1.0, 0.0)}
    with pytest.raises(UserError, match=r"groups\[0\]: dims: no parameter of '\.\*' has 3, they have \[1, 2\]"):
        parameter_groups(parameters, Optimizer(), [Group(".*", dims=3, decay=0.0)])


def test_frozen_parameters_are_left_out() -> None:
    parameters = named("a", "b")
    parameters["a"].requires_grad_(False)
    assert set(settings_of(parameter_groups(parameters, Optimizer(), [Group("a", lr=1.0)]))) == {"b"}
    with pytest.raises(UserError, match="every parameter is frozen"):
        parameter_groups({"a": parameters["a"]}, Optimizer(), [])


def test_mistakes_in_rules_are_sentences() -> None:
    with pytest.raises(
        UserError, match=r"train.groups\[1\]: 'had.weight' matches no parameter. Did you mean 'head.weight'\?"
    ):
        parameter_groups(named("head.weight"), Optimizer(), [Group(".*"), Group("had.weight", lr=2.0)])
    with pytest.raises(UserError, match=r"match: '\(' is no regular expression"):
        Group("(")
    with pytest.raises(UserError, match=r"layer_decay: none of the 1 parameters has 'blocks.<i>.'"):
        parameter_groups(named("head.weight"), Optimizer(), [Group(".*", layer_decay=0.75)])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizers_step_by_their_groups(kind: str) -> None:
    parameters = named("still", "moving")
    groups = parameter_groups(parameters, Optimizer(kind=kind, lr=0.1), [Group("still", lr=0.0)])  # pyright: ignore[reportArgumentType]
    optimizer = Optimizer(kind=kind, lr=0.1).build(groups)  # pyright: ignore[reportArgumentType]
    sum(parameters.values(), torch.zeros(1)).backward()
    optimizer.step()
    assert parameters["still"].item() == 0.0
    assert parameters["moving"].item() == pytest.approx(-0.1)


def test_warm_up_and_end() -> None:
    schedule = Schedule(power=1.0, warmup=0.5, warmup_ratio=0.1, end=0.5)
    assert schedule.factor(0, 10) == pytest.approx(0.1)
    assert schedule.factor(5, 10) == pytest.approx(0.75)
    assert schedule.factor(9, 10) == pytest.approx(0.55)
    assert Schedule().factor(0, 10) == 1.0


def test_cosine_falls_from_the_end_of_the_warm_up_on() -> None:
    """ViT-P's rule: s / w, then (1 + cos(pi (s - w) / (T - w))) / 2, also where the warm-up has no end."""
    steps, rising = 27_500, 1250
    schedule = Schedule("cosine", warmup=rising / steps, warmup_ratio=0.0)
    for step in (0, 1, 625, 1249):
        assert schedule.factor(step, steps) == pytest.approx(step / rising)
    for step in (1250, 1251, 14_375, 27_499):
        assert schedule.factor(step, steps) == pytest.approx((1 + math.cos(math.pi * (step - 1250) / 26_250)) / 2)
    # The learning rates that the released weights were saved at (specification 4.2).
    assert 9e-3 * Schedule("cosine").factor(18_750, 19_200) == pytest.approx(1.2e-5, rel=0.05)
    assert 1e-2 * schedule.factor(27_400, steps) == pytest.approx(3.6e-7, rel=0.05)
    assert Schedule("cosine", warmup=1.0, warmup_ratio=0.0).factor(9, 10) == pytest.approx(0.9)
    assert Schedule("cosine", end=0.5).factor(5, 10) == pytest.approx(0.75)
    with pytest.raises(UserError, match=r"power: 0.9 is of shape poly, and this is cosine; leave it out"):
        Schedule("cosine", power=0.9)


def test_average_follows_and_gives_way() -> None:
    module = nn.BatchNorm1d(1)
    average = Average(module, 0.75)
    with torch.no_grad():
        module.weight.fill_(3.0)
    module(torch.ones(2, 1))
    average.update(1000)
    assert average.tensors["weight"].item() == pytest.approx(1.5)  # 0.75 * 1 + 0.25 * 3
    assert average.tensors["num_batches_tracked"].item() == 1
    inside = []

    def fail() -> None:
        with average.applied():
            inside.append(module.weight.item())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert inside == pytest.approx([1.5])
    assert module.weight.item() == 3.0


def test_average_soon_forgets_the_start() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Average(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(5.0)
    for step in range(1, 100):
        average.update(step)
    assert average.tensors["weight"].item() == pytest.approx(5.0, rel=1e-3)


def test_training_refuses_what_cannot_be() -> None:
    for wrong, sentence in (
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"micro": 9}, r"micro: 9 must lie in 1..batch \(8\)"),
        ({"evaluate_every": 0.0}, "evaluate_every: 0.0 must lie in 0..1"),
        ({"clip": 0.0}, "clip: 0.0 must be above 0"),
        ({"average": 1.0}, "average: 1.0 must lie between 0 and 1"),
        ({"save_steps": 0}, "save_steps: 0 must be at least 1"),
        ({"workers": -1}, r"workers \(-1\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            Training(**{"steps": 10, "batch": 8} | wrong)
    with pytest.raises(UserError, match="8 cannot be shared out to 3 processes; make it 6 or 9"):
        Training(steps=10, batch=8).share(3)


def test_evaluations_are_fractions_of_the_training() -> None:
    assert Training(steps=10, batch=1, evaluate_every=0.3).evaluations == [3, 6, 9, 10]
    assert Training(steps=10, batch=1, evaluate_every=1.0).evaluations == [10]
    assert Training(steps=3, batch=1, evaluate_every=0.1).evaluations == [1, 2, 3]


def test_drops_bring_the_rate_to_a_tenth() -> None:
    schedule = Schedule(power=0.0, drops=(0.5, 0.75))
    factors = [schedule.factor(step, 8) for step in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    with pytest.raises(UserError, match=r"drops: \[1.5\] must lie between 0 and 1"):
        Schedule(drops=(1.5,))
