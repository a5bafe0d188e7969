"""Small EoMTs of transformers with random weights, recipes of the same models, and their weights in the original's keys."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EomtConfig, EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

from maskfirst.frames import Frame
from maskfirst.types import Batch, Segments

NAMES = [f"name {index}" for index in range(7)]
SIDE = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "num_blocks": 3,
    "num_queries": 6, "num_labels": len(NAMES), "num_register_tokens": 4, "train_num_points": 96,
}  # fmt: skip
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "num_upscale_blocks": 2}),
    "dinov2_fine": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "num_upscale_blocks": 1}),
    "dinov2_giant": (
        "vit_giant_patch14_reg4_dinov2",
        # A width of which the two round two thirds of the hidden channels alike, as they do at 1536.
        {"patch_size": 16, "num_upscale_blocks": 2, "use_swiglu_ffn": True, "hidden_size": 48},
    ),
    "dinov3": (
        "vit_small_patch16_dinov3_qkvb",
        {"patch_size": 16, "num_upscale_blocks": 2, "intermediate_size": 128, "layer_norm_eps": 1e-5},
    ),
    "dinov3_fine": (
        "vit_small_patch16_dinov3_qkvb",
        {"patch_size": 8, "num_upscale_blocks": 1, "intermediate_size": 128, "layer_norm_eps": 1e-5},
    ),
}
"""timm's name of the trunk, and the configuration of the whole."""


def theirs(form: str, **settings: Any) -> Any:
    """The model of transformers. All its weights are away from where they are initialised, scales and registers too."""
    torch.manual_seed(0)
    sizes = {**SIZES, **FORMS[form][1], **settings}
    if form.startswith("dinov3"):
        model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**{"pos_embed_rescale": None, **sizes}))
    else:
        model = EomtForUniversalSegmentation(EomtConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda1" in name or "norm" in name:
                parameter.uniform_(0.3, 1.2)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.3)
            elif "token" in name or "position" in name:
                parameter.normal_(std=0.7)
            else:
                parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
    return model


def tree(form: str, criterion: Mapping[str, Any], **proposer: Any) -> dict[str, Any]:
    """The recipe of that model. Pictures are taken as they are, normalised by neither."""
    trunk, settings = FORMS[form][0], SIZES | FORMS[form][1]
    return {
        "size": [SIDE, SIDE],
        "vocabulary": NAMES,
        "proposer": {
            "kind": "eomt",
            "trunk": {
                "kind": "vit", "model": trunk, "patch": settings["patch_size"], "width": settings["hidden_size"],
                "depth": 4, "heads": 2,
                "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
            },
            "queries": 6,
            "blocks": 3,
            **proposer,
        },
        "namer": {"kind": "class_head"},
        "criterion": dict(criterion),
    }  # fmt: skip


def original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by transformers' keys as the original's code would have saved them."""
    rotary = "embeddings.patch_embeddings.weight" in state
    made: dict[str, Tensor] = {
        "network.encoder.pixel_mean": torch.zeros(1, 3, 1, 1),
        "network.encoder.pixel_std": torch.ones(1, 3, 1, 1),
    }
    renames = {
        r"query\.weight": "network.q.weight",
        r"class_predictor\.(.*)": r"network.class_head.\1",
        r"mask_head\.fc([123])\.(.*)": lambda match: f"network.mask_head.{2 * int(match[1]) - 2}.{match[2]}",
        r"upscale_block\.block\.(\d+)\.layernorm2d\.(.*)": r"network.upscale.\1.norm.\2",
        r"upscale_block\.block\.(.*)": r"network.upscale.\1",
        r"attn_mask_probs": "network.attn_mask_probs",
        r"(criterion\.empty_weight)": r"\1",
        r"layernorm\.(.*)": r"network.encoder.backbone.norm.\1",
    }
    if rotary:
        renames |= {
            r"embeddings\.(.*)": r"network.encoder.backbone.patch_embed.\1",
            r"layers\.(.*)": r"network.encoder.backbone.blocks.\1",
        }
    else:
        state = _packed(state)
        renames |= {
            r"embeddings\.cls_token": "network.encoder.backbone.cls_token",
            r"embeddings\.register_tokens": "network.encoder.backbone.reg_token",
            r"embeddings\.position_embeddings\.weight": "network.encoder.backbone.pos_embed",
            r"embeddings\.patch_embeddings\.projection\.(.*)": r"network.encoder.backbone.patch_embed.proj.\1",
            r"layers\.(\d+)\.attention\.out_proj\.(.*)": r"network.encoder.backbone.blocks.\1.attn.proj.\2",
            r"layers\.(\d+)\.attention\.(.*)": r"network.encoder.backbone.blocks.\1.attn.\2",
            r"layers\.(\d+)\.layer_scale([12])\.lambda1": r"network.encoder.backbone.blocks.\1.ls\2.gamma",
            r"layers\.(.*)": r"network.encoder.backbone.blocks.\1",
        }
    for key, tensor in state.items():
        pattern, template = next(rule for rule in renames.items() if re.fullmatch(rule[0], key))
        home = re.sub(pattern, template, key)
        made[home] = tensor[None] if home.endswith("pos_embed") else tensor
    return made


def _packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With queries, keys and values, and the two branches of a gated MLP, in one tensor each."""
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if found := re.fullmatch(r"(.*\.attention\.)q_proj\.(.*)", key):
            made[f"{found[1]}qkv.{found[2]}"] = torch.cat(
                [state[f"{found[1]}{part}_proj.{found[2]}"] for part in "qkv"]
            )
        elif found := re.fullmatch(r"(.*\.mlp\.)gate_proj\.(.*)", key):
            made[f"{found[1]}fc1.{found[2]}"] = torch.cat([tensor, state[f"{found[1]}up_proj.{found[2]}"]])
        elif found := re.fullmatch(r"(.*\.mlp\.)down_proj\.(.*)", key):
            made[f"{found[1]}fc2.{found[2]}"] = tensor
        elif not re.fullmatch(r".*\.(attention\.[kv]_proj|mlp\.up_proj)\..*", key):
            made[key] = tensor
    return made


def batch(count: int = 2, truth: bool = True) -> Batch:
    """Smooth noise of unit variance; the truth is two and three rectangles of several classes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    segments = []
    for index in range(count):
        masks = torch.zeros(2 + index, SIDE, SIDE, dtype=torch.bool)
        for place, mask in enumerate(masks):
            mask[8 * place : 8 * place + 20, 20 * place : 20 * place + 24] = True
        classes = torch.arange(2 + index) * 2 % len(NAMES)
        segments.append(Segments(masks, classes, torch.ones(len(classes)), torch.zeros(len(classes), dtype=torch.bool)))
    tasks = ("panoptic",) * count
    return Batch(pixels, tasks, (frame,) * count, ("",) * count, tuple(segments) if truth else None)
