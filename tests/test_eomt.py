"""EoMT is transformers' on the same weights, in every block, masked or not; its masking fades out as the original's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

import tiny_eomt
from maskfirst.backbones.vit import ShrunkTaps, Taps, TimmViT, resize_positions
from maskfirst.build import Experiment
from maskfirst.convert import eomt as released
from maskfirst.convert.rename import rename
from maskfirst.criteria.matched import Matched
from maskfirst.proposers.eomt import Enlarge, EoMT, masking, published_annealing
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Segmenter
from maskfirst.types import Proposals

CRITERION = {"kind": "set", "points": 96}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def ours(
    form: str, model: Any, original: bool = False, criterion: dict[str, Any] = CRITERION, **settings: Any
) -> Segmenter:
    """Our model with the weights of theirs, by way of their own keys or the original's."""
    segmenter = Experiment(Recipe(tiny_eomt.tree(form, criterion, **settings), "tiny.yaml")).segmenter()
    state = tiny_eomt.original(model.state_dict()) if original else model.state_dict()
    shapes = {name: tensor.shape for name, tensor in segmenter.state_dict().items()}
    renamed = rename(state, released.rules(state.keys()), shapes)
    segmenter.load_state_dict({name: tensor.clone() for name, tensor in renamed.tensors.items()})
    return segmenter


def stages(model: Any, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Masks and names that transformers' model predicts, those before the last among them."""
    seen = []
    predict = model.predict
    model.predict = lambda tokens: seen.append(predict(tokens)) or seen[-1]
    model(pixels)
    del model.predict
    return seen


@pytest.mark.parametrize("original", [False, True], ids=["transformers", "original"])
@pytest.mark.parametrize("form", tiny_eomt.FORMS)
def test_predictions_are_those_of_transformers(form: str, original: bool) -> None:
    model = tiny_eomt.theirs(form).eval()
    model.attn_mask_probs.zero_()
    batch = tiny_eomt.batch(truth=False)
    segmenter = ours(form, model, original).eval()
    with torch.no_grad():
        expected = model(batch.pixels)
        proposals, names = segmenter(batch)
    assert proposals.earlier == ()
    assert proposals.masks.std() > 0.5
    torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, **CLOSE)
    torch.testing.assert_close(names.logits, expected.class_queries_logits, **CLOSE)


