"""ViT-Adapter's released checkpoints: the adapter, the trunk within it, BEiT's pyramid without one, and the heads.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.convert import mask2former, uni_perceiver, upernet
from maskfirst.convert.mask2former import deformable, moves
from maskfirst.convert.rename import Leave, Move, Rule, count

BACKBONE = "proposer.backbone."
_KIND = r"\.(?P<kind>weight|bias)"
_NORM = r"\.(?P<kind>weight|bias|running_mean|running_var|num_batches_tracked)"


def _squeezed(kernel: Tensor) -> Tensor:
    """A convolution's kernel of 1 x 1 as a linear layer's (out, in)."""
    return kernel.flatten(1)


def _without_class(table: Tensor) -> Tensor:
    """A position table (1, 1 + N, D) without its first row, which is the class token's and is not used."""
    return table[:, 1:]


def _part(match: str, to: str) -> list[Rule]:
    """An injector or an extractor, each of which has some of these."""
    table = {
        rf"{match}\.query_norm": f"{to}.query_norm",
        rf"{match}\.feat_norm": f"{to}.token_norm",
        rf"{match}\.ffn_norm": f"{to}.norm",
        rf"{match}\.ffn\.fc1": f"{to}.feedforward.expand",
        rf"{match}\.ffn\.dwconv\.dwconv": f"{to}.feedforward.mix",
        rf"{match}\.ffn\.fc2": f"{to}.feedforward.contract",
    }
    return [*moves(table), *deformable(rf"{match}\.attn", f"{to}.attention")]


def adapter() -> list[Rule]:
    """What lies beside the trunk, to the backbone `adapter`."""
    prior = r"backbone\.spm\."

    def after(match: str, to: str) -> list[Rule]:
        """A convolution without bias, and the batch norm after it."""
        return [Move(rf"{match}\.0\.weight", f"{to}.0.weight"), Move(rf"{match}\.1{_NORM}", rf"{to}.1.\g<kind>")]

    projections: list[Rule] = []
    for level in range(4):
        home = f"{BACKBONE}prior.project.{level}"
        projections.append(Move(rf"{prior}fc{level + 1}\.weight", f"{home}.weight", _squeezed))
        projections.append(Move(rf"{prior}fc{level + 1}\.bias", f"{home}.bias"))
    return [
        Move(r"backbone\.level_embed", f"{BACKBONE}level_embed"),
        Move(rf"{prior}stem\.(\d){_NORM}", rf"{BACKBONE}prior.stem.\1.\g<kind>"),
        *(rule for step in range(3) for rule in after(rf"{prior}conv{step + 2}", f"{BACKBONE}prior.down.{step}")),
        *projections,
        Move(r"backbone\.interactions\.(\d+)\.injector\.gamma", rf"{BACKBONE}injectors.\1.gate"),
        *_part(r"backbone\.interactions\.(\d+)\.injector", rf"{BACKBONE}injectors.\1"),
        *_part(r"backbone\.interactions\.(\d+)\.extractor", rf"{BACKBONE}extractors.\1"),
        *_part(r"backbone\.interactions\.\d+\.extra_extractors\.(\d+)", rf"{BACKBONE}extra_extractors.\1"),
        *moves({r"backbone\.up": f"{BACKBONE}enlarge"}),
        *(Move(rf"backbone\.norm{level + 1}{_NORM}", rf"{BACKBONE}norms.{level}.\g<kind>") for level in range(4)),
    ]


def plain_trunk(trunk: str = f"{BACKBONE}trunk.") -> list[Rule]:
    """The plain ViT within, to a `vit` whose class token is absent."""
    block, home = r"backbone\.blocks\.(\d+)\.", rf"{trunk}vit.blocks.\1."
    return [
        Move(r"backbone\.pos_embed", f"{trunk}vit.pos_embed", _without_class),
        *moves({r"backbone\.patch_embed\.proj": f"{trunk}vit.patch_embed.proj"}),
        Move(rf"{block}gamma([12])", rf"{home}ls\2.gamma"),
        *moves({rf"{block}(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])": rf"{home}\2"}),
    ]


def beit_trunk(trunk: str = f"{BACKBONE}trunk.") -> list[Rule]:
    """The BEiT within, to a `beit`; its names are timm's."""
    block, home = r"backbone\.blocks\.(\d+)\.", rf"{trunk}vit.blocks.\1."
    return [
        Move(r"backbone\.cls_token", f"{trunk}vit.cls_token"),
        *moves({r"backbone\.patch_embed\.proj": f"{trunk}vit.patch_embed.proj"}),
        Leave(rf"{block}attn\.relative_position_index", "a table of places, computed"),
        Move(rf"{block}(gamma_[12]|attn\.(?:q_bias|v_bias|relative_position_bias_table))", rf"{home}\2"),
        Move(rf"{block}attn\.qkv\.weight", f"{home}attn.qkv.weight"),
        *moves({rf"{block}(norm[12]|attn\.proj|mlp\.fc[12])": rf"{home}\2"}),
    ]


