"""DiNAT: neighbourhood attention alone, the backbone, and how the keys of both are called there."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskfirst.backbones.dinat import DiNAT, NeighbourhoodAttention
from maskfirst.convert import dinat
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename

from .arrays import Compared, read_arrays
from .foreign import Settings
from .rows import Row, Tolerance, equal

LAYER = Tolerance(atol=1e-5)
MAPS = Tolerance(atol=5e-5)


def _filled(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Gives a part of a backbone, at `place` in it, tensors by the original's names for the whole."""
    shapes = {f"{place}{key}": tensor.shape for key, tensor in module.state_dict().items()}
    renamed = rename(weights, dinat.backbone(), shapes).tensors
    module.load_state_dict({key.removeprefix(place): tensor for key, tensor in renamed.items()})


def layer(folder: Path, path: Path) -> Iterator[Row]:
    """The layer with its projections, and the gradients of the map and of the table of biases, in double precision."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    told.need("kind")
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    weights = open_checkpoint(folder / "state.safetensors").tensors
    for content in told.need("cases"):
        case = Settings(content, path.name)
        name, width = case.need("name"), case.need("dim")
        module = NeighbourhoodAttention(width, case.need("heads"), case.need("kernel"), case.need("dilation"))
        own = {key.removeprefix(f"{name}."): weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
        before = "backbone.levels.0.blocks.0.attn."
        _filled(
            module,
            {f"{before}{key}": each for key, each in own.items()},
            f"{dinat.BACKBONE}stages.0.blocks.0.attention.",
        )
        module.double()
        given = compared.take(f"{name}_x").double().requires_grad_()
        yield equal(path.name, f"{name}: size", (*given.shape[1:],), (case.need("H"), case.need("W"), width))
        case.done()
        output = module(given)
        cotangent = compared.take(f"{name}_gout").double()
        gradients = torch.autograd.grad(output, (given, module.bias), cotangent)
        for key, found in zip(("out", "gx", "grpb"), (output, *gradients), strict=True):
            yield compared.row(f"{name}_{key}", found, LAYER)
        with torch.inference_mode():
            yield equal(
                path.name, f"{name}: the same without a backward pass", bool((module(given) == output).all()), True
            )
    told.done()
    yield equal(path.name, "weights of no case", list(weights), [])
    yield from compared.rest()


def backbone_tree(told: Settings) -> dict[str, Any]:
    """The recipe of a configuration's backbone."""
    told.only("ln_eps", 1e-5)
    told.take("note", None)
    return {
        "width": told.need("embed_dim"),
        "depths": tuple(told.need("depths")),
        "heads": tuple(told.need("num_heads")),
        "kernel": told.need("kernel_size"),
        "dilations": tuple(tuple(each) for each in told.need("dilations")),
        "mlp_ratio": told.need("mlp_ratio"),
        "drop_path": told.need("drop_path_rate"),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }


def backbone(folder: Path, path: Path) -> Iterator[Row]:
    """All maps of a picture."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    told.need("kind")
    module = DiNAT(**backbone_tree(told))
    told.done()
    _filled(module, open_checkpoint(folder / "state.safetensors").tensors, dinat.BACKBONE)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    picture = compared.take("image")
    with torch.inference_mode():
        maps = module.eval()(picture)
    for index, each in enumerate(maps):
        yield compared.row(f"res{index + 2}", each, MAPS)
    yield from compared.rest()


KINDS = {
    "NATTEN 0.15.1 NeighborhoodAttention2D (CPU build), rel. pos. bias, NHWC": layer,
    "OneFormer DiNAT backbone": backbone,
}
"""What a config.json says it is of -> what compares it."""