@pytest.mark.parametrize("form", tiny_eomt.FORMS)
@pytest.mark.parametrize("chance", [1.0, 0.5], ids=["all masked", "half masked"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_masked_blocks_are_those_of_transformers(form: str, chance: float, training: bool) -> None:
    """With every guess on the way, in either of transformers' modes, which both mask; which half is, is drawn alike."""
    model = tiny_eomt.theirs(form).train(training)
    model.attn_mask_probs.fill_(chance)
    batch = tiny_eomt.batch()
    segmenter = ours(form, model).train()
    assert isinstance(segmenter.proposer, EoMT)
    segmenter.proposer.masking = (chance,) * 3
    with torch.no_grad():
        torch.manual_seed(3)
        expected = stages(model, batch.pixels)
        torch.manual_seed(3)
        proposals = segmenter.proposer(batch)
        guesses = [*proposals.earlier, proposals]
        assert len(guesses) == len(expected) == 4
        for guess, (masks, logits) in zip(guesses, expected, strict=True):
            torch.testing.assert_close(guess.masks, masks, **CLOSE)
            torch.testing.assert_close(segmenter.namer(guess, batch).logits, logits, **CLOSE)
    share = (torch.stack([guess.masks for guess in guesses]) > 0).float().mean()
    assert 0.1 < share < 0.9, "masks so full or empty would mask nothing or everything"


@pytest.mark.parametrize("form", ["dinov2", "dinov3"])
def test_losses_and_gradients_are_those_of_transformers(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all guesses, at the same random points. Theirs come in the order of the blocks, our last guess comes first."""
    model = tiny_eomt.theirs(form).train()
    batch = tiny_eomt.batch()
    assert batch.truth is not None
    drawn: list[Tensor] = []
    rand = torch.rand

    def record(*size: Any, **settings: Any) -> Tensor:
        drawn.append(rand(*size, **settings))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", record)
        expected = model(
            batch.pixels,
            mask_labels=[segments.masks.float() for segments in batch.truth],
            class_labels=[segments.classes for segments in batch.truth],
        ).loss
    assert len(drawn) == 16, "two pictures to match and two draws for the losses, in each of four stages"
    replayed = iter([*drawn[12:], *drawn[:12]])
    segmenter = ours(form, model).train()
    assert isinstance(segmenter.criterion, Matched)
    segmenter.criterion.draw = lambda masks, points, device: next(replayed)
    losses = segmenter.losses(batch)
    assert set(losses) == {f"{name}{stage}" for name in ("ce", "mask", "dice") for stage in ("", "_0", "_1", "_2")}
    found = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    expected.backward()
    for name, own, other in (
        ("queries", segmenter.proposer.get_parameter("queries.weight"), model.query.weight),
        ("cls_token", segmenter.proposer.get_parameter("trunk.vit.cls_token"), model.embeddings.cls_token),
        ("names", segmenter.namer.get_parameter("linear.weight"), model.class_predictor.weight),
        ("mask head", segmenter.proposer.get_parameter("mask_head.0.weight"), model.mask_head.fc1.weight),
    ):
        assert own.grad is not None
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
    assert next(replayed, None) is None


def test_masks_of_the_training_change_what_queries_become() -> None:
    segmenter = ours("dinov2", tiny_eomt.theirs("dinov2")).train()
    assert isinstance(segmenter.proposer, EoMT)
    batch = tiny_eomt.batch()
    masked = segmenter.proposer(batch).masks
    segmenter.proposer.at(1.0)
    free = segmenter.proposer(batch).masks
    assert (masked - free).abs().max() > 0.1
    assert torch.equal(free, segmenter.eval().proposer(batch).masks)
    segmenter.proposer.at(0.0)
    assert torch.equal(free, segmenter.proposer(batch).masks), "nothing is masked in prediction, whatever the progress"


def test_what_is_seen_does_not_depend_on_the_truth() -> None:
    proposer = ours("dinov3", tiny_eomt.theirs("dinov3")).train().proposer
    torch.testing.assert_close(proposer(tiny_eomt.batch()).masks, proposer(tiny_eomt.batch(truth=False)).masks)
    assert proposer(tiny_eomt.batch(truth=False)).earlier == ()


def test_coordinates_are_zoomed_as_in_transformers() -> None:
    model = tiny_eomt.theirs("dinov3", pos_embed_rescale=2.0).train()
    batch = tiny_eomt.batch(truth=False)
    tree = tiny_eomt.tree("dinov3", CRITERION)
    segmenter = ours("dinov3", model, trunk=tree["proposer"]["trunk"] | {"zoom": 2.0})
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            expected = stages(model, batch.pixels)[-1][0]
            torch.manual_seed(seed)
            torch.testing.assert_close(segmenter.train().proposer(batch).masks, expected, **CLOSE)
        assert (segmenter.eval().proposer(batch).masks - expected).abs().max() > 0.1


PUBLISHED = {
    # Steps of the released configurations, and of the whole training: 1263 a pass, 16 pictures each.
    4: ([6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600], 31 * 1263),
    3: ([29564, 73910, 118256], [59128, 103474, 147820], 24 * 7391),
    5: ([14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910], 12 * 7391),
}


@pytest.mark.parametrize("blocks", PUBLISHED)
def test_masking_fades_when_the_released_configurations_say(blocks: int) -> None:
    firsts, lasts, steps = PUBLISHED[blocks]
    for (first, last), begin, end in zip(published_annealing(blocks), firsts, lasts, strict=True):
        assert first == pytest.approx(begin / steps, abs=1e-3)
        assert last == pytest.approx(end / steps, abs=1e-3)


def test_masking_falls_by_a_power() -> None:
    span = (0.2, 0.6)
    assert [masking(progress, span, 0.9) for progress in (0.0, 0.2, 0.6, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    assert masking(0.5, span, 0.9) == pytest.approx(0.25**0.9)
    assert masking(0.3, (0.3, 0.3), 0.9) == 0.0
    proposer = ours("dinov2", tiny_eomt.theirs("dinov2"), annealing=[[0.0, 0.5], [0.5, 1.0], [1.0, 1.0]]).proposer
    assert isinstance(proposer, EoMT)
    proposer.at(0.5)
    assert proposer.masking == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"blocks": 5}, r"blocks 5 must lie in 1\.\.4"),
        ({"queries": 0}, "queries 0 must be at least 1"),
        ({"annealing": [[0.1, 0.2]]}, "annealing must have 3 pairs, one a block"),
        ({"annealing": [[0.1, 0.2], [0.3, 0.2], [0.1, 0.2]]}, "rising shares of training"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=rf"tiny\.yaml: proposer: .*{told}"):
        Experiment(Recipe(tiny_eomt.tree("dinov2", CRITERION, **settings), "tiny.yaml")).segmenter(meta=True)


@pytest.mark.parametrize(("patch", "stride"), [(8, 4), (14, 7), (16, 4), (32, 4)])
def test_masks_are_enlarged_to_about_four_px(patch: int, stride: int) -> None:
    trunk = TimmViT((4 * patch, 4 * patch), "vit_small_patch14_reg4_dinov2", width=16, depth=1, heads=2, patch=patch)
    batch = tiny_eomt.batch(1, truth=False)
    masks = EoMT(trunk, queries=2, blocks=1).eval()(batch).masks
    assert masks.shape[-1] == -(-tiny_eomt.SIDE // patch) * patch // stride


def test_enlarging_is_a_transposed_convolution_and_its_gradients() -> None:
    torch.manual_seed(0)
    layer, maps = Enlarge(6), torch.randn(2, 3, 5, 6)
    kernel = layer.open.weight.unflatten(0, (2, 2, 6)).permute(3, 2, 0, 1)
    found = layer(maps)
    opened = F.gelu(F.conv_transpose2d(maps.permute(0, 3, 1, 2), kernel, layer.bias, stride=2))
    mixed = F.conv2d(opened, layer.mix.weight, padding=1, groups=6).permute(0, 2, 3, 1)
    expected = F.layer_norm(mixed, (6,), layer.norm.weight, layer.norm.bias, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((maps * weights).sum(), list(layer.parameters())) for maps in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


TRUNK: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "vit_small_patch14_dinov2": (Dinov2Model, Dinov2Config, {"image_size": 56, "patch_size": 14}),
    "vit_small_patch14_reg4_dinov2": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {"image_size": 56, "patch_size": 14},
    ),
    "vit_small_patch16_dinov3_qkvb": (
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {"patch_size": 16, "intermediate_size": 128, "num_register_tokens": 4},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (3, 2)], ids=str)
def test_trunks_are_those_of_transformers_at_every_size(name: str, grid: tuple[int, int]) -> None:
    """Larger, smaller and of another shape than their position tables."""
    kind, configure, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(configure(**TRUNK, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    patch = settings["patch_size"]
    trunk = TimmViT(
        (4 * patch, 4 * patch), name, width=32, depth=3, heads=2, mean=(0.0,) * 3, std=(1.0,) * 3, class_token=True
    )
    trunk.load_state_dict(_trunk_weights(model.state_dict(), trunk))
    pixels = torch.randn(2, 3, grid[0] * patch, grid[1] * patch)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        tokens, found = trunk.eval().embed(pixels)
        for index in range(trunk.depth):
            tokens = trunk.block(index, tokens, found)
        assert found == grid
        assert trunk.prefix == tokens.shape[1] - grid[0] * grid[1] == (1 if name == "vit_small_patch14_dinov2" else 5)
        torch.testing.assert_close(trunk.norm(tokens), expected, **CLOSE)


def _trunk_weights(state: dict[str, Tensor], trunk: TimmViT) -> dict[str, Tensor]:
    """A DINOv2 or DINOv3 of transformers by our keys, through the converter of EoMT and its own names of the same parts."""
    keys = {
        key.replace("encoder.layer.", "layers.")
        .replace("model.layer.", "layers.")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.out_proj"): tensor
        for key, tensor in state.items()
    }
    keys = {f"layernorm.{key[5:]}" if key.startswith("norm.") else key: tensor for key, tensor in keys.items()}
    if "embeddings.position_embeddings" in keys:
        table = keys.pop("embeddings.position_embeddings")[0]
        keys["embeddings.position_embeddings.weight"] = table
    shapes = {f"proposer.trunk.{name}": tensor.shape for name, tensor in trunk.state_dict().items()}
    leading = 0
    if trunk.vit.reg_token is not None and "embeddings.position_embeddings.weight" in keys:
        # transformers keeps the class token's position, which timm's has inside of the token.
        leading = 1
        table = keys["embeddings.position_embeddings.weight"]
        keys["embeddings.cls_token"] = keys["embeddings.cls_token"] + table[:1]
        keys["embeddings.position_embeddings.weight"] = table[leading:]
    tensors = rename(keys, released.rules(keys.keys()), shapes).tensors
    return {name.removeprefix("proposer.trunk."): tensor for name, tensor in tensors.items()}


def test_taps_are_maps_without_the_tokens_before_them() -> None:
    trunk = TimmViT((64, 64), "vit_small_patch16_dinov3_qkvb", width=32, depth=2, heads=2).eval()
    (maps,) = Taps(trunk, (1,))(torch.rand(1, 3, 48, 80) * 255)
    assert maps.shape == (1, 32, 3, 5)
    tokens, _ = trunk.embed(torch.rand(1, 3, 48, 80) * 255)
    assert tokens.shape[1] == 5 + 15
    with pytest.raises(ValueError, match="set the trunk's class_token to false"):
        ShrunkTaps(trunk, (1,), 1)
    with pytest.raises(ValueError, match="a DINOv3 cannot be shrunk"):
        trunk.shrink_block(0, tokens[:, :2], tokens)


def test_masks_say_who_looks_at_whom() -> None:
    """What a token may not look at does not reach it, in both families."""
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"):
        torch.manual_seed(0)
        trunk = TimmViT((64, 64), name, width=32, depth=1, heads=2, patch=16).eval()
        with torch.no_grad():
            for parameter in trunk.parameters():
                parameter.normal_(0.1, 0.2)
        tokens, grid = trunk.embed(torch.rand(1, 3, 64, 64) * 255)
        mask = torch.ones(1, 21, 21, dtype=torch.bool)
        mask[:, 0, 9] = False
        other = tokens.clone()
        other[:, 9] = torch.randn(32)
        plain, changed = trunk.block(0, tokens, grid, mask), trunk.block(0, other, grid, mask)
        assert torch.equal(plain[:, 0], changed[:, 0])
        assert not torch.allclose(plain[:, 1], changed[:, 1], atol=1e-3)
        assert torch.allclose(
            trunk.block(0, tokens, grid), trunk.block(0, tokens, grid, torch.ones_like(mask)), atol=1e-5
        )


def test_trunks_of_other_kinds_are_refused_in_a_sentence() -> None:
    small: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
    with pytest.raises(ValueError, match="'vit_relpos_small_patch16_224' has positions of a kind"):
        TimmViT((64, 64), "vit_relpos_small_patch16_224", **small)
    with pytest.raises(ValueError, match=r"class_token false: .* keep them"):
        TimmViT((64, 64), "vit_small_patch16_dinov3", class_token=False, **small)
    with pytest.raises(ValueError, match=r"zoom 2\.0 is for the coordinates of DINOv3"):
        TimmViT((64, 64), "vit_small_patch14_reg4_dinov2", zoom=2.0, **small)


def test_weights_of_other_sizes_are_resized_by_the_rules_of_their_origin() -> None:
    small: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
    source = TimmViT((70, 70), "vit_small_patch14_reg4_dinov2", **small)
    goal = TimmViT((64, 64), "vit_small_patch14_reg4_dinov2", patch=16, **small)
    table = source.vit.pos_embed.detach()
    found = goal.resize_from("vit.pos_embed", table)
    assert found is not None
    assert torch.equal(found, resize_positions(table, (4, 4), antialias=True))
    assert not torch.allclose(found, resize_positions(table, (4, 4)), atol=1e-3)
    kernel = goal.resize_from("vit.patch_embed.proj.weight", source.vit.patch_embed.proj.weight.detach())
    assert kernel is not None
    assert kernel.shape == (32, 3, 16, 16)
    # Enlarged pictures and kernels meet as small ones did (FlexiViT).
    picture = torch.randn(1, 3, 14, 14)
    larger = F.interpolate(picture, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        (kernel * larger).sum((1, 2, 3)), (source.vit.patch_embed.proj.weight * picture).sum((1, 2, 3)), **CLOSE
    )
    assert goal.resize_from("vit.patch_embed.proj.weight", torch.rand(16, 3, 14, 14)) is None


def test_scales_of_branches_begin_where_they_are_told() -> None:
    small: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
    for name, scale in (("vit_small_patch14_reg4_dinov2", "ls1.gamma"), ("vit_small_patch16_dinov3", "gamma_1")):
        for told, begins in ((None, 1e-5), (0.5, 0.5)):
            found = TimmViT((64, 64), name, layer_scale=told, **small).vit.blocks[0].get_parameter(scale)
            assert (found == begins).all()


def test_channels_of_proposals() -> None:
    segmenter = ours("dinov2", tiny_eomt.theirs("dinov2")).eval()
    found: Proposals = segmenter.proposer(tiny_eomt.batch(truth=False))
    assert found.queries is not None
    assert found.queries.shape == (2, 6, 32)
    assert segmenter.proposer.width == 32
    assert segmenter.proposer.tasks == {"semantic", "instance", "panoptic"}
    assert not found.competing
