"""Every part of the menus in a graph that is its model; what is not, or no longer, is refused in a line."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import maskfirst.export as verb
from maskfirst import build, cli, engine, graphs, weights
from maskfirst.build import MENUS, Experiment
from maskfirst.contracts import Backbone, Dataset, Namer, Proposer, Trunk
from maskfirst.data.shapes import Shapes
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.export import export
from maskfirst.frames import Size
from maskfirst.graphs import Facts, GraphError
from maskfirst.parity import LEAST_IOU, LEAST_MASKS, Parity, Picture, compare
from maskfirst.recipe import Recipe, import_class
from maskfirst.segmenter import Segmenter
from maskfirst.types import Sample, Segments
from test_contracts import BACKBONES, NAMES, SIDE, TRUNKS, sample

VIT_P = import_class(MENUS[Namer]["vit_p"]).example
CANVAS = (SIDE, 45)


def kind(contract: type, name: str, **changes: Any) -> dict[str, Any]:
    return {**import_class(MENUS[contract][name]).example, **changes}


def backbone(name: str, **changes: Any) -> dict[str, Any]:
    return {"kind": name, **BACKBONES[name], **changes}


def taps(trunk: str, *depths: int) -> dict[str, Any]:
    """Maps of a trunk that ends with the last of them."""
    return {"kind": "taps", "trunk": {**TRUNKS[trunk], "depth": depths[-1] + 1}, "depths": list(depths)}


def dense(name: str, **changes: Any) -> dict[str, Any]:
    """The linear head on a backbone."""
    return kind(Proposer, "dense", backbone=backbone(name, **changes))


@dataclass(frozen=True)
class Model:
    """What is exported. `answer`: the task whose answer its graph gives, too."""

    proposer: Mapping[str, Any]
    namer: Mapping[str, Any]
    answer: str | None = None


GIVEN, HEAD = kind(Namer, "given"), kind(Namer, "class_head")
EOMT = kind(Proposer, "eomt")
ADAPTER = backbone(
    "adapter",
    trunk=taps("vit", 0)["trunk"],
    interactions=[[0, 0]],
    extra_extractors=0,
    add_trunk=False,
    points=1,
)
MODELS: Mapping[str, Model] = {
    "atm": Model(kind(Proposer, "atm"), HEAD, "semantic"),
    "atm_single": Model(kind(Proposer, "atm_single", backbone=taps("beit", 0)), kind(Namer, "embeddings")),
    "atm_shrunk": Model(kind(Proposer, "atm_shrunk"), HEAD),
    "eomt": Model({**EOMT, "trunk": {**EOMT["trunk"], "depth": 2}, "blocks": 1}, kind(Namer, "among"), "instance"),
    "mask2former": Model(
        kind(Proposer, "mask2former", backbone=backbone("pyramid", window=7), decoder_layers=1, points=1),
        kind(Namer, "pading"),
        "panoptic",
    ),
    "oneformer": Model(
        kind(
            Proposer,
            "oneformer",
            backbone=backbone("internimage", depths=[1, 1, 1, 1]),
            encoder_layers=0,
            decoder_layers=1,
        ),
        HEAD,
    ),
    "upernet": Model(kind(Proposer, "upernet", backbone=ADAPTER, pools=[2]), GIVEN, "semantic"),
    "blend": Model(dense("simple_pyramid", backbone=taps("uni_perceiver", 0)), kind(Namer, "blend", first=GIVEN)),
    "vit_p": Model(kind(Proposer, "oracle"), VIT_P),
    "stem_vit": Model(dense("stem_vit"), GIVEN),
    "deconv_pyramid": Model(dense("deconv_pyramid", backbone=taps("vit", 0, 1, 2, 3)), GIVEN),
    "dinat": Model(dense("dinat", depths=[1, 1, 1, 1], dilations=[[2], [1], [1], [1]]), GIVEN),
}
"""Every kind of the menus of proposers, namers, backbones and trunks is in one of them, or in REFUSED."""
REFUSED: Mapping[tuple[type, str], tuple[str, str, str]] = {
    (Proposer, "saved"): (
        "saved",
        "given",
        "proposer saved is told the masks, and nothing is left that a graph could do",
    ),
    (Proposer, "oracle"): (
        "oracle",
        "given",
        "proposer oracle is told the masks, and nothing is left that a graph could do",
    ),
    (Namer, "oracle"): ("dense", "oracle", "namer oracle is told the truth, which no graph is; take another namer"),
}
"""Kinds without a graph, those of known masks unless points name these: a proposer and a namer with it, and what is said."""
PARTS: Mapping[str, type] = {
    "backbone": Backbone,
    "trunk": Trunk,
    "namer": Namer,
    "first": Namer,
    "second": Namer,
}


def kinds(contract: type, tree: Mapping[str, Any]) -> set[tuple[type, str]]:
    """Of a part and of all within it."""
    within = (kinds(PARTS[key], node) for key, node in tree.items() if key in PARTS)
    return {(contract, tree["kind"])}.union(*within)


def test_every_kind_is_exported() -> None:
    exported = set().union(*(kinds(Proposer, each.proposer) | kinds(Namer, each.namer) for each in MODELS.values()))
    menus = {(contract, name) for contract in (Proposer, Namer, Backbone, Trunk) for name in MENUS[contract]}
    assert exported | set(REFUSED) == menus


def model(name: str) -> tuple[Segmenter, Recipe]:
    tree = {
        "size": [SIDE, SIDE],
        "vocabulary": NAMES,
        "proposer": MODELS[name].proposer,
        "namer": MODELS[name].namer,
        "criterion": kind_of_loss(),
    }
    torch.manual_seed(0)
    recipe = Recipe(tree, "example.yaml")
    return Experiment(recipe, from_names(NAMES, things=["car"])).segmenter().eval(), recipe


def kind_of_loss() -> dict[str, Any]:
    return {"kind": "pixel"}


def noise(size: Size, truth: bool = False, count: int = 24) -> list[Picture]:
    samples = [sample(size, seed) for seed in range(count)]
    return [Picture(each.image, each.key, each.truth if truth else None) for each in samples]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_exported_and_run(name: str, tmp_path: Path) -> None:
    segmenter, recipe = model(name)
    answer, out = MODELS[name].answer, tmp_path / "model.onnx"
    found = export(segmenter, recipe, out, noise(CANVAS, segmenter.uses_truth), "semantic", answer=answer)
    assert not found.parity.faults
    assert found.parity.masks >= LEAST_MASKS
    assert "alone" not in found.sentence
    assert [file.name for file in found.files] == ["model.onnx", *(["model.points.onnx"] if name == "blend" else [])]
    assert {file.name for file in tmp_path.iterdir()} == {*(file.name for file in found.files), "model.onnx.json"}
    operators = {node.op_type for file in found.files for node in onnx.load(file).graph.node}
    assert "GridSample" not in operators
    # Other sizes, such as windows of 7 divide and such as they do not, and more pictures at once than it was traced with.
    masks, points = graphs.networks(segmenter, answer)
    network = masks or points
    assert network is not None
    multiple, runner = segmenter.proposer.multiple, engine.OnnxRun(out)
    canvases = [(2 * multiple, 3 * multiple), (7 * multiple, 7 * multiple)]
    for size in [(VIT_P["size"][0], VIT_P["size"][1])] if masks is None else canvases:
        given = [torch.cat([each, each[:1]]) for each in graphs.example(network, size)]
        with torch.inference_mode():
            right = network(*given)
        made = runner(dict(zip(network.inputs, given, strict=True)))
        assert list(made) == list(network.outputs)
        for one, other in zip(right, made.values(), strict=True):
            assert one.shape == other.shape
            if one.is_floating_point():
                torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
            else:
                assert (one == other).float().mean() > 0.99


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    segmenter, recipe = model("atm")
    found = export(segmenter, recipe, tmp_path / "model.pt2", noise((SIDE, 45)), "semantic", size=(SIDE, 48))
    assert found.sentence.startswith("canvases of 32 x 48 px alone")
    extra = {"format": "", "vocabulary": "", "recipe": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert extra["format"] == engine.FORMAT
    assert json.loads(extra["recipe"]) == recipe.tree
    with pytest.raises(GraphError, match=r"fp16: is for \.onnx files"):
        export(segmenter, recipe, tmp_path / "model.pt2", [], "semantic", numbers="fp16")


@dataclass(frozen=True)
class Trained:
    """The bundled model, what it sees, and its file."""

    segmenter: Segmenter
    recipe: Recipe
    pictures: list[Picture]
    file: Path
    found: verb.Export


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    segmenter, recipe = build.load("camvid-small"), weights.read("camvid-small").recipe
    scenes = Shapes("val", 6, size=(144, 192))
    pictures = [Picture(scenes[index].image, scenes.keys()[index]) for index in range(len(scenes))]
    out = tmp_path_factory.mktemp("trained") / "camvid.onnx"
    found = export(segmenter, recipe, out, pictures, "semantic")
    return Trained(segmenter, recipe, pictures, out, found)


def perturbed(path: Path, to: Path, place: float) -> None:
    """A copy of a graph with one matrix of weights, at this share of all, pushed by half of its spread."""
    graph = onnx.load(path)
    large = [each for each in graph.graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) > 1]
    chosen = large[int(place * (len(large) - 1))]
    array = numpy_helper.to_array(chosen)
    push = np.random.default_rng(0).normal(0, 0.5 * array.std(), array.shape).astype(np.float32)
    chosen.CopyFrom(numpy_helper.from_array(array + push, chosen.name))
    onnx.save_model(graph, to)


def written(trained: Trained, write: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets an export of the bundled model write this in place of what it would trace."""
    facts = engine.read(trained.file).facts
    assert facts is not None
    program = torch.export.ExportedProgram.__new__(torch.export.ExportedProgram)
    monkeypatch.setattr(verb, "trace_masks", lambda *given: verb.Traced(program, facts, ""))
    monkeypatch.setattr(verb, "write_onnx", lambda path, *given: write(path))


