"""DiNAT: neighbourhood attention against its definition, the backbone, and parity with the original."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import Dim

from fixtures_dir import FIXTURES
from maskfirst import export
from maskfirst.backbones.dinat import DESIGNS, Block, DiNAT, Halving, NeighbourhoodAttention, Stage
from maskfirst.ops import neighbourhood_attention as module
from maskfirst.ops.neighbourhood_attention import (
    layout_of_any_size,
    neighbourhood_attention,
    neighbourhood_attention_of_any_size,
)
from parity.rows import table
from parity.runner import run

SUBSET = Path(__file__).parent / "fixtures" / "dinat"


def line(length: int, kernel: int, dilation: int, place: int) -> list[tuple[int, int]]:
    """The neighbours of a place, and how many steps each lies after it: of all runs of places of one remainder, as long as
    the kernel, the one whose middle is nearest."""
    own = [each for each in range(length) if each % dilation == place % dilation]
    runs = [own[first : first + kernel] for first in range(len(own) - kernel + 1)]
    nearest = min(runs, key=lambda run: abs(run[kernel // 2] - place))
    return [(each, (each - place) // dilation) for each in nearest]


def by_loop(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Token by token, as it is defined."""
    height, width, _, depth = queries.shape[1:]
    kernel = (bias.shape[-1] + 1) // 2
    found = torch.empty_like(queries)
    for y in range(height):
        for x in range(width):
            near = [
                (down, across)
                for down in line(height, kernel, dilation, y)
                for across in line(width, kernel, dilation, x)
            ]
            assert len(near) == kernel**2
            rows, columns = ([pair[axis][0] for pair in near] for axis in range(2))
            steps = [[pair[axis][1] + kernel - 1 for pair in near] for axis in range(2)]
            scores = torch.einsum("bmd,bkmd->bmk", queries[:, y, x], keys[:, rows, columns]) / depth**0.5
            shares = (scores + bias[:, steps[0], steps[1]]).softmax(-1)
            found[:, y, x] = torch.einsum("bmk,bkmd->bmd", shares, values[:, rows, columns])
    return found.flatten(3)


def given(size: tuple[int, int], kernel: int, batch: int = 2, depth: int = 3) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, *size, 2, depth)] * 3 + [(2, 2 * kernel - 1, 2 * kernel - 1)]
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


