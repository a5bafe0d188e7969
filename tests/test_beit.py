"""BEiT: timm's network in its own window, any other grid of patches, and tables of other windows."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import offline
from fixtures_dir import FIXTURES
from maskfirst.backbones.beit import EXTRA, TABLE, BEiT, bicubic_table, geometric_places, geometric_table, table_rows
from maskfirst.errors import UserError

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}


def beit(size: tuple[int, int] = (64, 96), **settings: Any) -> BEiT:
    """One whose weights are away from where they are initialised."""
    torch.manual_seed(0)
    made = BEiT(size, **{**SMALL, **settings}).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def run(trunk: BEiT, pixels: Tensor) -> Tensor:
    tokens, grid = trunk.embed(pixels)
    for index in range(trunk.depth):
        tokens = trunk.block(index, tokens, grid)
    return trunk.norm(tokens)


@pytest.mark.parametrize("final_norm", [False, True])
def test_it_is_timm_s_in_its_window(final_norm: bool) -> None:
    trunk = beit(final_norm=final_norm, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    theirs: Any = timm.create_model(
        "beit_base_patch16_224", img_size=(64, 96), embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    )
    theirs = theirs.double().eval()
    names = theirs.load_state_dict(trunk.vit.state_dict(), strict=False)
    assert (names.missing_keys, names.unexpected_keys) == ([] if final_norm else ["norm.weight", "norm.bias"], [])
    if not final_norm:
        theirs.norm = torch.nn.Identity()
    pixels = torch.randn(2, 3, 64, 96).double()
    torch.testing.assert_close(run(trunk, pixels), theirs.forward_features(pixels))


def by_loop(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Biases (M, N, N) pair by pair, the class token first."""
    height, width = grid
    maps, (to_patch, to_class, itself) = table[:-EXTRA].view(2 * height - 1, 2 * width - 1, -1), table[-EXTRA:]
    places = [(y, x) for y in range(height) for x in range(width)]
    rows = [torch.stack([itself, *([to_patch] * len(places))])]
    for y, x in places:
        near = [maps[y - v + height - 1, x - u + width - 1] for v, u in places]
        rows.append(torch.stack([to_class, *near]))
    return torch.stack(rows).permute(2, 0, 1)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (6, 6), (1, 2), (7, 1)])
def test_biases_are_those_of_a_loop_on_any_grid(grid: tuple[int, int]) -> None:
    trunk = beit()
    table = trunk.vit.blocks[1].attn.relative_position_bias_table
    maps = table[:-EXTRA].T.view(1, 2, 7, 11)
    goal = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if grid != (4, 6):
        maps = F.interpolate(maps, goal, mode="bicubic")
    resized = torch.cat([maps[0].flatten(1).T, table[-EXTRA:]])
    seen: list[Tensor] = []

    def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        seen.append(attn_mask)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", note)
        trunk.block(1, torch.zeros(1, 1 + grid[0] * grid[1], 32).double(), grid)
    assert torch.equal(seen[0][0], by_loop(resized, grid))


def test_a_table_of_its_own_grid_stays_as_it_is() -> None:
    table = torch.randn(80, 2)
    assert bicubic_table(table, (4, 6), (4, 6)) is table
    other = bicubic_table(table, (4, 6), (3, 6))
    assert other.shape == (5 * 11 + 3, 2)
    assert torch.equal(other[-EXTRA:], table[-EXTRA:])


def test_any_picture() -> None:
    trunk = beit()
    for size, grid in (((48, 80), (3, 5)), ((70, 33), (5, 3)), ((1, 1), (1, 1))):
        tokens, found = trunk.embed(torch.rand(1, 3, *size).double() * 255)
        assert found == grid
        assert tokens.shape == (1, 1 + grid[0] * grid[1], 32)
        assert trunk.block(0, tokens, grid).isfinite().all()


