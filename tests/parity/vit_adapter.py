"""ViT-Adapter: the original's backbones on plain ViTs and BEiT, tap by tap in double precision; tables of other windows."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from maskfirst import recipe as recipes
from maskfirst.backbones.adapter import Adapter
from maskfirst.backbones.beit import EXTRA, geometric_places, geometric_table
from maskfirst.build import Experiment
from maskfirst.contracts import Backbone
from maskfirst.convert import vit_adapter
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import Renamed, rename
from maskfirst.frames import Size
from maskfirst.proposers.mask2former import Mask2Former
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter

from . import upernet, vit_adapter_mask2former, vit_adapter_views
from .arrays import Compared, read_arrays
from .foreign import NotCoveredError, Settings
from .rows import Row, Tolerance, compare, equal
from .tables import read_json
from .vit_adapter_settings import bundled, rates_and_decays

ARRAYS = Tolerance(atol=1e-5)
"""In double precision; the fixtures are stored in single precision."""
PLACES = Tolerance(atol=1e-9)
BESIDE = (
    "model.safetensors",
    *(f"{name}.{ending}" for name in ("slide", "unpad", "loss") for ending in ("json", "npz")),
)
"""What is read with the config of a variant, where it is there."""
BASELINE_DEPTHS = [7, 11, 15, 23]


def is_variant(told: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model of the original's."""
    model = told.get("model")
    return isinstance(model, dict) and "backbone" in model and "decode_head" in model


def variant(folder: Path, path: Path) -> Iterator[Row]:
    """All that a tiny model made of a batch, with model.safetensors and io.npz beside its config, and what else lies there."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    config, outputs = told.need("model"), told.need("outputs")
    # Where it comes from, and how near a tie its numbers are.
    for key in ("name", "input", "mode", "ignore_index", "mask_threshold_margin", "fully_masked_rows"):
        told.take(key, None)
    told.done()
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    listed = sorted(key.removeprefix("out/") for key in compared.left if key.startswith("out/"))
    yield equal(path.name, "outputs", listed, sorted(outputs))
    model, renamed = filled(recipe_tree(config), open_checkpoint(folder / "model.safetensors").tensors, path.name)
    picture = compared.take("img")
    yield from taps(compared, model.double().proposer.get_submodule("backbone"), picture.double())
    if isinstance(model.proposer, Mask2Former):
        # Its pixel decoder computes in single precision, whatever it is given.
        model = model.float()
        yield from vit_adapter_mask2former.head(model, compared, picture)
        if (folder / "loss.json").is_file():
            yield from vit_adapter_mask2former.losses(model, renamed, picture, folder)
        logits = Tolerance(atol=5e-4)
    else:
        yield from upernet.outputs(
            compared, model, upernet.batch(picture.double(), compared.take("gt_semantic_seg")[:, 0])
        )
        logits = ARRAYS
    if (folder / "slide.json").is_file():
        yield from vit_adapter_views.views(folder, model, logits)
    yield from compared.rest()


def taps(compared: Compared, backbone: Backbone, pixels: Tensor) -> Iterator[Row]:
    """What the spatial prior, each interaction and the first block made of normalised pixels, and the pyramid."""
    assert isinstance(backbone, Adapter)
    with torch.inference_mode(), _noted(backbone) as noted:
        maps = backbone(pixels)
    for key, ours in noted.items():
        # A fixture has some of them, and what it has must be made.
        if f"out/tap.{key}" in compared.left:
            yield compared.row(f"out/tap.{key}", ours, ARRAYS)
    for level, each in enumerate(maps):
        yield compared.row(f"out/pyramid.{level}", each, ARRAYS)


@contextmanager
def _noted(backbone: Adapter) -> Iterator[dict[str, Tensor]]:
    """Fills in the taps by the original's names whenever the backbone runs inside of the block."""
    noted: dict[str, Tensor] = {}
    trunk, run = backbone.trunk, backbone.trunk.block

    def block(index: int, tokens: Tensor, grid: Size) -> Tensor:
        found = run(index, tokens, grid)
        if index == 0:
            noted["block0"] = found
        for group, (_, last) in enumerate(backbone.groups):
            if index == last and trunk.prefix:
                noted[f"interaction{group}.2"] = found[:, : trunk.prefix]
        return found

    def prior(module: nn.Module, given: Any, made: tuple[Tensor, list[Tensor]]) -> None:
        noted.update({f"spm.{level}": each for level, each in enumerate([made[0], *made[1]])})

    def extractor(group: int) -> Any:
        def note(module: nn.Module, given: tuple[Tensor, Tensor, Any], made: Tensor) -> None:
            noted[f"interaction{group}.0"], noted[f"interaction{group}.1"] = given[1], made

        return note

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trunk, "block", block))
        hooks = [backbone.prior.register_forward_hook(prior)]
        hooks += [each.register_forward_hook(extractor(group)) for group, each in enumerate(backbone.extractors)]
        last = len(backbone.groups) - 1
        hooks += [each.register_forward_hook(extractor(last)) for each in backbone.extra_extractors]
        for hook in hooks:
            stack.callback(hook.remove)
        yield noted


