"""Weights: what is saved comes back, what does not fit is named, what could run code is refused."""

import errno
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import maskfirst
from maskfirst import build, weights
from maskfirst.build import Experiment
from maskfirst.contracts import PerClass, Resizable
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.files import DiskError
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Segmenter
from maskfirst.weights import WeightsError, load_part, locate, read, require_same_vocabulary, save

NAMES = ("sky", "road", "car")
VOCABULARY = from_names(NAMES, things=["car"])


class Rows(nn.Module, PerClass):
    class_rows: ClassVar[Mapping[str, bool]] = {"weight": True, "queries": False}

    def __init__(self, classes: int, width: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes + 1, width))
        self.queries = nn.Parameter(torch.randn(classes, width))
        self.plain = nn.Parameter(torch.randn(width))


class Table(nn.Module, Resizable):
    """Grows by repeating its last row; the table itself lies one module deeper."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.inner = nn.Embedding(length, 2)

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        if name != "inner.weight" or tensor.shape[1] != 2:
            return None
        rows = torch.arange(self.inner.num_embeddings).clamp(max=len(tensor) - 1)
        return tensor[rows]


class Model(nn.Module):
    def __init__(self, classes: int = 3, length: int = 4, width: int = 2) -> None:
        super().__init__()
        self.head = Rows(classes, width)
        self.table = Table(length)
        self.linear = nn.Linear(width, 2)
        self.register_buffer("count", torch.tensor(7))


TREE: dict[str, Any] = {
    "size": 32,
    "vocabulary": "camvid",
    "proposer": {
        "kind": "atm",
        "backbone": {
            "kind": "taps",
            "depths": [0, 1],
            "trunk": {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2},
        },
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
    "namer": {"kind": "class_head"},
    "criterion": {"kind": "fixed"},
    "inference": {"window": [32, 32], "stride": [16, 16]},
}


def experiment(**changes: Any) -> Experiment:
    return Experiment(Recipe(TREE | changes, "camvid.yaml"))


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    return experiment().segmenter().eval()


@pytest.fixture
def saved(model: Segmenter, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(path, model, TREE, model.vocabulary, {"miou": 0.5}, source="a test")
    return path


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def message(call: Any, *arguments: Any, kind: type[Exception] = WeightsError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(path: Path, change: Any, **metadata: str) -> Path:
    """A copy of a weights file with its tensors and metadata changed."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        told = file.metadata()
    change(tensors)
    other = path.with_name("changed.safetensors")
    save_file(tensors, other, told | metadata)
    return other


# What is saved comes back.


def test_a_model_comes_back_as_it_was_saved(model: Segmenter, saved: Path) -> None:
    file = read(saved)
    assert file.recipe.tree == TREE
    assert not file.recipe.trusted
    assert file.vocabulary == model.vocabulary
    assert (file.scores, file.source) == ({"miou": 0.5}, "a test")
    assert same(file.tensors, model.state_dict())

    loaded = maskfirst.load(str(saved))
    assert not loaded.training
    assert loaded.inference == model.inference
    assert loaded.vocabulary == model.vocabulary
    assert same(loaded.state_dict(), model.state_dict())
    picture = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    assert torch.equal(loaded.segment(picture).label_map(), model.segment(picture).label_map())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_loaded_model_is_whole_and_its_own(model: Segmenter, saved: Path) -> None:
    loaded = build.load(saved)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    assert same(loaded.state_dict(), model.state_dict())
    assert not any(parameter.is_meta for parameter in nn.Linear(2, 2).parameters()), "others build as ever"


def test_half_precision_is_stored_and_widened(model: Segmenter, saved: Path, tmp_path: Path) -> None:
    small = tmp_path / "half.safetensors"
    save(small, model, TREE, model.vocabulary, half=True)
    assert small.stat().st_size < 0.7 * saved.stat().st_size
    loaded = build.load(small).state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.allclose(loaded[name], tensor, rtol=1e-3, atol=1e-6)


def test_half_precision_keeps_what_16_bits_cannot_hold(tmp_path: Path) -> None:
    module = Model()
    with torch.no_grad():
        module.linear.bias[0] = 1e6
    save(tmp_path / "a.safetensors", module, {}, VOCABULARY, half=True)
    tensors = read(tmp_path / "a.safetensors").tensors
    assert tensors["linear.bias"].dtype == torch.float32
    assert tensors["linear.bias"][0] == 1e6
    assert tensors["linear.weight"].dtype == torch.float16
    assert tensors["count"].dtype == torch.int64


