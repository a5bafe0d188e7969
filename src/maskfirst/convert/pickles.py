"""Opening the files of other projects as data: tensors by name and plain values, and no code, whatever they ask for."""

import argparse
import collections
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from maskfirst.convert import containers
from maskfirst.convert.containers import CheckpointError, Content, damaged
from maskfirst.errors import nearest

WRAPPERS = ("state_dict", "model", "module", "teacher")
"""Under these keys the projects keep the tensors, beside what else they save."""


@dataclass(frozen=True, eq=False)
class Opened:
    """What a file holds: `tensors` by its own keys, and `beside` them, as it came, what lay around them.

    `name`: of the file that has them, which may have lain in an archive.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    name: str


def open_checkpoint(path: Path | str) -> Opened:
    """The tensors of a file, on the CPU, by its suffix. Raises CheckpointError in one line.

    `.safetensors`; `.pth`, `.pth.tar`, `.pt`, `.bin`, `.ckpt` of torch, with plain types beside the tensors; `.pkl` of NumPy
    arrays in plain containers; `.npz`; and a `.zip` with one of these in it. A file that asks for anything else is refused
    and never opened another way.
    """
    path = Path(path)
    suffix = containers.suffix(path.name, _READERS)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: a folder, not a checkpoint")
    if suffix not in _READERS:
        known = ", ".join(_READERS)
        raise CheckpointError(f"{path}: suffix '{suffix}' is not known.{nearest(suffix, _READERS)} Known: {known}.")
    with warnings.catch_warnings():
        # Old checkpoints make torch and NumPy warn about their own past; nothing there is ours to act on.
        warnings.simplefilter("ignore")
        file = containers.find(path, _READERS)
        content = _READERS[containers.suffix(file.name, _READERS)](file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file.place}: holds a {type(content).__name__} and no tensors by name")
    beside: dict[str, Any] = {}
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            beside = {str(key): value for key, value in content.items() if key != wrapper}
            content = content[wrapper]
            break
    tensors = {str(key): _tensor(value, f"{file.place}: {key}") for key, value in content.items()}
    if not tensors:
        raise CheckpointError(f"{file.place}: holds no tensors")
    return Opened(tensors, beside, file.name)


def _tensor(value: Any, place: str) -> Tensor:
    if isinstance(value, np.ndarray | np.generic):
        try:
            value = torch.from_numpy(np.array(value))
        except TypeError as error:
            raise CheckpointError(f"{place}: an array of {value.dtype}, which is no tensor") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{place}: a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{place}: a sparse or quantized tensor; only plain ones are known here")
    return value.detach()


def _refused(file: Content, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file.place}: refused, it asks for '{name}', which could run code; "
        "ask its publisher for a file of tensors alone (.safetensors)"
    )


def _safetensors(file: Content) -> Any:
    try:
        return load_file(file.data) if isinstance(file.data, Path) else load(file.data.getvalue())
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file.place, error) from error


def _empty_array(kind: type, shape: tuple[int, ...], code: str | bytes) -> np.ndarray:
    """Where NumPy's pickles begin an array, which its state then fills; anything but that beginning is refused."""
    if kind is not np.ndarray or tuple(shape) != (0,) or code not in ("b", b"b"):
        raise pickle.UnpicklingError(f"an array of {kind} that begins with shape {shape}")
    return np.ndarray((0,), "b")


def _filled_array(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _latin(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in '{encoding}'")
    return text.encode("latin1")


_PLAIN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _latin,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
} | {
    f"numpy.{core}.{name}": made
    for core in ("core", "_core")
    for name, made in {
        "multiarray._reconstruct": _empty_array,
        "multiarray.scalar": np._core.multiarray.scalar,  # pyright: ignore[reportAttributeAccessIssue]
        "numeric._frombuffer": _filled_array,
    }.items()
}
"""All that a pickle may ask for by name, and what it is given."""


class _Plain(pickle.Unpickler):
    """Knows the names of _PLAIN and no other."""

    def find_class(self, module: str, name: str) -> Any:
        # Python 2 called it so.
        asked = f"{module}.{name}".replace("copy_reg.", "copyreg.")
        if asked not in _PLAIN:
            raise _Asked(asked)
        return _PLAIN[asked]


class _Asked(Exception):  # noqa: N818 - not an error but a finding
    """The name that a pickle asks for and may not have."""


def _pickled(file: Content) -> Any:
    try:
        with file.open() as stream:
            # Pickles of Python 2 hold their bytes as text.
            return _Plain(stream, encoding="latin1").load()
    except _Asked as asked:
        raise _refused(file, str(asked)) from None
    except Exception as error:
        # A torn or made-up pickle can raise anything from EOFError to MemoryError.
        raise damaged(file.place, error) from error


def _torch(file: Content) -> Any:
    # The kinds of numbers that NumPy's pickles fill in; their classes have no names of their own to ask for.
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    # Torch knows the other two.
    plain = [(made, name) for name, made in _PLAIN.items() if name.startswith(("argparse.", "numpy."))]
    try:
        if zipfile.is_zipfile(file.data):
            containers.check_archive(file)
        with torch.serialization.safe_globals([*plain, *dtypes]), file.open() as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise _refused(file, asked[1]) from error
        if "TorchScript" in str(error):
            raise _refused(file, "TorchScript") from error
        # A torn archive makes torch raise anything from EOFError to KeyError; its long advice is to load unsafely.
        reason = re.search(r"WeightsUnpickler error: ([^.\n]*)", str(error))
        raise damaged(file.place, pickle.UnpicklingError(reason[1] if reason else type(error).__name__)) from error


def _numpy(file: Content) -> Any:
    try:
        containers.check_archive(file)
        with file.open() as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except CheckpointError:
        raise
    except Exception as error:
        if "allow_pickle" in str(error):
            raise _refused(file, "pickle") from error
        raise damaged(file.place, error) from error


_READERS: dict[str, Callable[[Content], Any]] = {
    ".safetensors": _safetensors,
    **dict.fromkeys(containers.TORCH, _torch),
    ".pkl": _pickled,
    ".npz": _numpy,
    containers.ZIP: _torch,
}
"""By suffix. What has come out of a zip archive has one of its own; one that is itself to be read is torch's."""
