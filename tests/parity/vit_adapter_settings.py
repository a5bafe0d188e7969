"""ViT-Adapter but for its network: how pictures are laid, what labels mean, the colours, and what steps the weights."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from maskfirst import recipe as recipes
from maskfirst.convert.rename import Rule, destinations
from maskfirst.data.coco_stuff import COCOStuff164K
from maskfirst.data.coding import UNKNOWN, Code
from maskfirst.data.folder import Folder, Paired
from maskfirst.data.mapillary import MapillaryAsCityscapes
from maskfirst.data.vocabulary import load
from maskfirst.frames import Frame
from maskfirst.optim import Schedule
from maskfirst.segmenter import Inference
from maskfirst.training import Training
from maskfirst.types import VOID

from .foreign import NotCoveredError, Settings
from .rows import Row, compare, equal, failed
from .tables import RATES, read_json, same_groups

RECIPES = {
    "adapter-deit-t-upernet-ade20k": "ade20k/upernet_deit_adapter_tiny_512_160k_ade20k",
    "adapter-deit-s-upernet-ade20k": "ade20k/upernet_deit_adapter_small_512_160k_ade20k",
    "adapter-deit-b-upernet-ade20k": "ade20k/upernet_deit_adapter_base_512_160k_ade20k",
    "adapter-deit-b-light-upernet-ade20k": "ade20k/upernet_deit_adapter_light_base_512_160k_ade20k",
    "adapter-augreg-t-upernet-ade20k": "ade20k/upernet_augreg_adapter_tiny_512_160k_ade20k",
    "adapter-augreg-b-upernet-ade20k": "ade20k/upernet_augreg_adapter_base_512_160k_ade20k",
    "adapter-augreg-l-upernet-ade20k": "ade20k/upernet_augreg_adapter_large_512_160k_ade20k",
    "adapter-uni-perceiver-l-upernet-ade20k": "ade20k/upernet_uniperceiver_adapter_large_512_160k_ade20k",
    "beit-l-upernet-ade20k": "ade20k/upernet_beit_large_512_160k_ade20k",
    "adapter-beit-l-upernet-ade20k": "ade20k/upernet_beit_adapter_large_640_160k_ade20k",
    "adapter-beit-l-mask2former-ade20k-640": "ade20k/mask2former_beit_adapter_large_640_160k_ade20k",
    "adapter-beit-l-mask2former-ade20k": "ade20k/mask2former_beit_adapter_large_896_80k_ade20k",
    "adapter-beitv2-l-mask2former-ade20k": "ade20k/mask2former_beitv2_adapter_large_896_80k_ade20k",
    "adapter-beit-l-mask2former-cityscapes": "cityscapes/mask2former_beit_adapter_large_896_80k_cityscapes",
    "adapter-beit-l-mask2former-mapillary": "cityscapes/mask2former_beit_adapter_large_896_80k_mapillary",
    "adapter-beit-b-mask2former-coco-stuff-10k": "coco_stuff10k/mask2former_beit_adapter_base_512_40k_cocostuff10k",
    "adapter-beit-l-upernet-coco-stuff-10k": "coco_stuff10k/upernet_beit_adapter_large_512_80k_cocostuff10k",
    "adapter-beit-l-mask2former-coco-stuff-10k": "coco_stuff10k/mask2former_beit_adapter_large_512_40k_cocostuff10k",
    "adapter-beit-l-upernet-coco-stuff-164k": "coco_stuff164k/upernet_beit_adapter_large_640_80k_cocostuff164k",
    "adapter-beit-l-mask2former-coco-stuff-164k": "coco_stuff164k/mask2former_beit_adapter_large_896_80k_cocostuff164k",
    "adapter-beitv2-l-mask2former-coco-stuff-164k": "coco_stuff164k/mask2former_beitv2_adapter_large_896_80k_cocostuff164k",
    "adapter-beit-b-mask2former-pascal-context": "pascal_context/mask2former_beit_adapter_base_480_40k_pascal_context_59",
    "adapter-beit-l-upernet-pascal-context": "pascal_context/upernet_beit_adapter_large_480_80k_pascal_context_59",
    "adapter-beit-l-mask2former-pascal-context": "pascal_context/mask2former_beit_adapter_large_480_40k_pascal_context_59",
    "adapter-beit-l-mask2former-potsdam": "potsdam/mask2former_beit_adapter_large_512_80k_potsdam",
    "adapter-beit-l-mask2former-chase-db1": "chase_db1/mask2former_beit_adapter_large_128_40k_chase_db1",
}
"""Recipe -> config; those that end in _ss and _ms are two, and one bundled recipe here."""
VARIANTS = {
    "ade20k/mask2former_beitv2_adapter_large_896_160k_ade20k": (
        "adapter-beitv2-l-mask2former-ade20k",
        ("train.steps=160000", "train.schedule.warmup=0.009375"),
    ),
}
"""Config without a published score -> the recipe of which it is a variant, and what it changes there."""


def bundled(config: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of a config, and its overrides. Raises NotCoveredError where there is none."""
    name = re.sub("_(ss|ms)$", "", config)
    if name in VARIANTS:
        return VARIANTS[name]
    for recipe, known in RECIPES.items():
        if known == name:
            return recipe, ()
    raise NotCoveredError(f"no recipe for {config}")


def inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `inference` of a recipe that lays pictures as a config of the original's does in its test.

    Its `fit` is for augmented testing, too: a config has one of both. Raises NotCoveredError.
    """
    load, test = (Settings(step, "test_pipeline") for step in config["test_pipeline"])
    load.only("type", "LoadImageFromFile")
    test.only("type", "MultiScaleFlipAug")
    scale = test.need("img_scale")
    section: dict[str, Any] = {
        "fit": {"long": max(scale), "short": min(scale)},
        "multiple": 1,
        "scales": test.take("img_ratios", [1.0]),
        "flip": test.need("flip"),
        "average": "softmax",
    }
    if config["head"]["type"] == "Mask2FormerHead":
        # Its masks are mixed into scores at their own size, and those are enlarged to the window.
        section["order"] = "names_first"
    normalised = False
    for content in test.need("transforms"):
        step = Settings(content, "transforms")
        kind = step.need("type")
        if kind == "Resize":
            step.only("keep_ratio", False, True)
        elif kind == "SETR_Resize":
            step.only("keep_ratio", False, True)
            step.only("setr_multi_scale", False, True)
            section["fit"] = {"short": min(scale), "least": min(step.need("crop_size"))}
        elif kind == "ResizeToMultiple":
            section["fit"]["round_up"] = step.need("size_divisor")
        elif kind == "PadShortSide":
            step.only("pad_val", 0)
            step.only("seg_pad_val", 255)
            section |= {"pad": step.need("size"), "fill": "mean" if normalised else "black"}
        elif kind == "Normalize":
            normalised = True
        elif kind in ("ImageToTensor", "Collect"):
            step.only("keys", None, ["img"])
        elif kind != "RandomFlip":
            raise NotCoveredError(f"transforms: {kind}")
        step.done()
    test.done()
    windows = Settings(config["test_cfg"], "test_cfg")
    windows.only("mode", "slide")
    section |= {"window": windows.need("crop_size"), "stride": windows.need("stride")}
    windows.done()
    return section


def augment(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The section `augment` of a recipe that changes training samples as a config of the original's does."""
    mean = [round(value) for value in config["train_norm"]["mean"]]
    section: list[dict[str, Any]] = []
    for content in config["train_pipeline"]:
        step = Settings(content, "train_pipeline")
        kind = step.need("type")
        if kind == "Resize":
            low, high = step.need("ratio_range")
            scale = step.need("img_scale")
            section.append(
                {"kind": "scale", "low": low, "high": high, "fit": {"long": max(scale), "short": min(scale)}}
            )
        elif kind == "RandomCrop":
            size, most = step.need("crop_size"), step.need("cat_max_ratio")
            section.append({"kind": "crop", "size": size, "most": most, "tries": 10})
        elif kind == "RandomFlip":
            section.append({"kind": "flip", "p": step.need("prob")})
        elif kind == "PhotoMetricDistortion":
            section.append({"kind": "photometric"})
        elif kind == "Pad":
            step.only("pad_val", 0)
            step.only("seg_pad_val", 255)
            section.append({"kind": "pad", "size": step.need("size"), "fill": mean})
        elif kind == "LoadAnnotations":
            # What label maps mean is the data set's here.
            step.take("reduce_zero_label", None)
        elif kind == "Collect":
            step.take("keys", None)
        elif kind not in ("LoadImageFromFile", "MapillaryHack", "Normalize", "ToMask", "DefaultFormatBundle"):
            raise NotCoveredError(f"train_pipeline: {kind}")
        step.done()
    return section


SLOWEST = r"proposer\.(queries|positions|level_embed|mask_embed\..*)|namer\..*"
"""What of a Mask2Former learns as slowly as the embeddings of its trunk."""


