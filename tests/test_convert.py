"""Converting: renaming speaks for every key, and foreign files are opened as data alone."""

import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskfirst.convert import pickles
from maskfirst.convert.pickles import CheckpointError, open_checkpoint
from maskfirst.convert.rename import Join, Leave, Move, RenameError, Split, rename

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
    monkeypatch.setattr(pickles, "LARGEST", 10_000)
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
