"""The run folder: whole at every instant, even on a full disk, and exact about what it resumes from."""

import copy
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_parts
from maskfirst.checkpoint import STATE, RunFolder, State, collect, restore, trend
from maskfirst.errors import UserError
from maskfirst.files import DiskError
from maskfirst.optim import Average, Group, Optimizer, parameter_groups
from maskfirst.stream import Load

RECIPE: dict[str, Any] = {
    "size": (4, 4),
    "train": {"steps": 3, "groups": [{"match": ".*", "lr": 1e-05}]},
    "augment": [],
}


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def trained(module: nn.Module, kind: str = "adamw", steps: int = 3) -> tuple[dict[str, torch.optim.Optimizer], Average]:
    """Its optimizer and average after some steps on data of their own."""
    settings = Optimizer(kind=kind, lr=0.1)  # pyright: ignore[reportArgumentType]
    optimizer = settings.build(parameter_groups(dict(module.named_parameters()), settings, [Group("0.*", lr=0.5)]))
    average = Average(module, 0.9)
    generator = torch.Generator().manual_seed(steps)
    for step in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 2, generator=generator)).square().sum().backward()
        optimizer.step()
        average.update(step)
    return {"all": optimizer}, average


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_is_restored_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: str) -> None:
    first, second = network(), network()
    optimizers, average = trained(first, kind)
    RunFolder(tmp_path).save(State(step=3), collect(first, optimizers, average), RECIPE)
    others, another = trained(second, kind, steps=0)
    restore(RunFolder(tmp_path).tensors(), second, others, another)
    for module, optimizer, mean in ((first, optimizers["all"], average), (second, others["all"], another)):
        optimizer.zero_grad()
        module(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        mean.update(4)
    one, other = collect(first, optimizers, average), collect(second, others, another)
    assert set(one) == set(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(name.startswith("optimizer.all.0.weight.") for name in one)


def test_parameters_without_a_moment_yet_stay_without(tmp_path: Path) -> None:
    module = network()
    optimizers, average = trained(module, steps=0)
    RunFolder(tmp_path).save(State(), collect(module, optimizers, average), RECIPE)
    restore(RunFolder(tmp_path).tensors(), module, optimizers, average)
    assert not optimizers["all"].state


def test_another_model_is_refused(tmp_path: Path) -> None:
    module, wider = network(), network(width=4)
    optimizers, average = trained(module)
    tensors = collect(module, optimizers, average)
    with pytest.raises(UserError, match=r"does not fit this model .*'average.0.bias'"):
        restore(tensors, wider, *trained(wider))
    with pytest.raises(UserError, match=r"does not fit this model .*'average.0.bias'"):
        restore(tensors, module, optimizers, None)


def test_state_comes_back(tmp_path: Path) -> None:
    state = State(7, 2, [(3, 0.25), (7, 0.5)], {"mIoU": 0.5}, 12.5, ["a.png: truncated"])
    folder = RunFolder(tmp_path / "run")
    assert folder.open(RECIPE, resume=False) == State()
    folder.save(state, {"x": torch.ones(2)}, RECIPE)
    assert RunFolder(tmp_path / "run").open(copy.deepcopy(RECIPE), resume=True) == state
    assert (state.best, state.evaluated, state.is_best) == (0.5, 7, True)


def test_resume_before_the_first_save_starts_anew_with_the_same_recipe_only(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).open(RECIPE, resume=True) == State()
    assert RunFolder(tmp_path).open(RECIPE, resume=True) == State()
    with pytest.raises(UserError, match=r"train.steps \(3 there, 4 now\)"):
        RunFolder(tmp_path).open({**RECIPE, "train": {**RECIPE["train"], "steps": 4}}, resume=True)
    with pytest.raises(UserError, match=r"holds a run already \(recipe.yaml\)"):
        RunFolder(tmp_path).open(RECIPE, resume=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"augment": [{"kind": "flip"}]}, "augment ([] there, absent now), augment.0.kind (absent there, flip now)"),
        ({"size": (4, 5)}, "size.1 (4 there, 5 now)"),
        (
            {"train": {"steps": 3}},
            "train.groups.0.match (.* there, absent now), train.groups.0.lr (1e-05 there, absent now)",
        ),
    ],
)
def test_every_key_that_differs_is_listed(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    RunFolder(tmp_path).open(RECIPE, resume=False)
    with pytest.raises(UserError) as refused:
        RunFolder(tmp_path).open(RECIPE | change, resume=True)
    assert f"another recipe: {told}; resume with {tmp_path}/recipe.yaml" in str(refused.value)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).open(RECIPE, resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_state_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=f"{STATE}: is not the state of a run"):
        RunFolder(tmp_path).open(RECIPE, resume=True)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: the system refuses the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_a_sentence_and_the_former_save_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(State(step=1), {"x": torch.ones(2)}, RECIPE)
    with pytest.raises(DiskError, match=f"{STATE}: not saved: .*untouched"):
        folder.save(State(step=2), {"x": torch.ones(100_000)}, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert folder.open(RECIPE, resume=True).step == 1
    assert torch.equal(folder.tensors()["x"], torch.ones(2))


def test_a_batch_set_aside_can_be_read_again(tmp_path: Path) -> None:
    samples = [tiny_parts.Noise()[index] for index in range(3)]
    loads = [Load.pack(samples[:2], ["x.png: truncated"]), Load.pack(samples[2:], [])]
    path = RunFolder(tmp_path).save_batch(loads, 5, 1)
    assert path.name == "nonfinite_step_5_rank_1.safetensors"
    again = [sample for one in RunFolder.read_batch(path) for sample in one.unpack(torch.device("cpu"))]
    assert [sample.key for sample in again] == ["noise-0", "noise-1", "noise-2"]
    assert all(torch.equal(a.image, b.image) and torch.equal(a.ids, b.ids) for a, b in zip(samples, again, strict=True))


def test_trend_of_the_curve() -> None:
    def told(*scores: float) -> str:
        return trend([(step, score) for step, score in enumerate(scores)])

    assert told(0.1, 0.2) == "too few evaluations to say whether the curve is flat"
    assert told(0.1, 0.2, 0.4) == (
        "the curve is still rising, +20.0 points in the last fifth: a longer training is likely better"
    )
    assert told(0.1, 0.4, 0.401) == "the curve is flat, +0.1 points in the last fifth"
    assert "falling, -10.0" in told(0.1, 0.5, 0.4)
    assert "flat" in told(*[0.1] * 6, 0.50, 0.52, 0.51, 0.511)


def test_scores_say_curve_time_and_hardware(tmp_path: Path) -> None:
    state = State(step=4, curve=[(2, 0.5), (4, 0.25)], scores={"mIoU": 0.25}, seconds=90.0)
    RunFolder(tmp_path).finish(state, "mIoU", "a machine")
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "scores": {"mIoU": 0.25},
        "best": {"step": 2, "mIoU": 0.5},
        "curve": [{"step": 2, "mIoU": 0.5}, {"step": 4, "mIoU": 0.25}],
        "trend": "too few evaluations to say whether the curve is flat",
        "steps": 4,
        "minutes": 1.5,
        "hardware": "a machine",
        "unreadable": [],
    }
