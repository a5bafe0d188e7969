"""Plain ViTs as ViT-Adapter has them: without a class token, with scales of 1, and with windows in chosen blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import offline
from maskfirst.backbones.vit import TimmViT, resize_positions
from maskfirst.errors import UserError

SMALL: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "final_norm": False}


def vit(**settings: Any) -> TimmViT:
    """One whose weights are away from where they are initialised."""
    torch.manual_seed(0)
    made = TimmViT((64, 64), "vit_tiny_patch16_224", **{**SMALL, **settings}).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def test_a_class_token_may_be_absent() -> None:
    trunk, seated = vit(class_token="absent"), vit()
    assert trunk.prefix == 0
    assert set(seated.state_dict()) - set(trunk.state_dict()) == {"vit.cls_token"}
    assert trunk.vit.pos_embed.shape == (1, 16, 32)
    # It is the network of one whose token is dropped after embedding.
    told = {name: tensor for name, tensor in seated.state_dict().items() if name != "vit.cls_token"}
    trunk.load_state_dict(told | {"vit.pos_embed": told["vit.pos_embed"][:, 1:]})
    pixels = torch.rand(2, 3, 48, 80, dtype=torch.float64) * 255
    tokens, grid = trunk.embed(pixels)
    other, _ = seated.embed(pixels)
    assert grid == (3, 5)
    torch.testing.assert_close(tokens, other)
    torch.testing.assert_close(trunk.block(1, tokens, grid), seated.block(1, other, grid))


def test_a_trunk_that_turns_what_follows_its_class_token_keeps_it() -> None:
    with pytest.raises(
        ValueError, match="class_token absent: 'vit_small_patch16_dinov3' turns what follows its class token"
    ):
        TimmViT((64, 64), "vit_small_patch16_dinov3", class_token="absent", **SMALL)


def test_one_that_begins_alike_looks_at_what_is_near() -> None:
    """Of tokens that are their positions alone, every one attends most to itself, and on average more to its neighbours."""
    torch.manual_seed(0)
    trunk = TimmViT((128, 128), "vit_tiny_patch16_224", class_token="absent", start="alike", width=64, depth=2, heads=2)
    table, block = trunk.vit.pos_embed[0].detach(), trunk.vit.blocks[1]
    queries, keys, _ = block.attn.qkv(block.norm1(table)).chunk(3, -1)
    assert torch.equal(queries, keys)
    scores = queries @ keys.T
    assert torch.equal(scores.argmax(1), torch.arange(64))
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).float()
    beside = torch.cdist(places, places) == 1
    assert scores[beside].mean() > 2 * scores[~beside].mean()


def test_only_one_with_a_position_table_begins_alike() -> None:
    with pytest.raises(ValueError, match="start alike: 'vit_small_patch16_dinov3' has no position table"):
        TimmViT((64, 64), "vit_small_patch16_dinov3", start="alike", **SMALL)


@pytest.mark.parametrize("patch", [8, 16])
def test_a_stem_takes_the_place_of_the_patch_embedding(patch: int) -> None:
    trunk = TimmViT((64, 64), f"vit_small_patch{patch}_224", stem=4, **SMALL).eval()
    tokens, grid = trunk.embed(torch.rand(1, 3, 64, 32) * 255)
    assert grid == (64 // patch, 32 // patch)
    assert tokens.shape == (1, grid[0] * grid[1], 32)
    convolutions = [part for part in trunk.vit.patch_embed.proj.modules() if isinstance(part, torch.nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [*(4, 8, 16)[: len(convolutions) - 1], 32]
    assert 2 ** len(convolutions) == patch


def test_only_patches_that_halving_makes_have_a_stem() -> None:
    with pytest.raises(ValueError, match="stem: patches of 14 px are not made by halving"):
        TimmViT((56, 56), "vit_small_patch14_dinov2", stem=4, **SMALL)


@pytest.mark.parametrize("side", [4, 6])
def test_files_with_a_row_for_the_class_token_fit_a_vit_without_it(side: int) -> None:
    trunk, table = vit(class_token="absent"), torch.randn(1, 1 + side * side, 32)
    found = trunk.resize_from("vit.pos_embed", table)
    assert found is not None
    assert torch.equal(found, resize_positions(table, (4, 4)))
    bare = trunk.resize_from("vit.pos_embed", table[:, 1:])
    assert bare is not None
    assert torch.equal(bare, found)
    assert vit().resize_from("vit.pos_embed", table[:, 1:]) is None


def test_pretrained_weights_fit_without_a_class_token_and_with_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    made = offline.made_up(monkeypatch)
    trunk = TimmViT(
        (64, 64), "vit_tiny_patch16_224", class_token="absent", layer_scale=1.0, final_norm=False, pretrained=True
    )
    theirs = made[0].state_dict()
    for name, tensor in trunk.vit.state_dict().items():
        if name.endswith(".gamma"):
            assert (tensor == 1).all()
        elif name == "pos_embed":
            assert torch.equal(tensor, resize_positions(theirs[name], (4, 4)))
        else:
            assert torch.equal(tensor, theirs[name]), name


def by_loop(trunk: TimmViT, tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The attention of block 1, window by window and query by query; outside of the map keys and values are 0."""
    attention = trunk.vit.blocks[1].attn
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, 2, 16)).unbind(2)
    height, width = grid
    seen = torch.zeros_like(query)
    for top in range(0, height, side):
        for left in range(0, width, side):
            inside = [
                y * width + x for y in range(top, min(top + side, height)) for x in range(left, min(left + side, width))
            ]
            missing = side * side - len(inside)
            for place in inside:
                scores = torch.einsum("bmd,bnmd->bmn", query[:, place], key[:, inside]) / 4
                shares = torch.cat([scores, scores.new_zeros(*scores.shape[:2], missing)], -1).softmax(-1)
                seen[:, place] = torch.einsum("bmn,bnmd->bmd", shares[..., : len(inside)], value[:, inside])
    return attention.proj(seen.flatten(2))


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((3, 5), 2), ((5, 7), 3), ((2, 3), 4)])
def test_windows_are_those_of_a_loop(grid: tuple[int, int], side: int) -> None:
    trunk = vit(class_token="absent", layer_scale=1.0, window=side, windowed=(1,))
    tokens = torch.randn(2, grid[0] * grid[1], 32, dtype=torch.float64)
    block = trunk.vit.blocks[1]
    expected = tokens + block.ls1(by_loop(trunk, block.norm1(tokens), grid, side))
    expected = expected + block.ls2(block.mlp(block.norm2(expected)))
    torch.testing.assert_close(trunk.block(1, tokens, grid), expected)
    torch.testing.assert_close(trunk.block(0, tokens, grid), trunk.vit.blocks[0](tokens))


