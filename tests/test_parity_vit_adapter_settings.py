"""Parity with ViT-Adapter but for its network: its fixtures hold, and the runner that says so fails where it should."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures_dir import FIXTURES
from maskfirst import recipe
from maskfirst.build import MENUS, Experiment
from maskfirst.contracts import Augmentation
from maskfirst.convert import vit_adapter
from maskfirst.convert.rename import destinations
from maskfirst.segmenter import Inference
from maskfirst.training import Training
from parity.rows import Row, table
from parity.runner import run
from parity.tables import read_json
from parity.vit_adapter import published
from parity.vit_adapter_settings import augment, bundled, inference, rates_and_decays, train

SUBSET = Path(__file__).parent / "fixtures" / "vit-adapter"
FOLDERS = [SUBSET] if FIXTURES is None else [SUBSET, FIXTURES / "vit-adapter"]


def failing(folder: Path) -> list[Row]:
    return [row for row in run(folder) if not row.passed]


CONFIGS = read_json(SUBSET / "manifests" / "config_summary.json.gz")


@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "all"][: len(FOLDERS)])
def test_data_holds(folder: Path) -> None:
    """Every size, padding, flip and window of ten configs; label maps, names and colours of all data sets."""
    rows = run(folder / "data")
    assert len(rows) >= 698
    bad = [row for row in rows if not row.passed]
    assert not bad, table(bad)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_told_by_keys_of_recipes(name: str) -> None:
    """And by such that their parts take, and that say the same."""
    config = CONFIGS[name]

    def built(node: Any, kind: Any) -> Any:
        return recipe.construct(node, kind, menus=MENUS, where="", source=name)

    shown, steps = built(inference(config), Inference), built(train(config), Training)
    scale, fit = config["test_pipeline"][1]["img_scale"], shown.fit
    assert [list(each) for each in (shown.window, shown.stride)] == [
        config["test_cfg"][key] for key in ("crop_size", "stride")
    ]
    assert fit.short == min(scale)
    assert fit.long == max(scale) or fit.least == min(config["test_cfg"]["crop_size"])
    assert [type(each).__name__ for each in built(augment(config), list[Augmentation])] == [
        "RandomScale", "RandomCrop", "RandomFlip", "Photometric", "Pad",
    ]  # fmt: skip
    assert (steps.steps, steps.optimizer.lr) == (config["max_iters"], config["optimizer"]["lr"])
    assert steps.batch in (8, 16)


def grouped(name: str, told: dict[str, Any]) -> list[Row]:
    """The rows of the parameters of a config's recipe: `told` as in `optim`."""
    training = Experiment(recipe.load(*bundled(name))).training()
    parameters = dict(published(*bundled(name)).named_parameters())
    return [*rates_and_decays(name, told, training, parameters, vit_adapter.rules(told["params"]))]