def test_tensors_that_share_memory_are_saved_both(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    save(tmp_path / "a.safetensors", module, {}, VOCABULARY)
    tensors = read(tmp_path / "a.safetensors").tensors
    assert torch.equal(tensors["0.weight"], tensors["1.weight"])


def test_run_folders_and_bundled_names(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    told = message(locate, run)
    assert (
        told
        == f"{run}: no best.safetensors, last.safetensors or model.safetensors in this folder; give a run folder or a file"
    )
    shutil.copy(saved, run / "last.safetensors")
    assert locate(run) == run / "last.safetensors"
    shutil.copy(saved, run / "best.safetensors")
    assert locate(str(run)) == run / "best.safetensors"
    monkeypatch.setattr(weights, "_BUNDLED", run)
    assert locate("best") == run / "best.safetensors"
    assert message(locate, "bests") == (
        "no weights 'bests'. Did you mean 'best'? Give a .safetensors file, a run folder, hub:org/name "
        "or a bundled name: best, last."
    )
    assert message(locate, saved.with_name("modle.safetensors")) == (
        f"no weights '{saved.with_name('modle.safetensors')}'. Did you mean 'model.safetensors'? "
        "Give a .safetensors file, a run folder, hub:org/name or a bundled name: best, last."
    )


def test_weights_of_the_hub(saved: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(build.load("hub:org/name").state_dict(), model.state_dict())
    assert asked == [("org/name", "model.safetensors")]

    def refuse(repository: str, file: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert message(locate, "hub:org/name") == "hub:org/name: cannot fetch model.safetensors: cannot reach the hub"


def test_a_name_that_no_hub_can_have() -> None:
    assert message(locate, "hub:a/b/c").startswith("hub:a/b/c: cannot fetch model.safetensors: ")


# What is not ours, is damaged, or could run code.


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.pkl", "weights.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_are_refused(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"weight": [1.0]}, protocol))
    told = message(build.load, path)
    if protocol or not name.endswith("safetensors"):
        assert told == (
            f"{path}: a pickle could run code and is not opened; "
            f"'maskfirst convert {path} --recipe R --out FILE.safetensors' makes a safe file of it"
        )
    else:
        assert told.startswith(f"{path}: truncated, or no safetensors file at all: ")


def test_torch_archives_are_refused_whatever_their_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "a pickle could run code" in message(read, path)


def test_truncated_and_empty_files(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(content[:length])
        assert message(build.load, broken).startswith(f"{broken}: truncated, or no safetensors file at all: ")


def test_safetensors_of_others(tmp_path: Path) -> None:
    path = tmp_path / "timm.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    assert message(build.load, path) == (
        f"{path}: not a model that this version can build (it has no recipe inside); "
        "'maskfirst convert' makes one of a checkpoint of the original projects"
    )
    save_file({"a": torch.zeros(1)}, path, {"format": "maskfirst-9"})
    assert "(its format is 'maskfirst-9')" in message(build.load, path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"recipe": "{"}, "Expecting property name"),
        ({"recipe": "[]"}, "the recipe and the scores should be mappings"),
        ({"recipe": "[" * 100_000}, "recursion"),
        ({"vocabulary": "{}"}, "faults in the vocabulary: 4"),
        ({"vocabulary": '{"names":["a"],"things":[3],"colors":[[0,0,0]],"ids":[0]}'}, "faults in the vocabulary: 1"),
    ],
)
def test_damaged_metadata(saved: Path, metadata: dict[str, str], reason: str) -> None:
    path = rewritten(saved, lambda tensors: None, **metadata)
    told = message(build.load, path)
    assert told.startswith(f"{path}: damaged metadata: ")
    assert reason in told


def test_misfits_are_all_named_ten_of_each_kind(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("proposer.decoders.")][:12]:
            del tensors[name]
        tensors["stray"] = torch.zeros(1)
        tensors["namer.linear.bias"] = torch.zeros(5)

    path = rewritten(saved, change)
    told = message(build.load, path)
    assert told.startswith(f"{path}: does not fit its own recipe: 12 missing: proposer.decoders.")
    assert " and 2 more; 1 extra: stray; 1 misshaped: namer.linear.bias [5] for [12]" in told
    assert told.count("proposer.decoders.") == 10


