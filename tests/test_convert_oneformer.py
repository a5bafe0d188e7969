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
from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

from fixtures_dir import FIXTURES
from maskfirst import build
from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.convert import oneformer
from maskfirst.convert.catalogue import convert
from maskfirst.convert.rename import RenameError, rename
from maskfirst.frames import Frame
from maskfirst.proposers.oneformer import START, OneFormer
from maskfirst.proposers.texts import TextBranch
from maskfirst.recipe import Recipe
from maskfirst.types import TASKS, Batch, Segments

ZOO = [name for name in recipes.names() if name.startswith("oneformer-")]


def tree(texts: dict[str, Any] | None) -> dict[str, Any]:
    swin = {"kind": "pyramid", "widths": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "heads": [1, 1, 2, 2], "window": 5}
    return {
        "vocabulary": ["a", "b", "c"],
        "proposer": {
            "kind": "oneformer", "backbone": swin, "queries": 9, "width": 64, "heads": 2, "encoder_layers": 1,
            "encoder_feedforward": 24, "class_layers": 1, "decoder_layers": 3, "decoder_feedforward": 40, "texts": texts,
        },
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> OneFormerForUniversalSegmentation:
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=5, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=swin, conv_dim=64, mask_dim=64, hidden_dim=64, encoder_feedforward_dim=24, dim_feedforward=40,
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
    report = convert(tmp_path / "model.safetensors", Recipe(tree(texts), "tiny.yaml"), tmp_path / "out.safetensors")
    assert report.origin == "OneFormer"
    assert report.holds.endswith(f"blocks, {'without' if texts is None else 'with'} texts")
    assert {"criterion.logit_scale"} & set(report.left) == (set() if texts else {"criterion.logit_scale"})
    model = build.load(str(tmp_path / "out.safetensors"))
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    pixels = torch.rand(3, 3, 64, 96) * 255
    frame = Frame((64, 96), (64, 96), (64, 96))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    ids = proposer.task.rows[proposer.task.places(TASKS)]
    empty = torch.zeros(0)
    nothing = Segments(torch.zeros(0, 64, 96).bool(), empty.long(), empty, empty.bool())
    with torch.inference_mode():
        proposals, said = model(Batch(pixels, TASKS, (frame,) * 3, ("",) * 3, (nothing,) * 3))
        rows = torch.randint(1, 49000, (3, 6, 77))
        rows[:, :, 20], rows[:, :, 21:] = 49407, 0
        expected = theirs(
            pixel_values=(pixels - mean) / std, task_inputs=ids, text_inputs=rows,
            pixel_mask=torch.ones(3, 64, 96, dtype=torch.long),
        )  # fmt: skip
        torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(said.logits, expected.class_queries_logits, atol=1e-4, rtol=1e-3)
        start = expected.transformer_decoder_contrastive_queries
        torch.testing.assert_close(proposals.extras[START], start, atol=1e-4, rtol=1e-3)
        # Not the texts themselves: transformers' encoder looks at later tokens, which the original's does not.
        assert isinstance(proposer.texts, TextBranch) == (texts is not None)


def test_the_zoo_is_whole() -> None:
    assert len(ZOO) == 12
    published = [recipes.load(name).tree["published"] for name in ZOO]
    assert len({told["checkpoint"] for told in published}) == 12
    of = {name: told["scores"] for name, told in zip(ZOO, published, strict=True)}
    assert of["oneformer-swin-l-ade20k-896"] == {"PQ": 51.1, "AP": 37.6, "mIoU": 57.4, "mIoU_tta": 58.3}
    assert of["oneformer-convnext-l-cityscapes-mapillary"]["PQ"] == 70.1


MILLIONS = {"swin-l": 219, "convnext-l": 220, "convnext-xl": 372}
"""As published, without texts."""


@pytest.mark.parametrize("name", ["swin-l-ade20k", "convnext-l-ade20k", "convnext-xl-ade20k", "swin-l-coco"])
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = Experiment(recipes.load(f"oneformer-{name}", ["proposer.texts=null"])).segmenter(meta=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == MILLIONS[re.sub(r"-(ade20k|coco)$", "", name)]


if FIXTURES is not None:
    MANIFESTS = FIXTURES / "proposals" / "manifests"

    def shapes_of(name: str) -> dict[str, Tensor]:
        with gzip.open(MANIFESTS / f"{name}.json.gz", "rt") as file:
            return {key: torch.empty(shape, device="meta") for key, shape in json.load(file).items()}

    INTERNIMAGE = "proposer.backbone={kind: internimage, model: h}"

    @pytest.mark.parametrize(
        ("manifest", "recipe", "overrides"),
        [
            ("swin_large", "oneformer-swin-l-ade20k", []),
            ("convnext_large", "oneformer-convnext-l-ade20k", []),
            ("internimage_h", "oneformer-swin-l-ade20k", [INTERNIMAGE]),
        ],
    )
    def test_every_key_of_the_original_is_spoken_for(manifest: str, recipe: str, overrides: list[str]) -> None:
        tensors = shapes_of(f"oneformer_{manifest}_ade20k")
        assert oneformer.plan(tensors) == (None if overrides else (recipe, ()))
        model = Experiment(recipes.load(recipe, overrides)).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        renamed = rename(tensors, oneformer.rules(tensors), own)
        assert all(re.search(r"relative_position_index$|^criterion\.empty_weight$", key) for key in renamed.left)
        assert len(renamed.homes) + len(renamed.left) == len(tensors)
        taken = sum(tensors[key].numel() for key in renamed.homes)
        assert taken == sum(parameter.numel() for parameter in model.parameters())
        # Without what it was trained with besides, it answers the same.
        bare = {key: each for key, each in tensors.items() if not re.match("text_|prompt_ctx", key)}
        assert oneformer.plan(bare) == (None if overrides else (recipe, ("proposer.texts=null",)))
        model = Experiment(recipes.load(recipe, [*overrides, "proposer.texts=null"])).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        assert "criterion.logit_scale" in rename(bare, oneformer.rules(bare), own).left

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
