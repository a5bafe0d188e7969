"""Weights: one safetensors file is a model, its recipe and vocabulary being in the metadata.

Nothing in such a file can run code. Files that could (pickles) are refused, never loaded another way.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskfirst.contracts import PerClass, Receiver, Resizable
from maskfirst.errors import UserError, listed, nearest
from maskfirst.files import write_aside
from maskfirst.recipe import Recipe
from maskfirst.types import Vocabulary

FORMAT = "maskfirst-1"
HUB_FILE = "model.safetensors"
RUN_FILES = ("best.safetensors", "last.safetensors", HUB_FILE)
"""The weights of a run folder, or of one that was published; the first that exists counts."""
PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".bin")
_BUNDLED = Path(__file__).with_name("bundled")


class WeightsError(UserError):
    """Weights that are not there, are not ours, are damaged, or do not fit."""


@dataclass(frozen=True)
class WeightsFile:
    """What one file holds. `recipe` is not trusted. `tensors`: by the segmenter's names, on the CPU, as stored."""

    path: Path
    recipe: Recipe
    vocabulary: Vocabulary
    scores: dict[str, Any]
    source: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a part that was given weights; names are relative to the part.

    `loaded`: copied as they are, by the rows of the classes, or made of other tensors. `resized`: carried to another size.
    `reset`: not in the file or of another shape, left at their initialisation. `unused`: in the file only. `kept` and `fresh`:
    the classes whose rows were carried over, and those whose rows are at their initialisation; both empty where the
    vocabularies are one. `remark`: what the part itself says of them.
    """

    source: str
    part: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    reset: tuple[str, ...]
    unused: tuple[str, ...]
    kept: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    remark: str | None = None

    def describe(self) -> str:
        """One paragraph for people."""
        sentences = [f"{self.part or 'model'} from {self.source}: {len(self.loaded)} tensors loaded"]
        for count, what in (
            (self.resized, "resized"),
            (self.reset, "left at their initialisation"),
            (self.unused, "of the file not used"),
        ):
            if count:
                sentences.append(f"{len(count)} {what} ({listed(count)})")
        if self.kept:
            sentences.append(f"the rows of {len(self.kept)} names carried over ({listed(self.kept)})")
        if self.fresh:
            sentences.append(f"those of {len(self.fresh)} at their initialisation ({listed(self.fresh)})")
        if self.remark:
            sentences.append(self.remark)
        return "; ".join(sentences) + "."


def save(
    path: Path | str,
    segmenter: nn.Module | Mapping[str, Tensor],
    recipe_tree: Mapping[str, Any],
    vocabulary: Vocabulary,
    scores: Mapping[str, Any] | None = None,
    half: bool = False,
    source: str = "",
) -> None:
    """Writes a model, or its tensors by name, to one file, which is whole or absent. Raises DiskError where the disk refuses.

    `half` stores float tensors in 16 bits, but for those with a value that 16 bits cannot hold. `source`: where the
    weights come from, in words.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    state = segmenter.state_dict() if isinstance(segmenter, nn.Module) else segmenter
    for name, tensor in state.items():
        stored = _stored(tensor, half)
        storage = stored.untyped_storage().data_ptr()
        # The format has no tensors that share memory.
        tensors[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
    metadata = {
        "format": FORMAT,
        "recipe": json.dumps(recipe_tree, ensure_ascii=False),
        "vocabulary": TypeAdapter(Vocabulary).dump_json(vocabulary).decode(),
        "scores": json.dumps(dict(scores or {}), ensure_ascii=False),
        "source": source,
    }
    with write_aside(path) as aside:
        try:
            save_file(tensors, aside, metadata)
        except SafetensorError as error:
            # The library words a full disk as its own error; write_aside knows what to do with the system's.
            raise OSError(0, f"the disk refused it ({' '.join(str(error).split())})") from error


def read(source: str | Path) -> WeightsFile:
    """The content of the weights at `source`, see `locate`. Raises WeightsError."""
    path = locate(source)
    metadata, tensors = _open(path)
    found = metadata.get("format")
    if "part" in metadata:
        raise WeightsError(
            f"{path}: a part alone, of {metadata.get('source', 'an unknown file')}, and no model; "
            f"a recipe takes it by the key `weights`, as at {metadata['part']}"
        )
    if found != FORMAT:
        other = f"its format is '{found}'" if found else "it has no recipe inside"
        raise WeightsError(
            f"{path}: not a model that this version can build ({other}); "
            "'maskfirst convert' makes one of a checkpoint of the original projects"
        )
    try:
        tree, scores = json.loads(metadata["recipe"]), json.loads(metadata["scores"])
        if not (isinstance(tree, dict) and isinstance(scores, dict)):
            raise ValueError("the recipe and the scores should be mappings")
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged metadata: {error}") from error
    vocabulary = _vocabulary(path, metadata)
    return WeightsFile(
        path, Recipe(tree, str(path), trusted=False), vocabulary, scores, metadata.get("source", ""), tensors
    )


def locate(source: str | Path) -> Path:
    """The safetensors file that `source` names: a file, a run folder, `hub:org/name` or a bundled name.

    Files of the hub are downloaded once and kept in its cache. Raises WeightsError.
    """
    text = str(source)
    if text.startswith("hub:"):
        return _download(text)
    path = Path(text)
    if path.is_dir():
        for name in RUN_FILES:
            if (path / name).is_file():
                return path / name
        names = f"{', '.join(RUN_FILES[:-1])} or {RUN_FILES[-1]}"
        raise WeightsError(f"{path}: no {names} in this folder; give a run folder or a file")
    if not path.is_file():
        bundled = _BUNDLED / f"{text}.safetensors"
        known = sorted(each.stem for each in _BUNDLED.glob("*.safetensors"))
        if text in known:
            return bundled
        here = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(text, known) or nearest(path.name, [name for name in here if name.endswith(".safetensors")])
        raise WeightsError(
            f"no weights '{text}'.{hint} Give a .safetensors file, a run folder, hub:org/name"
            + (f" or a bundled name: {', '.join(known)}." if known else ".")
        )
    with open(path, "rb") as file:
        start = file.read(4)
    # Zip archives and pickles begin so; a safetensors file begins with a length, whose third byte is 0 below 16 MiB.
    if (
        path.suffix.lower() in PICKLES
        or start.startswith(b"PK\x03\x04")
        or (start[:1] == b"\x80" and start[1:2] < b"\x06")
    ):
        raise WeightsError(
            f"{path}: a pickle could run code and is not opened; "
            f"'maskfirst convert {path} --recipe R --out FILE.safetensors' makes a safe file of it"
        )
    return path


def check_fit(module: nn.Module, file: WeightsFile) -> None:
    """Raises WeightsError naming every misfit, unless the module has the tensors of the file in their shapes, and no others."""
    own = module.state_dict()
    missing = [name for name in own if name not in file.tensors]
    extra = [name for name in file.tensors if name not in own]
    misshaped = [
        f"{name} {list(file.tensors[name].shape)} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in file.tensors and file.tensors[name].shape != tensor.shape
    ]
    wrong = (("missing", missing), ("extra", extra), ("misshaped", misshaped))
    if any(names for _, names in wrong):
        faults = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in wrong if names)
        raise WeightsError(f"{file.path}: does not fit its own recipe: {faults}")


