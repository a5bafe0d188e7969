"""ViT-Adapter's released checkpoints: the adapter, the plain ViT or BEiT within it, BEiT's pyramid without one, and the heads.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.convert import mask2former, upernet
from maskfirst.convert.mask2former import deformable, moves
from maskfirst.convert.rename import Leave, Move, Rule, count
from maskfirst.errors import UserError

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
}
"""Classes -> what has so many."""


@dataclass(frozen=True)
class Facts:
    """What the tensors say. `side`: of the pictures that the trunk's positions are of, px. `groups`: interactions."""

    head: str
    trunk: str
    side: int
    width: int
    classes: int
    groups: int

    def __str__(self) -> str:
        trunk = {"beit": "BEiT", "vit": "ViT"}[self.trunk]
        head = {"upernet": "UperNet", "mask2former": "Mask2Former"}[self.head]
        return (
            f"a ViT-Adapter of {self.groups} interactions on a {trunk} {self.width} wide, of {self.side} px, with {head} for "
            f"{self.classes} classes"
        )


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole segmenter on ViT-Adapter's backbone."""
    return "backbone.spm.stem.0.weight" in keys and any(key.startswith("decode_head.") for key in keys)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that all have is missing, UserError for other trunks."""
    if any(key.startswith("backbone.visual_embed.") for key in tensors):
        raise UserError("a ViT-Adapter on Uni-Perceiver, a trunk that is not among ours")
    trunk = "beit" if "backbone.cls_token" in tensors else "vit"
    if trunk == "beit":
        rows = len(tensors["backbone.blocks.0.attn.relative_position_bias_table"])
        side = (isqrt(rows - 3) + 1) // 2
    else:
        side = isqrt(tensors["backbone.pos_embed"].shape[1] - 1)
    head = "mask2former" if "decode_head.cls_embed.weight" in tensors else "upernet"
    classes = (
        len(tensors["decode_head.cls_embed.weight"]) - 1
        if head == "mask2former"
        else len(tensors["decode_head.conv_seg.weight"])
    )
    patch = tensors["backbone.patch_embed.proj.weight"].shape[-1]
    groups = count(tensors, r"backbone\.interactions\.(\d+)\..*")
    return Facts(head, trunk, side * patch, tensors["backbone.level_embed"].shape[1], classes, groups)


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes; None for models of no published row.

    What a trunk was pretrained on shows in its shapes only in part: BEiT and BEiTv2 are one network, and so are the smallest
    ViTs of DeiT and AugReg. The first of each then counts, unless the file has the other's name.
    """
    found = facts(tensors)
    trunk = "beit" if found.trunk == "beit" else "deit" if found.side == 224 else "augreg"
    size = _SIZES.get(found.width, "") + ("-light" if found.groups == 1 else "")
    for data in _DATA.get(found.classes, ()):
        for name in (f"adapter-{trunk}-{size}-{found.head}-{data}{end}" for end in ("", f"-{found.side}")):
            # The recipes of plain ViTs are all for one size of picture, and that of their positions is the trunk's own.
            if name in recipes.names() and (found.trunk == "vit" or recipes.load(name).tree["size"][0] == found.side):
                return name, ()
    return None


def rules(keys: Collection[str]) -> list[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `upernet` or `mask2former` on an `adapter`."""
    trunk = beit_trunk() if "backbone.cls_token" in keys else plain_trunk()
    head = mask2former.mmseg_head() if "decode_head.cls_embed.weight" in keys else upernet.rules()
    return [*adapter(), *trunk, *head]
