"""Pyramids: timm's networks at any size, their norms, pretrained weights and other windows; and pyramids of plain ViTs."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import offline
from maskfirst.backbones.beit import BEiT
from maskfirst.backbones.deconv_pyramid import DeconvPyramid
from maskfirst.backbones.doubling import Doubling
from maskfirst.backbones.pyramid import Pyramid
from maskfirst.backbones.simple_pyramid import SimplePyramid
from maskfirst.backbones.swin import SwinBlock
from maskfirst.backbones.vit import Taps, TimmViT
from maskfirst.errors import UserError
from maskfirst.ops.cpu import fast_on_cpu

SWIN: dict[str, Any] = {"widths": (8, 16, 32, 64), "depths": (2, 1, 1, 1), "heads": (1, 1, 2, 2), "window": 4}


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("swin_small_patch4_window7_224", (96, 192, 384, 768)),
        ("swin_base_patch4_window12_384", (128, 256, 512, 1024)),
        ("swin_large_patch4_window12_384", (192, 384, 768, 1536)),
        ("convnext_large", (192, 384, 768, 1536)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnet101", (256, 512, 1024, 2048)),
    ],
)
def test_the_zoo_s_backbones_are_there(model: str, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert Pyramid(model, norms=False).channels == channels


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (50, 70)])
def test_swin_takes_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(**SWIN).eval()
    with torch.inference_mode():
        maps = pyramid(torch.rand(2, 3, *size) * 255)
    padded = [-(-side // 32) * 32 for side in size]
    for tapped, channels, stride in zip(maps, pyramid.channels, pyramid.strides, strict=True):
        assert tapped.shape == (2, channels, padded[0] // stride, padded[1] // stride)
        # The norm is over channels, and at first without scale or shift.
        torch.testing.assert_close(tapped.mean(1), torch.zeros_like(tapped[:, 0]), atol=1e-5, rtol=0)


def swin_block(window: int, shift: int, width: int = 8) -> Any:
    torch.manual_seed(0)
    trunk: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=width, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=window,
        strict_img_size=False, always_partition=True, num_classes=0,
    )  # fmt: skip
    block = trunk.layers[0].blocks[1 if shift else 0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_s_block_is_timm_s_where_windows_fit(shift: int) -> None:
    block = swin_block(5, shift)
    assert tuple(block.shift_size) == (shift, shift)
    maps = torch.randn(2, 15, 10, 8)
    with torch.inference_mode():
        torch.testing.assert_close(SwinBlock(block, again=False)(maps), block(maps))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_what_is_made_anew_is_the_same(dtype: torch.dtype, tolerance: float) -> None:
    # So wide that in single precision the fast way is taken.
    block = swin_block(5, 2, 64).to(dtype)
    gradients = []
    for again in (False, True):
        maps = torch.randn(2, 31, 24, 64, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
        with fast_on_cpu():
            loss = SwinBlock(block, again)(maps).square().sum()
        gradients.append(torch.autograd.grad(loss, [maps, *block.parameters()]))
    for kept, anew in zip(*gradients, strict=True):
        torch.testing.assert_close(anew, kept, rtol=tolerance, atol=tolerance * kept.abs().max().item())


def test_windows_do_not_wrap_round_where_they_do_not_fit() -> None:
    """At the border too, what a token sees lies within a window's length of it; timm's own block mixes in the first row."""
    timms = swin_block(5, 2)
    maps = torch.randn(1, 16, 5, 8)
    changed = maps.clone()
    changed[:, -1] = torch.randn(1, 5, 8)

    def reached(block: nn.Module) -> list[int]:
        with torch.inference_mode():
            rows = (block(changed) - block(maps)).abs().amax((0, 2, 3))
        return (rows > 1e-4).nonzero()[:, 0].tolist()

    # Shifted by 2, windows begin at rows 2, 7 and 12.
    assert reached(SwinBlock(timms, again=False)) == [12, 13, 14, 15]
    assert reached(timms) == [0, 12, 13, 14, 15]


def test_it_normalises_for_itself_and_pads_with_what_becomes_nothing() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(**SWIN, mean=(10.0, 20.0, 30.0), std=(2.0, 3.0, 4.0)).eval()
    bare = Pyramid(**SWIN, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
    bare.load_state_dict(pyramid.state_dict())
    pixels = torch.rand(1, 3, 40, 64) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((10.0, 20.0, 30.0), (2.0, 3.0, 4.0)))
    filled = torch.cat([pixels, mean.expand(-1, -1, 24, 64)], 2)
    with torch.inference_mode():
        for ours, same, whole in zip(pyramid(pixels), bare((pixels - mean) / std), pyramid(filled), strict=True):
            torch.testing.assert_close(ours, same)
            torch.testing.assert_close(ours, whole)


def test_frozen_norms_stay_as_they_are() -> None:
    pyramid = Pyramid("resnet18", norms=False, freeze_norms=True).train()
    assert not [module for module in pyramid.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: buffer.clone() for name, buffer in pyramid.named_buffers()}
    maps = pyramid(torch.rand(2, 3, 64, 64) * 255)
    torch.stack([each.sum() for each in maps]).sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in pyramid.named_buffers())
    assert not [name for name, parameter in pyramid.named_parameters() if parameter.grad is None]


def test_frozen_norms_are_batch_norms_in_evaluation() -> None:
    torch.manual_seed(0)
    plain, frozen = (Pyramid("resnet18", norms=False, freeze_norms=freeze).eval() for freeze in (False, True))
    weights = {
        name: torch.rand(tensor.shape) + 0.5 if tensor.ndim == 1 else tensor
        for name, tensor in plain.state_dict().items()
    }
    plain.load_state_dict(weights)
    frozen.load_state_dict({name: weights[name] for name in frozen.state_dict()})
    assert {name for name in weights if name not in frozen.state_dict()} == {
        name for name in weights if name.endswith("num_batches_tracked")
    }
    pixels = torch.rand(1, 3, 32, 64) * 255
    with torch.inference_mode():
        for ours, same in zip(frozen(pixels), plain(pixels), strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"model": "swin_tinny_patch4_window7_224"}, "Did you mean 'swin_tiny_patch4_window7_224'"),
        ({"model": "vit_tiny_patch16_224", "norms": False}, "a pyramid needs"),
        (
            {"model": "mobilenetv3_small_050", "norms": False, "freeze_norms": True},
            "is for plain batch norms, and bn1 is a",
        ),
        ({"model": "resnet18", "window": 7}, "resnet18 cannot be made like that: .*window_size"),
        ({**SWIN, "widths": (8, 12, 32, 64)}, r"widths \[8, 12, 32, 64\] are not what"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Pyramid(**arguments)


def test_tables_of_relative_positions_come_from_other_windows() -> None:
    wide, narrow = Pyramid(**SWIN), Pyramid(**SWIN | {"window": 2})
    name = "trunk.layers.0.blocks.0.attn.relative_position_bias_table"
    table = torch.linspace(-1, 1, 3)[:, None].expand(3, 3).reshape(9, 1)
    resized = wide.resize_from(name, table)
    assert resized is not None
    assert resized.shape == wide.state_dict()[name].shape == (49, 1)
    # It rises from above to below and is the same along rows, as before; the middle stays.
    rows = resized.view(7, 7)
    torch.testing.assert_close(rows, rows[:, :1].expand(7, 7))
    assert (rows[:, 0].diff() > 0).all()
    assert rows[3, 3].abs() < 1e-6
    same = narrow.resize_from(name, table)
    assert same is not None
    assert torch.equal(same, table)
    assert wide.resize_from(name, table.expand(9, 2)) is None
    assert wide.resize_from("trunk.patch_embed.proj.weight", torch.zeros(2, 3, 4, 4)) is None
    assert wide.resize_from("nothing", table) is None


def test_pretrained_weights_are_taken_over_for_other_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = offline.made_up(monkeypatch)
    pyramid = Pyramid(window=5, pretrained=True)
    theirs, ours = made[0].state_dict(), pyramid.trunk.state_dict()
    assert {name for name in theirs if name not in ours} == {"norm.weight", "norm.bias"}
    for name, tensor in ours.items():
        if name.endswith("relative_position_bias_table"):
            assert tensor.shape[0] == 81
            assert theirs[name].shape[0] == 169
        else:
            assert torch.equal(tensor, theirs[name]), name
    with pytest.raises(ValueError, match="leave out widths, depths and heads"):
        Pyramid(**SWIN, pretrained=True)


def test_pretrained_weights_that_cannot_be_fetched_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    offline.unreachable(monkeypatch)
    with pytest.raises(UserError, match=r"could not be fetched \(no route to host\); give `weights:` instead"):
        Pyramid("resnet18", norms=False, pretrained=True)


def plain(patch: int = 16) -> TimmViT:
    return TimmViT((64, 64), "vit_tiny_patch16_224", width=32, depth=2, heads=2, patch=patch, final_norm=False)


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(64, 96), (45, 70)])
def test_a_plain_vit_becomes_a_pyramid(patch: int, size: tuple[int, int]) -> None:
    pyramid = SimplePyramid(Taps(plain(patch), (1,)), width=12).eval()
    with torch.inference_mode():
        maps = pyramid(torch.rand(1, 3, *size) * 255)
    padded = [-(-side // 32) * 32 for side in size]
    for tapped, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert tapped.shape == (1, 12, padded[0] // stride, padded[1] // stride)


def test_the_last_map_of_a_stride_counts() -> None:
    pyramid = SimplePyramid(Taps(plain(), (0, 1)), width=12).eval()
    pixels = torch.rand(1, 3, 32, 32) * 255
    deep = Taps(pyramid.get_submodule("backbone.trunk"), (1,)).eval()
    again = SimplePyramid(deep, width=12).eval()
    again.load_state_dict(pyramid.state_dict())
    with torch.inference_mode():
        for ours, same in zip(pyramid(pixels), again(pixels), strict=True):
            torch.testing.assert_close(ours, same)


def test_strides_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="give its trunk another `patch`"):
        SimplePyramid(Taps(plain(14), (1,)))


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_doubling_is_a_transposed_convolution(size: tuple[int, int]) -> None:
    ours, theirs = Doubling(6).double(), nn.ConvTranspose2d(6, 6, 2, 2).double()
    with torch.no_grad():
        ours.bias.normal_()
    assert not set(theirs.load_state_dict(ours.state_dict())[0])
    maps = torch.randn(2, 6, *size).double()
    torch.testing.assert_close(ours(maps), theirs(maps))


def four_taps(patch: int = 16) -> Taps:
    trunk = TimmViT((64, 64), "vit_tiny_patch16_224", width=32, depth=5, heads=2, patch=patch, final_norm=False)
    return Taps(trunk, (0, 1, 3, 4))


@pytest.mark.parametrize("size", [(64, 96), (45, 70)])
def test_taps_become_a_pyramid_by_transposed_convolutions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pyramid = DeconvPyramid(four_taps()).eval()
    pixels = torch.rand(2, 3, *size) * 255
    height, width = (-(-side // 32) * 32 for side in size)
    mean = torch.tensor(pyramid.mean).view(1, 3, 1, 1)
    filled = torch.cat([pixels, mean.expand(2, -1, size[0], width - size[1])], 3)
    filled = torch.cat([filled, mean.expand(2, -1, height - size[0], width)], 2)
    with torch.inference_mode():
        maps, taps = pyramid(pixels), pyramid.get_submodule("backbone")(filled)
    for found, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert found.shape == (2, 32, height // stride, width // stride)
    assert torch.equal(maps[2], taps[2])
    assert torch.equal(maps[3], nn.functional.max_pool2d(taps[3], 2))


def test_beit_s_baseline_has_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        trunk = BEiT((512, 512), "beit_large_patch16_224", layer_scale=1e-6)
        pyramid = DeconvPyramid(Taps(trunk, (7, 11, 15, 23)))
    assert sum(parameter.numel() for parameter in pyramid.parameters()) == 317_235_712


def test_taps_that_are_no_four_of_stride_16_are_refused_with_the_remedy() -> None:
    for taps in (Taps(plain(), (0, 1)), four_taps(8)):
        with pytest.raises(ValueError, match=r"needs four maps of stride 16 px and one width, .*give it `taps`"):
            DeconvPyramid(taps)
