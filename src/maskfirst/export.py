"""Export: a model as an ONNX file, or a program of torch.export, with its recipe and names inside, and proved to be the model.

Both are traced, with pictures in any number and, where the network does not ask for its size, of any size. What was written is
read back, run beside PyTorch on pictures, and thrown away where the two differ.
"""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import torch
from rich.table import Table
from torch import Tensor
from torch.export import Dim, ExportedProgram

from maskfirst.contracts import Dataset
from maskfirst.data.images import read_image
from maskfirst.engine import ENDING, INSTALL, POINTS, Card, OnnxRun, data_of
from maskfirst.evaluate import evaluate
from maskfirst.files import write_json
from maskfirst.frames import Size, up_to_multiple
from maskfirst.graphs import Facts, GraphError, MaskNetwork, Network, Run, driven, example, named, networks, settled
from maskfirst.parity import Parity, Picture, compare
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.sources.files import Found

PROGRAM = ".pt2"
OPSET = 18
TRACED, TRIED = (5, 11), (6, 3)
"""Sides, in multiples of what a network takes, of canvases that it is traced with, and tried with then: all unlike, and unlike
those that a model was made for, so that no branch is taken for one of these. Windows of 7 or 12 divide none of the grids that
it is traced with, as a padding of nothing would be left out of the graph."""
LARGE = 2**31 - 2**24
"""Bytes of weights from which on an ONNX file has them in a file beside it, as its format ends at 2 GiB."""
SMALL = 2**10
"""Bytes of a tensor that stays inside of its graph all the same: runtimes read such tensors before they look beside it."""
Numbers = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Lost:
    """The score of a data set, 0..1, in PyTorch and by a graph of other numbers."""

    headline: str
    before: float
    after: float

    def as_json(self) -> dict[str, Any]:
        return {"score": self.headline, "torch": self.before, "graph": self.after, "lost": self.before - self.after}

    def __str__(self) -> str:
        lost = 100 * (self.before - self.after)
        return f"{self.headline} {100 * self.before:.2f} % in PyTorch, {100 * self.after:.2f} % here: {lost:.2f} points lost"


@dataclass(frozen=True)
class Export:
    """What was written, what it takes in a sentence, and what it was found to be."""

    files: tuple[Path, ...]
    sentence: str
    parity: Parity
    lost: Lost | None

    def as_json(self) -> dict[str, Any]:
        return {
            "files": [str(file) for file in self.files],
            "takes": self.sentence,
            "parity": self.parity.as_json(),
            "lost": None if self.lost is None else self.lost.as_json(),
        }

    def as_table(self) -> Table:
        table = self.parity.as_table()
        table.caption = self.sentence if self.lost is None else f"{self.sentence}; {self.lost}"
        return table


def export(
    segmenter: Segmenter,
    recipe: Recipe,
    out: Path | str,
    pictures: Iterable[Picture],
    task: str,
    *,
    size: Size | None = None,
    answer: str | None = None,
    numbers: Numbers = "fp32",
    dataset: Dataset | None = None,
) -> Export:
    """Writes the networks of a segmenter to `out`, `.onnx` or `.pt2`, and what it was found to be to `out` with `.json` after.

    A namer of points beside a proposer is a second file, `NAME.points.onnx`. `pictures`: for the comparison, in which both
    answer `task`. `size`: (height, width) px of the only canvas that the graph shall take; None: any, where the network can.
    `answer`: the graph gives that task's answer, too. `numbers`: fp16 and int8 (weights and products; ONNX alone) are made of
    a graph in fp32 that has passed, and what they lose is measured on `dataset`.
    Raises GraphError where the network cannot be exported, or differs: then there is no file but the report.
    """
    out = Path(out)
    if out.suffix.lower() not in (ENDING, PROGRAM):
        raise GraphError(f"{out}: should end in {ENDING}, or in {PROGRAM} for torch.export")
    whole = out.suffix.lower() == ENDING
    if numbers != "fp32" and not (whole and dataset is not None):
        raise GraphError(f"{numbers}: is for {ENDING} files, and needs a data set to tell what is lost")
    if whole:
        _require_onnx(out)
    segmenter = settled(segmenter).to("cpu").eval()
    masks, points = networks(segmenter, answer)
    programs, facts, sentence = {}, None, "points of any number of pictures, in any number"
    if masks is not None:
        traced = trace_masks(masks, _start(segmenter, recipe), size)
        programs[out.name], facts, sentence = traced.program, traced.facts, traced.sentence
    if points is not None:
        name = out.name if masks is None else out.with_suffix(POINTS + out.suffix).name
        programs[name] = trace(points, example(points, points.namer.size), None)
    card = Card(recipe, segmenter.vocabulary, facts, masks is not None and points is not None)
    owners: dict[str, Network] = dict(
        zip(programs, [each for each in (masks, points) if each is not None], strict=True)
    )
    lost = None
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the folder itself, so that what has passed is renamed and never copied.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        folder = Path(place)
        for name, program in programs.items():
            (write_onnx if whole else _write_program)(folder / name, program, owners[name], card)
        runs = [_opened(folder / name, network) for name, network in owners.items()]
        graph = driven(segmenter, facts, *_by_part(runs, masks is not None, points is not None))
        parity = compare(segmenter, graph, pictures, task)
        report = Export((), sentence, parity, None)
        if parity.faults:
            write_json(_report(out), report.as_json())
            raise GraphError(
                f"{out}: not written, as it is not the model: {'; '.join(parity.faults)}; see {_report(out)}"
            )
        if numbers != "fp32" and dataset is not None:
            for name in programs:
                (to_half if numbers == "fp16" else to_int8)(folder / name)
            runs = [_opened(folder / name, network) for name, network in owners.items()]
            small = driven(segmenter, facts, *_by_part(runs, masks is not None, points is not None))
            before, after = (evaluate(each, dataset, task).scores for each in (segmenter, small))
            lost = Lost(before.headline, before.value, after.value)
        del runs
        # That of `out` last: what it asks for is there when it is.
        files = [file for name in reversed(programs) for file in _put(folder / name, out.parent)]
    found = replace(report, files=tuple(reversed(files)), lost=lost)
    write_json(_report(out), found.as_json())
    return found