CASES = {
    "one token": ((1, 1), 1, 1),
    "windows of one": ((3, 4), 1, 2),
    "just a window": ((3, 5), 3, 1),
    "one tile a line": ((9, 10), 3, 1),
    "tiles": ((19, 13), 3, 1),
    "tiles that overlap": ((17, 21), 5, 1),
    "lines of two lengths": ((11, 10), 3, 3),
    "lines just long enough": ((15, 16), 5, 3),
    "dilated tiles of two lengths": ((35, 25), 3, 2),
    "a large window": ((24, 11), 11, 1),
    "a window of more than two tiles": ((24, 21), 19, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_sum_that_it_is_defined_as(case: tuple[tuple[int, int], int, int]) -> None:
    size, kernel, dilation = case
    arguments = given(size, kernel)
    found = neighbourhood_attention(*arguments, dilation)
    torch.testing.assert_close(found, by_loop(*arguments, dilation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_that_of_any_size_is_the_same_sum(case: tuple[tuple[int, int], int, int]) -> None:
    """Without a token beyond the map, as windows fit."""
    size, kernel, dilation = case
    queries, keys, values, bias = given(size, kernel)
    layout = layout_of_any_size(queries.flatten(3), queries.shape[3], kernel, dilation)
    beyond = 1e3 * torch.randn(2, *queries.shape[3:], dtype=torch.float64)
    found = neighbourhood_attention_of_any_size(queries, keys, values, bias, layout, beyond)
    torch.testing.assert_close(found, by_loop(queries, keys, values, bias, dilation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [1, 2**30])
def test_it_is_the_same_however_much_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    arguments = given((33, 26), 3)
    expected = neighbourhood_attention(*arguments, 2)
    monkeypatch.setattr(module, "SCORES", scores)
    torch.testing.assert_close(neighbourhood_attention(*arguments, 2), expected, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_those_of_its_values() -> None:
    leaves = [tensor.requires_grad_() for tensor in given((7, 6), 3, batch=1, depth=2)]
    assert torch.autograd.gradcheck(lambda *each: neighbourhood_attention(*each, 2), leaves, fast_mode=True)


def test_its_gradients_are_those_of_the_definition() -> None:
    """On a map of tiles that overlap, whose queries are had twice."""
    leaves = [tensor.requires_grad_() for tensor in given((17, 9), 5)]
    cotangent = torch.randn(2, 17, 9, 6, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(way(*leaves, 1), leaves, cotangent) for way in (neighbourhood_attention, by_loop)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_its_memory_does_not_grow_with_all_neighbours_of_all_tokens() -> None:
    """The largest tensor that is made is far smaller than tokens x neighbours x channels."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    arguments = given((96, 96), 7, batch=1)
    with torch.inference_mode(), Sizes():
        neighbourhood_attention(*arguments, 2)
    assert 0 < largest < 96 * 96 * 7 * 7 * 6 / 4


def test_it_is_of_operators_that_every_exporter_knows() -> None:
    class Whole(torch.nn.Module):
        def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return neighbourhood_attention(queries, keys, values, bias, 2)

    arguments = given((14, 9), 3)
    program = torch.export.export(Whole(), arguments)
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("maskfirst" in each or "scaled_dot_product" in each for each in used)
    torch.testing.assert_close(program.module()(*arguments), neighbourhood_attention(*arguments, 2))


@pytest.mark.parametrize(
    ("size", "side", "dilation", "told"),
    [
        ((6, 5), 5, 2, "a map of 6 x 5 is smaller than a window of 3 with dilation 2"),
        ((6, 6), 7, 1, "odd window"),
        ((6, 6), 5, 0, "dilation 0 at least 1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(size: tuple[int, int], side: int, dilation: int, told: str) -> None:
    maps = torch.zeros(1, *size, 1, 2)
    with pytest.raises(ValueError, match=told):
        neighbourhood_attention(maps, maps, maps, torch.zeros(1, side, side), dilation)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 5), (6, 6)], ids=str)
def test_a_map_smaller_than_a_window_is_filled_up_and_the_filling_is_seen(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = NeighbourhoodAttention(4, 2, 3, 2).double()
    with torch.no_grad():
        layer.qkv.bias.normal_()
    maps = torch.randn(1, *size, 4, dtype=torch.float64)
    canvas = torch.zeros(1, *(max(side, 6) for side in size), 4, dtype=torch.float64)
    canvas[:, : size[0], : size[1]] = maps
    with torch.inference_mode():
        torch.testing.assert_close(layer(maps), layer(canvas)[:, : size[0], : size[1]])


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are symbols where a graph is traced, and checks would ask for their numbers."""
    with export._unchecked():
        yield


@pytest.mark.usefixtures("unchecked")
def test_a_graph_of_a_stage_takes_maps_of_any_size(tmp_path: Path) -> None:
    """Smaller than windows on one side or both, and such as no tile divides, of lines of one length or two."""
    torch.manual_seed(0)
    design = replace(DESIGNS["t"], kernel=3)
    stage = Stage(Halving((4, 8), bias=False), [Block(8, 2, design, 3, 0.0) for _ in range(2)]).eval()
    with torch.no_grad():
        for block in stage.blocks:
            block.get_parameter("attention.qkv.bias").normal_()
    sides = {0: Dim("batch"), **{axis: 2 * Dim(name, min=1) for axis, name in ((1, "rows"), (2, "columns"))}}
    with torch.no_grad():
        program = torch.export.export(
            stage, (torch.randn(2, 22, 38, 4), False), dynamic_shapes=(sides, None), strict=False
        )
        torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(tmp_path / "stage.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "stage.onnx")
    for size in ((1, 1), (2, 30), (17, 5), (8, 9), (11, 19), (29, 24)):
        maps = torch.randn(3, *(2 * side for side in size), 4)
        with torch.inference_mode():
            right = stage(maps, False)
        assert right.shape == (3, *size, 8)
        found = program.module(check_guards=False)(maps, False)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"maps": maps.numpy()})[0]), right, rtol=1e-4, atol=1e-5
        )


SMALL: dict[str, Any] = {
    "width": 8,
    "depths": (1, 1, 2, 1),
    "heads": (1, 2, 2, 4),
    "kernel": 3,
    "dilations": ((2,), (1,), (1, 2), (1,)),
}


def small(**changes: Any) -> DiNAT:
    torch.manual_seed(0)
    return DiNAT("t", **(SMALL | changes))


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("size", [(64, 32), (45, 70), (1, 1)], ids=str)
def test_it_takes_any_size(size: tuple[int, int], scale: float | None) -> None:
    made = small(layer_scale=scale).eval()
    with torch.inference_mode():
        maps = made(torch.rand(2, 3, *size) * 255)
    padded = [-(-side // 32) * 32 for side in size]
    assert [tuple(each.shape) for each in maps] == [
        (2, channels, padded[0] // stride, padded[1] // stride)
        for channels, stride in zip(made.channels, made.strides, strict=True)
    ]
    assert all(each.isfinite().all() for each in maps)


def test_layer_scales_scale_the_branches() -> None:
    plain, scaled = small().eval(), small(layer_scale=0.5).eval()
    names = [name for name in scaled.state_dict() if re.search(r"scale[12]$", name)]
    assert len(names) == 2 * 5
    scaled.load_state_dict(plain.state_dict(), strict=False)
    halved = {
        key: tensor * 0.5 if re.search(r"(attention\.proj|contract)\.(weight|bias)$", key) else tensor
        for key, tensor in plain.state_dict().items()
    }
    picture = torch.rand(1, 3, 64, 32) * 255
    with torch.inference_mode():
        found = scaled(picture)
        plain.load_state_dict(halved)
        for one, other in zip(found, plain(picture), strict=True):
            torch.testing.assert_close(one, other)


def test_it_normalises_for_itself_and_pads_with_what_becomes_nothing() -> None:
    made = small().eval()
    picture = torch.rand(1, 3, 40, 64) * 255
    padded = torch.tensor(made.mean).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    padded[:, :, :40] = picture
    with torch.inference_mode():
        for ours, theirs in zip(made(picture), made(padded), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_what_is_made_anew_is_the_same() -> None:
    """With drop-path, whose choice must be the same the second time."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        made = small(checkpointing=checkpointing, drop_path=0.5, layer_scale=0.5).train()
        torch.manual_seed(1)
        torch.stack([each.square().mean() for each in made(torch.rand(3, 3, 32, 64) * 255)]).sum().backward()
        return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(list(small(layer_scale=0.5).parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_drop_path_grows_from_nothing() -> None:
    made = small(drop_path=0.4)
    rates = [each.drop_prob for name, each in made.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_autocast_stays_near() -> None:
    made = small().eval()
    picture = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        exact = made(picture)
        with torch.autocast("cpu", torch.bfloat16):
            near = made(picture)
    for one, other in zip(exact, near, strict=True):
        assert (one - other.float()).abs().max() < 0.05 * one.abs().max()


def test_tables_of_biases_are_resized_to_other_windows() -> None:
    """Bicubically, which a plane survives away from its ends; the numbers of heads must be equal."""
    large = small(kernel=5, dilations=((1,), (1,), (1, 1), (1,)))
    plane = (torch.arange(5)[:, None] + 10 * torch.arange(5)).float()[None]
    name = "stages.0.blocks.0.attention.bias"
    resized = large.resize_from(name, plane)
    assert resized is not None
    assert resized.shape == (1, 9, 9)
    torch.testing.assert_close(resized[0, 4, 4], plane[0, 2, 2])
    assert large.resize_from(name, plane.expand(2, 5, 5)) is None
    assert large.resize_from("stages.0.blocks.0.norm1.weight", torch.zeros(9)) is None
    assert large.resize_from("no.such", plane) is None


MILLIONS = {"m": 20, "t": 28, "s": 51, "b": 90, "l": 200}
"""Of classification, as published, with a head of 1000 classes."""


@pytest.mark.parametrize("model", MILLIONS)
def test_parameters_are_as_many_as_published(model: Any) -> None:
    assert MILLIONS.keys() == DESIGNS.keys()
    with torch.device("meta"):
        made = DiNAT(model)
    count = sum(parameter.numel() for parameter in made.parameters())
    last = made.channels[-1]
    # One norm there, and the head; four norms here.
    beside = last * 1002 + 1000 - 2 * sum(made.channels)
    # OneFormer's windows are larger than those of classification.
    beside -= sum(
        tensor.numel() - len(tensor) * 13**2
        for key, tensor in made.state_dict().items()
        if key.endswith("attention.bias")
    )
    # Of 22k classes l's figure has no head.
    assert round((count + (0 if model == "l" else beside)) / 1e6) == MILLIONS[model]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"heads": (3, 2, 4, 4)}, "8 channels do not fall into 3 heads; change width or heads"),
        ({"depths": (1, 1, 2)}, r"depths \[1, 1, 2\] should be 4 numbers of at least 1, one a stage"),
        ({"depths": (1, 0, 2, 1)}, "depths"),
        ({"width": 9, "heads": (1, 1, 1, 1)}, "width 9 should be even"),
        ({"kernel": 4}, "kernel 4 should be odd"),
        ({"kernel": -1}, "kernel -1 should be odd"),
        (
            {"dilations": ((1,), (1,), (1,), (1,))},
            r"dilations \[\[1\], \[1\], \[1\], \[1\]\] should be \[1, 1, 2, 1\] numbers",
        ),
        ({"dilations": ((1,), (0,), (1, 1), (1,))}, "dilations"),
        ({"dilations": ()}, "dilations"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(**arguments)


def test_the_subset_holds() -> None:
    rows = run(SUBSET / "natten2d")
    assert len(rows) == 6
    assert all(row.passed for row in rows), table(rows)


@pytest.mark.parametrize(
    "key", ["small.qkv.weight", "small.qkv.bias", "small.rpb", "small.proj.weight", "small.proj.bias"]
)
def test_one_perturbed_tensor_shows(tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(SUBSET / "natten2d", tmp_path / "layer")
    weights = load_file(folder / "state.safetensors")
    # All of a head's biases alike would change nothing.
    weights[key].view(-1)[::2] += 0.05
    save_file(weights, folder / "state.safetensors")
    assert "small_out" in {row.name for row in run(folder) if not row.passed}


if FIXTURES is not None:

    @pytest.mark.parametrize(("part", "least"), {"natten2d": 26, "dinat": 4}.items())
    def test_everything_of_the_original_holds(part: str, least: int) -> None:
        assert FIXTURES is not None
        rows = run(FIXTURES / "proposals" / part)
        assert len(rows) == least
        assert all(row.passed for row in rows), table(rows)

    def test_every_perturbed_tensor_shows(tmp_path: Path) -> None:
        """One of each kind of tensor."""
        assert FIXTURES is not None
        source = FIXTURES / "proposals" / "dinat"
        weights = load_file(source / "state.safetensors")
        folder = shutil.copytree(source, tmp_path / "one")
        folder.chmod(0o755)
        for key in {re.sub(r"\d+", "#", key): key for key in weights}.values():
            changed = dict(weights)
            changed[key] = weights[key].clone()
            # What all of a head's biases, or all channels of a map, have in common would change nothing.
            changed[key] += torch.randn(changed[key].shape, generator=torch.Generator().manual_seed(0)) * 0.3
            (folder / "state.safetensors").unlink(missing_ok=True)
            save_file(changed, folder / "state.safetensors")
            assert not all(row.passed for row in run(folder)), key