def test_a_recipe_inside_of_weights_is_not_trusted(saved: Path, tmp_path: Path) -> None:
    def with_tree(tree: dict[str, Any]) -> Path:
        return rewritten(saved, lambda tensors: None, recipe=json.dumps(tree))

    private = with_tree(TREE | {"namer": {"kind": "os:system"}})
    assert message(build.load, private, kind=RecipeError) == (
        f"{private}: namer: kind 'os:system' would run code of its own, which weights may only if trusted (--trust)."
    )
    trunk = TREE["proposer"]["backbone"]["trunk"] | {"pretrained": True, "weights": "nowhere.safetensors"}
    backbone = TREE["proposer"]["backbone"] | {"trunk": trunk, "freeze": True}
    quiet = with_tree(TREE | {"proposer": TREE["proposer"] | {"backbone": backbone}})
    loaded = build.load(quiet)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    misspelt = with_tree(TREE | {"namer": {"kind": "class_haed"}})
    assert message(build.load, misspelt, kind=RecipeError) == (
        f"{misspelt}: namer: unknown kind 'class_haed'. Did you mean 'class_head'? "
        "Known: among, blend, class_head, embeddings, given, oracle, pading, vit_p."
    )


@pytest.mark.parametrize("width", [2**20, 2**40])
def test_a_recipe_cannot_ask_for_more_memory_than_its_file_has(saved: Path, width: int) -> None:
    tree = TREE | {"proposer": TREE["proposer"] | {"width": width}}
    told = message(build.load, rewritten(saved, lambda tensors: None, recipe=json.dumps(tree)))
    assert "misshaped" in told or "its recipe cannot be built" in told


def test_a_full_disk_leaves_what_was_there(model: Segmenter, saved: Path) -> None:
    before = saved.read_bytes()
    with file_size_limit(1000):
        told = message(save, saved, model, TREE, model.vocabulary, kind=DiskError)
    assert told.startswith(f"{saved}: not saved: ")
    assert told.endswith("what was there before is untouched")
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: the system refuses as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = message(save, tmp_path / "file" / "a.safetensors", Model(), {}, VOCABULARY, kind=DiskError)
    assert told == f"{tmp_path / 'file' / 'a.safetensors'}: cannot write here: {os.strerror(errno.EEXIST)}"


# What a part is given of other weights.


def stored(path: Path, module: nn.Module, names: tuple[str, ...] = NAMES) -> Path:
    save(path, module, {}, from_names(names))
    return path


def test_the_same_model_is_loaded_whole(tmp_path: Path) -> None:
    source, target = Model(), Model()
    path = stored(tmp_path / "a.safetensors", source)
    report = load_part(target, path, vocabulary=VOCABULARY)
    assert same(tensors_of(target), source.state_dict())
    assert set(report.loaded) == set(source.state_dict())
    assert report.resized == report.reset == report.unused == report.kept == report.fresh == ()
    assert report.describe() == f"model from {path}: 7 tensors loaded."


def test_class_rows_are_carried_over_by_name(tmp_path: Path) -> None:
    source, target = Model(3), Model(3)
    before = tensors_of(target)
    path = stored(tmp_path / "a.safetensors", source)
    report = load_part(target, path, vocabulary=from_names(["car", "tree", "sky"]))
    head, old = target.head, source.head
    for rows, others in ((head.weight, old.weight), (head.queries, old.queries)):
        assert torch.equal(rows[0], others[2])
        assert torch.equal(rows[2], others[0])
    assert torch.equal(head.weight[1], before["head.weight"][1]), "a new class starts at its initialisation"
    assert torch.equal(head.queries[1], before["head.queries"][1])
    assert torch.equal(head.weight[3], old.weight[3]), "no object is no object"
    assert torch.equal(head.plain, old.plain)
    assert report.kept == ("car", "sky")
    assert report.fresh == ("tree",)
    assert report.describe() == (
        f"model from {path}: 7 tensors loaded; the rows of 2 names carried over (car, sky); "
        "those of 1 at their initialisation (tree)."
    )


