"""Converting OneFormers: transformers' model, whose numbers are ours; every key of the released models spoken for."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DinatConfig, OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig
from transformers.models.dinat import modeling_dinat

from fixtures_dir import FIXTURES
from imagenet import normalised
from maskfirst import build
from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.convert import oneformer
from maskfirst.convert.catalogue import ORIGINS, Whole, convert
from maskfirst.convert.rename import RenameError, rename
from maskfirst.frames import Frame
from maskfirst.proposers.oneformer import START, OneFormer
from maskfirst.proposers.texts import TextBranch
from maskfirst.recipe import Recipe
from maskfirst.types import TASKS, Batch, Segments

ZOO = [name for name in recipes.names() if name.startswith("oneformer-")]


def tree(texts: dict[str, Any] | None, backbone: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocabulary": ["a", "b", "c"],
        "proposer": {
            "kind": "oneformer", "backbone": backbone, "queries": 9, "width": 64, "heads": 2, "encoder_layers": 1,
            "encoder_feedforward": 24, "class_layers": 1, "decoder_layers": 3, "decoder_feedforward": 40, "texts": texts,
        },
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }  # fmt: skip


SWIN = {"kind": "pyramid", "widths": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "heads": [1, 1, 2, 2], "window": 5}
DINAT = {
    "kind": "dinat", "width": 8, "depths": [1, 1, 2, 1], "heads": [1, 1, 2, 2], "kernel": 3, "mlp_ratio": 2.0,
    "dilations": [[3], [1], [1, 2], [1]], "layer_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> OneFormerForUniversalSegmentation:
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=5, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return made(swin)


def made(backbone: Any) -> OneFormerForUniversalSegmentation:
    """transformers' model on a backbone, its weights random and none at its beginning."""
    torch.manual_seed(0)
    config = OneFormerConfig(
        backbone_config=backbone, conv_dim=64, mask_dim=64, hidden_dim=64, encoder_feedforward_dim=24, dim_feedforward=40,
        encoder_layers=1, decoder_layers=4, query_dec_layers=1, num_attention_heads=2, num_queries=9, num_labels=3,
        text_encoder_width=64, text_encoder_num_layers=1, text_encoder_n_ctx=3, dropout=0.0, is_training=True,
    )  # fmt: skip
    model = OneFormerForUniversalSegmentation(config).eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and ("norm" in name or "ln_final" in name) and name.endswith("weight")
        small = 1e-5 if name.endswith("task_mlp.layers.0.0.weight") else 0.2
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape) * small + norm)
    return model


@pytest.mark.parametrize("texts", [{"width": 64, "layers": 1, "context": 3}, None], ids=["with texts", "without texts"])
def test_transformers_model_has_our_numbers(
    theirs: OneFormerForUniversalSegmentation, tmp_path: Path, texts: dict[str, Any] | None
) -> None:
    tensors = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    if texts is None:
        # As files have it that were saved of a model for answers alone.
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("model.text_mapper.")}
    save_file(tensors, tmp_path / "model.safetensors")
    report = convert(
        tmp_path / "model.safetensors", Recipe(tree(texts, SWIN), "tiny.yaml"), tmp_path / "out.safetensors"
    )
    assert report.origin == "OneFormer"
    assert report.holds.endswith(f"blocks, {'without' if texts is None else 'with'} texts")
    assert {"criterion.logit_scale"} & set(report.left) == (set() if texts else {"criterion.logit_scale"})
    model = build.load(str(tmp_path / "out.safetensors"))
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    pixels = torch.rand(3, 3, 64, 96) * 255
    frame = Frame((64, 96), (64, 96), (64, 96))
    ids = proposer.task.rows[proposer.task.places(TASKS)]
    empty = torch.zeros(0)
    nothing = Segments(torch.zeros(0, 64, 96).bool(), empty.long(), empty, empty.bool())
    with torch.inference_mode():
        proposals, said = model(Batch(pixels, TASKS, (frame,) * 3, ("",) * 3, (nothing,) * 3))
        rows = torch.randint(1, 49000, (3, 6, 77))
        rows[:, :, 20], rows[:, :, 21:] = 49407, 0
        expected = theirs(
            pixel_values=normalised(pixels), task_inputs=ids, text_inputs=rows,
            pixel_mask=torch.ones(3, 64, 96, dtype=torch.long),
        )  # fmt: skip
        torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(said.logits, expected.class_queries_logits, atol=1e-4, rtol=1e-3)
        start = expected.transformer_decoder_contrastive_queries
        torch.testing.assert_close(proposals.extras[START], start, atol=1e-4, rtol=1e-3)
        # Not the texts themselves: transformers' encoder looks at later tokens, which the original's does not.
        assert isinstance(proposer.texts, TextBranch) == (texts is not None)