def fill(module: nn.Module, file: WeightsFile) -> None:
    """Gives a module the tensors of its file in place of its own, in its own dtypes. Raises as `check_fit` does."""
    check_fit(module, file)
    own = module.state_dict()
    # Copied, as what was read is a window on the file, which others may overwrite.
    tensors = {name: value.to(own[name].dtype, copy=True) for name, value in file.tensors.items()}
    module.load_state_dict(tensors, assign=True)


@torch.no_grad()
def load_part(
    module: nn.Module, source: str | Path, prefix: str = "", vocabulary: Vocabulary | None = None
) -> LoadReport:
    """Copies into a module what fits of the weights at `source`, see `locate`, and tells what became of each tensor.

    `prefix`: the part's place in the recipe, such as `proposer.backbone`, under which the file has its tensors; a file with
    nothing there may hold the part alone, or one inside of it whose place it names. `vocabulary`: the module's own; where the
    file's is another, rows of classes (PerClass) are carried over by name. Tensors of other shapes are resized where their
    module can (Resizable), and given to modules that make more of them (Receiver).
    Raises WeightsError where nothing at all fits.
    """
    path = locate(source)
    metadata, everything = _open(path)
    theirs = _vocabulary(path, metadata) if metadata.get("format") == FORMAT else None
    start = f"{prefix}." if prefix else ""
    inner = metadata.get("part", "")
    if inner and inner.startswith(start):
        everything = {f"{inner}.{name}": tensor for name, tensor in everything.items()}
    tensors = {name.removeprefix(start): tensor for name, tensor in everything.items() if name.startswith(start)}
    tensors = tensors or everything
    # Rows stand for names only where both vocabularies are known; where they are the same, rows are like any tensor.
    pairs, kept, fresh = None, (), ()
    if theirs is not None and vocabulary is not None and theirs.names != vocabulary.names:
        kept = tuple(name for name in vocabulary.names if name in theirs.names)
        fresh = tuple(name for name in vocabulary.names if name not in theirs.names)
        pairs = _Pairs(len(vocabulary), len(theirs), [(vocabulary.names.index(n), theirs.names.index(n)) for n in kept])
    rows = _class_rows(module)
    fates: dict[str, list[str]] = {"loaded": [], "resized": [], "reset": []}
    carried = False
    own = module.state_dict()
    for name, goal in own.items():
        fate, value = "loaded", tensors.get(name)
        if value is not None and pairs is not None and name in rows:
            value = pairs.carry(goal, value, rows[name])
            carried |= value is not None
        elif value is not None and value.shape != goal.shape:
            fate, value = "resized", resized(module, name, value, goal.shape)
        if value is None:
            fate = "reset"
        else:
            goal.copy_(value)
        fates[fate].append(name)
    for filled in _received(module, tensors):
        if filled in fates["reset"]:
            fates["reset"].remove(filled)
            fates["loaded"].append(filled)
    if own and not fates["loaded"] and not fates["resized"]:
        tops = sorted({name.split(".")[0] for name in everything})
        raise WeightsError(f"{path}: nothing in it fits {prefix or 'this model'}; it holds {listed(tops)}")
    return LoadReport(
        str(source),
        prefix,
        *(tuple(names) for names in fates.values()),
        unused=tuple(name for name in tensors if name not in own),
        kept=kept if carried else (),
        fresh=fresh if carried else (),
        remark=module.remark if isinstance(module, Receiver) else None,
    )


