"""maskfirst: image segmentation with vision transformers. Masks first, names second."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskfirst.build import load
    from maskfirst.prediction import Prediction
    from maskfirst.publishing import publish
    from maskfirst.segmenter import Segmenter
    from maskfirst.types import Segments, Vocabulary

__all__ = ["Prediction", "Segmenter", "Segments", "Vocabulary", "load", "publish"]
__version__ = "0.1.0"

# torch takes seconds to import, the command line's help must not: names are looked up when first used (PEP 562).
_HOMES = {
    "load": "maskfirst.build",
    "Prediction": "maskfirst.prediction",
    "publish": "maskfirst.publishing",
    "Segmenter": "maskfirst.segmenter",
    "Segments": "maskfirst.types",
    "Vocabulary": "maskfirst.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'maskfirst' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