def test_tokens_before_the_class_token_have_no_bias() -> None:
    """Two more tokens change nothing for those who may not look at them, and are looked at without a bias."""
    trunk, grid = beit(), (4, 6)
    tokens = torch.randn(1, 25, 32).double()
    more = torch.cat([torch.randn(1, 2, 32).double(), tokens], 1)
    mask = torch.ones(1, 27, 27, dtype=torch.bool)
    mask[:, 2:, :2] = False
    torch.testing.assert_close(trunk.block(0, more, grid, mask)[:, 2:], trunk.block(0, tokens, grid))
    attention = trunk.vit.blocks[0].attn
    biases = trunk._biases(attention.relative_position_bias_table, grid, 2)
    assert not biases[:, :2].any()
    assert not biases[:, :, :2].any()
    torch.testing.assert_close(biases[:, 2:, 2:], trunk._biases(attention.relative_position_bias_table, grid, 0))


def test_masks_say_who_looks_at_whom() -> None:
    trunk, grid = beit((32, 32)), (2, 2)
    tokens = torch.randn(2, 5, 32).double()
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 1, 3] = False
    other = tokens.clone()
    other[:, 3] = torch.randn(32).double()
    plain, changed = trunk.block(0, tokens, grid, mask), trunk.block(0, other, grid, mask)
    torch.testing.assert_close(plain[0, 1], changed[0, 1])
    assert not torch.allclose(plain[1, 1], changed[1, 1], atol=1e-3)
    torch.testing.assert_close(trunk.block(0, tokens, grid), trunk.block(0, tokens, grid, torch.ones_like(mask)))


def test_everything_learns() -> None:
    for size in ((64, 96), (40, 50)):
        trunk = beit().train()
        run(trunk, torch.rand(1, 3, *size).double() * 255).square().sum().backward()
        silent = [name for name, parameter in trunk.named_parameters() if parameter.grad is None]
        assert not silent
        table = trunk.vit.blocks[0].attn.relative_position_bias_table.grad
        assert table is not None
        assert table.any(0).all()


def test_places_of_pairs_are_kept_once() -> None:
    """Not in every block, where 896 px would take 1.9 GB."""
    trunk = BEiT((128, 128), width=32, depth=6, heads=2)
    assert trunk.rows.dtype == torch.int32
    assert sum(buffer.nbytes for buffer in trunk.buffers()) <= 4 * 65**2 + 6 * 4 * 32 + 24
    assert not [name for name in trunk.state_dict() if "index" in name or "rows" in name]
    assert torch.equal(trunk.rows, table_rows((8, 8)))


@pytest.mark.parametrize(("size", "rows"), [(128, 228), (480, 3484), (512, 3972), (640, 6244), (896, 12324)])
def test_tables_have_the_published_numbers_of_rows(size: int, rows: int) -> None:
    with torch.device("meta"):
        trunk = BEiT((size, size), "beitv2_large_patch16_224")
    assert (trunk.width, trunk.depth, trunk.prefix, trunk.patch) == (1024, 24, 1, 16)
    assert trunk.vit.blocks[23].attn.relative_position_bias_table.shape == (rows, 16)


def test_near_places_stay_and_far_ones_are_stretched() -> None:
    ratio, places = geometric_places(27, 79)
    assert 1.01 <= ratio < 1.5
    assert places[13] == 0
    assert places[14] == -places[12] == 1
    np.testing.assert_allclose(places[-1], 39, atol=1e-3)
    np.testing.assert_allclose(np.diff(places)[14:] / np.diff(places)[13:-1], ratio)
    table = torch.randn(27 * 27 + 3, 2, dtype=torch.float64)
    carried = geometric_table(table, (40, 40))
    here, there = table[:-3].view(27, 27, 2), carried[:-3].view(79, 79, 2)
    torch.testing.assert_close(there[38:41, 38:41], here[12:15, 12:15])
    torch.testing.assert_close(there[0, 39], here[0, 13], atol=1e-2, rtol=0)
    assert torch.equal(carried[-3:], table[-3:])
    assert geometric_table(table, (14, 14)) is table


