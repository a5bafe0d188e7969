"""ViT-Adapter's configs and the bundled recipes: what a config says, its recipe does; and the sizes of the models of both."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskfirst import recipe as recipes
from maskfirst.build import MENUS, Experiment
from maskfirst.contracts import Augmentation, Backbone
from maskfirst.data.vocabulary import load
from maskfirst.frames import Size
from maskfirst.proposers.mask2former import Mask2Former
from maskfirst.proposers.upernet import UperNet
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.training import Training

from . import vit_adapter_settings as settings
from .foreign import Settings
from .rows import Row, equal
from .tables import read_json
from .vit_adapter import backbone_tree, published

PICTURES: list[Size] = [(512, 683), (683, 512), (480, 640), (256, 256), (1024, 2048), (375, 500), (300, 700)]
VOCABULARIES = settings.VOCABULARIES | {"MapillaryDataset": "cityscapes"}
"""Data set there -> the classes that are trained on it."""
PRETRAINED = {
    "deit_tiny_patch16_224-a1311bcf": "deit_tiny_patch16_224.fb_in1k",
    "deit_small_patch16_224-cd65a155": "deit_small_patch16_224.fb_in1k",
    "deit_base_patch16_224-b5f2ef4d": "deit_base_patch16_224.fb_in1k",
    "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224": (
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    ),
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384": (
        "vit_base_patch16_384.augreg_in21k_ft_in1k"
    ),
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384": (
        "vit_large_patch16_384.augreg_in21k_ft_in1k"
    ),
    "beit_base_patch16_224_pt22k_ft22k": "beit_base_patch16_224.in22k_ft_in22k",
    "beit_large_patch16_224_pt22k_ft22k": "beit_large_patch16_224.in22k_ft_in22k",
    "beitv2_large_patch16_224_pt1k_ft21k": "beitv2_large_patch16_224.in1k_ft_in22k",
    # timm has none.
    "uni-perceiver-large-L24-H1024-224size-pretrained_converted": None,
}
"""The file that a trunk starts from there -> the same weights at timm's."""
Named = Callable[[str, Any, Any], Row]
"""A row from what it compares, ours and theirs."""


def configs(folder: Path, path: Path) -> Iterator[Row]:
    """All that the configs say, single-scale and multi-scale."""
    for name, config in read_json(path).items():
        yield from compared(path.name, name, config)


def compared(file: str, name: str, config: Mapping[str, Any]) -> Iterator[Row]:
    """Rows for one config. Raises NotCoveredError where no bundled recipe is for it, and for what it says beyond them."""
    bundled = settings.bundled(name)
    experiment, segmenter = Experiment(recipes.load(*bundled)), published(*bundled)
    size = tuple(config["test_cfg"]["crop_size"])

    def built(section: Any, kind: Any) -> Any:
        given = {object: {"size": size}}
        return recipes.construct(section, kind, menus=MENUS, given=given, where="config", source=name)

    def row(what: str, ours: Any, theirs: Any) -> Row:
        return equal(file, f"{name}: {what}, as {' '.join((bundled[0], *bundled[1]))}", ours, theirs)

    # How often it was looked at changes nothing in what it learns.
    ours, theirs = (
        replace(each, evaluate_every=1.0) for each in (experiment.training(), built(settings.train(config), Training))
    )
    yield row("training", differences(ours, theirs), [])
    ours, theirs = experiment.augmentations(), built(settings.augment(config), list[Augmentation])
    yield row("training samples", *([(type(each), vars(each)) for each in some] for some in (ours, theirs)))
    yield from _data(row, experiment, config)
    yield row("normalisation in tests", config["test_norm"], config["train_norm"])
    tree = backbone_tree(config["backbone"], config["train_norm"])
    network = _network(json.dumps(tree))
    yield row("backbone", unlike(segmenter.proposer.get_submodule("backbone"), network), [])
    own = experiment.recipe.tree["proposer"]["backbone"]
    yield row("what scales begin with", _scales(own), _scales(tree))
    begun = PRETRAINED.get(Path(config["pretrained"]).stem, "unknown")
    yield row("pretrained trunk", _trunk(own).get("model") if _trunk(own).get("pretrained") else None, begun)
    yield row("head", *_heads(segmenter, config))
    yield from _views(row, replace(segmenter.inference, multiple=1), built(settings.inference(config), Inference), name)
    told = Settings(config, name)
    for key in (
        *("optimizer", "lr_config", "max_iters", "samples_per_gpu", "train_pipeline", "test_pipeline", "test_cfg"),
        *("train_set", "val_set", "train_norm", "test_norm", "segmentor", "backbone", "head", "aux", "pretrained"),
        # A whole model to start from is not a recipe's to say, nor is the precision of a test.
        *("load_from", "fp16", "eval_interval"),
    ):
        told.take(key, None)
    told.done()


