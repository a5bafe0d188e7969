"""Converting: renaming speaks for every key, and foreign files are opened as data alone."""

import collections
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from maskfirst import build, weights
from maskfirst import recipe as recipes
from maskfirst.backbones.vit import TimmViT
from maskfirst.build import Experiment
from maskfirst.convert import containers, segvit
from maskfirst.convert.catalogue import ConvertError, convert, released
from maskfirst.convert.pickles import CheckpointError, open_checkpoint
from maskfirst.convert.rename import Copy, Join, Leave, Move, RenameError, Split, destinations, rename
from maskfirst.frames import Frame
from maskfirst.recipe import Recipe
from parity.foreign import recipe_tree
from parity.second import Shape, make

# ---- rename


def test_keys_move_by_groups_and_by_functions() -> None:
    rules = [
        Move(r"layers\.(\d+)\.w", r"blocks.\1.weight"),
        Move(r"stage_(\d+)", lambda match: f"stages.{int(match[1]) - 1}"),
        Move(r"kernel", "linear", lambda kernel: kernel.T),
    ]
    given = {"layers.11.w": torch.rand(2), "stage_1": torch.rand(3), "kernel": torch.rand(2, 3)}
    renamed = rename(given, rules, {"blocks.11.weight": (2,), "stages.0": (3,), "linear": (3, 2)})
    assert torch.equal(renamed.tensors["blocks.11.weight"], given["layers.11.w"])
    assert torch.equal(renamed.tensors["stages.0"], given["stage_1"])
    assert torch.equal(renamed.tensors["linear"], given["kernel"].T)
    assert renamed.homes["stage_1"] == ("stages.0",)


def test_packed_tensors_are_cut_and_single_ones_joined() -> None:
    packed = torch.rand(6, 2)
    cut = rename(
        {"in_proj": packed}, [Split("in_proj", ("q", "k", "v"))], {"q": (2, 2), "k": (2, 2), "v": (2, 2)}
    ).tensors
    assert torch.equal(torch.cat([cut["q"], cut["k"], cut["v"]]), packed)
    assert len({tensor.untyped_storage().data_ptr() for tensor in cut.values()}) == 3
    rules = [Join(name, "qkv", part, 3, torch.t) for part, name in enumerate(("query", "key", "value"))]
    # The order of the foreign keys does not matter.
    single = {"value": cut["v"].T, "query": cut["q"].T, "key": cut["k"].T}
    assert torch.equal(rename(single, rules, {"qkv": (6, 2)}).tensors["qkv"], packed)


