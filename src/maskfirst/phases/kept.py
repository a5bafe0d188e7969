"""Kept: what a network at rest makes of a picture, in a file of its own on disk, so that it is made once."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskfirst.files import write_aside


def digest(tensors: Iterable[Tensor], *words: object) -> str:
    """64 hexadecimal digits that any other number, shape, type or word would change."""
    found = hashlib.blake2b(repr(words).encode(), digest_size=32)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Kept:
    """Tensors by digest, a file each in one of 256 folders. Several processes may write the same ones."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """None where nothing is kept under that digest, or only a file that is broken."""
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError):
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises DiskError."""
        with write_aside(self._path(name)) as aside:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name[2:]}.safetensors"