def filled(tree: dict[str, Any], weights: Mapping[str, Tensor], source: str) -> tuple[Segmenter, Renamed]:
    """The model of a recipe with the original's weights, in evaluation, and where each of them went."""
    model = Experiment(Recipe(tree, source)).segmenter()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    renamed = rename(weights, vit_adapter.rules(weights.keys()), shapes)
    model.load_state_dict(renamed.tensors)
    return model.eval(), renamed


def recipe_tree(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the same model."""
    told = Settings(config, "model")
    told.only("type", "EncoderDecoder", "EncoderDecoderMask2Former", "EncoderDecoderMask2FormerAug")
    told.only("pretrained", None)
    training, backbone = told.take("train_cfg", {}), backbone_tree(told.need("backbone"))
    windows = Settings(told.need("test_cfg"), "test_cfg")
    windows.only("mode", "slide")
    inference = {"window": windows.need("crop_size"), "stride": windows.need("stride"), "multiple": 1}
    windows.done()
    kind = told.need("decode_head")["type"]
    auxiliary = told.take("auxiliary_head", None)
    told.done()
    if kind == "UPerHead":
        proposer, classes = upernet.proposer_tree(config, backbone)
        parts = {"namer": {"kind": "given"}, "criterion": {"kind": "pixel", "average": "all"}}
    else:
        if auxiliary is not None:
            raise NotCoveredError(f"auxiliary_head beside {kind}")
        proposer, classes, criterion = vit_adapter_mask2former.proposer_tree(config["decode_head"], training, backbone)
        parts = {"namer": {"kind": "class_head"}, "criterion": criterion}
        inference["order"] = "names_first"
    names = [f"class {index}" for index in range(classes)]
    return {"vocabulary": names, "proposer": proposer, **parts, "inference": inference}


NORMALISED = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
"""Of pictures that are normalised already, as those of the fixtures are."""


def backbone_tree(config: Mapping[str, Any], norm: Mapping[str, Any] = NORMALISED) -> dict[str, Any]:
    """The recipe of a config's backbone. `norm`: the mean and deviation by which it normalises."""
    told = Settings(config, "backbone")
    kind = told.need("type")
    if kind not in ("ViTAdapter", "UniPerceiverAdapter", "BEiTAdapter", "BEiTBaseline"):
        raise NotCoveredError(f"backbone.type: {kind!r}")
    depth, drop_path = told.need("depth"), told.need("drop_path_rate")
    norm_eps = 1e-5 if kind == "UniPerceiverAdapter" else 1e-6
    trunk: dict[str, Any] = {
        "width": told.need("embed_dim"),
        "depth": depth,
        "heads": told.need("num_heads"),
        "patch": told.need("patch_size"),
        "drop_path": drop_path,
        "norm_eps": norm_eps,
        **norm,
    }
    told.only("mlp_ratio", 4)
    if kind in ("ViTAdapter", "UniPerceiverAdapter"):
        # The size of the pictures that it is given, which changes nothing.
        told.take("img_size", None)
        told.only("window_attn", [False] * depth)
        told.only("window_size", [None] * depth)
        gate = told.take("init_values", 0.0)
        plain = {"kind": "vit", "final_norm": False, "class_token": "absent", "layer_scale": 1.0}
        trunk |= plain if kind == "ViTAdapter" else {"kind": "uni_perceiver"}
        trunk["size"] = _pair(told.take("pretrain_size", 224))
    else:
        told.only("qkv_bias", True)
        told.only("use_abs_pos_emb", False)
        told.only("use_rel_pos_bias", True)
        gate = told.need("init_values")
        trunk |= {"kind": "beit", "final_norm": False, "layer_scale": gate, "size": _pair(told.take("img_size", 512))}
    if kind == "BEiTBaseline":
        told.only("out_indices", BASELINE_DEPTHS)
        told.done()
        return {"kind": "deconv_pyramid", "backbone": {"kind": "taps", "depths": BASELINE_DEPTHS, "trunk": trunk}}
    tree = {
        "kind": "adapter",
        "trunk": trunk,
        "interactions": told.need("interaction_indexes"),
        "heads": told.need("deform_num_heads"),
        "value_ratio": told.need("deform_ratio"),
        "stem": told.need("conv_inplane"),
        "points": told.need("n_points"),
        "feedforward_ratio": told.need("cffn_ratio"),
        "convolution_ffn": told.take("with_cffn", True),
        "extra_extractors": 2 if told.take("use_extra_extractor", True) else 0,
        "add_trunk": told.take("add_vit_feature", True),
        "gate": gate,
        "drop_path": drop_path,
        "norm_eps": norm_eps,
        "checkpointing": told.take("with_cp", False),
    }
    told.done()
    return tree


def manifest(folder: Path, path: Path) -> Iterator[Row]:
    """Every key of a full-size model: to its place in that of the bundled recipe, which its shapes ask for."""
    told = read_json(path)
    told = told.get("keys", told)
    recipe = bundled(path.name.removesuffix(".json.gz").replace("__", "/"))
    with torch.device("meta"):
        tensors = {key: torch.empty(each["shape"], dtype=getattr(torch, each["dtype"])) for key, each in told.items()}
    model = published(*recipe)
    own, parameters = model.state_dict(), dict(model.named_parameters())
    shapes = {key: each.shape for key, each in own.items()}
    renamed = rename(tensors, vit_adapter.rules(tensors.keys()), shapes)
    yield equal(path.name, f"keys, as {recipe[0]}", len(renamed.homes) + len(renamed.left), len(told))
    left = {key.rpartition(".")[2]: told[key]["kind"] for key in renamed.left}
    yield equal(path.name, "keys left behind", left, {"relative_position_index": "buffer"} if left else {})
    kinds = {
        key: {"param" if goal in parameters else "buffer" for goal in goals} for key, goals in renamed.homes.items()
    }
    yield equal(path.name, "kinds", [key for key in kinds if kinds[key] != {told[key]["kind"]}], [])
    dtypes = {key: {own[goal].dtype for goal in goals} for key, goals in renamed.homes.items()}
    yield equal(path.name, "types", [key for key in dtypes if dtypes[key] != {tensors[key].dtype}], [])
    plan = vit_adapter.plan(tensors)
    asked = {} if plan is None else {key: each.shape for key, each in published(*plan).state_dict().items()}
    yield equal(path.name, "recipe by its tensors", asked == shapes, True)


@cache
def published(name: str, overrides: tuple[str, ...] = ()) -> Segmenter:
    """The model of a bundled recipe, without memory."""
    return Experiment(recipes.load(name, overrides)).segmenter(meta=True)


def optimizer(folder: Path, path: Path) -> Iterator[Row]:
    """The rate and the weight decay of every parameter, as the bundled recipe of that configuration steps it."""
    told = read_json(path)
    recipe = bundled(told["config"])
    parameters = dict(published(*recipe).named_parameters())
    training = Experiment(recipes.load(*recipe)).training()
    yield from rates_and_decays(path.name, told, training, parameters, vit_adapter.rules(told["params"].keys()))


def _pair(size: int | list[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else size


def is_tables(told: Mapping[str, Any]) -> bool:
    """Whether a meta.json describes tables of relative positions carried to other windows."""
    return bool(told) and all(
        isinstance(case, dict) and {"window", "dst_rows", "q"} <= case.keys() for case in told.values()
    )


def tables(folder: Path, path: Path) -> Iterator[Row]:
    """One table carried to larger and smaller windows, with tables.npz beside."""
    compared = Compared("tables.npz", read_arrays(folder / "tables.npz"))
    source = compared.take("src_table")
    for size, content in json.loads(path.read_text(encoding="utf-8")).items():
        told = Settings(content, f"{path.name}: {size}")
        window = told.need("window")
        carried = geometric_table(source, (window, window))
        ratio, places = geometric_places(round((len(source) - EXTRA) ** 0.5), 2 * window - 1)
        yield equal(path.name, f"{size}: dst_rows", len(carried), told.need("dst_rows"))
        yield compare(path.name, f"{size}: q", ratio, told.need("q"), PLACES)
        yield compare(path.name, f"{size}: last_coord", places[-1], told.need("last_coord"), PLACES)
        copied = torch.equal(carried[-EXTRA:], source[-EXTRA:])
        yield equal(path.name, f"{size}: extra_rows_copied", copied, told.need("extra_rows_copied"))
        yield compared.row(f"src_coords.{size}", torch.from_numpy(places), PLACES)
        yield compared.row(f"dst_table.{size}", carried, ARRAYS)
        # Of the spline that the original used from the one used here.
        told.take("max_dev_of_RectBivariateSpline", None)
        told.done()
    yield from compared.rest()


FILES = {
    r"(upernet|mask2former)_.+\.json\.gz": optimizer,
    r"\w+__(upernet|mask2former)_.+\.json\.gz": manifest,
}
"""File name -> what compares it."""