def test_a_shared_tensor_goes_to_each_of_its_places_with_memory_of_its_own() -> None:
    rules = [Copy(r"shared\.(\w+)", (r"blocks.0.\1", r"blocks.1.\1"))]
    given = {"shared.table": torch.rand(3, 2)}
    renamed = rename(given, rules, {"blocks.0.table": (3, 2), "blocks.1.table": (3, 2)})
    assert renamed.homes == {"shared.table": ("blocks.0.table", "blocks.1.table")}
    assert all(torch.equal(tensor, given["shared.table"]) for tensor in renamed.tensors.values())
    tensors = [*given.values(), *renamed.tensors.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 3
    assert destinations(given, rules) == renamed.homes


def test_a_shared_tensor_beside_one_of_a_places_own_are_two_sources() -> None:
    rules = [Copy("shared", ("a", "b")), Move("own", "b")]
    with pytest.raises(RenameError) as caught:
        rename({"shared": torch.rand(2), "own": torch.rand(2)}, rules, {"a": (3,), "b": (2,)})
    assert caught.value.twice == ("b",)
    assert caught.value.misfits == (("a", (2,), (3,)),)


def test_what_is_left_behind_has_a_reason() -> None:
    renamed = rename(
        {"a": torch.rand(1), "head.x": torch.rand(1)}, [Move("a", "b"), Leave(r"head\..*", "why")], {"b": (1,)}
    )
    assert renamed.left == {"head.x": "why"}
    assert set(renamed.tensors) == {"b"}


def test_one_error_lists_everything_that_does_not_fit() -> None:
    given = {
        "stray": torch.rand(1),
        "small": torch.rand(2, 3),
        "gone": torch.rand(1),
        "one": torch.rand(1),
        "two": torch.rand(1),
    }
    rules = [Move("small", "big"), Move("gone", "nowhere"), Move("one|two", "both")]
    with pytest.raises(RenameError) as caught:
        rename(given, rules, {"big": (4, 3), "both": (1,), "unmet.weight": (1,)})
    error, line = caught.value, str(caught.value)
    assert error.unknown == ("stray",)
    assert error.homeless == (("gone", "nowhere"),)
    assert error.missing == ("unmet.weight",)
    assert error.misfits == (("big", (2, 3), (4, 3)),)
    assert error.twice == ("both",)
    assert "\n" not in line
    for part in ("stray", "gone (as nowhere)", "unmet.weight", "big [2, 3] must be [4, 3]", "both"):
        assert part in line


def test_the_line_stays_readable_and_the_attributes_have_all() -> None:
    given = {f"key{index:02}": torch.rand(1) for index in range(25)}
    with pytest.raises(RenameError, match=r"\(25\): .*key09 and 15 more") as caught:
        rename(given, [], {})
    assert caught.value.unknown == tuple(given)


def test_tensors_that_cannot_be_cut_turned_or_joined_are_misfits() -> None:
    rules = [
        Split("odd", ("q", "k")),
        Move("flat", "conv", lambda kernel: kernel.permute(3, 2, 0, 1)),
        Join("left", "joined", 0, 2),
        Join("right", "joined", 1, 2),
    ]
    given = {"odd": torch.rand(3), "flat": torch.rand(3), "left": torch.rand(1, 2), "right": torch.rand(1, 3)}
    with pytest.raises(RenameError) as caught:
        rename(given, rules, {"q": (1,), "k": (1,), "conv": (1, 1, 1, 3), "joined": (2, 2)})
    assert [misfit.key for misfit in caught.value.misfits] == ["odd", "flat", "joined"]
    assert caught.value.missing == ()


def test_a_join_without_all_its_parts_is_missing() -> None:
    with pytest.raises(RenameError) as caught:
        rename({"left": torch.rand(1)}, [Join("left", "joined", 0, 2)], {"joined": (2,)})
    assert caught.value.missing == ("joined",)


def test_the_first_rule_that_fits_counts_and_fits_whole_keys_only() -> None:
    rules = [Leave("a", "first"), Move("a.*", "b")]
    assert set(rename({"a": torch.rand(1), "ab": torch.rand(2)}, rules, {"b": (2,)}).tensors) == {"b"}


# ---- opening

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor([3])}


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


def save_torch(path: Path, content: Any, zipped: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def save_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in WEIGHTS.items()}


def save_good(path: Path) -> None:
    """WEIGHTS in the format of the suffix."""
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays())
    elif path.suffix == ".pkl":
        save_pickle(path, arrays())
    else:
        save_torch(path, WEIGHTS)


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz")


