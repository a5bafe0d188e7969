"""InternImage: DCNv3 alone, its layer, backbones of every layout, and the keys of full-size models."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from maskfirst import recipe as recipes
from maskfirst.backbones.internimage import DCNv3, InternImage
from maskfirst.build import Experiment
from maskfirst.convert import internimage
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename
from maskfirst.ops.dcnv3 import Window, dcnv3, dcnv3_by_gather

from .arrays import Compared, read_arrays
from .foreign import NotCoveredError, Settings
from .rows import Row, Tolerance, compare, equal
from .tables import read_json

DOUBLE = Tolerance(atol=1e-10)
LAYER = Tolerance(atol=2e-5)
MAPS = Tolerance(atol=1e-4)


def _settings(content: Mapping[str, Any], place: str) -> Settings:
    told = Settings(content, place)
    # How far the original is from its own definition, as it has its grid in single precision.
    for key in ("kind", "layout", "max_abs_err_of_original_f32_grid"):
        told.take(key, None)
    return told


def operator(folder: Path, path: Path) -> Iterator[Row]:
    """DCNv3 alone, both ways of it, with the gradients of all that it is given, in double precision."""
    told = _settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    for content in told.need("cases"):
        case = _settings(content, path.name)
        name, groups = case.need("name"), case.need("G")
        window = Window(*(case.need(key) for key in ("K", "S", "P", "D", "scale")))
        size = (case.need("H"), case.need("W"))
        leaves = [compared.take(f"{name}_{key}").requires_grad_() for key in ("x", "offset", "mask")]
        yield equal(path.name, f"{name}: size", (*leaves[0].shape[1:],), (*size, groups * case.need("C")))
        case.need("mag")
        case.done()
        cotangent = compared.take(f"{name}_gout")
        theirs = {key: compared.take(f"{name}_{key}") for key in ("out", "gx", "goffset", "gmask")}
        for way in (dcnv3, dcnv3_by_gather):
            value, offsets, weights = (leaf.unflatten(-1, (groups, -1)) for leaf in leaves)
            output = way(value, offsets.unflatten(-1, (-1, 2)), weights, window)
            ours = (output, *torch.autograd.grad(output, leaves, cotangent))
            for (key, expected), found in zip(theirs.items(), ours, strict=True):
                yield compare("io.npz", f"{name}_{key}, {way.__name__}", found, expected, DOUBLE)
    told.done()
    yield from compared.rest()


def layer(folder: Path, path: Path) -> Iterator[Row]:
    """The layer with its projections, and the gradient of what it is given; with and without the centre's share."""
    told = _settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    weights = open_checkpoint(folder / "state.safetensors").tensors
    for content in told.need("cases"):
        case = _settings(content, path.name)
        name, width = case.need("name"), case.need("channels")
        case.only("kernel", 3)
        module = DCNv3(
            width,
            case.need("group"),
            # None: as wide as what DCNv3 itself reads.
            case.need("dw_kernel_size") or 3,
            case.need("offset_scale"),
            case.need("center_feature_scale"),
        )
        case.done()
        place = "levels.0.blocks.0."
        own = {key.removeprefix(f"{name}."): weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
        home = f"{internimage.BACKBONE}stages.0.blocks.0.look.part."
        named = {f"backbone.{place}dcn.{key}": tensor for key, tensor in own.items()}
        shapes = {f"{home}{key}": tensor.shape for key, tensor in module.state_dict().items()}
        renamed = rename(named, internimage.backbone(named.keys()), shapes).tensors
        module.load_state_dict({key.removeprefix(home): tensor for key, tensor in renamed.items()})
        given = compared.take(f"{name}_x").requires_grad_()
        output = module.eval()(given)
        (gradient,) = torch.autograd.grad(output, given, compared.take(f"{name}_gout"))
        yield compared.row(f"{name}_out", output, LAYER)
        yield compared.row(f"{name}_gx", gradient, LAYER)
    told.done()
    yield equal(path.name, "weights of no case", list(weights), [])
    yield from compared.rest()


def backbone_tree(told: Settings) -> dict[str, Any]:
    """The recipe of a configuration's backbone."""
    told.only("norm_layer", "LN")
    told.only("act", "GELU")
    told.only("kernel", 3)
    told.only("ln_eps", 1e-6)
    after, both = told.need("post_norm"), told.take("res_post_norm", False)
    if after and both:
        raise NotCoveredError(f"{told.place}: post_norm and res_post_norm")
    indices = told.take("level2_post_norm_block_ids", None) or ()
    told.only("level2_post_norm", bool(indices))
    return {
        # H has no layer scales but those that it is given.
        "model": "h",
        "width": told.need("channels"),
        "depths": tuple(told.need("depths")),
        "groups": tuple(told.need("groups")),
        "norms": "after" if after else "both" if both else "before",
        "layer_scale": told.need("layer_scale"),
        "offset_scale": told.need("offset_scale"),
        "kernel": told.take("dw_kernel_size", None) or 3,
        "centre_scale": told.take("center_feature_scale", False),
        "post_norms": tuple(indices),
        "mlp_ratio": told.need("mlp_ratio"),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }


def backbone(folder: Path, path: Path) -> Iterator[Row]:
    """All maps of a picture."""
    told = _settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    module = InternImage(**backbone_tree(told))
    told.done()
    weights = open_checkpoint(folder / "state.safetensors").tensors
    shapes = {f"{internimage.BACKBONE}{key}": tensor.shape for key, tensor in module.state_dict().items()}
    renamed = rename(weights, internimage.backbone(weights.keys()), shapes).tensors
    module.load_state_dict({key.removeprefix(internimage.BACKBONE): tensor for key, tensor in renamed.items()})
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    picture = compared.take("image")
    with torch.inference_mode():
        maps = module.eval()(picture)
    for index, each in enumerate(maps):
        yield compared.row(f"out{index}", each, MAPS)
    yield from compared.rest()


def manifest(folder: Path, path: Path) -> Iterator[Row]:
    """Every key of a full-size model: to its place in that of the bundled recipe, which its shapes ask for."""
    told = read_json(path)
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in told.items()}
    plan = internimage.plan(tensors)
    if plan is None:
        raise NotCoveredError(f"{path.name}: no recipe for {internimage.facts(tensors)}")
    model = Experiment(recipes.load(*plan)).segmenter(meta=True)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    renamed = rename(tensors, internimage.rules(tensors.keys()), shapes)
    yield equal(path.name, f"keys, as {plan[0]}", len(renamed.homes), len(told))


FILES = {r"internimage_\w+\.json\.gz": manifest}
"""File name -> what compares it."""
KINDS = {
    "DCNv3 sampling op, float64, channels-last": operator,
    "DCNv3 layer (NHWC in, NHWC out), state keys prefixed by the case name": layer,
    "InternImage backbone": backbone,
}
"""What a config.json says it is of -> what compares it."""
