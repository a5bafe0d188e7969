"""Backbones of foreign checkpoints that become a `pyramid` or a `dinat`: detectron2's Swin and ResNet, OneFormer's ConvNeXt
and DiNAT, and transformers' Swin and DiNAT.

Swin's blocks are followed by the halving of their map there, and preceded by it here.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from maskfirst.convert import dinat
from maskfirst.convert.rename import Join, Leave, Move, Rule

TRUNK = "proposer.backbone.trunk."
NORMS = "proposer.backbone.norms."
_INDEX = "a table of the places in a window, which is computed"
_STATISTICS = r"(weight|bias|running_mean|running_var)"
_NAMES: Mapping[tuple[str, int, tuple[int, ...]], str] = {
    ("ResNet", 64, (3, 4, 6, 3)): "r50",
    ("ResNet", 64, (3, 4, 23, 3)): "r101",
    ("Swin", 96, (2, 2, 6, 2)): "swin-t",
    ("Swin", 96, (2, 2, 18, 2)): "swin-s",
    ("Swin", 128, (2, 2, 18, 2)): "swin-b",
    ("Swin", 192, (2, 2, 18, 2)): "swin-l",
    ("ConvNeXt", 192, (3, 3, 27, 3)): "convnext-l",
    ("ConvNeXt", 256, (3, 3, 27, 3)): "convnext-xl",
    ("DiNAT", 64, (3, 4, 6, 5)): "dinat-m",
    ("DiNAT", 64, (3, 4, 18, 5)): "dinat-t",
    ("DiNAT", 96, (3, 4, 18, 5)): "dinat-s",
    ("DiNAT", 128, (3, 4, 18, 5)): "dinat-b",
    ("DiNAT", 192, (3, 4, 18, 5)): "dinat-l",
}
"""Family, width of the stem and depths -> what it is called."""


@dataclass(frozen=True)
class Spelling:
    """How one project names the tensors of one family of backbones.

    `stem`: the key whose first axis is the width that all follows from. `block`: its groups 1 and 2 are stage and block.
    """

    family: str
    stem: str
    block: str
    rules: Callable[[], list[Rule]]

    def name(self, tensors: Mapping[str, Tensor]) -> str:
        """Such as "swin-t"; of sizes that no one has released, in words. Raises LookupError without the stem."""
        width = tensors[self.stem].shape[0]
        stages: dict[int, set[str]] = {}
        for key in tensors:
            if match := re.match(self.block, key):
                stages.setdefault(int(match[1]), set()).add(match[2])
        depths = tuple(len(stages[stage]) for stage in sorted(stages))
        told = f"{self.family} {width} wide with {', '.join(map(str, depths))} blocks"
        return _NAMES.get((self.family, width, depths), told)


def _next(template: str) -> Callable[[re.Match[str]], str]:
    """`template` with the match's first group counted one on as {0}, and its other groups as {1}, {2}."""
    return lambda match: template.format(int(match[1]) + 1, *match.groups()[1:])


def _swin() -> list[Rule]:
    return [
        Move(r"backbone\.(patch_embed\..*)", rf"{TRUNK}\1"),
        Leave(r"backbone\.layers\..*\.(relative_position_index|attn_mask)", _INDEX),
        Move(r"backbone\.(layers\.\d+\.blocks\..*)", rf"{TRUNK}\1"),
        Move(r"backbone\.layers\.(\d+)\.downsample\.(.*)", _next(TRUNK + "layers.{0}.downsample.{1}")),
        Move(r"backbone\.norm(\d)\.(weight|bias)", rf"{NORMS}\1.\2"),
    ]


def _resnet() -> list[Rule]:
    def stage(match: re.Match[str]) -> str:
        return f"{TRUNK}layer{int(match[1]) - 1}.{match[2]}."

    block = r"backbone\.res(\d)\.(\d+)\."
    return [
        Move(r"backbone\.stem\.conv1\.weight", f"{TRUNK}conv1.weight"),
        Move(rf"backbone\.stem\.conv1\.norm\.{_STATISTICS}", rf"{TRUNK}bn1.\1"),
        Move(rf"{block}conv([123])\.weight", lambda match: f"{stage(match)}conv{match[3]}.weight"),
        Move(rf"{block}conv([123])\.norm\.{_STATISTICS}", lambda match: f"{stage(match)}bn{match[3]}.{match[4]}"),
        Move(rf"{block}shortcut\.weight", lambda match: f"{stage(match)}downsample.0.weight"),
        Move(rf"{block}shortcut\.norm\.{_STATISTICS}", lambda match: f"{stage(match)}downsample.1.{match[3]}"),
        Leave(r"backbone\..*\.num_batches_tracked", "a count that a frozen norm does not keep"),
    ]