def test_one_window_around_all_is_no_window() -> None:
    trunk = vit(window=4, windowed=(0, 2))
    tokens = torch.randn(1, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(trunk.block(2, tokens, (4, 4)), trunk.vit.blocks[2](tokens))


def test_windows_hold_patches_alone() -> None:
    trunk = vit(window=2, windowed=(0,))
    tokens, mask = torch.zeros(1, 5, 32).double(), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="block 0 looks through windows, at patches alone"):
        trunk.block(0, tokens, (2, 2))
    with pytest.raises(UserError, match="leave it out of `windowed`"):
        trunk.block(0, tokens[:, 1:], (2, 2), mask)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"windowed": (0,)}, "give `window` in patches"),
        ({"window": 2}, "`windowed` say which blocks"),
        ({"window": 0, "windowed": (0,)}, "window 0 should be at least 1 patch"),
        ({"window": 2, "windowed": (3,)}, r"windowed \[3\] should be blocks, 0..2"),
        ({"window": 2, "windowed": (0,), "class_token": True}, "has tokens before them"),
    ],
)
def test_windows_that_cannot_be_are_a_sentence(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        vit(**settings)


def test_attention_through_windows_learns() -> None:
    trunk = vit(window=2, windowed=(0, 1, 2)).train()
    tokens, grid = trunk.embed(torch.rand(1, 3, 48, 48).double() * 255)
    for index in range(3):
        tokens = trunk.block(index, tokens, grid)
    F.gelu(tokens).sum().backward()
    assert not [name for name, parameter in trunk.named_parameters() if parameter.grad is None]