def require_same_vocabulary(model: Vocabulary, data: Vocabulary, where: str) -> None:
    """Raises UserError, saying which names differ, unless both have the same names in the same order.

    `where`: what the data is called, such as `camvid.yaml: data.test`.
    """
    if model.names == data.names:
        return
    only_model = [name for name in model.names if name not in data.names]
    only_data = [name for name in data.names if name not in model.names]
    told = [
        f"{whose}: {listed(names, 3)}"
        for whose, names in (("only the model knows", only_model), ("only the data", only_data))
        if names
    ]
    difference = "; ".join(told) or "the same names in another order"
    raise UserError(
        f"{where}: the data has {len(data)} classes, the model {len(model)}, and they differ ({difference}); "
        "train it on these with --from, or give the data the model's with the key vocabulary"
    )


def _received(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Gives every Receiver within the tensors that are its own, inner ones first; the parameters that they have filled."""
    filled = []
    for place, part in reversed(list(module.named_modules())):
        if isinstance(part, Receiver):
            start = f"{place}." if place else ""
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            filled += [f"{start}{name}" for name in part.receive(own)]
    return filled


def _stored(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if half and tensor.is_floating_point():
        small = tensor.half()
        if bool((small.isfinite() == tensor.isfinite()).all()):
            return small
    return tensor


def _open(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: truncated, or no safetensors file at all: {reason}") from error


def _vocabulary(path: Path, metadata: Mapping[str, str]) -> Vocabulary:
    try:
        return TypeAdapter(Vocabulary).validate_json(metadata.get("vocabulary", ""), strict=True)
    except ValidationError as error:
        raise WeightsError(f"{path}: damaged metadata: faults in the vocabulary: {error.error_count()}") from error


def _download(source: str) -> Path:
    # Its import takes half a second that local files need not wait for.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository = source.removeprefix("hub:")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{source}: cannot fetch {HUB_FILE}: {reason}") from error


def _class_rows(module: nn.Module) -> dict[str, bool]:
    """The parameters with one row a class, by name; True where one more row, for no object, follows."""
    return {
        f"{place}.{name}" if place else name: extra
        for place, part in module.named_modules()
        if isinstance(part, PerClass)
        for name, extra in part.class_rows.items()
    }


@dataclass(frozen=True)
class _Pairs:
    """The classes that a model of `own` classes shares with a file of `theirs`: the row here and the row there."""

    own: int
    theirs: int
    rows: Sequence[tuple[int, int]]

    def carry(self, goal: Tensor, found: Tensor, extra: bool) -> Tensor | None:
        """`goal` with the rows shared, and the `extra` one for no object; None where nothing can be carried over."""
        rows = [*self.rows, (self.own, self.theirs)] if extra else self.rows
        if not rows or len(goal) != self.own + extra or found.shape != (self.theirs + extra, *goal.shape[1:]):
            return None
        here, there = (list(places) for places in zip(*rows, strict=True))
        result = goal.clone()
        result[here] = found[there].to(goal.dtype)
        return result


def resized(module: nn.Module, name: str, found: Tensor, goal: torch.Size) -> Tensor | None:
    """`found` in the shape `goal` of parameter `name`, by the innermost module around it that can carry it over."""
    around = [(place, part) for place, part in module.named_modules() if name.startswith(f"{place}." if place else "")]
    for place, part in reversed(around):
        if isinstance(part, Resizable):
            fitted = part.resize_from(name.removeprefix(f"{place}." if place else ""), found)
            if fitted is not None and fitted.shape == goal:
                return fitted
    return None
