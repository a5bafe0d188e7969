"""ViT-P's released checkpoints, DINOv2 with point tokens: all of each is the namer `vit_p`.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (arXiv 2505.19795).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from maskfirst.convert.rename import Copy, Leave, Move, Rule, count

POINTS = "cls_embeddings.weight"
_BEFORE = r"(?:teacher\.|module\.|backbone\.)*"
_BLOCK = r"blocks\.(?:\d+\.)?(\d+)"


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
    plain = {_plain(key): tensor for key, tensor in tensors.items()}
    registers = plain["register_tokens"].shape[1] if "register_tokens" in plain else 0
    width = plain[POINTS].shape[0]
    return Facts(plain["head.weight"].shape[0], width, count(plain, rf"{_BLOCK}\..*"), registers)


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of the very same namer: by its size and its number of classes."""
    told = facts(tensors)
    size = {(768, 12, 0): "b", (1024, 24, 0): "l"}.get((told.width, told.depth, told.registers))
    data = {150: "ade20k", 19: "cityscapes", 133: "coco", 171: "coco-stuff-164k", 365: "objects365"}.get(told.classes)
    return None if size is None or data is None else (f"vit-p-{size}-{data}", ())


def rules(keys: Collection[str]) -> Sequence[Rule]:
    """From the original's keys to those of a Segmenter whose namer is `vit_p` on a ViT without a class token."""
    trunk = r"namer.trunk.vit."
    return [
        Move(rf"{_BEFORE}cls_embeddings\.weight", "namer.point_proj.weight"),
        Copy(
            rf"{_BEFORE}pos_embed",
            ("namer.slot", f"{trunk}pos_embed"),
            # The class token's row, which every point is given, and those of the patches.
            (lambda table: table[0, 0], lambda table: table[:, 1:]),
        ),
        Move(rf"{_BEFORE}register_tokens", f"{trunk}reg_token"),
        Move(rf"{_BEFORE}{_BLOCK}\.mlp\.w12\.(weight|bias)", rf"{trunk}blocks.\1.mlp.fc1.\2"),
        Move(rf"{_BEFORE}{_BLOCK}\.mlp\.w3\.(weight|bias)", rf"{trunk}blocks.\1.mlp.fc2.\2"),
        Move(rf"{_BEFORE}{_BLOCK}\.(.*)", rf"{trunk}blocks.\1.\2"),
        Move(rf"{_BEFORE}(patch_embed|norm)\.(.*)", rf"{trunk}\1.\2"),
        Move(rf"{_BEFORE}head\.(weight|bias)", r"namer.head.\1"),
        Leave(rf"{_BEFORE}mask_token", "the mask token of its pretraining, which nothing reads"),
    ]


def _plain(key: str) -> str:
    return re.sub(rf"^{_BEFORE}", "", key)
