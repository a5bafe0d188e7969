"""The bundled recipes of ViT-Adapter: each is its released configuration, for training, testing and augmented testing."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures_dir import FIXTURES
from maskfirst import recipe
from maskfirst.build import Experiment
from parity import vit_adapter_recipes, vit_adapter_settings
from parity.foreign import NotCoveredError
from parity.rows import table
from parity.runner import run
from parity.tables import read_json
from parity.vit_adapter import published

SUBSET = Path(__file__).parent / "fixtures" / "vit-adapter" / "manifests"
FOLDER = SUBSET if FIXTURES is None else FIXTURES / "vit-adapter" / "manifests"
CONFIGS = read_json(SUBSET / "config_summary.json.gz")
NAMES = vit_adapter_settings.RECIPES


def test_every_recipe_has_its_config() -> None:
    assert set(NAMES) == {name for name in recipe.names() if name.startswith(("adapter-", "beit-"))}
    assert {vit_adapter_settings.bundled(config)[0] for config in CONFIGS} == set(NAMES)


def test_all_of_the_manifests_hold() -> None:
    """Keys and sizes of the full-size models; of every config network, training, changes of samples, and views."""
    rows = run(FOLDER)
    bad = [row for row in rows if not row.passed]
    assert not bad, table(bad)
    assert {row.file for row in rows} == {path.name for path in FOLDER.iterdir()}
    for name in CONFIGS:
        assert len([row for row in rows if row.name.startswith(f"{name}: ")]) >= 12


VIT = "ade20k/upernet_augreg_adapter_base_512_160k_ade20k"
BASELINE = "ade20k/upernet_beit_large_512_160k_ade20k_ms"
MASKS = "ade20k/mask2former_beit_adapter_large_896_80k_ade20k_ss"
TILES = "potsdam/mask2former_beit_adapter_large_512_80k_potsdam_ss"


def unreduced(config: Any) -> None:
    del config["train_pipeline"][1]["reduce_zero_label"]


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        (VIT, lambda told: told["optimizer"].update(lr=3e-5), {"training"}),
        (MASKS, lambda told: told["optimizer"]["paramwise_cfg"].update(layer_decay_rate=0.95), {"training"}),
        (MASKS, lambda told: told.update(samples_per_gpu=2), {"training"}),
        (VIT, lambda told: told["train_pipeline"][3].update(cat_max_ratio=0.8), {"training samples"}),
        (VIT, lambda told: told["train_norm"].update(std=[58.0] * 3), {"backbone", "normalisation in tests"}),
        (VIT, lambda told: told["backbone"].update(num_heads=6), {"backbone"}),
        (VIT, lambda told: told["backbone"].update(drop_path_rate=0.2), {"backbone"}),
        (MASKS, lambda told: told["backbone"].update(with_cp=False), {"backbone"}),
        (MASKS, lambda told: told["backbone"].update(init_values=1e-5), {"backbone", "what scales begin with"}),
        (BASELINE, lambda told: told["backbone"].update(img_size=640), {"backbone"}),
        (BASELINE, lambda told: told["aux"].update(channels=512), {"head"}),
        (MASKS, lambda told: told["head"].update(num_queries=100), {"head"}),
        (MASKS, lambda told: told.update(pretrained="beitv2_large_patch16_224_pt1k_ft21k.pth"), {"pretrained trunk"}),
        (TILES, lambda told: told["train_set"].update(img_dir="images/train"), {"folders of train"}),
        (TILES, unreduced, {"numbers of train", "numbers of val"}),
        (TILES, lambda told: told["train_set"].update(type="CityscapesDataset"), {"classes"}),
        (MASKS, lambda told: told["test_cfg"].update(stride=[511, 512]), {"windows and strides"}),
        (BASELINE, lambda told: told["test_pipeline"][1]["img_ratios"].pop(), {"views"}),
    ],
)
def test_one_wrong_setting_shows(name: str, change: Callable[[Any], Any], shown: set[str]) -> None:
    config = copy.deepcopy(CONFIGS[name])
    change(config)
    rows = vit_adapter_recipes.compared("", name, config)
    bad = {row.name.removeprefix(f"{name}: ").split(", as ")[0] for row in rows if not row.passed}
    # Other windows show in the views of some pictures, too.
    assert {each for each in bad if not each.startswith("view of ")} == shown


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("ade20k/upernet_deit_adapter_huge", {}, "no recipe for ade20k/upernet_deit_adapter_huge"),
        (VIT, {"teacher": {}}, f"{VIT}: unknown keys teacher"),
        (
            VIT,
            {"optimizer": CONFIGS[VIT]["optimizer"] | {"paramwise_cfg": {"custom_keys": {}}}},
            "paramwise_cfg.custom_keys",
        ),
    ],
    ids=["config", "section", "rules"],
)
def test_what_no_recipe_says_is_not_passed_over(name: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(NotCoveredError, match=told):
        list(vit_adapter_recipes.compared("", name, CONFIGS[VIT] | change))


MANIFEST = "ade20k__upernet_deit_adapter_small_512_160k_ade20k.json.gz"


@pytest.mark.parametrize(
    ("key", "changed", "shown"),
    [
        ("backbone.level_embed", {"kind": "buffer"}, "kinds"),
        ("backbone.norm1.num_batches_tracked", {"dtype": "float32"}, "types"),
        ("backbone.level_embed", {"shape": [3, 385]}, ""),
    ],
)
def test_one_wrong_entry_of_a_manifest_shows(tmp_path: Path, key: str, changed: dict[str, Any], shown: str) -> None:
    told = read_json(SUBSET / MANIFEST)
    told.get("keys", told)[key].update(changed)
    (tmp_path / MANIFEST).write_bytes(gzip.compress(json.dumps(told).encode()))
    assert [row.name for row in run(tmp_path) if not row.passed] == [shown]


def test_one_wrong_size_shows() -> None:
    told = read_json(SUBSET / "summary.json.gz")[f"{MASKS}.py"]
    found = vit_adapter_recipes.sizes_of(published("adapter-beit-l-mask2former-ade20k"), CONFIGS[MASKS])
    assert found == told
    other = vit_adapter_recipes.sizes_of(published("adapter-beit-l-mask2former-ade20k-640"), CONFIGS[MASKS])
    assert {key for key in told if other[key] != told[key]} == {"total", "backbone", "decode_head"}


ALONE = [name for name in NAMES if f"{NAMES[name]}_ms" not in CONFIGS]
"""Those without a config of many scales."""
LIKE_OTHERS = {"adapter-beit-l-mask2former-mapillary", "adapter-beitv2-l-mask2former-coco-stuff-164k"}
"""Those among them that have the scales of others on such pictures."""


@pytest.mark.parametrize("name", sorted({*ALONE} - LIKE_OTHERS))
def test_without_a_config_of_many_scales_they_are_those_of_the_original_s_switch(name: str) -> None:
    inference = Experiment(recipe.load(name)).segmenter(meta=True).inference
    assert inference.flip
    assert inference.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


PARAMETERS = {
    "adapter-deit-t-upernet-ade20k": 36,
    "adapter-deit-s-upernet-ade20k": 58,
    "adapter-beit-b-mask2former-coco-stuff-10k": 120,
    "adapter-deit-b-upernet-ade20k": 134,
    "adapter-beit-l-mask2former-chase-db1": 350,
    "adapter-beit-l-mask2former-potsdam": 352,
    "adapter-augreg-l-upernet-ade20k": 364,
    "adapter-beit-l-upernet-pascal-context": 451,
    "adapter-beit-l-mask2former-ade20k-640": 568,
    "adapter-beit-l-mask2former-ade20k": 571,
}
"""Millions, as published."""


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_parameters_are_as_many_as_published(name: str, millions: int) -> None:
    assert round(sum(parameter.numel() for parameter in published(name).parameters()) / 1e6) == millions
