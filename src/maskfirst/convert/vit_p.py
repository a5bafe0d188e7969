"""ViT-P's released checkpoints, DINOv2 with point tokens: all of each is the namer `vit_p`.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (arXiv 2505.19795).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from maskfirst.convert import dinov2
from maskfirst.convert.dinov2 import BEFORE
from maskfirst.convert.rename import Copy, Move, Rule

POINTS = "cls_embeddings.weight"


@dataclass(frozen=True)
class Facts:
    """What the shapes of a ViT-P tell."""

    classes: int
    width: int
    depth: int
    registers: int

    def __str__(self) -> str:
        size = {384: "S", 768: "B", 1024: "L", 1536: "g"}.get(self.width, f"of width {self.width}")
        registers = f", {self.registers} registers" if self.registers else ""
        return f"a ViT-P {size} of {self.depth} blocks{registers}, {self.classes} classes"


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a ViT-P, whatever stands before them."""
    return any(key.endswith(POINTS) for key in keys)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Raises KeyError where a key is missing that every ViT-P has."""
    plain = dinov2.plain(tensors)
    registers = plain["register_tokens"].shape[1] if "register_tokens" in plain else 0
    width = plain[POINTS].shape[0]
    return Facts(plain["head.weight"].shape[0], width, dinov2.depth(plain), registers)


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of the very same namer: by its size and its number of classes."""
    told = facts(tensors)
    size = {(768, 12, 0): "b", (1024, 24, 0): "l"}.get((told.width, told.depth, told.registers))
    data = {150: "ade20k", 19: "cityscapes", 133: "coco", 171: "coco-stuff-164k", 365: "objects365"}.get(told.classes)
    return None if size is None or data is None else (f"vit-p-{size}-{data}", ())


def pair(masks: str, names: str) -> str:
    """What the bundled recipe is called that joins two: that of a model, and that of a ViT-P which names its masks, too."""
    return f"{'-'.join(names.split('-')[:3])}-{masks}"


def rules(keys: Collection[str]) -> Sequence[Rule]:
    """From the original's keys to those of a Segmenter whose namer is `vit_p` on a ViT without a class token."""
    return [
        Move(rf"{BEFORE}cls_embeddings\.weight", "namer.point_proj.weight"),
        Copy(
            rf"{BEFORE}pos_embed",
            ("namer.slot", "namer.trunk.vit.pos_embed"),
            # The class token's row, which every point is given, and those of the patches.
            (lambda table: table[0, 0], lambda table: table[:, 1:]),
        ),
        Move(rf"{BEFORE}head\.(weight|bias)", r"namer.head.\1"),
        *dinov2.rules("namer.trunk."),
    ]