def test_class_rows_are_carried_over_to_more_classes_and_fewer(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", source := Model(3))
    more, fewer = Model(5), Model(1)
    load_part(more, path, vocabulary=from_names(["a", "road", "b", "car", "c"]))
    assert torch.equal(more.head.weight[[1, 3, 5]], source.head.weight[[1, 2, 3]])
    load_part(fewer, path, vocabulary=from_names(["road"]))
    assert torch.equal(fewer.head.weight, source.head.weight[[1, 3]])
    assert torch.equal(fewer.head.queries, source.head.queries[[1]])


def test_classes_without_a_common_name_start_afresh(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", source := Model(3))
    target = Model(3)
    before = tensors_of(target)
    report = load_part(target, path, vocabulary=from_names(["a", "b", "c"]))
    assert torch.equal(target.head.queries, before["head.queries"])
    assert torch.equal(target.head.weight[:3], before["head.weight"][:3])
    assert torch.equal(target.head.weight[3], source.head.weight[3])
    assert "head.queries" in report.reset
    assert report.fresh == ("a", "b", "c")


def test_rows_of_another_width_are_reset(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", Model(3, width=5))
    report = load_part(Model(3), path, vocabulary=from_names(["car", "tree", "sky"]))
    assert {"head.weight", "head.queries", "head.plain", "linear.weight"} <= set(report.reset)
    assert not report.kept


def test_tensors_are_resized_where_their_module_can(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", source := Model(length=2))
    target = Model(length=4)
    report = load_part(target, path, vocabulary=VOCABULARY)
    assert report.resized == ("table.inner.weight",)
    assert torch.equal(target.table.inner.weight, source.table.inner.weight[[0, 1, 1, 1]])
    assert "1 resized (table.inner.weight)" in report.describe()


def test_what_is_missing_or_left_over_is_listed(tmp_path: Path) -> None:
    source = Model()
    source.extra = nn.Linear(2, 2)
    target = Model()
    target.fresh = nn.Linear(2, 2)
    path = stored(tmp_path / "a.safetensors", source)
    report = load_part(target, path, vocabulary=VOCABULARY)
    assert report.reset == ("fresh.weight", "fresh.bias")
    assert set(report.unused) == {"extra.weight", "extra.bias"}
    assert "2 left at their initialisation (fresh.weight, fresh.bias)" in report.describe()


def test_a_part_takes_its_place_in_the_file_or_a_file_of_its_own(tmp_path: Path) -> None:
    whole = nn.ModuleDict({"proposer": Model(), "namer": nn.Linear(2, 2)})
    path = stored(tmp_path / "a.safetensors", whole)
    target = Model()
    report = load_part(target, path, "proposer", VOCABULARY)
    assert same(tensors_of(target), whole["proposer"].state_dict())
    assert (report.part, report.unused) == ("proposer", ())

    foreign = tmp_path / "part.safetensors"
    save_file(dict(tensors_of(whole["namer"])), foreign)
    alone = nn.Linear(2, 2)
    load_part(alone, foreign, "proposer.backbone.trunk", VOCABULARY)
    assert same(tensors_of(alone), whole["namer"].state_dict())

    assert message(load_part, nn.Conv2d(1, 1, 1), path, "criterion") == (
        f"{path}: nothing in it fits criterion; it holds namer, proposer"
    )


def test_weights_of_a_subtree(saved: Path, model: Segmenter) -> None:
    proposer = TREE["proposer"] | {"backbone": TREE["proposer"]["backbone"] | {"weights": str(saved)}}
    tuned = experiment(proposer=proposer, vocabulary=["Road", "Zebra"], size=64)
    segmenter = tuned.segmenter()
    (report,) = tuned.loaded
    assert report.part == "proposer.backbone"
    assert report.resized == ("trunk.vit.pos_embed",)
    assert not report.reset
    name = "proposer.backbone.trunk.vit.blocks.0.attn.qkv.weight"
    assert torch.equal(segmenter.get_parameter(name), model.get_parameter(name))
    missing = experiment(proposer=TREE["proposer"] | {"weights": "nowhere.safetensors"})
    assert message(missing.segmenter, kind=RecipeError).startswith(
        "camvid.yaml: proposer.weights: no weights 'nowhere.safetensors'."
    )


def test_fine_tuning_on_other_classes(saved: Path, model: Segmenter) -> None:
    tuned = experiment(vocabulary=["Zebra", "Road"]).segmenter()
    report = load_part(tuned, saved, vocabulary=tuned.vocabulary)
    road = model.vocabulary.names.index("Road")
    assert torch.equal(tuned.get_parameter("namer.linear.weight")[1], model.get_parameter("namer.linear.weight")[road])
    assert torch.equal(tuned.get_parameter("namer.linear.bias")[2], model.get_parameter("namer.linear.bias")[-1])
    assert torch.equal(
        tuned.get_parameter("proposer.queries.weight")[1], model.get_parameter("proposer.queries.weight")[road]
    )
    assert (report.kept, report.fresh) == (("Road",), ("Zebra",))
    assert report.reset == ("criterion.class_weights",)


def test_other_vocabularies_are_told_apart() -> None:
    require_same_vocabulary(VOCABULARY, from_names(NAMES), "camvid.yaml: data.test")
    data = from_names(["sky", "a", "b", "c", "d"])
    assert message(require_same_vocabulary, VOCABULARY, data, "camvid.yaml: data.test", kind=UserError) == (
        "camvid.yaml: data.test: the data has 5 classes, the model 3, and they differ (only the model knows: road, car; "
        "only the data: a, b, c and 1 more); train it on these with --from, or give the data the model's with the key "
        "vocabulary"
    )
    turned = from_names(["road", "sky", "car"])
    assert "the same names in another order" in message(
        require_same_vocabulary, VOCABULARY, turned, "data", kind=UserError
    )
