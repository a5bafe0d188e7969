"""The bundled recipes of InternImage: parameters as published, and its released configurations' rates and decays."""

import pytest
from torch import nn

from maskfirst import recipe
from maskfirst.build import Experiment
from maskfirst.optim import parameter_groups
from maskfirst.segmenter import Segmenter

NAMES = [name for name in recipe.names() if name.startswith("internimage-")]
MILLIONS = {
    "t-upernet": 59, "s-upernet": 80, "b-upernet": 128, "l-upernet": 256, "xl-upernet": 368, "h-upernet": 1120,
    "h-mask2former": 1310,
}  # fmt: skip
"""As published; of billions three digits are."""
SPARE = (150 - 19) * (513 + 257)
"""Parameters of classes that Cityscapes has not, in the heads of the released UperNets for it, and in their figures."""


def built(name: str) -> Segmenter:
    return Experiment(recipe.load(name)).segmenter(meta=True)


def settings(name: str) -> dict[str, tuple[float, float]]:
    """The rate and the decay of every parameter."""
    training = Experiment(recipe.load(name)).training()
    groups = parameter_groups(dict(built(name).named_parameters()), training.optimizer, training.groups)
    return {each: (group["lr"], group["weight_decay"]) for group in groups for each in group["names"]}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    count = sum(parameter.numel() for parameter in built(name).parameters())
    millions = (count + (SPARE if "upernet-cityscapes" in name else 0)) / 1e6
    if name == "internimage-h-mask2former-cityscapes":
        assert round(millions) == 1094
    else:
        _, size, head, *_ = name.split("-")
        published = MILLIONS[f"{size}-{head}"]
        assert round(millions, -1 if published > 1000 else None) == published


def test_every_published_row_has_a_recipe() -> None:
    scores = {name: tuple(recipe.load(name).tree["published"]["scores"].values()) for name in NAMES}
    assert len(set(scores.values())) == len(NAMES) == 16


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_small_ones_learn_at_one_rate(size: str) -> None:
    name = f"internimage-{size}-upernet-ade20k"
    dims = {key: parameter.ndim for key, parameter in built(name).named_parameters()}
    assert settings(name) == {key: (6e-5, 0.0 if count == 1 else 0.05) for key, count in dims.items()}


def layer(key: str, depths: tuple[int, ...], last: int) -> int:
    """The original's rule: the stem is 0, block n of all is n, counted from 1, what ends a stage is of the next one's first
    block, or of its own stage's where there is none, a norm between blocks goes by its number, and heads are the last."""
    if not key.startswith("proposer.backbone."):
        slowest = ("queries", "positions", "level_embed", "mask_embed")
        return 0 if key.startswith(("namer.", *(f"proposer.{name}" for name in slowest))) and last == 51 else last
    _, _, _, stage, place, *rest = key.split(".")
    begin = sum(depths[: int(stage)])
    if place == "entrance":
        return begin + 1 if begin else 0
    if place == "norm":
        return sum(depths[: min(int(stage), 2) + 1]) + 1
    return begin + int(rest[0]) + 1


@pytest.mark.parametrize(
    ("name", "depths", "lr", "decay"),
    [
        ("internimage-l-upernet-ade20k", (5, 5, 22, 5), 2e-5, 0.94),
        ("internimage-xl-upernet-cityscapes-mapillary", (5, 5, 24, 5), 2e-5, 0.94),
        ("internimage-h-upernet-ade20k", (6, 6, 32, 6), 2e-5, 0.95),
        ("internimage-h-mask2former-ade20k", (6, 6, 32, 6), 1e-5, 0.95),
        ("internimage-h-mask2former-coco-stuff-164k", (6, 6, 32, 6), 2e-5, 0.95),
        ("internimage-h-mask2former-cityscapes", (6, 6, 32, 6), 1e-5, 0.95),
    ],
)
def test_large_ones_learn_layer_by_layer(name: str, depths: tuple[int, ...], lr: float, decay: float) -> None:
    parameters: dict[str, nn.Parameter] = dict(built(name).named_parameters())
    found, last = settings(name), sum(depths) + 1
    heads = "upernet" if "upernet" in name else "mask2former"
    for key, parameter in parameters.items():
        index = last if heads == "upernet" and not key.startswith("proposer.backbone.") else layer(key, depths, last)
        plain = parameter.ndim == 1 or key.endswith("attention.offsets.weight")
        rate, weight_decay = found[key]
        assert rate == pytest.approx(lr * decay ** (last - index), rel=1e-4), key
        assert weight_decay == (0.0 if plain else 0.05), key


def test_whole_pictures_are_looked_at_but_by_mask2former_on_cityscapes() -> None:
    windows = {name: built(name).inference.window for name in NAMES}
    slides = "internimage-h-mask2former-cityscapes"
    assert windows == {**dict.fromkeys(NAMES), slides: (1024, 1024)}
