"""The bundled recipes of ViT-P: sizes, points, steps and rates of the released configurations."""

import pytest

from maskfirst import recipe
from maskfirst.build import Experiment
from maskfirst.convert import vit_p
from maskfirst.phases.points import PointPhase

TABLE = {
    "vit-p-b-ade20k": (86_696_598, 250, (518, 518), 80, 19200, 0, 9e-3),
    "vit-p-l-ade20k": (304_523_414, 200, (518, 518), 80, 19200, 0, 3e-2),
    "vit-p-b-coco": (86_683_525, 150, (518, 518), 80, 37500, 0, 6e-3),
    "vit-p-l-coco": (304_505_989, 250, (518, 518), 80, 37500, 0, 1e-2),
    "vit-p-b-cityscapes": (86_595_859, 250, (518, 1036), 80, 20700, 0, 1e-2),
    "vit-p-l-cityscapes": (304_389_139, 250, (518, 1036), 48, 34500, 0, 3e-3),
    # Of the B there is no released configuration.
    "vit-p-b-coco-stuff-164k": (86_712_747, 200, (518, 518), 80, 27500, 1250, 1e-2),
    "vit-p-l-coco-stuff-164k": (304_544_939, 200, (518, 518), 80, 27500, 1250, 1e-2),
    "vit-p-b-objects365": (86_861_933, 250, (518, 518), 280, 18666, 0, 1e-2),
    "vit-p-l-objects365": (304_743_789, 250, (518, 518), 80, 10885, 2177, 1e-2),
}
"""Parameters, points, size, pictures on four devices, steps, steps of warm-up, rate."""
UNREAD = {"b": 768, "l": 1024}
"""Of a token that the original has and never reads."""
POINTS_RATE = 1e-2


def test_every_recipe_is_compared() -> None:
    named = {name for name in recipe.names() if name.startswith("vit-p-")}
    assert set(TABLE) == {name for name in named if recipe.load(name).tree["namer"]["kind"] == "vit_p"}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_the_released_configuration(name: str) -> None:
    parameters, points, size, batch, steps, warmup, rate = TABLE[name]
    experiment = Experiment(recipe.load(name))
    experiment.check()
    model, settings = experiment.segmenter(meta=True), experiment.training()
    phase = experiment.phase(model)
    assert isinstance(phase, PointPhase)
    assert sum(each.numel() for each in model.parameters()) == parameters - UNREAD[name.split("-")[2]]
    assert (phase.count, phase.namer.size, experiment.size) == (points, size, size)
    assert (settings.batch, settings.steps, round(settings.schedule.warmup * steps)) == (batch, steps, warmup)
    groups = phase.optimizers["points"].param_groups
    rates = {key: group["base"] for group in groups for key in group["names"]}
    assert rates["namer.point_proj.weight"] == pytest.approx(POINTS_RATE)
    assert rates["namer.head.weight"] == rates["namer.trunk.vit.blocks.0.attn.qkv.weight"] == pytest.approx(rate)
    assert all(group["weight_decay"] == 0 for group in groups)


@pytest.mark.parametrize("name", TABLE)
def test_a_checkpoint_of_its_shapes_is_known_by_them(name: str) -> None:
    own = {
        key.removeprefix("namer."): each
        for key, each in Experiment(recipe.load(name)).segmenter(True).state_dict().items()
    }
    theirs = {key.removeprefix("trunk.vit."): each for key, each in own.items() if key.startswith("trunk.vit.")}
    theirs |= {"cls_embeddings.weight": own["point_proj.weight"], "head.weight": own["head.weight"]}
    assert vit_p.plan(theirs) == (name, ())
