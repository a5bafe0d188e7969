"""The bundled recipes: all can be built, and SegViT's carry its configuration and meet its published figures."""

import json
from pathlib import Path

import pytest
import torch

import offline
from fixtures_dir import FIXTURES
from maskfirst import recipe
from maskfirst.backbones.vit import TimmViT, resize_positions
from maskfirst.build import Experiment
from maskfirst.cost import Published, counted, figures, row
from maskfirst.errors import UserError
from maskfirst.frames import Frame
from maskfirst.optim import parameter_groups

SEGVIT = [name for name in recipe.names() if name.startswith("segvit-")]
LR_SCHEDULE = json.loads((Path(__file__).parent / "fixtures" / "segvit" / "lr_schedule.json").read_text())["lr"]


def experiment(name: str, *overrides: str) -> Experiment:
    return Experiment(recipe.load(name, overrides))


@pytest.mark.parametrize("name", recipe.names())
def test_recipe_can_be_built(name: str) -> None:
    told = experiment(name)
    segmenter = told.check()
    assert {parameter.device.type for parameter in segmenter.parameters()} == {"meta"}
    assert len(segmenter.vocabulary) == len(told.vocabulary)
    assert told.task in segmenter.proposer.tasks
    row(name)


def test_every_published_row_has_a_recipe() -> None:
    published = [told for name in SEGVIT if (told := row(name).published)]
    assert {told.scores["mIoU"] for told in published} == {51.3, 53.9, 54.6, 49.1, 49.9, 62.3, 64.1}
    assert len({told.checkpoint for told in published}) == len(SEGVIT) == 7


@pytest.mark.parametrize("name", SEGVIT)
def test_published_parameters_and_gflops(name: str) -> None:
    published, ours = row(name).published, counted(name)
    assert published is not None
    assert ours.gflops is not None
    assert ours.parameters == published.parameters
    assert round(ours.gflops, 1) == published.gflops


def test_figures_of_a_recipe_are_checked() -> None:
    wrong = recipe.load("segvit-vit-b-ade20k", ["published.gigaflops=1"])
    with pytest.raises(UserError, match=r"published: unknown key 'gigaflops'\. Did you mean 'gflops'"):
        figures(wrong, "published", Published)


@pytest.mark.parametrize(
    ("name", "steps", "schedule"),
    [
        ("segvit-vit-l-ade20k", 160_000, "ade20k_160k_power1"),
        ("segvit-vit-b-ade20k", 160_000, "ade20k_160k_power1"),
        ("segvit-vit-l-shrunk-coco-stuff-10k", 80_000, "cocostuff10k_80k_power2"),
        ("segvit-vit-l-pascal-context", 80_000, "pascal_context_80k_power1"),
    ],
)
def test_learning_rates_are_the_original_s(name: str, steps: int, schedule: str) -> None:
    training = experiment(name).training()
    assert training.steps == steps
    for step, (backbone, head) in LR_SCHEDULE[schedule].items():
        factor = training.schedule.factor(int(step), steps)
        assert training.optimizer.lr * factor == pytest.approx(backbone, rel=1e-9)
        assert 10 * training.optimizer.lr * factor == pytest.approx(head, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "decay"), [("segvit-vit-l-ade20k", 0.01), ("segvit-vit-l-shrunk-pascal-context", 0.03)]
)
def test_groups_are_the_original_s(name: str, decay: float) -> None:
    """196 tensors of the ViT decay and 96 do not; the head learns ten times faster and decays whole."""
    built = experiment(name)
    training = built.training()
    parameters = dict(built.segmenter(meta=True).named_parameters())
    found: dict[tuple[float, float], set[str]] = {}
    for group in parameter_groups(parameters, training.optimizer, training.groups):
        found.setdefault((group["lr"], group["weight_decay"]), set()).update(group["names"])
    backbone = {each for each in parameters if each.startswith("proposer.backbone.")}
    assert found[2e-4, decay] == set(parameters) - backbone
    assert len(found[2e-5, decay]) == 196
    assert len(found[2e-5, 0.0]) == 96
    assert all("norm1" in each or "norm2" in each for each in found[2e-5, 0.0])
    assert len(found) == 3


@pytest.mark.parametrize("name", SEGVIT)
def test_pictures_are_never_smaller_than_the_window(name: str) -> None:
    """So that multi-scale testing runs, which the original's ADE20K configuration cannot."""
    inference = experiment(name).segmenter(meta=True).inference
    assert inference.window is not None
    for size in ((512, 683), (333, 500), (256, 1024)):
        views = inference.views(size, 16, augment=True)
        assert len(views) == 12
        for view in views:
            assert min(view.inner) >= inference.window[0]
            assert {window.outer for window in inference.windows(view, 16)} == {inference.window}


if FIXTURES is not None:
    GEOMETRY = json.loads((FIXTURES / "segvit" / "test_geometry.json").read_text())
    OF = {
        "segvit-vit-l-ade20k": ("ade20k", ["inference.fit.least=null"]),
        "segvit-vit-l-shrunk-coco-stuff-10k": ("cocostuff10k", []),
        "segvit-vit-l-pascal-context": ("pascal_context", []),
    }

    @pytest.mark.parametrize("name", OF)
    def test_sizes_and_windows_are_the_original_s(name: str) -> None:
        data, overrides = OF[name]
        inference = experiment(name, *overrides).segmenter(meta=True).inference
        for row in GEOMETRY[data]["rows"]:
            view = Frame.fit(tuple(row["image"]), inference.fit, row["ratio"], 1)
            windows = inference.windows(view, 16)
            assert [*view.inner] == row["resized"]
            assert len(windows) == row["n_windows"]
            if row["windows"] is not None:
                seen = [[y, y + each.outer[0], x, x + each.outer[1]] for each in windows for y, x in [each.origin]]
                assert seen == row["windows"]


SMALL = {"model": "vit_tiny_patch16_384.augreg_in21k_ft_in1k", "final_norm": False}


def test_pretrained_weights_come_with_resized_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = offline.made_up(monkeypatch)
    trunk = TimmViT((64, 64), pretrained=True, **SMALL)
    (trained,) = made
    own, theirs = trunk.vit.state_dict(), trained.state_dict()
    assert {name for name in theirs if name not in own} == {"norm.weight", "norm.bias"}
    for name, tensor in own.items():
        if name == "pos_embed":
            assert torch.equal(tensor[:, 1:], resize_positions(theirs[name], (4, 4)))
            assert torch.equal(tensor[:, :1], theirs[name][:, :1])
        else:
            assert torch.equal(tensor, theirs[name])
    with pytest.raises(ValueError, match="leave out width and depth"):
        TimmViT((64, 64), width=96, pretrained=True, **SMALL)


def test_pretrained_weights_that_cannot_be_fetched_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    offline.unreachable(monkeypatch)
    with pytest.raises(UserError, match=r"could not be fetched \(no route to host\); give `weights:` instead"):
        TimmViT((64, 64), pretrained=True, **SMALL)
