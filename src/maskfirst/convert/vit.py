"""Weights of plain ViTs alone, as mmseg, Google's JAX AugReg and timm keep them, and DeiT as timm: what training starts from.

Steiner et al., "How to train your ViT?", 2021; Touvron et al., "Training data-efficient image transformers", 2021.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from maskfirst.backbones.vit import TimmViT
from maskfirst.convert.rename import Join, Leave, Move, Rule, count
from maskfirst.errors import UserError

NO_HEAD = "the head of its image classification"
_NO_NORM = "the norm after the last block, which this model does not have"


@dataclass(frozen=True)
class Layout:
    """Where a format keeps what tells a ViT's size: keys, and the axis of the patches' kernel that counts channels."""

    kernel: str
    channels: int
    positions: str
    block: str
    norm: str

    def build(self, tensors: Mapping[str, Tensor]) -> TimmViT:
        """A ViT of that size, without memory.

        Raises LookupError where a key or an axis of every ViT is missing, UserError for a distilled one.
        """
        if "dist_token" in tensors:
            raise UserError(
                "a distilled DeiT, whose second token (dist_token) takes part in every block and has no place in this trunk; "
                "take the release of that size without distillation"
            )
        kernel = tensors[self.kernel]
        patch = kernel.shape[2] if self.channels == 0 else kernel.shape[0]
        side = isqrt(tensors[self.positions].shape[1] - 1) * patch
        with torch.device("meta"):
            # The number of heads does not show in the tensors.
            return TimmViT(
                (side, side),
                width=kernel.shape[self.channels],
                depth=count(tensors, self.block),
                heads=1,
                patch=patch,
                final_norm=self.norm in tensors,
            )


MMSEG = Layout("patch_embed.projection.weight", 0, "pos_embed", r"layers\.(\d+)\..*", "ln1.weight")
JAX = Layout(
    "embedding/kernel",
    3,
    "Transformer/posembed_input/pos_embedding",
    r"Transformer/encoderblock_(\d+)/.*",
    "Transformer/encoder_norm/scale",
)
TIMM = Layout("patch_embed.proj.weight", 0, "pos_embed", r"blocks\.(\d+)\..*", "norm.weight")


def is_mmseg(keys: Collection[str]) -> bool:
    """Whether these are the keys of mmseg's VisionTransformer alone."""
    return "layers.0.attn.attn.in_proj_weight" in keys


def mmseg_rules(final_norm: bool, foreign: str = "", ours: str = "") -> list[Rule]:
    """From mmseg's VisionTransformer to `TimmViT`. `foreign`, `ours`: what stands before the keys, with its dot."""
    there, here = foreign.replace(".", r"\."), f"{ours}vit."
    block, kind = rf"{there}layers\.(\d+)", "(weight|bias)"
    return [
        Move(rf"{there}(cls_token|pos_embed)", rf"{here}\1"),
        Move(rf"{there}patch_embed\.projection\.{kind}", rf"{here}patch_embed.proj.\1"),
        Move(rf"{block}\.ln([12])\.{kind}", rf"{here}blocks.\1.norm\2.\3"),
        Move(rf"{block}\.attn\.attn\.in_proj_{kind}", rf"{here}blocks.\1.attn.qkv.\2"),
        Move(rf"{block}\.attn\.attn\.out_proj\.{kind}", rf"{here}blocks.\1.attn.proj.\2"),
        Move(rf"{block}\.ffn\.layers\.0\.0\.{kind}", rf"{here}blocks.\1.mlp.fc1.\2"),
        Move(rf"{block}\.ffn\.layers\.1\.{kind}", rf"{here}blocks.\1.mlp.fc2.\2"),
        Move(rf"{there}ln1\.{kind}", rf"{here}norm.\1") if final_norm else Leave(rf"{there}ln1\.{kind}", _NO_NORM),
        Leave(rf"{there}(head|pre_logits)\..*", NO_HEAD),
    ]


def is_jax(keys: Collection[str]) -> bool:
    """Whether these are the names of an AugReg `.npz`."""
    return "Transformer/posembed_input/pos_embedding" in keys


def _transposed(kernel: Tensor) -> Tensor:
    """(in, out) to (out, in)."""
    return kernel.permute(1, 0)


def _heads_out(kernel: Tensor) -> Tensor:
    """A query, key or value kernel (in, heads, head width) to (out, in)."""
    return _transposed(kernel.flatten(1, 2))


def _heads_in(kernel: Tensor) -> Tensor:
    """The output kernel (heads, head width, out) to (out, in)."""
    return _transposed(kernel.flatten(0, 1))


def _images_first(kernel: Tensor) -> Tensor:
    """A convolution's kernel (height, width, in, out) to (out, in, height, width)."""
    return kernel.permute(3, 2, 0, 1)


def jax_rules() -> list[Rule]:
    """From the arrays of an AugReg `.npz` to `TimmViT`."""
    block = r"Transformer/encoderblock_(\d+)"
    attention = rf"{block}/MultiHeadDotProductAttention_1"
    rules: list[Rule] = [
        Move(r"cls", "vit.cls_token"),
        Move(r"Transformer/posembed_input/pos_embedding", "vit.pos_embed"),
        Move(r"embedding/kernel", "vit.patch_embed.proj.weight", _images_first),
        Move(r"embedding/bias", "vit.patch_embed.proj.bias"),
        Move(rf"{attention}/out/kernel", r"vit.blocks.\1.attn.proj.weight", _heads_in),
        Move(rf"{attention}/out/bias", r"vit.blocks.\1.attn.proj.bias"),
        Move(r"Transformer/encoder_norm/scale", "vit.norm.weight"),
        Move(r"Transformer/encoder_norm/bias", "vit.norm.bias"),
        Leave(r"(head|pre_logits)/.*", NO_HEAD),
    ]
    for part, name in enumerate(("query", "key", "value")):
        qkv = r"vit.blocks.\1.attn.qkv"
        rules.append(Join(rf"{attention}/{name}/kernel", f"{qkv}.weight", part, 3, _heads_out))
        rules.append(Join(rf"{attention}/{name}/bias", f"{qkv}.bias", part, 3, Tensor.flatten))
    for norm, name in enumerate(("LayerNorm_0", "LayerNorm_2"), 1):
        rules.append(Move(rf"{block}/{name}/scale", rf"vit.blocks.\1.norm{norm}.weight"))
        rules.append(Move(rf"{block}/{name}/bias", rf"vit.blocks.\1.norm{norm}.bias"))
    for dense in range(2):
        linear = rf"vit.blocks.\1.mlp.fc{dense + 1}"
        rules.append(Move(rf"{block}/MlpBlock_3/Dense_{dense}/kernel", f"{linear}.weight", _transposed))
        rules.append(Move(rf"{block}/MlpBlock_3/Dense_{dense}/bias", f"{linear}.bias"))
    return rules


def is_timm(keys: Collection[str]) -> bool:
    """Whether these are the keys of timm's VisionTransformer, as DeiT's releases are.

    BEiT's have other biases, and DINOv2's scales.
    """
    return {"blocks.0.attn.qkv.bias", "patch_embed.proj.weight"} <= set(keys) and "blocks.0.ls1.gamma" not in keys


def timm_rules() -> list[Rule]:
    """From timm's VisionTransformer, DeiT's releases and SETR's `jx` files too, to `TimmViT`."""
    return [
        Move(r"(cls_token|pos_embed|(patch_embed|blocks|norm)\..*)", r"vit.\1"),
        Leave(r"(head|pre_logits|fc_norm)\..*", NO_HEAD),
    ]