@cache
def _network(tree: str) -> Backbone:
    """Without memory."""
    with torch.device("meta"):
        return recipes.construct(json.loads(tree), Backbone, menus=MENUS, where="backbone", source="config")


def _data(row: Named, experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Row]:
    """The classes; where label maps lie and whether their 0 is no class, of data sets that have no kind of their own."""
    names = load(VOCABULARIES[config["train_set"]["type"]]).names
    yield row("classes", experiment.vocabulary.names, names)
    for split in ("train", "val"):
        node, told = experiment.recipe.tree["data"][split], config[f"{split}_set"]
        if node["kind"] == "folder":
            folders = [node[key].replace("{split}", node["split"]) for key in ("images", "labels")]
            yield row(f"folders of {split}", folders, [told["img_dir"], told["ann_dir"]])
            (labels,) = (step for step in config["train_pipeline"] if step["type"] == "LoadAnnotations")
            yield row(f"numbers of {split}", node["shift"], -1 if labels.get("reduce_zero_label") else 0)


def _views(row: Named, ours: Inference, theirs: Inference, name: str) -> Iterator[Row]:
    """What a network is shown of pictures of many sizes: of a single-scale config one view, else all that are averaged."""
    yield row("windows and strides", (ours.window, ours.stride), (theirs.window, theirs.stride))
    yield row("reading out", (ours.order, ours.average), (theirs.order, theirs.average))
    if name.endswith("_ms"):
        yield row("views", [*_seen(ours)], [*_seen(theirs)])
        yield row("padding", ours.fill if ours.pad else None, theirs.fill if theirs.pad else None)
        return
    # What the original does not pad it cannot take where it ends below the window.
    fitting = [picture for picture in PICTURES if min(theirs.fit.size(picture)) >= min(theirs.window or (0,))]
    yield row("pictures that fit", len(fitting) >= 6, True)
    for picture in fitting:
        (view,), (same, *_) = ours.views(picture, 1, False), theirs.views(picture, 1, True)
        shown, told = (view, ours.windows(view, 1)), (replace(same, flipped=False), theirs.windows(same, 1))
        yield row(f"view of {picture[0]}x{picture[1]}", shown, told)


def _seen(inference: Inference) -> Iterator[tuple[Any, ...]]:
    for picture in PICTURES:
        for view in inference.views(picture, 1, True):
            yield view, *((each.outer, each.origin) for each in inference.windows(view, 1))


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """The fields in which two settings differ, those of settings within among them."""
    if not is_dataclass(ours) or type(ours) is not type(theirs):
        return [] if ours == theirs else [f"{place}: {ours!r}, should be {theirs!r}"]
    found = []
    for field in fields(ours):
        pair = (getattr(ours, field.name), getattr(theirs, field.name))
        found += differences(*pair, f"{place}.{field.name}" if place else field.name)
    return found


