"""InternImage's released checkpoints: the backbone alone, as classification leaves it, and whole with UperNet or Mask2Former.

Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.backbones.internimage import DESIGNS, InternImage, Norms
from maskfirst.convert import mask2former, upernet
from maskfirst.convert.mask2former import moves
from maskfirst.convert.rename import Leave, Move, Rule, count

BACKBONE = "proposer.backbone."
BEGUN = r"stages\.\d+\.blocks\.\d+\.(look|mix)\.scale"
"""What segmentation adds to a backbone of classification that has no layer scales; they begin with 1, which is nothing."""
_MARK = "levels.0.blocks.0.dcn.offset.weight"
_NO_HEAD = "what classification has behind the backbone"
_POINTS = 9


def backbone(keys: Collection[str], theirs: str = r"backbone\.", to: str = BACKBONE) -> list[Rule]:
    """To the backbone `internimage` at `to`; the keys begin with what the regular expression `theirs` fits.

    One name stands for the norm before a branch in some models and for the one after it in others.
    """
    stage, block = rf"{theirs}levels\.(\d)\.", rf"{theirs}levels\.(\d)\.blocks\.(\d+)\."
    own, home = rf"{to}stages.\1.", rf"{to}stages.\1.blocks.\2."
    look = f"{home}look.part."
    side = "after" if _norms(keys) == "after" else "before"
    table = {
        rf"{block}norm1\.0": f"{home}look.{side}",
        rf"{block}norm2\.0": f"{home}mix.{side}",
        rf"{block}res_post_norm1\.0": f"{home}look.after",
        rf"{block}res_post_norm2\.0": f"{home}mix.after",
        rf"{block}dcn\.dw_conv\.0": f"{look}depthwise",
        rf"{block}dcn\.dw_conv\.1\.1": f"{look}norm",
        rf"{block}dcn\.offset": f"{look}offsets",
        rf"{block}dcn\.mask": f"{look}weights",
        rf"{block}dcn\.input_proj": f"{look}value",
        rf"{block}dcn\.output_proj": f"{look}output",
        rf"{block}mlp\.fc1": f"{home}mix.part.0",
        rf"{block}mlp\.fc2": f"{home}mix.part.2",
        rf"{stage}norm\.0": f"{own}norm",
        rf"{stage}post_norms\.(\d+)\.0": rf"{own}post_norms.\2",
        rf"{theirs}patch_embed\.conv1": f"{to}stages.0.entrance.0.convolution",
        rf"{theirs}patch_embed\.norm1\.1": f"{to}stages.0.entrance.0.norm",
        rf"{theirs}patch_embed\.conv2": f"{to}stages.0.entrance.2.convolution",
        rf"{theirs}patch_embed\.norm2\.1": f"{to}stages.0.entrance.2.norm",
    }

    def entrance(match: re.Match[str]) -> str:
        """A map is halved at the end of a stage there, and at the beginning of the next one here."""
        part = "norm" if match[2] == "norm.1" else "convolution"
        return f"{to}stages.{int(match[1]) + 1}.entrance.{part}.{match[3]}"

    return [
        *moves(table),
        Move(rf"{block}gamma1", f"{home}look.scale"),
        Move(rf"{block}gamma2", f"{home}mix.scale"),
        Move(rf"{block}dcn\.center_feature_scale_proj_(weight|bias)", rf"{look}centre.\3"),
        Move(rf"{stage}downsample\.(conv|norm\.1)\.(weight|bias)", entrance),
    ]


def _norms(keys: Collection[str]) -> Norms:
    """Where the norms of its blocks lie: models normed after their branches have no norm after a stage, but G, which shares
    the centre's scale with H."""
    ends = {key.split("levels.0.", 1)[1] for key in keys if "levels.0." in key}
    if "blocks.0.res_post_norm1.0.weight" in ends:
        return "both"
    return "before" if "norm.0.weight" in ends and not _has_centre(ends) else "after"


def _has_centre(ends: Collection[str]) -> bool:
    return "blocks.0.dcn.center_feature_scale_proj_weight" in ends


def is_alone(keys: Collection[str]) -> bool:
    """Whether these are the keys of a backbone as classification names it."""
    return _MARK in keys