def test_the_bundled_model_is_itself(trained: Trained) -> None:
    told = json.loads(trained.file.with_name("camvid.onnx.json").read_text())
    assert told == trained.found.as_json()
    parity = told["parity"]
    assert parity["passed"]
    assert parity["masks"] >= LEAST_MASKS
    assert parity["least_iou"] >= LEAST_IOU
    assert 0 < parity["largest_logit_difference"] < 1e-2
    assert parity["torch_ms"] > 0
    assert parity["graph_ms"] > 0
    assert "any size" in told["takes"]


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_one_initializer_perturbed_is_seen(trained: Trained, place: float, tmp_path: Path) -> None:
    perturbed(trained.file, tmp_path / "other.onnx", place)
    found = compare(trained.segmenter, engine.load(tmp_path / "other.onnx"), trained.pictures, "semantic")
    assert found.faults
    assert not found.as_json()["passed"]


def test_a_graph_that_is_not_the_model_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(trained, lambda path: perturbed(trained.file, path, 0.5), monkeypatch)
    out = tmp_path / "new" / "model.onnx"
    with pytest.raises(GraphError, match=r"model\.onnx: not written, as it is not the model: .*IoU below"):
        export(trained.segmenter, trained.recipe, out, trained.pictures, "semantic")
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx.json"]
    assert not json.loads(out.with_name("model.onnx.json").read_text())["parity"]["passed"]