def by_the_text(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Rates and decays of a config's parameters as the original assigns them by its own names."""
    settings = CONFIGS[name]["optimizer"]
    how, decay = settings["paramwise_cfg"], settings["weight_decay"]

    def layered(key: str, dims: int) -> list[float]:
        block = re.match(r"backbone\.(?:blocks|layers)\.(\d+)\.", key)
        slowest = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed", "backbone.visual_embed")
        slowest += tuple(f"decode_head.{each}" for each in ("cls_embed", "mask_embed", "level_embed", "query_"))
        depth = how["num_layers"]
        layer = int(block[1]) + 1 if block else 0 if key.startswith(slowest) else depth + 1
        return [how["layer_decay_rate"] ** (depth + 1 - layer), 0.0 if dims == 1 or key.endswith(".bias") else decay]

    def substring(key: str, dims: int) -> list[float]:
        hit = next((word for word in ("level_embed", "pos_embed", "bias", "head", "norm") if word in key), None)
        return [10.0 if hit == "head" else 1.0, decay if hit in ("head", None) else 0.0]

    rule = substring if "custom_keys" in how else layered
    told = {key: rule(key, len(each["shape"])) for key, each in manifest.items() if each["kind"] == "param"}
    columns = ["lr multiplier", "weight decay"]
    return {"config": name, "base_lr": settings["lr"], "base_weight_decay": decay, "columns": columns, "params": told}


@pytest.mark.parametrize("path", sorted((SUBSET / "optim").glob("*.json.gz")), ids=lambda path: path.name)
def test_rates_and_decays_are_the_recorded_ones(path: Path) -> None:
    """And the text of the original, read anew, is that of the records."""
    told = read_json(path)
    bad = [row for row in grouped(told["config"], told) if not row.passed]
    assert not bad, table(bad)
    own = dict(published(*bundled(told["config"])).named_parameters())
    homes = destinations(told["params"], vit_adapter.rules(told["params"]))
    shapes = {key: {"shape": own[goals[0]].shape, "kind": "param"} for key, goals in homes.items()}
    expected = by_the_text(told["config"], shapes)
    assert {key: pytest.approx(each, rel=1e-12) for key, each in expected["params"].items()} == told["params"]
    told["params"]["backbone.blocks.3.attn.proj.bias"] = [0.7, 0.0]
    assert len([row for row in grouped(told["config"], told) if not row.passed]) == 1


MANIFESTS = sorted(path for folder in FOLDERS[-1:] for path in (folder / "manifests").glob("*__*.json.gz"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_rates_and_decays_are_the_original_s(path: Path) -> None:
    """Also where they are not recorded: both kinds of rules on every kind of trunk and head."""
    name = path.name.removesuffix(".json.gz").replace("__", "/")
    manifest = read_json(path)
    bad = [row for row in grouped(name, by_the_text(name, manifest)) if not row.passed]
    assert not bad, table(bad)


def change(folder: Path, name: str, changed: Callable[[Any], None]) -> Path:
    """A folder with one file of the subset's data, changed."""
    shutil.copytree(SUBSET / "manifests", folder / "manifests")
    content = read_json(next((SUBSET / "data").glob(f"{name}*")))
    changed(content)
    (folder / "data").mkdir()
    (folder / "data" / name).write_text(json.dumps(content))
    return folder / "data"


def view(content: Any) -> Any:
    return content["ade_m2f_896_ms"]["cases"][0]["views"][2]


@pytest.mark.parametrize(
    ("name", "changed", "row"),
    [
        ("test_resize_and_windows.json", lambda told: view(told)["windows"][1].__setitem__(2, 159), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: view(told).update(flip=True), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: view(told).update(img_shape=[896, 1056]), "512x683, view 2"),
        ("test_resize_and_windows.json", lambda told: told["city_m2f_ss"]["cases"][1]["views"].pop(), "480x640, views"),
        ("test_resize_and_windows.json", lambda told: told["pctx_m2f_ms"].update(stride=[1, 1]), "windows and strides"),
        ("label_luts.json", lambda told: told["reduce_zero_label_lut"].__setitem__(255, 254), "reduce_zero_label_lut"),
        (
            "label_luts.json",
            lambda told: told["mapillary_to_cityscapes_trainid_lut"].__setitem__(41, 1),
            "mapillary_to_cityscapes_trainid_lut",
        ),
        ("label_luts.json", lambda told: told.update(another=[0]), "another"),
        ("coco_stuff_raw_to_train_id.json", lambda told: told["coco_stuff164k"].update({"181": 1}), "coco_stuff164k"),
        ("coco_stuff_raw_to_train_id.json", lambda told: told["coco_stuff10k"].update({"13": 1}), "coco_stuff10k"),
        ("classes_palettes.json", lambda told: told["PotsdamDataset"]["palette"].reverse(), "PotsdamDataset: colours"),
        ("classes_palettes.json", lambda told: told["ADE20KDataset"]["classes"].reverse(), "ADE20KDataset: names"),
    ],
)
def test_one_wrong_number_shows(tmp_path: Path, name: str, changed: Callable[[Any], None], row: str) -> None:
    (found,) = failing(change(tmp_path, name, changed))
    assert found.file == name
    assert found.name.endswith(row)


def test_what_it_does_not_know_fails(tmp_path: Path) -> None:
    folder = change(tmp_path, "classes_palettes.json", lambda told: told.update(LoveDADataset=told["PotsdamDataset"]))
    assert [row.note for row in failing(folder)] == ["NotCoveredError: classes of LoveDADataset"]