def _convnext() -> list[Rule]:
    block = r"backbone\.stages\.(\d)\.(\d+)\."
    return [
        Move(r"backbone\.downsample_layers\.0\.(.*)", rf"{TRUNK}stem.\1"),
        Move(r"backbone\.downsample_layers\.(\d)\.(.*)", rf"{TRUNK}stages.\1.downsample.\2"),
        Move(rf"{block}dwconv\.(weight|bias)", rf"{TRUNK}stages.\1.blocks.\2.conv_dw.\3"),
        Move(rf"{block}pwconv([12])\.(weight|bias)", rf"{TRUNK}stages.\1.blocks.\2.mlp.fc\3.\4"),
        Move(rf"{block}(gamma|norm\.weight|norm\.bias)", rf"{TRUNK}stages.\1.blocks.\2.\3"),
        Move(r"backbone\.norm(\d)\.(weight|bias)", rf"{NORMS}\1.\2"),
    ]


_HF = r"model\.pixel_level_module\.encoder\.(?:swin\.|model\.)?"


def _transformers_swin() -> list[Rule]:
    """Files have the names of the library's version 4, and models in memory those of 5."""
    block, home = rf"{_HF}encoder\.layers\.(\d+)\.blocks\.(\d+)\.", rf"{TRUNK}layers.\1.blocks.\2."
    kind = "(weight|bias)"
    rules: list[Rule] = [
        Move(rf"{_HF}embeddings\.patch_embeddings\.projection\.{kind}", rf"{TRUNK}patch_embed.proj.\1"),
        Move(rf"{_HF}embeddings\.norm\.{kind}", rf"{TRUNK}patch_embed.norm.\1"),
        Leave(rf"{_HF}encoder\.layers\..*\.relative_position_index", _INDEX),
        Move(rf"{block}layernorm_before\.{kind}", rf"{home}norm1.\3"),
        Move(rf"{block}layernorm_after\.{kind}", rf"{home}norm2.\3"),
        Move(
            rf"{block}attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
            rf"{home}attn.relative_position_bias_table",
        ),
        Move(rf"{block}attention\.(?:output\.dense|o_proj)\.{kind}", rf"{home}attn.proj.\3"),
        Move(rf"{block}(?:intermediate\.dense|mlp\.fc1)\.{kind}", rf"{home}mlp.fc1.\3"),
        Move(rf"{block}(?:output\.dense|mlp\.fc2)\.{kind}", rf"{home}mlp.fc2.\3"),
        Move(rf"{_HF}encoder\.layers\.(\d+)\.downsample\.(.*)", _next(TRUNK + "layers.{0}.downsample.{1}")),
        Move(
            rf"{_HF}hidden_states_norms\.stage(\d)\.{kind}",
            lambda match: f"{NORMS}{int(match[1]) - 1}.{match[2]}",
        ),
        Leave(rf"{_HF}layernorm\.{kind}", "the norm before the head of its image classification"),
    ]
    for part, (old, new) in enumerate((("query", "q"), ("key", "k"), ("value", "v"))):
        rules.append(Join(rf"{block}attention\.(?:self\.{old}|{new}_proj)\.{kind}", rf"{home}attn.qkv.\3", part, 3))
    return rules


SWIN = Spelling("Swin", "backbone.patch_embed.proj.weight", r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", _swin)
RESNET = Spelling("ResNet", "backbone.stem.conv1.weight", r"backbone\.res(\d)\.(\d+)\.", _resnet)
CONVNEXT = Spelling("ConvNeXt", "backbone.downsample_layers.0.0.weight", r"backbone\.stages\.(\d)\.(\d+)\.", _convnext)
DINAT = Spelling("DiNAT", f"backbone.{dinat.STEM}", rf"backbone\.{dinat.BLOCK}", dinat.backbone)
_INNER = ("", "swin.", "model.")
TRANSFORMERS_SWIN = [
    Spelling(
        "Swin",
        f"model.pixel_level_module.encoder.{inner}embeddings.patch_embeddings.projection.weight",
        rf"{_HF}encoder\.layers\.(\d+)\.blocks\.(\d+)\.",
        _transformers_swin,
    )
    for inner in _INNER
]
TRANSFORMERS_DINAT = [
    Spelling(
        "DiNAT",
        f"model.pixel_level_module.encoder.{inner}embeddings.patch_embeddings.projection.1.weight",
        rf"{_HF}encoder\.levels\.(\d+)\.layers\.(\d+)\.",
        lambda: dinat.transformers(_HF),
    )
    for inner in _INNER
]
SPELLINGS = (SWIN, RESNET, CONVNEXT, DINAT, *TRANSFORMERS_SWIN, *TRANSFORMERS_DINAT)


def spelling(keys: Collection[str]) -> Spelling | None:
    """How a checkpoint names its backbone; None where it has none that is known here."""
    return next((each for each in SPELLINGS if each.stem in keys), None)