def unlike(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Where two networks differ, numbers aside: in modules, their settings (heads, rates, epsilons), and shapes."""
    own, other = _described(ours), _described(theirs)
    named = dict.fromkeys((*own, *other))
    return [f"{key}: {own.get(key)}, should be {other.get(key)}" for key in named if own.get(key) != other.get(key)]


def _described(network: nn.Module) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for place, module in network.named_modules():
        told[place] = type(module)
        plain = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
        }
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        told |= {f"{place}.{key}": value for key, value in plain.items()}
        told |= {f"{place}.{key}": tuple(tensor.shape) for key, tensor in tensors}
    return told


def _trunk(backbone: Mapping[str, Any]) -> Mapping[str, Any]:
    return backbone["trunk"] if "trunk" in backbone else _trunk(backbone["backbone"])


def _scales(backbone: Mapping[str, Any]) -> tuple[float, float]:
    """Of injectors, and of the trunk's branches."""
    return backbone.get("gate", 0.0), _trunk(backbone).get("layer_scale", 0.0)


def _heads(segmenter: Segmenter, config: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The kind of the head, its widths, classes and queries: ours and theirs."""
    ours, theirs, auxiliary = segmenter.proposer, config["head"], config["aux"]
    if isinstance(ours, UperNet):
        assert ours.auxiliary is not None
        last = ours.auxiliary[-1]
        return (
            [
                "UPerHead",
                ours.classifier.in_channels,
                ours.classifier.out_channels,
                last.in_channels,
                last.out_channels,
            ],
            [*(theirs.get(key) for key in ("type", "channels", "num_classes")), *(auxiliary or {}).values()],
        )
    assert isinstance(ours, Mask2Former)
    classes = theirs.get("num_things_classes", 0) + theirs.get("num_stuff_classes", 0)
    return (
        [
            "Mask2FormerHead",
            ours.width,
            ours.pixel_decoder.masks.out_channels,
            len(ours.queries),
            len(segmenter.vocabulary),
        ],
        [*(theirs.get(key) for key in ("type", "feat_channels", "out_channels", "num_queries")), classes],
    )


def sizes(folder: Path, path: Path) -> Iterator[Row]:
    """Of every model the parameters of its parts, the keys of its checkpoint and the bytes of the buffers in it."""
    told = read_json(folder / "config_summary.json.gz")
    for file, sized in read_json(path).items():
        name = file.removesuffix(".py")
        recipe, config = settings.bundled(name), told[name]
        yield equal(path.name, f"{name}: sizes, as {recipe[0]}", sizes_of(published(*recipe), config), sized)


def sizes_of(segmenter: Segmenter, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the same model there, and what it is made of."""
    backbone, parameters = config["backbone"], dict(segmenter.named_parameters())
    heads = ("proposer.backbone.", "proposer.auxiliary.")
    within, beside, everything = (
        sum(parameter.numel() for key, parameter in parameters.items() if key.startswith(start))
        for start in (*heads, "")
    )
    spare = settings.unread(backbone)
    # A packed projection there is three here, and BEiT's tables of places are computed here.
    keys = {re.sub(r"\.[qkv]\.(weight|bias)$", r".qkv.\1", key) for key in segmenter.state_dict()}
    tables = backbone["depth"] if backbone["type"].startswith("BEiT") else 0
    tokens = 1 + (backbone.get("img_size", 0) // backbone["patch_size"]) ** 2
    buffers = [each for key, each in segmenter.state_dict().items() if key not in parameters]
    return {
        "total": everything + spare,
        "backbone": within + spare,
        "decode_head": everything - within - beside,
        "auxiliary_head": beside,
        "nkeys": len(keys) + tables,
        "buffer_bytes": sum(each.numel() * each.element_size() for each in buffers) + tables * 8 * tokens**2,
        "segmentor": config["segmentor"],
        "backbone_type": backbone["type"],
        "head": config["head"]["type"],
    }


FILES = {r"config_summary.*\.json(\.gz)?": configs, r"summary.*\.json(\.gz)?": sizes}
"""File name -> what compares it."""