def test_too_few_masks_prove_nothing() -> None:
    few = Parity(pictures=1, ious=[1.0] * 3, scale=1.0)
    assert "only 3 masks" in few.faults[0]
    assert "--images" in few.faults[0]
    assert not Parity(pictures=1, ious=[1.0] * LEAST_MASKS, scale=1.0).faults
    assert Parity(pictures=1, ious=[1.0] * LEAST_MASKS, scale=1.0, difference=float("nan")).faults


def test_windows_scales_and_flips_are_run_around_it(trained: Trained) -> None:
    graph = engine.load(trained.file)
    settings = replace(
        trained.segmenter.inference, window=(96, 96), stride=(64, 64), scales=(1.0, 1.25), flip=True, batch=3
    )
    own, other = (
        Segmenter(each.proposer, each.namer, None, each.vocabulary, settings).eval()
        for each in (trained.segmenter, graph)
    )
    for image in (trained.pictures[0].image, trained.pictures[1].image[:, :101, :77]):
        one, two = (each.segment(image, augment=True).label_map() for each in (own, other))
        assert (one == two).float().mean() > 0.999


class Own(Dataset):
    """What the model itself makes of pictures, as truth."""

    def __init__(self, trained: Trained, count: int = 2) -> None:
        self.vocabulary = trained.segmenter.vocabulary
        self.samples = []
        for each in trained.pictures[:count]:
            answer = trained.segmenter.segment(each.image)
            ids = torch.full((1, *each.image.shape[1:]), -1, dtype=torch.int32)
            for number, mask in enumerate(answer.masks):
                ids[0][mask] = number
            self.samples.append(Sample(each.image, ids, answer.classes, answer.crowd, each.key))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def keys(self) -> list[str]:
        return [each.key for each in self.samples]


