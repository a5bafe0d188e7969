"""Class vectors: what a class is told by, a vector a name, in one safetensors file."""

import json
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskfirst.errors import listed, nearest
from maskfirst.formats import FormatError


def read(path: Path | str, names: Sequence[str]) -> Float[Tensor, "K D"]:
    """The vectors of `names`, in their order, float32. `path`: tensor `vectors` (M, D), and `names`, a JSON list, in the metadata.

    Raises FormatError where the file is none, where a name has no vector, or where one is not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            told, table = (file.metadata() or {}).get("names", ""), file.get_tensor("vectors").float()
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: no file of class vectors: {' '.join(str(error).split())}") from error
    try:
        known = {str(name): row for row, name in enumerate(json.loads(told))}
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: the metadata should hold `names`, a JSON list of words") from error
    if table.ndim != 2 or len(known) != len(table):
        raise FormatError(f"{path}: vectors of shape {list(table.shape)} for {len(known)} names; one row a name")
    missing = [name for name in names if name not in known]
    if missing:
        raise FormatError(f"{path}: no vector for {listed(missing)}.{nearest(missing[0], known)}")
    found = table[[known[name] for name in names]]
    wrong = [name for name, row in zip(names, found, strict=True) if not row.isfinite().all()]
    if wrong:
        raise FormatError(f"{path}: the vectors of {listed(wrong)} are not finite")
    return found
