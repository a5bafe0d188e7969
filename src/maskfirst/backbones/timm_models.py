"""timm's models and their pretrained weights; what is said, in one line, where they cannot be had or do not fit."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskfirst.errors import UserError, nearest


def load_timm() -> Any:
    """timm, or one line that says why it cannot be imported."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch breaks its own import, and timm's with it.
        raise UserError(
            f"timm cannot be imported ({error}): torchvision must be the one built for this torch "
            f"({torch.__version__}); install both from the same index"
        ) from error
    return timm


def create(model: str, what: str, *patterns: str, **settings: Any) -> Any:
    """timm's `model` without a classifier, with a tag of pretrained weights or without; settings of None are the model's own.

    Raises ValueError where none of timm's names that fit `patterns`, those of `what`, is so, or where settings do not suit it.
    """
    timm = load_timm()
    known = [name for each in patterns for name in (*timm.list_models(each), *timm.list_pretrained(each))]
    if model not in known:
        raise ValueError(f"timm has no {what} '{model}'.{nearest(model, known)}")
    chosen = {key: value for key, value in settings.items() if value is not None}
    try:
        return timm.create_model(model, num_classes=0, **chosen)
    except TypeError as error:
        raise ValueError(f"{model} cannot be made like that: {error}") from error


def pretrained_model(model: str, **settings: Any) -> nn.Module:
    """timm's `model` with its pretrained weights and without a classifier. Raises UserError where they cannot be fetched."""
    try:
        return load_timm().create_model(model, pretrained=True, num_classes=0, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the pretrained weights of {model} could not be fetched ({reason}); give `weights:` instead"
        ) from error


def take_over(
    module: nn.Module, trained: Mapping[str, Tensor], resize: Callable[[str, Tensor], Tensor | None], remedy: str
) -> None:
    """Gives `module` the tensors of its names of a model of another size; `resize` brings those of other shapes into its own.

    Raises ValueError, `remedy` being what to do, where one is missing or does not come into shape.
    """
    own = module.state_dict()
    found = {}
    for name, goal in own.items():
        tensor = trained.get(name)
        if tensor is not None and tensor.shape != goal.shape:
            tensor = resize(name, tensor)
        if tensor is None or tensor.shape != goal.shape:
            raise ValueError(f"pretrained weights are for the model as timm has it; {remedy}")
        found[name] = tensor
    module.load_state_dict(found)


def resize_kernel(kernel: Tensor, own: Tensor) -> Tensor | None:
    """A kernel of patches (D, 3, h, w) in the size of `own` by FlexiViT's rule; None where it has other channels.

    Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2023, which is how EoMT takes DINOv2 from 14 to 16 px.
    """
    if kernel.ndim != 4 or kernel.shape[:2] != own.shape[:2]:
        return None
    return load_timm().layers.resample_patch_embed(kernel.float(), list(own.shape[-2:])).to(kernel.dtype)