def assert_weights(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_tensors(tmp_path: Path, suffix: str) -> None:
    save_good(tmp_path / f"x{suffix}")
    assert_weights(open_checkpoint(tmp_path / f"x{suffix}").tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_mmcv_checkpoints_keep_plain_values_beside_the_tensors(tmp_path: Path, zipped: bool) -> None:
    meta = {
        "CLASSES": ("wall", "sky"),
        "PALETTE": [[1, 2, 3]],
        "hook_msgs": {"best": np.float64(54.6), "last": np.float32(1), "sizes": np.arange(3)},
        "iter": 160000,
    }
    state = collections.OrderedDict(WEIGHTS)
    save_torch(tmp_path / "x.pth", {"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, zipped)
    opened = open_checkpoint(tmp_path / "x.pth")
    assert_weights(opened.tensors)
    assert opened.beside["meta"]["CLASSES"] == ("wall", "sky")
    assert opened.beside["meta"]["hook_msgs"]["best"] == 54.6
    assert opened.beside["meta"]["hook_msgs"]["sizes"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_zoo_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {"model": collections.OrderedDict(arrays()), "__author__": "somebody", "scale": np.float64(2.5)}
    save_pickle(tmp_path / "x.pkl", content, protocol)
    opened = open_checkpoint(tmp_path / "x.pkl")
    assert_weights(opened.tensors)
    assert opened.beside == {"__author__": "somebody", "scale": 2.5}


def test_pickles_of_the_first_numpy_are_read(tmp_path: Path) -> None:
    content = pickle.dumps(arrays(), protocol=2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in content
    (tmp_path / "x.pkl").write_bytes(content)
    assert_weights(open_checkpoint(tmp_path / "x.pkl").tensors)


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_a_file_that_asks_for_code_is_refused_by_name_and_runs_nothing(tmp_path: Path, how: str) -> None:
    trace = tmp_path / "trace"
    content = {"state_dict": arrays(), "meta": Command(f"touch {trace}")}
    path = tmp_path / ("x.pkl" if how == "pickle" else "x.pth")
    save_pickle(path, content) if how == "pickle" else save_torch(path, content, how == "zip")
    with pytest.raises(CheckpointError, match=r"refused, it asks for 'posix\.system'") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "asked",
    [
        b"cbuiltins\neval\n.",
        b"cmaskfirst.files\nwrite_json\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
    ],
)
def test_pickles_may_ask_for_listed_names_only(tmp_path: Path, asked: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(asked)
    with pytest.raises(CheckpointError, match="refused, it asks for"):
        open_checkpoint(tmp_path / "x.pkl")


def test_arrays_must_begin_as_numpys_do(tmp_path: Path) -> None:
    """The call at an array's beginning could claim any amount of memory."""
    (tmp_path / "x.pkl").write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999\ntS'b'\ntR."
    )
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path / "x.pkl")


def test_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="refused, it asks for 'pickle'"):
        open_checkpoint(tmp_path / "x.npz")


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    save_torch(tmp_path / "x.pth", torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"refused, it asks for 'torch\.nn\.modules\.linear\.Linear'"):
        open_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "half"])
def test_damaged_files_get_one_line_that_names_them(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_good(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "garbage": b"\x89garbage" * 50, "truncated": whole[:20], "half": whole[: len(whole) // 2]}[
            damage
        ]
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert str(path) in line
    assert "fetch it again" in line
    assert "\n" not in line
    assert "weights_only" not in line


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(100_000))
    monkeypatch.setattr(containers, "LARGEST", 10_000)
    with pytest.raises(CheckpointError, match="would unpack to"):
        open_checkpoint(tmp_path / "x.npz")


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="a folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.safetensor").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"suffix '\.safetensor' is not known\. Did you mean '\.safetensors'\?"):
        open_checkpoint(tmp_path / "x.safetensor")
    save_torch(tmp_path / "x.pth", [1, 2])
    with pytest.raises(CheckpointError, match="holds a list"):
        open_checkpoint(tmp_path / "x.pth")
    save_torch(tmp_path / "x.pth", {"state_dict": {"a": "text"}})
    with pytest.raises(CheckpointError, match="a: a str, not a tensor"):
        open_checkpoint(tmp_path / "x.pth")
    save_torch(tmp_path / "x.pth", {"state_dict": {}})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "x.pth")
    save_torch(tmp_path / "x.pth", {"a": torch.eye(2).to_sparse()})
    with pytest.raises(CheckpointError, match="sparse"):
        open_checkpoint(tmp_path / "x.pth")
    save_pickle(tmp_path / "x.pkl", {"a": np.array(["text"])})
    with pytest.raises(CheckpointError, match="no tensor"):
        open_checkpoint(tmp_path / "x.pkl")


# ---- origins