def build(tensors: Mapping[str, Tensor]) -> InternImage:
    """A backbone of that size, without memory. Raises LookupError where a key or an axis of every InternImage is missing."""
    first = "levels.0.blocks.0."
    width, scales = tensors["patch_embed.conv2.weight"].shape[0], f"{first}gamma1" in tensors
    with torch.device("meta"):
        # H has nothing that others lack.
        return InternImage(
            "h",
            width,
            depths=_depths(tensors, ""),
            groups=tuple(
                len(tensors[f"levels.{stage}.blocks.0.dcn.mask.bias"]) // _POINTS
                for stage in range(_stages(tensors, ""))
            ),
            norms=_norms(tensors),
            layer_scale=1.0 if scales else None,
            kernel=tensors[f"{first}dcn.dw_conv.0.weight"].shape[-1],
            centre_scale=f"{first}dcn.center_feature_scale_proj_weight" in tensors,
            post_norms=tuple(range(count(tensors, r"levels\.2\.post_norms\.(\d+)\..*"))),
            mlp_ratio=len(tensors[f"{first}mlp.fc1.bias"]) / width,
        )


def _stages(keys: Collection[str], prefix: str) -> int:
    return count(keys, rf"{re.escape(prefix)}levels\.(\d+)\..*")


def _depths(keys: Collection[str], prefix: str) -> tuple[int, ...]:
    return tuple(
        count(keys, rf"{re.escape(prefix)}levels\.{stage}\.blocks\.(\d+)\..*") for stage in range(_stages(keys, prefix))
    )


def part_rules(keys: Collection[str]) -> list[Rule]:
    """From a backbone of classification, without its head."""
    heads = r"(conv_head|head|dcnv3_head_x[34]|clip_projector|fc_norm)\..*"
    return [*backbone(keys, "", ""), Leave(heads, _NO_HEAD)]


@dataclass(frozen=True)
class Facts:
    """What the tensors say. `model`: its letter; None for a size that no one has released."""

    model: str | None
    width: int
    head: str
    classes: int

    def __str__(self) -> str:
        size = f"InternImage-{self.model.upper()}" if self.model else f"an InternImage {self.width} wide"
        return f"{size} with {self.head} for {self.classes} classes"


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole segmenter of mmseg's on an InternImage."""
    return f"backbone.{_MARK}" in keys and any(key.startswith("decode_head.") for key in keys)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that all have is missing."""
    width = tensors["backbone.patch_embed.conv2.weight"].shape[0]
    sizes = {(design.width, design.depths): model for model, design in DESIGNS.items()}
    model = sizes.get((width, _depths(tensors, "backbone.")))
    if "decode_head.cls_embed.weight" in tensors:
        return Facts(model, width, "Mask2Former", len(tensors["decode_head.cls_embed.weight"]) - 1)
    return Facts(model, width, "UperNet", len(tensors["decode_head.conv_seg.weight"]))


_ADE20K, _CITYSCAPES = 150, 19
_DATA = {_ADE20K: "ade20k", 171: "coco-stuff-164k", _CITYSCAPES: "cityscapes"}
"""Classes -> what has so many."""


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes; None for models of no published row."""
    found = facts(tensors)
    name = f"internimage-{found.model}-{found.head.lower()}-{_DATA.get(found.classes)}"
    return (name, ()) if name in recipes.names() else None


def spare(tensors: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """The rows of UperNet's classifiers for so many classes, where they are Cityscapes' 19 and the file has ADE20K's 150.

    The released configurations for Cityscapes have left that number as it was; the other rows were trained to say no.
    """
    if classes != _CITYSCAPES:
        return {}
    heads = ("decode_head", "auxiliary_head")
    found = {
        f"{head}.conv_seg.{kind}": tensors.get(f"{head}.conv_seg.{kind}")
        for head in heads
        for kind in ("weight", "bias")
    }
    return {
        key: tensor[:classes].clone() for key, tensor in found.items() if tensor is not None and len(tensor) == _ADE20K
    }


def rules(keys: Collection[str]) -> list[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `upernet` or `mask2former` on `internimage`."""
    head = mask2former.mmseg_head() if "decode_head.cls_embed.weight" in keys else upernet.rules()
    return [*backbone(keys), *head]
