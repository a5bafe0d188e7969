"""timm's models: what is said, in one line, where timm or a model's pretrained weights cannot be had."""

from typing import Any

import torch
from torch import nn

from maskfirst.errors import UserError


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


def pretrained_model(model: str, **settings: Any) -> nn.Module:
    """timm's `model` with its pretrained weights and without a classifier. Raises UserError where they cannot be fetched."""
    try:
        return load_timm().create_model(model, pretrained=True, num_classes=0, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the pretrained weights of {model} could not be fetched ({reason}); give `weights:` instead"
        ) from error