def pictures_of_files(found: Iterable[Found]) -> Iterator[Picture]:
    """Pictures on disk, in their order, to compare on. Raises ImageError at one that cannot be read."""
    for each in found:
        yield Picture(read_image(each.file), each.name)


def pictures_of_data(dataset: Dataset, with_truth: bool) -> Iterator[Picture]:
    """Those of a data set, in its order, with their truth where the model is told it."""
    for index in range(len(dataset)):
        sample = dataset[index]
        yield Picture(sample.image, sample.key, sample.truth if with_truth else None)


@dataclass(frozen=True)
class Traced:
    """A program of masks, its facts, and what it takes in a sentence."""

    program: ExportedProgram
    facts: Facts
    sentence: str


def trace_masks(network: MaskNetwork, start: Size, size: Size | None = None) -> Traced:
    """Traces a network of masks with canvases of `size`, or of any size, or, where it does not allow that, of `start` alone.

    `start` is brought to multiples of what the network takes. Raises GraphError where it cannot be traced at all.
    """
    multiple = network.proposer.multiple
    wanted = up_to_multiple(size or start, multiple)
    facts = network.facts(example(network, wanted)[0][:1])
    if size is None:
        try:
            program = trace(network, example(network, _sized(multiple, TRACED)), multiple)
            _require_any_size(program, network, _sized(multiple, TRIED))
        except GraphError as error:
            reason = _in_line(error)
        else:
            return Traced(program, facts, f"canvases of any size whose sides {multiple} px divide, in any number")
    else:
        reason = "as asked for"
    program = trace(network, example(network, wanted), None)
    facts = replace(facts, size=wanted)
    return Traced(program, facts, f"canvases of {wanted[0]} x {wanted[1]} px alone, in any number ({reason})")


def _sized(multiple: int, times: tuple[int, int]) -> Size:
    height, width = (max(multiple, 16) * count for count in times)
    return up_to_multiple((height, width), multiple)


def _require_any_size(program: ExportedProgram, network: MaskNetwork, size: Size) -> None:
    """Raises GraphError where the program has kept a number of the size that it was traced with."""
    given = example(network, size)
    with torch.inference_mode():
        right = network(*given)
        try:
            found = unguarded(program)(*given)
        # Shapes that do not fit are errors of any operator's.
        except Exception as error:
            raise GraphError(f"traced at one size it fails at another: {_in_line(error)}") from error
    for one, other in zip(right, found, strict=True):
        if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2):
            raise GraphError("traced at one size it answers otherwise at another")


def trace(network: Network, given: tuple[Tensor, ...], multiple: int | None) -> ExportedProgram:
    """The program of a network. `multiple`: px that divide the sides of its pictures, which may have any size; None: they are
    all of the size of `given`. Raises GraphError."""
    batch = Dim("batch", min=1)
    sides = {} if multiple is None else {2: _sides("rows", multiple), 3: _sides("columns", multiple)}
    if isinstance(network, MaskNetwork):
        dynamic = ({0: batch, **sides}, *({0: batch} for _ in given[1:]))
    else:
        dynamic = ({0: batch}, {0: batch, 1: Dim("points", min=1)})
    try:
        with _unchecked(), torch.no_grad(), _quiet():
            return torch.export.export(network, given, dynamic_shapes={"given": dynamic}, strict=False)
    # Every operator that it does not know, and every question to a size, is an error of another type.
    except Exception as error:
        raise GraphError(f"torch.export cannot trace it: {_in_line(error)}") from error


def _sides(name: str, multiple: int) -> Any:
    dimension = Dim(name, min=1)
    return dimension if multiple == 1 else multiple * dimension