def attend(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    """transformers' layer of neighbourhood attention, which needs a function that its library no longer has, by its rule."""
    height, width = hidden_states.shape[1:3]
    heads, kernel, step = self.num_attention_heads, self.kernel_size, self.dilation

    def near(place: int, length: int) -> list[tuple[int, int]]:
        """The places that one place of an axis looks at, and which row of the biases is added."""
        first, rank = place % step, place // step
        start = min(max(rank - kernel // 2, 0), (length - first + step - 1) // step - kernel)
        return [(first + (start + t) * step, start + t - rank + kernel - 1) for t in range(kernel)]

    linears = (self.query, self.key, self.value)
    queries, keys, values = (linear(hidden_states).unflatten(-1, (heads, -1)) for linear in linears)
    out = torch.zeros_like(queries)
    for y in range(height):
        for x in range(width):
            pairs = [(row, column) for row in near(y, height) for column in near(x, width)]
            rows, columns = [row for (row, _), _ in pairs], [column for _, (column, _) in pairs]
            bias = self.rpb[:, [row for (_, row), _ in pairs], [column for _, (_, column) in pairs]]
            scores = (queries[:, y, x][:, None] * keys[:, rows, columns]).sum(-1) / queries.shape[-1] ** 0.5
            shares = (scores + bias.T).softmax(1)
            out[:, y, x] = (shares[..., None] * values[:, rows, columns]).sum(1)
    return (out.flatten(-2),)


def test_transformers_model_on_dinat_has_our_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *needed: None)
    monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", attend)
    theirs = made(
        DinatConfig(
            embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], kernel_size=3, mlp_ratio=2.0,
            dilations=[[3], [1], [1, 2], [1]], layer_scale_init_value=1.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
    )  # fmt: skip
    tensors = {key: each.clone() for key, each in theirs.state_dict().items() if "text_mapper" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", Recipe(tree(None, DINAT), "tiny.yaml"), tmp_path / "out.safetensors")
    model = build.load(str(tmp_path / "out.safetensors"))
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    pixels = torch.rand(1, 3, 64, 96) * 255
    frame = Frame((64, 96), (64, 96), (64, 96))
    rows = torch.zeros(1, 6, 77, dtype=torch.long)
    rows[:, :, 20] = 49407
    with torch.inference_mode():
        proposals, said = model(Batch(pixels, TASKS[:1], (frame,), ("",)))
        expected = theirs(
            pixel_values=normalised(pixels), task_inputs=proposer.task.rows[proposer.task.places(TASKS[:1])],
            text_inputs=rows, pixel_mask=torch.ones(1, 64, 96, dtype=torch.long),
        )  # fmt: skip
    torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(said.logits, expected.class_queries_logits, atol=1e-4, rtol=1e-3)


def test_the_zoo_is_whole() -> None:
    assert len(ZOO) == 21
    published = [recipes.load(name).tree["published"] for name in ZOO]
    assert len({told["checkpoint"] for told in published}) == 21
    of = {name: told["scores"] for name, told in zip(ZOO, published, strict=True)}
    assert of["oneformer-swin-l-ade20k-896"] == {"PQ": 51.1, "AP": 37.6, "mIoU": 57.4, "mIoU_tta": 58.3}
    assert of["oneformer-convnext-l-cityscapes-mapillary"]["PQ"] == 70.1


MILLIONS = {"dinat-l": 223, "swin-l": 219, "convnext-l": 220, "convnext-xl": 372}
"""As published, without texts."""


@pytest.mark.parametrize(
    "name", ["swin-l-ade20k", "convnext-l-ade20k", "convnext-xl-ade20k", "swin-l-coco", "dinat-l-ade20k"]
)
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = Experiment(recipes.load(f"oneformer-{name}", ["proposer.texts=null"])).segmenter(meta=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == MILLIONS[re.sub(r"-(ade20k|coco)$", "", name)]


if FIXTURES is not None:
    MANIFESTS = FIXTURES / "proposals" / "manifests"

    def shapes_of(name: str) -> dict[str, Tensor]:
        with gzip.open(MANIFESTS / f"{name}.json.gz", "rt") as file:
            return {key: torch.empty(shape, device="meta") for key, shape in json.load(file).items()}

    @pytest.mark.parametrize("name", ["swin-l", "convnext-l", "dinat-l", "internimage-h"])
    def test_every_key_of_the_original_is_spoken_for(name: str) -> None:
        recipe = f"oneformer-{name}-ade20k"
        tensors = shapes_of(f"oneformer_{re.sub('-l$', '_large', name).replace('-', '_')}_ade20k")
        assert oneformer.plan(tensors) == (recipe, ())
        model = Experiment(recipes.load(recipe)).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        renamed = rename(tensors, oneformer.rules(tensors), own)
        assert all(re.search(r"relative_position_index$|^criterion\.empty_weight$", key) for key in renamed.left)
        assert len(renamed.homes) + len(renamed.left) == len(tensors)
        taken = sum(tensors[key].numel() for key in renamed.homes)
        assert taken == sum(parameter.numel() for parameter in model.parameters())
        # Without what it was trained with besides, it answers the same.
        bare = {key: each for key, each in tensors.items() if not re.match("text_|prompt_ctx", key)}
        assert oneformer.plan(bare) == (recipe, ("proposer.texts=null",))
        model = Experiment(recipes.load(recipe, ["proposer.texts=null"])).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        assert "criterion.logit_scale" in rename(bare, oneformer.rules(bare), own).left

    def test_every_manifest_is_of_a_bundled_recipe() -> None:
        """The other tests compare each with its recipe; more queries tell one recipe from another of the same data."""
        names = sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.json.gz"))
        assert len(names) == 7
        for name in names:
            tensors = shapes_of(name)
            origin = next(each for each in ORIGINS if each.recognises(tensors))
            assert isinstance(origin, Whole)
            assert origin.plan(tensors) is not None, name
        tensors = shapes_of("oneformer_dinat_large_ade20k")
        fewer = torch.empty(150, 256, device="meta")
        tensors["sem_seg_head.predictor.query_embed.weight"] = fewer
        assert oneformer.plan(tensors) == ("oneformer-dinat-l-ade20k-1280-coco", ())

    def test_of_a_backbone_that_is_not_known_all_else_is_spoken_for() -> None:
        tensors = shapes_of("oneformer_swin_large_ade20k")
        tensors = {re.sub(r"^backbone\.", "backbone.another.", key): each for key, each in tensors.items()}
        assert oneformer.plan(tensors) is None
        assert "on a backbone of another kind" in str(oneformer.facts(tensors))
        model = Experiment(recipes.load("oneformer-swin-l-ade20k")).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with pytest.raises(RenameError) as raised:
            rename(tensors, oneformer.rules(tensors), own)
        assert all(key.startswith("backbone.") for key in raised.value.unknown)
        assert all(key.startswith("proposer.backbone.") for key in raised.value.missing)
        assert (raised.value.homeless, raised.value.misfits, raised.value.twice) == ((), (), ())
