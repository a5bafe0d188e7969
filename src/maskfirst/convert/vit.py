"""Weights of plain ViTs alone, as mmseg, Google's JAX AugReg and timm keep them: what SegViT's training starts from.

Steiner et al., "How to train your ViT?", 2021.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from maskfirst.backbones.vit import TimmViT
from maskfirst.convert.rename import Join, Leave, Move, Rule

_NO_HEAD = "the head of its image classification"
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
        """A ViT of that size, without memory. Raises LookupError where a key or an axis of every ViT is missing."""
        kernel = tensors[self.kernel]
        patch = kernel.shape[2] if self.channels == 0 else kernel.shape[0]
        side = isqrt(tensors[self.positions].shape[1] - 1) * patch
        blocks = {match[1] for key in tensors if (match := re.match(self.block, key))}
        with torch.device("meta"):
            # The number of heads does not show in the tensors.
            return TimmViT(
                (side, side),
                width=kernel.shape[self.channels],
                depth=len(blocks),
                heads=1,
                patch=patch,
                final_norm=self.norm in tensors,
            )


MMSEG = Layout("patch_embed.projection.weight", 0, "pos_embed", r"layers\.(\d+)\.", "ln1.weight")
JAX = Layout(
    "embedding/kernel",
    3,
    "Transformer/posembed_input/pos_embedding",
    r"Transformer/encoderblock_(\d+)/",
    "Transformer/encoder_norm/scale",
)
TIMM = Layout("patch_embed.proj.weight", 0, "pos_embed", r"blocks\.(\d+)\.", "norm.weight")


def _final_norm(match: str, to: str, final_norm: bool) -> Rule:
    return Move(match, to) if final_norm else Leave(match, _NO_NORM)


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
        _final_norm(rf"{there}ln1\.{kind}", rf"{here}norm.\1", final_norm),
        Leave(rf"{there}(head|pre_logits)\..*", _NO_HEAD),
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


def jax_rules(final_norm: bool) -> list[Rule]:
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
        _final_norm(r"Transformer/encoder_norm/scale", "vit.norm.weight", final_norm),
        _final_norm(r"Transformer/encoder_norm/bias", "vit.norm.bias", final_norm),
        Leave(r"(head|pre_logits)/.*", _NO_HEAD),
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
    """Whether these are the keys of timm's VisionTransformer."""
    return "blocks.0.attn.qkv.weight" in keys and "patch_embed.proj.weight" in keys


def timm_rules(final_norm: bool) -> list[Rule]:
    """From timm's VisionTransformer, SETR's `jx` files too, to `TimmViT`."""
    return [
        Move(r"(cls_token|pos_embed|(patch_embed|blocks)\..*)", r"vit.\1"),
        _final_norm(r"norm\.(weight|bias)", r"vit.norm.\1", final_norm),
        Leave(r"(head|pre_logits|fc_norm)\..*", _NO_HEAD),
    ]