def test_windows_need_not_be_square() -> None:
    """Each axis goes its own way: a table that is the same along an axis stays so."""
    rising = torch.linspace(-1, 1, 27)[:, None].expand(27, 27).reshape(-1, 1)
    carried = geometric_table(torch.cat([rising, torch.zeros(3, 1)]), (8, 20))
    assert carried.shape == (15 * 39 + 3, 1)
    rows = carried[:-3].view(15, 39)
    torch.testing.assert_close(rows, rows[:, :1].expand(15, 39))
    assert (rows[:, 0].diff() > 0).all()


if FIXTURES is not None:

    @pytest.mark.parametrize("size", [128, 480, 512, 640, 896])
    def test_tables_are_carried_as_in_the_original(size: int) -> None:
        assert FIXTURES is not None
        with np.load(FIXTURES / "vit-adapter" / "relpos_load" / "tables.npz") as archive:
            source, expected = (torch.from_numpy(archive[key]) for key in ("src_table", f"dst_table.{size}"))
        trunk = BEiT((size, size), **SMALL | {"depth": 1})
        found = trunk.resize_from(f"vit.blocks.0.attn.{TABLE}", source)
        assert found is not None
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_carried_over_is_left() -> None:
    trunk, name = beit((64, 64)), f"vit.blocks.0.attn.{TABLE}"
    assert trunk.resize_from(name, torch.randn(81 + 3, 3)) is None
    assert trunk.resize_from(name, torch.randn(7 * 11 + 3, 2)) is None
    assert trunk.resize_from(name, torch.randn(1 + 3, 2)) is None
    assert trunk.resize_from("vit.cls_token", torch.randn(1, 2, 32)) is None
    assert trunk.resize_from("nothing", torch.randn(1)) is None
    small = trunk.resize_from(name, torch.randn(9 + 3, 2))
    assert small is not None
    assert small.shape == (49 + 3, 2)
    kernel = trunk.resize_from("vit.patch_embed.proj.weight", torch.randn(32, 3, 14, 14))
    assert kernel is not None
    assert kernel.shape == (32, 3, 16, 16)
    with pytest.raises(ValueError, match="a table of 80 rows is of no square window"):
        geometric_table(torch.randn(80, 2), (4, 4))


@pytest.mark.parametrize("final_norm", [False, True])
def test_pretrained_weights_come_with_carried_tables(monkeypatch: pytest.MonkeyPatch, final_norm: bool) -> None:
    made = offline.made_up(monkeypatch, depth=1)
    trunk = BEiT((48, 64), "beit_base_patch16_224.in22k_ft_in22k", depth=1, final_norm=final_norm, pretrained=True)
    theirs = made[0].state_dict()
    for name, tensor in trunk.vit.state_dict().items():
        if name.endswith(TABLE):
            assert torch.equal(tensor, geometric_table(theirs[name], (3, 4)))
        else:
            assert torch.equal(tensor, theirs[name.replace("norm.", "fc_norm.") if name[:5] == "norm." else name])
    with pytest.raises(ValueError, match="leave out width and depth"):
        BEiT((48, 64), width=96, heads=12, depth=1, pretrained=True)


def test_what_cannot_be_is_a_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"timm has no BEiT 'beit_bas_patch16_224'\. Did you mean 'beit_base_patch16_224'"
    ):
        BEiT((64, 64), "beit_bas_patch16_224")
    with pytest.raises(ValueError, match="timm has no BEiT 'beit3_base_patch16_224'"):
        BEiT((64, 64), "beit3_base_patch16_224")
    with pytest.raises(ValueError, match="layer_scale 0 would keep every branch from learning"):
        BEiT((64, 64), layer_scale=0.0)
    trunk = beit()
    with pytest.raises(UserError, match="a BEiT cannot be shrunk"):
        trunk.shrink_block(0, torch.zeros(1, 2, 32).double(), torch.zeros(1, 25, 32).double())