def _in_line(error: Exception, most: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}..."


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without the checks of shapes that tests run: the numbers are symbols here, and a question to one would fix it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell about their own insides."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _require_onnx(out: Path) -> None:
    missing = [
        name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise GraphError(f"{out}: needs {', '.join(missing)}; {INSTALL}")


def _start(segmenter: Segmenter, recipe: Recipe) -> Size:
    """A canvas that the model is used with: a window, its recipe's size, or one of eight multiples."""
    said = recipe.tree.get("size")
    if segmenter.inference.window is not None:
        return segmenter.inference.window
    if isinstance(said, int):
        return said, said
    if isinstance(said, list | tuple) and len(said) == 2:
        return said[0], said[1]
    return 8 * segmenter.proposer.multiple, 8 * segmenter.proposer.multiple


def _write_program(path: Path, program: ExportedProgram, network: Network, card: Card) -> None:
    torch.export.save(program, path, extra_files=card.as_metadata())


def write_onnx(path: Path, program: ExportedProgram, network: Network, card: Card) -> None:
    """Writes a traced network and its card as ONNX. Raises GraphError where ONNX has no words for it."""
    import onnx
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    with _unchecked(), torch.no_grad(), _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(network.inputs),
                output_names=list(network.outputs),
                verbose=False,
                optimize=False,
            )
            assert made is not None
            # Half of the nodes tell sizes once more, and optimizing takes five times as long with them.
            CommonSubexpressionEliminationPass()(made.model)
            made.optimize()
        # It wraps whatever an operator's translation raises in types that are not public.
        except Exception as error:
            raise GraphError(f"{path.name}: cannot be said in ONNX: {_in_line(error)}") from error
    graph = made.model_proto
    onnx.helper.set_model_props(graph, card.as_metadata())
    _save(graph, path)


def _save(graph: Any, path: Path, large: int = LARGE) -> None:
    """Writes a graph, and beside it, from `large` bytes of weights on, a file of them. What lies there is replaced."""
    import onnx
    from onnx.external_data_helper import set_external_data

    data = data_of(path)
    # They are written to the end of what is there.
    data.unlink(missing_ok=True)
    weights = graph.graph.initializer
    if sum(len(tensor.raw_data) for tensor in weights) >= large:
        for tensor in weights:
            if len(tensor.raw_data) >= SMALL:
                set_external_data(tensor, data.name)
    onnx.save_model(graph, str(path))


def _put(written: Path, folder: Path) -> list[Path]:
    """Moves a graph, and what weights lie beside it, to `folder`, and returns where they are now, the graph last.

    One that lies there is removed before its weights change: it would take others' for its own.
    """
    placed, data = folder / written.name, data_of(written)
    beside = data_of(placed)
    moved = [(data, beside)] if data.is_file() else []
    if written.suffix.lower() == ENDING and (moved or beside.is_file()):
        placed.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
    for file, goal in (*moved, (written, placed)):
        file.replace(goal)
    return [goal for _, goal in (*moved, (written, placed))]


def unguarded(program: ExportedProgram) -> torch.nn.Module:
    """A program without its questions to sizes, such as whether padding made a copy, which differ while its numbers do not."""
    return program.module(check_guards=False)


class ProgramRun:
    """A program of torch.export, read back from its file. A `Run`."""

    def __init__(self, path: Path, network: Network) -> None:
        self.module = unguarded(torch.export.load(path))
        self.network = network

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            return named(self.network, self.module(*(given[name] for name in self.network.inputs)))


def _opened(path: Path, network: Network) -> Run:
    return OnnxRun(path) if path.suffix.lower() == ENDING else ProgramRun(path, network)


def _by_part(runs: list[Run], masks: bool, points: bool) -> tuple[Run | None, Run | None]:
    return runs[0] if masks else None, runs[-1] if points else None


def _report(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def to_half(path: Path) -> None:
    """In 16 bits, but for what goes in and comes out, and for what onnxruntime has in 32 bits alone."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    aside = path.with_name(f"{path.stem}.shapes{path.suffix}")
    with _quiet():
        # From file to file, as a graph above 2 GiB is told its shapes no other way; beside its weights, which both read.
        onnx.shape_inference.infer_shapes_path(str(path), str(aside))
        graph = onnx.load(str(aside))
        aside.unlink()
        _save(convert_float_to_float16(graph, keep_io_types=True, disable_shape_infer=True), path)


def to_int8(path: Path) -> None:
    """Weights of products in 8 bits, and what they are multiplied with as it comes (dynamic quantization)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    aside = path.with_name(f"{path.stem}.int8{path.suffix}")
    kind, large = QuantType.QInt8, data_of(path).is_file()
    with _quiet():
        quantize_dynamic(
            path, aside, op_types_to_quantize=["MatMul", "Gemm"], weight_type=kind, use_external_data_format=large
        )
        graph = onnx.load(str(aside))
        for file in (aside, data_of(aside)):
            file.unlink(missing_ok=True)
        _save(graph, path)