TINY = {
    "tiny": Shape("ATMHead"),
    "tiny-shrunk": Shape("TPNATMHead", shrink=1),
    "tiny-four": Shape("ATMHead", classes=4),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of small SegViTs in the original's keys, as mmcv writes them, with what they make of a picture."""
    folder = tmp_path_factory.mktemp("originals")
    for seed, (name, shape) in enumerate(TINY.items()):
        make(folder, name, shape, seed)
        meta = {"CLASSES": tuple(f"class {index}" for index in range(shape.classes)), "PALETTE": [[1, 2, 3]]}
        save_torch(folder / f"{name}.pth", {"meta": meta, "state_dict": load_file(folder / f"{name}.safetensors")})
    return folder


def own_recipe(name: str) -> Recipe:
    return Recipe(recipe_tree(TINY[name].config), f"{name}.yaml")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package has recipes of the small models alone, and knows their shapes."""
    for name in ("tiny", "tiny-shrunk"):
        tree = own_recipe(name).tree | {"published": {"checkpoint": f"{name}_99.9.pth"}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(recipes, "_BUNDLED", tmp_path)
    four = ("vocabulary=[a, b, c, d]",)
    shapes = {("cascade", 24, 5, 64): ("tiny", ()), ("cascade", 24, 4, 64): ("tiny", four)}
    monkeypatch.setattr(segvit, "RECIPES", shapes | {("shrunk", 24, 5, 64): ("tiny-shrunk", ())})


def changed(
    originals: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "tiny"
) -> Path:
    tensors = load_file(originals / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.parametrize("name", ["tiny", "tiny-shrunk"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_becomes_a_model_that_gives_the_originals_numbers(
    originals: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    report = convert(originals / f"{name}.{suffix}", own_recipe(name), tmp_path / "out.safetensors")
    model = build.load(str(tmp_path / "out.safetensors"))
    with np.load(originals / f"{name}.npz") as arrays:
        image, expected = (torch.from_numpy(arrays[key]) for key in ("img64", "pred"))
    rows = model.view_scores(image[1], Frame((64, 64), (64, 64), (64, 64)))
    torch.testing.assert_close(rows.fetch(0, 64), expected[1], atol=5e-5, rtol=1e-4)
    assert report.tensors + len(report.left) == len(load_file(originals / f"{name}.safetensors"))
    assert not report.notes
    assert len(report.left) == (name == "tiny-shrunk")
    assert all(reason for reason in report.left.values())
    assert json.loads(json.dumps(report.as_json()))["recipe"] == name
    assert "resized: none" in str(report)


def test_the_shapes_choose_the_recipe(originals: Path, tmp_path: Path, bundled: None) -> None:
    out = tmp_path / "out.safetensors"
    assert convert(originals / "tiny.pth", None, out).recipe == "tiny"
    assert convert(originals / "tiny-shrunk.pth", None, out).recipe == "tiny-shrunk"
    assert weights.read(out).recipe.tree["proposer"]["kind"] == "atm_shrunk"


def test_a_released_name_within_an_archive_counts(originals: Path, tmp_path: Path, bundled: None) -> None:
    """Whatever the archive is called; models of two recipes may have the same shapes."""
    tree = own_recipe("tiny").tree | {"published": {"checkpoint": "twin_1.pth"}}
    (tmp_path / "twin.yaml").write_text(yaml.safe_dump(tree))
    for name, recipe in (("run/twin_1.pth", "twin"), ("twin_2.pth", "tiny")):
        with zipfile.ZipFile(tmp_path / "download.zip", "w") as archive:
            archive.write(originals / "tiny.pth", name)
        report = convert(tmp_path / "download.zip", None, tmp_path / "out.safetensors")
        assert report.recipe == recipe
        assert report.checkpoint == str(tmp_path / "download.zip")


@pytest.mark.parametrize("given", [True, False])
def test_the_number_of_classes_chooses_the_vocabulary(
    originals: Path, tmp_path: Path, bundled: None, given: bool
) -> None:
    out = tmp_path / "out.safetensors"
    report = convert(originals / "tiny-four.pth", recipes.load("tiny") if given else None, out)
    assert report.overrides == ("vocabulary=[a, b, c, d]",)
    assert weights.read(out).vocabulary.names == ("a", "b", "c", "d")
    assert report.notes == (
        "note: 4 classes have other names: 'class 0' here 'a', 'class 1' here 'b', 'class 2' here 'c', 'class 3' here 'd'",
    )


def test_another_recipe_is_refused_with_the_right_one(originals: Path, tmp_path: Path, bundled: None) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConvertError, match=r"a SegViT for 5 classes .* which tiny-shrunk is not; take --recipe tiny$"):
        convert(originals / "tiny.pth", recipes.load("tiny-shrunk"), out)
    with pytest.raises(ConvertError, match=r"take --recipe tiny -s vocabulary=\[a, b, c, d\]$"):
        convert(originals / "tiny-four.pth", recipes.load("tiny-shrunk"), out)
    assert not out.exists()


def test_a_model_of_no_published_row_needs_its_own_recipe(
    originals: Path, tmp_path: Path, bundled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segvit, "RECIPES", {})
    with pytest.raises(ConvertError, match=r"no bundled recipe is; .* tiny_99\.9\.pth \(tiny\)"):
        convert(originals / "tiny.pth", None, tmp_path / "out.safetensors")


def test_everything_that_does_not_fit_is_listed(originals: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decode_head.surplus"] = torch.zeros(1)
        tensors["backbone.layers.9.ln1.weight"] = torch.zeros(24)
        del tensors["decode_head.class_embed.bias"], tensors["backbone.pos_embed"]
        tensors["decode_head.q.weight"] = torch.zeros(5, 17)

    out = tmp_path / "out.safetensors"
    path = changed(originals, tmp_path, spoil)
    with pytest.raises(ConvertError) as caught:
        convert(path, own_recipe("tiny"), out)
    line = str(caught.value)
    for told in (
        "without a rule (1): decode_head.surplus;",
        "without a place in the model (1): backbone.layers.9.ln1.weight (as proposer.backbone.trunk.vit.blocks.9.norm1.weight)",
        "without a source (2): proposer.backbone.trunk.vit.pos_embed, namer.linear.bias",
        "proposer.queries.weight [5, 17] must be [5, 16]",
    ):
        assert told in line
    assert "\n" not in line
    assert not out.exists()
    with pytest.raises(ConvertError, match=r"looks like SegViT, but has no 'backbone\.pos_embed'|has no 'decode_head"):
        convert(path, None, out)


def test_the_branch_of_an_older_revision_is_left_behind(originals: Path, tmp_path: Path) -> None:
    keys = ("conv_0.weight", "conv_1.weight", "syncbn_fc_0.running_mean")
    path = changed(
        originals, tmp_path, lambda tensors: tensors.update({f"decode_head.{key}": torch.zeros(1) for key in keys})
    )
    report = convert(path, own_recipe("tiny"), tmp_path / "out.safetensors")
    assert set(report.left) == {f"decode_head.{key}" for key in keys}


def test_another_number_of_class_names_is_noted(originals: Path, tmp_path: Path) -> None:
    content = {"meta": {"CLASSES": ("wall",)}, "state_dict": load_file(originals / "tiny.safetensors")}
    save_torch(tmp_path / "x.pth", content)
    (note,) = convert(tmp_path / "x.pth", own_recipe("tiny"), tmp_path / "out.safetensors").notes
    assert "it names 1 classes, and the recipe 5" in note


def test_half_precision_becomes_the_models_own(originals: Path, tmp_path: Path) -> None:
    path = changed(originals, tmp_path, lambda t: t.update({key: tensor.half() for key, tensor in t.items()}))
    convert(path, own_recipe("tiny"), tmp_path / "out.safetensors")
    assert {t.dtype for t in weights.read(tmp_path / "out.safetensors").tensors.values()} == {torch.float32}


def test_files_of_no_known_origin_are_told_apart(tmp_path: Path) -> None:
    save_file({"foo.weight": torch.zeros(1), "bar.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConvertError, match=r"of no known origin; it holds bar, foo\. Known: SegViT, "):
        convert(tmp_path / "x.safetensors", None, tmp_path / "out.safetensors")
    with pytest.raises(ConvertError, match=r"written as \.safetensors"):
        convert(tmp_path / "x.safetensors", None, tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("tops", "told"),
    [
        (("neck", "rpn_head", "roi_head"), "neck, rpn_head, roi_head"),
        (("neck", "bbox_head"), "neck, bbox_head"),
        (("panoptic_head",), "panoptic_head"),
    ],
)
def test_detection_s_copies_are_other_networks(tmp_path: Path, tops: tuple[str, ...], told: str) -> None:
    own = ("level_embed", "spm.stem.0.weight", "interactions.0.injector.gamma", "blocks.0.attn.q_bias")
    keys = [*(f"backbone.{key}" for key in own), *(f"{top}.conv.weight" for top in tops)]
    path = tmp_path / "htc++_beit_adapter_large_fpn_3x_coco.pth.tar"
    save_torch(path, {"state_dict": {key: torch.zeros(1) for key in keys}})
    with pytest.raises(ConvertError) as caught:
        convert(path, None, tmp_path / "out.safetensors")
    assert str(caught.value) == (
        f"{path}: a detector of mmdet's (it has {told}); detection's copies of ViT-Adapter and of its trunks are other "
        "networks than those of segmentation, whatever their names; take a checkpoint of segmentation (decode_head)"
    )


def test_the_released_checkpoints_have_their_recipes() -> None:
    found = {file: recipe for file, recipe in released().items() if recipe.startswith("segvit")}
    assert found == {
        "ade_51.3.pth": "segvit-vit-b-ade20k",
        "ade_54.6.pth": "segvit-vit-l-ade20k",
        "ade_shrunk_53.9.pth": "segvit-vit-l-shrunk-ade20k",
        "COCOstuff_49.9.pth": "segvit-vit-l-coco-stuff-10k",
        "COCOstuff10k_shrunk_49.1.pth": "segvit-vit-l-shrunk-coco-stuff-10k",
        "PC59cls_64.1.pth": "segvit-vit-l-pascal-context",
        "PC59cls_62.3.pth": "segvit-vit-l-shrunk-pascal-context",
    }
    assert {name for name, _ in segvit.RECIPES.values()} == set(found.values())


# ---- pretrained ViTs


def small_vit(side: int = 48, final_norm: bool = True) -> TimmViT:
    torch.manual_seed(0)
    return TimmViT((side, side), width=24, depth=2, heads=3, patch=16, final_norm=final_norm)


def in_mmseg(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renames = (
        ("vit.blocks.", "layers."),
        (".attn.qkv.", ".attn.attn.in_proj_"),
        (".attn.proj.", ".attn.attn.out_proj."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        (".norm", ".ln"),
        ("vit.ln", "ln1"),
        ("patch_embed.proj.", "patch_embed.projection."),
        ("vit.", ""),
    )
    found = {}
    for key, tensor in ours.items():
        for own, foreign in renames:
            key = key.replace(own, foreign)
        found[key] = tensor
    return found


def in_timm(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("vit."): tensor for key, tensor in ours.items()} | {"head.weight": torch.zeros(10, 24)}


def in_jax(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {
        "cls": ours["vit.cls_token"],
        "embedding/kernel": ours["vit.patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": ours["vit.patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": ours["vit.pos_embed"],
        "Transformer/encoder_norm/scale": ours["vit.norm.weight"],
        "Transformer/encoder_norm/bias": ours["vit.norm.bias"],
        "head/kernel": torch.zeros(24, 10),
    }
    for index in range(2):
        own, block = f"vit.blocks.{index}", f"Transformer/encoderblock_{index}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        weights_, biases = ours[f"{own}.attn.qkv.weight"].chunk(3), ours[f"{own}.attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights_, biases, strict=True):
            found[f"{attention}/{name}/kernel"] = weight.T.reshape(24, 3, 8)
            found[f"{attention}/{name}/bias"] = bias.reshape(3, 8)
        found[f"{attention}/out/kernel"] = ours[f"{own}.attn.proj.weight"].T.reshape(3, 8, 24)
        found[f"{attention}/out/bias"] = ours[f"{own}.attn.proj.bias"]
        for theirs, ours_ in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{block}/{theirs}/scale"] = ours[f"{own}.{ours_}.weight"]
            found[f"{block}/{theirs}/bias"] = ours[f"{own}.{ours_}.bias"]
        for dense in (0, 1):
            found[f"{block}/MlpBlock_3/Dense_{dense}/kernel"] = ours[f"{own}.mlp.fc{dense + 1}.weight"].T
            found[f"{block}/MlpBlock_3/Dense_{dense}/bias"] = ours[f"{own}.mlp.fc{dense + 1}.bias"]
    return found


FORMATS = {"mmseg.pth": in_mmseg, "timm.pth": in_timm, "deit.pth": in_timm, "jax.npz": in_jax}


def write_vit(folder: Path, file: str, ours: dict[str, torch.Tensor]) -> Path:
    tensors = FORMATS[file](ours)
    if file.endswith(".npz"):
        np.savez(folder / file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        save_torch(folder / file, {"model": tensors} if file == "deit.pth" else tensors)
    return folder / file


@pytest.mark.parametrize("file", FORMATS)
def test_pretrained_vits_become_weights_for_a_trunk(tmp_path: Path, file: str) -> None:
    vit = small_vit()
    report = convert(write_vit(tmp_path, file, vit.state_dict()), None, tmp_path / "out.safetensors")
    assert report.recipe is None
    assert "proposer.backbone.trunk.weights=" in report.notes[0]
    assert all("classification" in reason for reason in report.left.values())
    fresh = TimmViT((48, 48), width=24, depth=2, heads=3, patch=16)
    loaded = weights.load_part(fresh, tmp_path / "out.safetensors", "proposer.backbone.trunk")
    assert (loaded.resized, loaded.reset, loaded.unused) == ((), (), ())
    assert all(torch.equal(tensor, vit.state_dict()[key]) for key, tensor in fresh.state_dict().items())


def deit_recipe(side: int) -> Recipe:
    """Whose trunk scales its branches, and has neither the class token in its blocks nor a norm behind them."""
    trunk = {"kind": "vit", "size": [side, side], "width": 24, "depth": 2, "heads": 3, "patch": 16}
    trunk |= {"layer_scale": 1.0, "final_norm": False, "class_token": False}
    tree = {
        "vocabulary": ["a", "b"],
        "proposer": {"kind": "dense", "backbone": {"kind": "taps", "depths": [1], "trunk": trunk}},
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel"},
    }
    return Recipe(tree, "tiny.yaml")


@pytest.mark.parametrize("side", [48, 64])
@pytest.mark.parametrize("file", FORMATS)
def test_a_trunk_may_scale_its_branches_though_no_release_does(tmp_path: Path, file: str, side: int) -> None:
    """As ViT-Adapter's does on DeiT and AugReg: its scales begin with 1."""
    vit, told, out = small_vit(), deit_recipe(side), tmp_path / "out.safetensors"
    *resized, begun, use = convert(write_vit(tmp_path, file, vit.state_dict()), told, out).notes
    scales = [f"vit.blocks.{index}.ls{branch}.gamma" for index in range(2) for branch in (1, 2)]
    assert begun == f"note: tiny begins by itself what the checkpoint has not: {', '.join(scales)}"
    assert resized == (["note: tiny resizes: vit.pos_embed"] if side == 64 else [])
    experiment = Experiment(recipes.override(told, [use.split("`")[1].removeprefix("-s ")]))
    trunk = experiment.segmenter().get_submodule("proposer.backbone.trunk").state_dict()
    (loaded,) = experiment.loaded
    assert set(loaded.reset) == set(scales)
    assert set(loaded.unused) == {"vit.norm.weight", "vit.norm.bias"}
    assert all((trunk[scale] == 1).all() for scale in scales)
    assert all(torch.equal(trunk[key], vit.state_dict()[key]) for key in loaded.loaded)
    assert ("vit.pos_embed" in loaded.loaded) == (side == 48)


@pytest.mark.parametrize("head", [True, False])
def test_a_distilled_deit_is_refused(tmp_path: Path, head: bool) -> None:
    tensors = in_timm(small_vit().state_dict()) | {"dist_token": torch.zeros(1, 1, 24)}
    tensors |= {"head_dist.weight": torch.zeros(10, 24)} if head else {}
    save_torch(tmp_path / "deit_tiny_distilled_patch16_224-b40b3cf7.pth", {"model": tensors})
    with pytest.raises(ConvertError) as caught:
        convert(tmp_path / "deit_tiny_distilled_patch16_224-b40b3cf7.pth", None, tmp_path / "out.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'deit_tiny_distilled_patch16_224-b40b3cf7.pth'}: a distilled DeiT, whose second token (dist_token) "
        "takes part in every block and has no place in this trunk; take the release of that size without distillation"
    )


def test_a_trunk_of_another_size_resizes_the_positions_and_says_so(tmp_path: Path) -> None:
    convert(write_vit(tmp_path, "mmseg.pth", small_vit().state_dict()), None, tmp_path / "out.safetensors")
    larger = small_vit(side=64, final_norm=False)
    loaded = weights.load_part(larger, tmp_path / "out.safetensors", "proposer.backbone.trunk")
    assert loaded.resized == ("vit.pos_embed",)
    assert set(loaded.unused) == {"vit.norm.weight", "vit.norm.bias"}


def test_a_pretrained_vit_is_checked_against_a_recipe(originals: Path, tmp_path: Path) -> None:
    """Positions are resized where they are loaded; other widths, and recipes without a ViT, are refused."""
    out = tmp_path / "out.safetensors"
    deep = TimmViT((48, 48), width=24, depth=3, heads=3, patch=16)
    convert(write_vit(tmp_path, "timm.pth", deep.state_dict()), own_recipe("tiny"), out)
    out.unlink()
    path = write_vit(tmp_path, "timm.pth", small_vit().state_dict())
    with pytest.raises(
        ConvertError, match=r"does not fit proposer\.backbone\.trunk of tiny: vit\.blocks\.2\.norm1\.weight missing"
    ):
        convert(path, own_recipe("tiny"), out)
    with pytest.raises(ConvertError, match=r"shapes has no proposer\.backbone\.trunk"):
        convert(path, recipes.load("shapes"), out)
    assert not out.exists()


def test_a_vit_that_is_not_whole_is_named(tmp_path: Path) -> None:
    tensors = in_timm(small_vit().state_dict())
    save_torch(tmp_path / "x.pth", {key: tensor for key, tensor in tensors.items() if key != "pos_embed"})
    with pytest.raises(ConvertError, match=r"looks like a ViT of timm's, but has no 'pos_embed'"):
        convert(tmp_path / "x.pth", None, tmp_path / "out.safetensors")
    for key, shape in (
        ("pos_embed", (1, 0, 24)),
        ("pos_embed", (1, 1, 24)),
        ("patch_embed.proj.weight", (24, 3, 0, 0)),
    ):
        save_torch(tmp_path / "x.pth", tensors | {key: torch.zeros(shape)})
        with pytest.raises(ConvertError, match=r"looks like a ViT of timm's, but its tensors have other axes"):
            convert(tmp_path / "x.pth", None, tmp_path / "out.safetensors")
    save_torch(tmp_path / "x.pth", {key: tensor for key, tensor in tensors.items() if key != "blocks.1.norm2.bias"})
    with pytest.raises(ConvertError, match=r"without a source \(1\): vit\.blocks\.1\.norm2\.bias"):
        convert(tmp_path / "x.pth", None, tmp_path / "out.safetensors")