@pytest.mark.parametrize("numbers", ["fp16", "int8"])
def test_other_numbers_tell_what_they_lose(
    trained: Trained, numbers: verb.Numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(trained, lambda path: path.write_bytes(trained.file.read_bytes()), monkeypatch)
    out = tmp_path / "small.onnx"
    found = export(
        trained.segmenter, trained.recipe, out, trained.pictures, "semantic", numbers=numbers, dataset=Own(trained)
    )
    assert found.lost is not None
    assert found.lost.before == 1.0
    assert 0.5 < found.lost.after <= 1.0
    assert "points lost" in str(found.lost)
    assert out.stat().st_size < 0.95 * trained.file.stat().st_size
    assert engine.load(out).segment(trained.pictures[0].image).masks.any()


LARGE = 2**14
"""Bytes of weights from which on graphs have them beside in these tests; below those of the bundled model."""


def apart(trained: Trained, path: Path) -> Path:
    """A copy of the bundled model's graph with its weights beside it."""
    verb._save(onnx.load(trained.file), path, LARGE)
    return path


def test_weights_that_are_too_large_for_a_graph_lie_beside_it(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file of that name in the folder one works in is no concern of others.
    monkeypatch.chdir(tmp_path)
    out, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    given = (trained.segmenter, trained.recipe, out, trained.pictures, "semantic")
    for _ in range(2):
        written(trained, lambda path: apart(trained, path), monkeypatch)
        found = export(*given)
        assert found.files == (out, data)
        assert {file.name for file in tmp_path.iterdir()} == {out.name, data.name, "model.onnx.json"}
        assert data.stat().st_size > 3 * out.stat().st_size
        assert data.stat().st_size + out.stat().st_size < 1.1 * trained.file.stat().st_size
    image = trained.pictures[0].image
    assert torch.equal(engine.load(out).segment(image).masks, engine.load(trained.file).segment(image).masks)
    whole = data.read_bytes()
    for left, words in {
        None: r"its weights are a file of their own, model\.onnx\.data",
        len(whole) // 2: "cannot run it",
    }.items():
        data.unlink()
        if left is not None:
            data.write_bytes(whole[:left])
        with pytest.raises(GraphError, match=words) as caught:
            engine.load(out)
        assert str(caught.value).startswith(str(out))
        assert "\n" not in str(caught.value)
        data.write_bytes(whole)
    written(trained, lambda path: path.write_bytes(trained.file.read_bytes()), monkeypatch)
    assert export(*given).files == (out,)
    assert not data.exists()


def test_a_graph_does_not_read_weights_from_elsewhere(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = apart(trained, tmp_path / "in" / "model.onnx")
    engine.data_of(path).rename(tmp_path / "elsewhere.data")
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    onnx.save_model(graph, path)
    with pytest.raises(GraphError, match=r"model\.onnx: onnxruntime .* cannot run it"):
        engine.load(path)


@pytest.mark.parametrize("convert", [verb.to_half, verb.to_int8])
def test_other_numbers_of_weights_beside_a_graph(
    trained: Trained, convert: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = apart(trained, tmp_path / "model.onnx")
    monkeypatch.setattr(verb, "_save", partial(verb._save, large=LARGE))
    convert(path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"model.onnx", "model.onnx.data"}
    assert sum(sizes.values()) < 0.95 * trained.file.stat().st_size
    monkeypatch.undo()
    convert(apart(trained, tmp_path / "model.onnx"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert engine.load(path).segment(trained.pictures[0].image).masks.any()


def test_a_graph_never_lies_beside_weights_of_another(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(trained, lambda path: apart(trained, path), monkeypatch)
    out, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    out.write_text("the graph of another model")
    data.write_text("its weights")
    replace_file = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError("the machine stops here")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OSError, match="stops here"):
        export(trained.segmenter, trained.recipe, out, trained.pictures, "semantic")
    assert not out.exists()


def edited(trained: Trained, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    graph = onnx.load(trained.file)
    change(graph)
    onnx.save_model(graph, to)
    return to


def metadata(**values: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        told = {each.key: each.value for each in graph.metadata_props}
        helper.set_model_props(graph, told | values)

    return change


def strange(graph: onnx.ModelProto) -> None:
    graph.graph.node[3].op_type, graph.graph.node[3].domain = "Marvel", "elsewhere"
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (strange, "onnxruntime .* cannot run it: .*Marvel"),
        (metadata(format="other"), "not a graph that 'maskfirst export' of this version made"),
        (metadata(facts="{}"), "damaged metadata"),
        (metadata(vocabulary='{"names": 3}'), "damaged metadata"),
        (metadata(recipe="[]"), "damaged metadata"),
        (metadata(points="true"), r"camvid\.points\.onnx, and is not beside it|is not beside it"),
        (metadata(recipe='{"proposer": {"kind": "os:system"}}'), "proposer"),
    ],
)
def test_files_that_are_no_graph_of_ours(
    trained: Trained, change: Callable[[onnx.ModelProto], None], told: str, tmp_path: Path
) -> None:
    path = edited(trained, tmp_path / "other.onnx", change)
    with pytest.raises(UserError, match=told) as caught:
        engine.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_graph_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(GraphError, match="cannot run it"):
        engine.load(tmp_path / "text.onnx")
    with pytest.raises(GraphError, match=r"no graph '.*absent\.onnx'; 'maskfirst export MODEL"):
        engine.load(tmp_path / "absent.onnx")


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that a command ends with."""
    monkeypatch.setattr("sys.argv", ["maskfirst", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_mistakes_of_the_command_line_are_one_line(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(trained.file)
    mistakes = {
        ("evaluate", file, "--data", "shapes"): "the data has 7 classes, the model 11",
        ("predict", "camvid-small", "x.png", "--out", "y", "--engine", "onnx"): "camvid-small is no .onnx file",
        ("predict", file, "x.png", "--out", "y", "--engine", "torch"): "is run by onnxruntime",
        ("export", "camvid-small", "--out", str(tmp_path / "x.bin"), "--images", str(tmp_path)): "such|no ",
    }
    for arguments, wanted in mistakes.items():
        line = told([*arguments], monkeypatch, capsys)
        assert re.search(wanted, line), line
        assert "\n" not in line


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    def tree(proposer: str, namer: str) -> Segmenter:
        parts = {"proposer": kind(Proposer, proposer), "namer": kind(Namer, namer), "criterion": kind_of_loss()}
        recipe = Recipe({"size": [SIDE, SIDE], "vocabulary": NAMES, **parts}, "example.yaml")
        return Experiment(recipe, from_names(NAMES)).segmenter()

    empty = Recipe({}, "example.yaml")
    for proposer, namer, words in REFUSED.values():
        with pytest.raises(GraphError) as caught:
            export(tree(proposer, namer), empty, tmp_path / "model.onnx", [], "semantic")
        assert str(caught.value) == words
    assert not list(tmp_path.iterdir())
    for known in ("saved", "oracle"):
        masks, points = graphs.networks(tree(known, "vit_p"))
        assert masks is None
        assert points is not None
    with pytest.raises(GraphError, match=r"model\.txt: should end in \.onnx"):
        export(tree("dense", "given"), empty, tmp_path / "model.txt", [], "semantic")
    with pytest.raises(GraphError, match="--answer: the names of this model come from points"):
        graphs.networks(model("blend")[0], "semantic")


def test_a_graph_of_one_size_takes_no_other() -> None:
    segmenter, _ = model("atm")
    facts = Facts(True, False, None, 16, (32, 48))
    graph = graphs.driven(segmenter, facts, lambda given: {}, None)
    with pytest.raises(
        GraphError, match="for canvases of 32 x 48 px, and one of 64 x 48 came; export it with --size 64x48"
    ):
        graph.segment(torch.zeros(3, 64, 48, dtype=torch.uint8))


def test_masks_are_compared_with_their_class_alone() -> None:
    from maskfirst.parity import ious

    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, :1] = True, True
    one = Segments(masks, torch.tensor([0, 1, 2]), torch.ones(3), torch.zeros(3, dtype=torch.bool))
    other = Segments(masks[[1, 0]], torch.tensor([0, 2]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assert ious(one, other) == [0.5, 0.0]
    assert ious(one, one) == [1.0, 1.0]
