"""Engine: an ONNX file of `export` as a segmenter whose networks onnxruntime runs; its recipe and names are inside of it.

It is as untrusted as weights are: its recipe is checked, nothing in it can run code, and no library of operators is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from maskfirst import build
from maskfirst.graphs import Facts, GraphError, driven
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Vocabulary

FORMAT = "maskfirst-graph-1"
ENDING = ".onnx"
POINTS = ".points"
"""Before the ending: of the file of points that lies beside one of masks."""
DATA = ".data"
"""After the whole name: of the file of weights that lies beside a graph which is too large for one file."""
INSTALL = "install the extra that has it: pip install 'maskfirst[export]'"


@dataclass(frozen=True)
class Card:
    """What a graph's file says of the model. `facts`: of its masks; None where it has points alone. `points`: whether a graph
    of points lies beside."""

    recipe: Recipe
    vocabulary: Vocabulary
    facts: Facts | None
    points: bool

    def as_metadata(self) -> dict[str, str]:
        """As strings by name, which is all that the formats have."""
        return {
            "format": FORMAT,
            "recipe": json.dumps(self.recipe.tree, ensure_ascii=False),
            "vocabulary": TypeAdapter(Vocabulary).dump_json(self.vocabulary).decode(),
            "facts": json.dumps(None if self.facts is None else asdict(self.facts)),
            "points": json.dumps(self.points),
        }

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> "Card":
        """Raises GraphError where the file is no graph of ours, or damaged."""
        found = metadata.get("format")
        if found != FORMAT:
            told = f"its format is '{found}'" if found else "it has no recipe inside"
            raise GraphError(f"{path}: not a graph that 'maskfirst export' of this version made ({told})")
        try:
            recipe, points = json.loads(metadata["recipe"]), json.loads(metadata["points"])
            if not isinstance(recipe, dict) or not isinstance(points, bool):
                raise ValueError("the recipe should be a mapping, and points a truth value")
            vocabulary = TypeAdapter(Vocabulary).validate_json(metadata["vocabulary"], strict=True)
            facts = TypeAdapter(Facts | None).validate_json(metadata["facts"])
        except ValidationError as error:
            raise GraphError(f"{path}: damaged metadata: faults in it: {error.error_count()}") from error
        except (KeyError, ValueError, RecursionError) as error:
            raise GraphError(f"{path}: damaged metadata: {error}") from error
        return cls(Recipe(recipe, str(path), trusted=False), vocabulary, facts, points)


def data_of(path: Path) -> Path:
    """Where the weights of a graph lie that are not inside of it."""
    return path.with_name(path.name + DATA)


class OnnxRun:
    """One session of onnxruntime, on a GPU where it has one. A `Run`; safe from several threads. Raises GraphError."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise GraphError(f"{path}: needs onnxruntime; {INSTALL}") from error
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Warnings are of what it does about a graph, none of which is the user's to put right.
        options.log_severity_level = 3
        able = set(onnxruntime.get_available_providers())
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in able]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        # The runtime has no type of errors of its own but classes derived of RuntimeError or Exception, one a code.
        except Exception as error:
            reason, data = _reason(error), data_of(path)
            if data.name in reason and not data.is_file():
                told = f"its weights are a file of their own, {data.name}, and it is not beside it"
            else:
                told = f"onnxruntime {onnxruntime.__version__} cannot run it: {reason}"
            raise GraphError(f"{path}: {told}") from error
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.inputs = {each.name for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(given) != self.inputs:
            raise GraphError(f"{self.path}: its inputs are {sorted(self.inputs)}, where {sorted(given)} are given")
        try:
            found = self.session.run(self.outputs, {name: tensor.numpy() for name, tensor in given.items()})
        except Exception as error:
            raise GraphError(f"{self.path}: onnxruntime failed: {_reason(error)}") from error
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, found, strict=True)}


def _reason(error: Exception) -> str:
    """The runtime's own words in one line, without what it begins each with."""
    return " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")


def is_graph(source: str | Path) -> bool:
    """Whether `source` is meant as an ONNX file."""
    return Path(source).suffix.lower() == ENDING


def read(path: str | Path) -> Card:
    """What an ONNX file says of itself. Raises GraphError."""
    return Card.of(Path(path), _opened(path).metadata)


def load(path: str | Path, trusted: bool = False) -> Segmenter:
    """The model of an ONNX file, ready to predict. Raises GraphError; `trusted` as for `build.load`."""
    path = Path(path)
    run = _opened(path)
    card = Card.of(path, run.metadata)
    beside = path.with_suffix(POINTS + ENDING)
    points = None if card.facts is not None else run
    if card.points and card.facts is not None:
        if not beside.is_file():
            raise GraphError(f"{path}: its namer of points is a file of its own, {beside.name}, and is not beside it")
        points = OnnxRun(beside)
    return driven(like(card, trusted), card.facts, None if card.facts is None else run, points)


def like(card: Card, trusted: bool = False) -> Segmenter:
    """The model of a card without any numbers. Raises UserError where its recipe cannot be built."""
    experiment = build.Experiment(replace(card.recipe, trusted=trusted), card.vocabulary)
    try:
        return experiment.segmenter(meta=True, bare=True).eval()
    except RuntimeError as error:
        # Sizes beyond all tensors, which only a damaged or hostile recipe has.
        raise GraphError(f"{card.recipe.source}: its recipe cannot be built: {error}") from error


def _opened(path: str | Path) -> OnnxRun:
    if not Path(path).is_file():
        raise GraphError(f"no graph '{path}'; 'maskfirst export MODEL --out {path}' makes one")
    return OnnxRun(Path(path))