def beit_pyramid() -> list[Rule]:
    """BEiT without an adapter, to a `deconv_pyramid` of `taps`."""
    return [
        *beit_trunk(f"{BACKBONE}backbone.trunk."),
        *moves({r"backbone\.fpn1\.([03])": rf"{BACKBONE}quarter.\1", r"backbone\.fpn2\.0": f"{BACKBONE}eighth"}),
        Move(rf"backbone\.fpn1\.1{_NORM}", rf"{BACKBONE}quarter.1.\g<kind>"),
    ]


_SIZES = {192: "t", 384: "s", 768: "b", 1024: "l"}
_DATA: Mapping[int, tuple[str, ...]] = {
    150: ("ade20k",),
    171: ("coco-stuff-10k", "coco-stuff-164k"),
    59: ("pascal-context",),
    19: ("cityscapes",),
    6: ("potsdam",),
    2: ("chase-db1",),
}
"""Classes -> what has so many."""


@dataclass(frozen=True)
class Facts:
    """What the tensors say. `side`: of the pictures that the trunk's positions are of, px.

    `groups`: interactions; 0 where it is BEiT's pyramid, without an adapter.
    """

    head: str
    trunk: str
    side: int
    width: int
    classes: int
    groups: int

    def __str__(self) -> str:
        adapter = f"a ViT-Adapter of {self.groups} interactions" if self.groups else "a pyramid"
        return f"{adapter} on a {self.trunk} {self.width} wide, of {self.side} px, with {self.head} for {self.classes} classes"


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole segmenter on ViT-Adapter's backbone, or on BEiT's pyramid without one."""
    backbone = "backbone.spm.stem.0.weight" in keys or {"backbone.cls_token", "backbone.fpn1.0.weight"} <= set(keys)
    return backbone and any(key.startswith("decode_head.") for key in keys)


def _trunk(keys: Collection[str]) -> str:
    if f"backbone.{uni_perceiver.KERNEL}" in keys:
        return "Uni-Perceiver"
    return "BEiT" if "backbone.cls_token" in keys else "ViT"


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that all have is missing."""
    trunk, kernel = _trunk(tensors), "backbone.patch_embed.proj.weight"
    if trunk == "Uni-Perceiver":
        kernel = f"backbone.{uni_perceiver.KERNEL}"
        side = isqrt(tensors[f"backbone.{uni_perceiver.PLACES}"].shape[0])
    elif trunk == "BEiT":
        rows = len(tensors["backbone.blocks.0.attn.relative_position_bias_table"])
        side = (isqrt(rows - 3) + 1) // 2
    else:
        side = isqrt(tensors["backbone.pos_embed"].shape[1] - 1)
    masks = "decode_head.cls_embed.weight" in tensors
    classes = len(tensors["decode_head.cls_embed.weight"]) - 1 if masks else len(tensors["decode_head.conv_seg.weight"])
    width, patch = tensors[kernel].shape[0], tensors[kernel].shape[-1]
    groups = count(tensors, r"backbone\.interactions\.(\d+)\..*")
    return Facts("Mask2Former" if masks else "UperNet", trunk, side * patch, width, classes, groups)


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes; None for models of no published row.

    What a trunk was pretrained on shows in its shapes only in part: BEiT and BEiTv2 are one network, and so are the smallest
    ViTs of DeiT and AugReg. The first of each then counts, unless the file has the other's name.
    """
    found = facts(tensors)
    plain = "deit" if found.side == 224 else "augreg"
    trunk = f"{'adapter-' if found.groups else ''}{plain if found.trunk == 'ViT' else found.trunk.lower()}"
    size = _SIZES.get(found.width, "") + ("-light" if found.groups == 1 else "")
    for data in _DATA.get(found.classes, ()):
        for name in (f"{trunk}-{size}-{found.head.lower()}-{data}{end}" for end in ("", f"-{found.side}")):
            # BEiT's positions are of the pictures of its recipe, those of other trunks of the ones they were pretrained on.
            if name in recipes.names() and (found.trunk != "BEiT" or recipes.load(name).tree["size"][0] == found.side):
                return name, ()
    return None


def rules(keys: Collection[str]) -> list[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `upernet` or `mask2former` on its backbone."""
    head = mask2former.mmseg_head() if "decode_head.cls_embed.weight" in keys else upernet.rules()
    if not any(key.startswith("backbone.interactions.") for key in keys):
        return [*beit_pyramid(), *head]
    trunk = f"{BACKBONE}trunk."
    within = {
        "BEiT": beit_trunk(trunk),
        "Uni-Perceiver": uni_perceiver.rules("backbone.", trunk),
        "ViT": plain_trunk(trunk),
    }
    return [*adapter(), *within[_trunk(keys)], *head]