def train(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `train` of a recipe that steps the weights as a config of the original's does."""
    optimizer = Settings(config["optimizer"], "optimizer")
    optimizer.only("type", "AdamW")
    how = Settings(optimizer.take("paramwise_cfg", {}), "paramwise_cfg")
    if optimizer.take("constructor", None) == "LayerDecayOptimizerConstructor":
        trunk = r"proposer\.backbone\.trunk\..*"
        if config["backbone"]["type"] == "BEiTBaseline":
            trunk = r"proposer\.backbone\.backbone\.trunk\..*"
        rule: dict[str, Any] = {"match": trunk, "layer_decay": how.need("layer_decay_rate")}
        if config["head"]["type"] == "Mask2FormerHead":
            rule |= {"match": f"{trunk}|{SLOWEST}", "first": SLOWEST}
        groups = [{"match": ".*", "dims": 1, "decay": 0.0}, rule]
        how.only("num_layers", config["backbone"].get("depth", 12))
    else:
        told, still = how.need("custom_keys"), {"decay_mult": 0.0}
        if told != dict.fromkeys(("level_embed", "pos_embed", "norm", "bias"), still) | {"head": {"lr_mult": 10.0}}:
            raise NotCoveredError(f"paramwise_cfg.custom_keys: {told}")
        groups = [
            {"match": r".*\.bias", "lr": 1.0, "decay": 0.0},
            {"match": r"proposer\.(?!backbone\.).*", "lr": 10.0},
            {"match": r"proposer\.backbone\.(level_embed|.*pos_embed|.*norm.*)", "decay": 0.0},
        ]
    how.done()
    rates = {"lr": optimizer.need("lr"), "decay": optimizer.need("weight_decay"), "betas": optimizer.need("betas")}
    optimizer.done()
    schedule = Settings(config["lr_config"], "lr_config")
    for key, value in (("policy", "poly"), ("warmup", "linear"), ("min_lr", 0.0), ("by_epoch", False)):
        schedule.only(key, value)
    steps = config["max_iters"]
    power, rising, start = (schedule.need(key) for key in ("power", "warmup_iters", "warmup_ratio"))
    schedule.done()
    # A config does not say on how many GPUs it was run.
    gpus = {896: 16, 128: 4}.get(config["test_cfg"]["crop_size"][0], 8)
    return {
        "steps": steps,
        "batch": gpus * config["samples_per_gpu"],
        "optimizer": {"kind": "adamw", **rates},
        "groups": groups,
        "schedule": {"power": power, "warmup": rising / steps, "warmup_ratio": start},
        "evaluate_every": config["eval_interval"] / steps,
    }


def unread(backbone: Mapping[str, Any]) -> int:
    """Parameters of a config's backbone that nothing reads, and that are none here.

    A plain ViT keeps the position of a class token that it does not have, a Uni-Perceiver 8 moments of which a picture has one.
    """
    return {"ViTAdapter": 1, "UniPerceiverAdapter": 7}.get(backbone["type"], 0) * backbone["embed_dim"]


def poly_warmup(folder: Path, path: Path) -> Iterator[Row]:
    """The rate at some steps of every length of training that there is, as the configs of that length and rate have it."""
    configs = read_json(folder.parent / "manifests" / "config_summary.json.gz").values()
    for case, samples in read_json(path).items():
        match = re.fullmatch(r"base(.+)_max(\d+)", case)
        if match is None:
            raise NotCoveredError(f"schedule {case}")
        rate, steps = float(match[1]), int(match[2])
        like = [each for each in configs if (each["optimizer"]["lr"], each["max_iters"]) == (rate, steps)]
        sections = {json.dumps(train(each)["schedule"]) for each in like}
        yield equal(path.name, f"{case}: schedules", len(sections), 1)
        for section in sections:
            schedule = recipes.construct(json.loads(section), Schedule, menus={}, where="schedule", source=path.name)
            ours = [rate * schedule.factor(step, steps) for step, _ in samples]
            yield compare(path.name, case, ours, [told for _, told in samples], RATES)


def rates_and_decays(
    file: str,
    told: Mapping[str, Any],
    training: Training,
    parameters: Mapping[str, nn.Parameter],
    rules: Iterable[Rule],
) -> Iterator[Row]:
    """Rows for one file of `optim`: the rate and the weight decay of every parameter. `rules`: theirs to ours."""
    if told["columns"] != ["lr multiplier", "weight decay"]:
        raise NotCoveredError(f"{file}: columns {told['columns']}")
    name, rate = told["config"], told["base_lr"]
    ours = [training.optimizer.lr, training.optimizer.decay]
    yield equal(file, f"{name}: optimizer", ours, [rate, told["base_weight_decay"]])
    rates = {key: (factor * rate, decay) for key, (factor, decay) in told["params"].items()}
    yield from same_groups(file, name, rates, destinations(rates, rules), training, parameters)


def test_geometry(folder: Path, path: Path) -> Iterator[Row]:
    """Sizes after resizing and padding, and windows, of every view of pictures of many sizes."""
    configs = read_json(folder.parent / "manifests" / "config_summary.json.gz")
    for case, told in read_json(path).items():
        node = inference(configs[told["config"]])
        settings = recipes.construct(node, Inference, menus={}, where="inference", source=path.name)
        ours = [list(settings.window), list(settings.stride)]
        yield equal(path.name, f"{case}: windows and strides", ours, [told["crop"], told["stride"]])
        for row in told["cases"]:
            height, width = row["ori"]
            views = settings.views((height, width), 1, augment=True)
            found = [_told(view, settings.windows(view, 1)) for view in views]
            for number, (view, wanted) in enumerate(zip(found, row["views"], strict=False)):
                yield equal(path.name, f"{case}: {height}x{width}, view {number}", view, wanted)
            yield equal(path.name, f"{case}: {height}x{width}, views", len(found), len(row["views"]))


def _told(view: Frame, windows: Sequence[Frame]) -> dict[str, Any]:
    """A view as the fixture tells it, where places are listed of four windows at most."""
    spans = [[y, y + window.outer[0], x, x + window.outer[1]] for window in windows for y, x in [window.origin]]
    return {
        "tensor": list(view.outer),
        "img_shape": list(view.inner),
        "pad_shape": list(view.outer),
        "flip": view.flipped,
        "num_windows": len(windows),
        "min_window": [min(window.outer[axis] for window in windows) for axis in (0, 1)],
        "windows": spans if len(spans) <= 4 else None,
    }


VOCABULARIES = {
    "ADE20KDataset": "ade20k",
    "COCOStuffDataset": "coco_stuff_171",
    "ChaseDB1Dataset": "chase_db1",
    "CityscapesDataset": "cityscapes",
    "MapillaryDataset": "mapillary_vistas",
    "PascalContextDataset59": "pascal_context_59",
    "PotsdamDataset": "potsdam",
}


def palettes(folder: Path, path: Path) -> Iterator[Row]:
    """Names and colours of the bundled vocabularies."""
    for name, told in read_json(path).items():
        if name not in VOCABULARIES:
            raise NotCoveredError(f"classes of {name}")
        words = load(VOCABULARIES[name])
        names, colors = [*words.names], [list(color) for color in words.colors]
        if name == "MapillaryDataset":
            # A class there, and none here.
            names, colors = [*names, "Unlabeled"], [*colors, [0, 0, 0]]
        yield equal(path.name, f"{name}: names", names, [each.strip() for each in told["classes"]])
        yield equal(path.name, f"{name}: colours", colors, told["palette"])


def label_tables(folder: Path, path: Path) -> Iterator[Row]:
    """What numbers in label maps mean. Those beyond Mapillary's are errors here, and road in the original."""
    tables = read_json(path)
    words = [f"class {index}" for index in range(254)]
    code = _code(lambda root: Folder(root, vocabulary=words, shift=-1), "images/train", "annotations/train")
    reduced = tables.pop("reduce_zero_label_lut")
    yield equal(path.name, "reduce_zero_label_lut", _classes(code, range(256)), reduced)
    code = _code(MapillaryAsCityscapes, "training/images", "training/labels")
    streets = tables.pop("mapillary_to_cityscapes_trainid_lut")
    streets[66:] = [UNKNOWN] * len(streets[66:])
    yield equal(path.name, "mapillary_to_cityscapes_trainid_lut", _classes(code, range(256)), streets)
    for name in tables:
        yield failed(path.name, name, "not covered")


def coco_stuff(folder: Path, path: Path) -> Iterator[Row]:
    """COCO-Stuff's categories and its classes; label maps of the 10 thousand hold classes from 1 on, 0 being none."""
    tables = read_json(path)
    ids = load("coco_stuff_171").ids
    ours = {"0": 0} | {str(category): index for index, category in enumerate(ids, start=1)}
    yield equal(path.name, "coco_stuff10k", ours, tables.pop("coco_stuff10k"))
    code = _code(COCOStuff164K, "train2017", "stuffthingmaps/train2017")
    table = tables.pop("coco_stuff164k")
    yield equal(path.name, "coco_stuff164k", _classes(code, map(int, table)), [*table.values()])
    for name in tables:
        yield failed(path.name, name, "not covered")


def _code(data: Callable[[str], Paired], images: str, labels: str) -> Code:
    """What a data set takes the numbers in its label maps for."""
    with TemporaryDirectory() as root:
        for place in (images, labels):
            Path(root, place).mkdir(parents=True)
            Path(root, place, "a.png").touch()
        return data(root).coding


def _classes(code: Code, numbers: Iterable[int]) -> list[int]:
    """The class of each number, 255 for none, as the originals have it."""
    return [255 if meaning == VOID else meaning for meaning in map(code.meaning, numbers)]


FILES = {
    r"test_resize_and_windows.*\.json(\.gz)?": test_geometry,
    r"classes_palettes.*\.json": palettes,
    r"label_luts.*\.json": label_tables,
    r"coco_stuff_raw_to_train_id.*\.json": coco_stuff,
    r"poly_warmup.*\.json": poly_warmup,
}
"""File name -> what compares it."""
