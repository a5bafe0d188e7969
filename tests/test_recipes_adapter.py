"""The bundled recipes of ViT-Adapter: each is its released configuration, for training, testing and augmented testing."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures_dir import FIXTURES
from maskfirst import recipe
from maskfirst.build import Experiment
from maskfirst.contracts import Augmentation
from maskfirst.frames import Size
from maskfirst.recipe import construct
from maskfirst.segmenter import Inference
from maskfirst.training import Training
from parity import vit_adapter_settings as settings
from parity.tables import read_json

SUBSET = Path(__file__).parent / "fixtures" / "vit-adapter"
CONFIGS = read_json((FIXTURES / "vit-adapter" if FIXTURES else SUBSET) / "manifests" / "config_summary.json.gz")
OF = settings.RECIPES
PICTURES: list[Size] = [(512, 683), (683, 512), (480, 640), (256, 256), (1024, 2048), (375, 500), (300, 700)]


def config(name: str, augmented: bool = False) -> dict[str, Any] | None:
    """The config of a recipe, for single-scale or for multi-scale testing; None where there is none."""
    ending = "_ms" if augmented else "_ss"
    return CONFIGS.get(OF[name] + ending, None if augmented else CONFIGS.get(OF[name]))


def built(section: Any, kind: Any, name: str) -> Any:
    from maskfirst.build import MENUS

    size = tuple(config(name)["test_cfg"]["crop_size"])
    return construct(section, kind, menus=MENUS, where="config", source=OF[name], given={object: {"size": size}})


def test_every_recipe_is_compared() -> None:
    assert set(OF) == {name for name in recipe.names() if name.startswith(("adapter-", "beit-"))}


@pytest.mark.parametrize("name", OF)
def test_training_is_the_original_s(name: str) -> None:
    told = config(name)
    assert told is not None
    ours, theirs = Experiment(recipe.load(name)).training(), built(settings.train(told), Training, name)
    # How often it was looked at changes nothing in what it learns.
    assert replace(ours, evaluate_every=1.0) == replace(theirs, evaluate_every=1.0)


@pytest.mark.parametrize("name", OF)
def test_training_samples_are_changed_as_there(name: str) -> None:
    told = config(name)
    assert told is not None
    ours, theirs = (
        Experiment(recipe.load(name)).augmentations(),
        built(settings.augment(told), list[Augmentation], name),
    )
    assert [(type(each), vars(each)) for each in ours] == [(type(each), vars(each)) for each in theirs]


def seen(inference: Inference, augmented: bool) -> Iterator[tuple[Any, ...]]:
    """All that a network is shown of some pictures."""
    for picture in PICTURES:
        for view in inference.views(picture, 1, augmented):
            yield view, *((each.outer, each.origin) for each in inference.windows(view, 1))


@pytest.mark.parametrize("name", OF)
def test_pictures_are_shown_as_there(name: str) -> None:
    inference = replace(Experiment(recipe.load(name)).segmenter(meta=True).inference, multiple=1)
    single, several = config(name), config(name, augmented=True)
    assert single is not None
    theirs = built(settings.inference(single), Inference, name)
    assert (inference.window, inference.stride) == (theirs.window, theirs.stride)
    assert (inference.order == "names_first") == ("mask2former" in name)
    # What the original does not pad it cannot take where it ends below the window.
    fitting = [picture for picture in PICTURES if min(theirs.fit.size(picture)) >= min(theirs.window or (0,))]
    assert len(fitting) >= 6
    for picture in fitting:
        (ours,), (view, *_) = inference.views(picture, 1, False), theirs.views(picture, 1, True)
        assert ours == replace(view, flipped=False)
        assert inference.windows(ours, 1) == theirs.windows(ours, 1)
    if several is not None:
        theirs = built(settings.inference(several), Inference, name)
        assert [*seen(inference, True)] == [*seen(theirs, True)]
        assert inference.average == "softmax"
        assert inference.pad == theirs.pad == 0 or inference.fill == theirs.fill
    elif not name.endswith(("mapillary", "coco-stuff-164k", "beitv2-l-mask2former-ade20k")):
        # The tables' scores of many scales are those of a switch of the test's there.
        assert inference.flip
        assert inference.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


PARAMETERS = {
    "adapter-deit-t-upernet-ade20k": 36,
    "adapter-deit-s-upernet-ade20k": 58,
    "adapter-beit-b-mask2former-coco-stuff-10k": 120,
    "adapter-deit-b-upernet-ade20k": 134,
    "adapter-augreg-l-upernet-ade20k": 364,
    "adapter-beit-l-mask2former-chase-db1": 350,
    "adapter-beit-l-mask2former-potsdam": 352,
    "adapter-beit-l-upernet-pascal-context": 451,
    "adapter-beit-l-mask2former-ade20k-640": 568,
    "adapter-beit-l-mask2former-ade20k": 571,
}
"""Millions, as published."""


@pytest.mark.parametrize("name", OF)
def test_parameters_are_the_original_s(name: str) -> None:
    counts = read_json((FIXTURES / "vit-adapter" if FIXTURES else SUBSET) / "manifests" / "summary.json")
    told = next(value for key, value in counts.items() if re.fullmatch(rf"{OF[name]}(_ss)?\.py", key))
    segmenter = Experiment(recipe.load(name)).segmenter(meta=True)
    ours = sum(parameter.numel() for parameter in segmenter.parameters())
    assert ours == told["total"] - settings.unread(config(name)["backbone"])
    if name in PARAMETERS:
        assert round(ours / 1e6) == PARAMETERS[name]
