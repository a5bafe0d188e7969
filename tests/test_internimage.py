"""InternImage: DCNv3 is the sum that it is defined as, both ways; the layouts of all sizes; sizes of pictures; training."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixtures_dir import FIXTURES
from maskfirst.backbones.internimage import DESIGNS, InternImage
from maskfirst.ops.dcnv3 import Window, dcnv3, dcnv3_by_gather
from parity.rows import table
from parity.runner import run

WAYS = (dcnv3, dcnv3_by_gather)
SUBSET = Path(__file__).parent / "fixtures" / "internimage"
Way = Callable[..., Tensor]


def by_loop(value: Tensor, offsets: Tensor, weights: Tensor, window: Window) -> Tensor:
    """Sample by sample, as the definition has it."""
    pictures, rows, columns, groups, points, _ = offsets.shape
    found = torch.zeros(pictures, rows, columns, groups, value.shape[-1], dtype=value.dtype)
    half = window.dilation * (window.kernel - 1) // 2
    for picture, row, column, group, point in torch.cartesian_prod(
        *(torch.arange(count) for count in (pictures, rows, columns, groups, points))
    ).tolist():
        tap = (point // window.kernel, point % window.kernel)
        move = offsets[picture, row, column, group, point]
        x, y = (
            -window.padding + half + place * window.stride
            + window.offset_scale * (tap[axis] * window.dilation - half + float(move[axis]))
            for axis, place in enumerate((column, row))
        )  # fmt: skip
        for j in (int(y // 1), int(y // 1) + 1):
            for i in (int(x // 1), int(x // 1) + 1):
                if 0 <= j < value.shape[1] and 0 <= i < value.shape[2]:
                    share = (1 - abs(y - j)) * (1 - abs(x - i)) * weights[picture, row, column, group, point]
                    found[picture, row, column, group] += share * value[picture, j, i, group]
    return found.flatten(3)


def given(window: Window, spread: float, size: tuple[int, int] = (5, 4)) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows, columns = window.size(size)
    shape = (2, rows, columns, 3, window.kernel**2)
    value = torch.randn(2, *size, 3, 2, generator=random, dtype=torch.float64)
    offsets = torch.randn(*shape, 2, generator=random, dtype=torch.float64) * spread
    return value, offsets, torch.rand(shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [0.5, 20.0])
@pytest.mark.parametrize(
    "window",
    [Window(), Window(offset_scale=2.0), Window(3, 2, 0, 1), Window(3, 1, 2, 2, 0.5), Window(1, 1, 0), Window(5, 3, 1)],
    ids=str,
)
def test_it_is_the_sum_that_it_is_defined_as(way: Way, window: Window, spread: float) -> None:
    size = (9, 8) if window.kernel == 5 else (5, 4)
    arguments = given(window, spread, size)
    torch.testing.assert_close(way(*arguments, window), by_loop(*arguments, window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_its_gradients_are_those_of_its_values(way: Way) -> None:
    window = Window(3, 2, 1, 1, 1.5)
    leaves = [tensor[:1].requires_grad_() for tensor in given(window, 0.7, (4, 3))]
    assert torch.autograd.gradcheck(lambda *each: way(*each, window), leaves, nondet_tol=1e-12)


def test_the_exportable_way_is_of_operators_that_every_exporter_knows() -> None:
    window = Window()

    class Whole(torch.nn.Module):
        def forward(self, value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
            return dcnv3_by_gather(value, offsets, weights, window)

    arguments = given(window, 1.0)
    program = torch.export.export(Whole(), arguments)
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("embedding" in each for each in used)
    assert not any("grid_sampler" in each or "embedding_bag" in each for each in used)
    torch.testing.assert_close(program.module()(*arguments), dcnv3(*arguments, window))


def test_offsets_of_other_windows_are_refused() -> None:
    value, offsets, weights = given(Window(), 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        dcnv3(value, offsets, weights, Window(stride=2))


SMALL: dict[str, Any] = {"width": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 4)}


def small(model: str = "t", **changes: Any) -> InternImage:
    """One whose offsets, centres and scales are no longer what they begin with."""
    torch.manual_seed(0)
    made = InternImage(**{"model": model, "post_norms": () if model in "tsblxl" else (1,), **SMALL, **changes})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if re.search(r"(offsets|weights|centre|scale)", name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize("model", DESIGNS)
@pytest.mark.parametrize("size", [(64, 32), (45, 70), (1, 1)], ids=str)
def test_all_layouts_take_any_size(model: str, size: tuple[int, int]) -> None:
    made = small(model).eval()
    with torch.inference_mode():
        maps = made(torch.rand(2, 3, *size) * 255)
    padded = [-(-side // 32) * 32 for side in size]
    assert [tuple(each.shape) for each in maps] == [
        (2, channels, padded[0] // stride, padded[1] // stride)
        for channels, stride in zip(made.channels, made.strides, strict=True)
    ]
    assert all(each.isfinite().all() for each in maps)


def test_what_a_layout_has() -> None:
    """Norms after stages where branches are normed before, or the centre counts; scales where segmentation has them."""
    kept = {
        model: {
            key
            for key in ("stages.0.norm.weight", "stages.0.blocks.0.look.scale", "stages.2.post_norms.0.weight")
            if key in small(model).state_dict()
        }
        for model in DESIGNS
    }
    norm, scale, between = "stages.0.norm.weight", "stages.0.blocks.0.look.scale", "stages.2.post_norms.0.weight"
    after = {key: {scale} for key in ("s", "b", "l", "xl")}
    assert kept == {"t": {norm, scale}, **after, "h": {norm, between}, "g": {norm, between}}


def test_it_normalises_for_itself_and_pads_with_what_becomes_nothing() -> None:
    made = small().eval()
    picture = torch.rand(1, 3, 40, 64) * 255
    padded = torch.tensor(made.mean).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    padded[:, :, :40] = picture
    with torch.inference_mode():
        for ours, theirs in zip(made(picture), made(padded), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("model", ["t", "b", "h"])
def test_what_is_made_anew_is_the_same(model: str) -> None:
    """With drop-path, whose choice must be the same the second time."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        made = small(model, checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(1)
        torch.stack([each.square().mean() for each in made(torch.rand(3, 3, 32, 64) * 255)]).sum().backward()
        return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(list(small(model).parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_drop_path_grows_from_nothing() -> None:
    made = small(depths=(1, 1, 2, 1), drop_path=0.4)
    rates = [branch.drop_path.drop_prob for name, branch in made.named_modules() if name.endswith("look")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_autocast_keeps_places_exact() -> None:
    """Where to look is computed in single precision, or a wide map's far tokens would be read pixels away."""
    made = small().eval()
    picture = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        exact = made(picture)
        with torch.autocast("cpu", torch.bfloat16):
            near = made(picture)
    for one, other in zip(exact, near, strict=True):
        assert (one - other.float()).abs().max() < 0.05 * one.abs().max()


MILLIONS = {"t": 30, "s": 50, "b": 97, "l": 223, "xl": 335, "h": 1080}
"""Of classification, as published, with its head; H's and G's heads are many, and ours have none."""


@pytest.mark.parametrize("model", DESIGNS)
def test_parameters_are_as_many_as_published(model: str) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in InternImage(model).parameters())  # pyright: ignore[reportArgumentType]
    if model in MILLIONS:
        assert count / 1e6 == pytest.approx(MILLIONS[model], rel=0.06)
    else:
        assert count / 1e9 == pytest.approx(3, rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"groups": (3, 2, 4, 4)}, "8 channels do not fall into 3 groups; change width or groups"),
        ({"depths": (1, 1, 2)}, r"depths \[1, 1, 2\] should be 4 numbers of at least 1, one a stage"),
        ({"depths": (1, 0, 2, 1)}, "depths"),
        ({"width": 9, "groups": (1, 1, 1, 1)}, "width 9 should be even"),
        ({"kernel": 4}, "kernel 4 should be odd"),
        ({"post_norms": (2,)}, r"post_norms \[2\]: the third stage has blocks 0\.\.1"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(**arguments)


PARTS = {"dcnv3_op": 9, "dcnv3_layer": 3}


@pytest.mark.parametrize(("part", "least"), PARTS.items())
def test_the_subset_holds(part: str, least: int) -> None:
    rows = run(SUBSET / part)
    assert len(rows) >= least
    assert all(row.passed for row in rows), table(rows)


@pytest.mark.parametrize(
    "key", ["plain.dw_conv.0.weight", "plain.dw_conv.1.1.bias", "plain.offset.bias", "plain.mask.weight"]
)
def test_one_perturbed_tensor_shows(tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(SUBSET / "dcnv3_layer", tmp_path / "layer")
    weights = load_file(folder / "state.safetensors")
    weights[key][0] += 0.05
    save_file(weights, folder / "state.safetensors")
    assert {row.name for row in run(folder) if not row.passed} == {"plain_out", "plain_gx"}


if FIXTURES is not None:

    @pytest.mark.parametrize(
        ("part", "least"), {"dcnv3_op": 45, "dcnv3_layer": 5, "internimage_t": 4, "internimage_h": 4}.items()
    )
    def test_everything_of_the_original_holds(part: str, least: int) -> None:
        assert FIXTURES is not None
        rows = run(FIXTURES / "proposals" / part)
        assert len(rows) == least
        assert all(row.passed for row in rows), table(rows)

    @pytest.mark.parametrize("part", ["internimage_t", "internimage_h"])
    def test_every_perturbed_tensor_shows(tmp_path: Path, part: str) -> None:
        """One of each kind of tensor."""
        assert FIXTURES is not None
        source = FIXTURES / "proposals" / part
        weights = load_file(source / "state.safetensors")
        kinds = {re.sub(r"\d+", "#", key): key for key in weights}
        folder = shutil.copytree(source, tmp_path / "one")
        folder.chmod(0o755)
        for key in kinds.values():
            changed = dict(weights)
            changed[key] = weights[key].clone()
            changed[key][0] += 0.5
            (folder / "state.safetensors").unlink(missing_ok=True)
            save_file(changed, folder / "state.safetensors")
            assert not all(row.passed for row in run(folder)), key
