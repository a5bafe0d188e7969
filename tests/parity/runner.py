"""The runner: every file of a folder, each compared by what knows its kind, and none passed over."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import (
    answers,
    dinat,
    internimage,
    mask2former,
    oneformer,
    pading,
    pading_recipes,
    scores,
    tables,
    upernet,
    vit_adapter,
    vit_adapter_recipes,
    vit_adapter_settings,
    vit_p,
    zero_shot,
)
from .rows import Row, failed
from .variant import variant

PROSE = {".md", ".txt"}
FILES = {
    **tables.FILES,
    **vit_adapter_settings.FILES,
    **vit_adapter.FILES,
    **vit_adapter_recipes.FILES,
    **internimage.FILES,
    **oneformer.FILES,
    **zero_shot.FILES,
}
"""File name -> what compares it."""
KINDS = {
    "Mask2Former MaskFormerHead (pixel decoder + masked decoder)": mask2former.original_head,
    "Mask2FormerHead of the InternImage / ViT-P mmseg tree (weights named decode_head.*)": mask2former.mmseg_head,
    "tiny full Mask2Former (Swin backbone) end to end": mask2former.end_to_end,
    "OneFormer head: pixel decoder + task MLP + class transformer + decoder": oneformer.head,
    "OneFormer text encoder + projector + learned context, contrastive loss (single process)": oneformer.texts,
    "OneFormer ConvNeXt backbone": mask2former.convnext,
    "post-processing": answers.post_processing,
    "Hungarian matcher + set criterion": answers.criterion,
    "ViT-P glue: point of every mask, class fusion (two variants)": vit_p.fusion,
    "UPerHead (PSP scales 1,2,3,6) + FCN auxiliary head, BN eval": upernet.head,
    **internimage.KINDS,
    **dinat.KINDS,
}
"""What a config.json says it is of -> what compares it, with io.npz and state.safetensors beside it."""


def run(folder: Path) -> list[Row]:
    """A row for every comparison, and a failed one for every file that is not covered or cannot be compared."""
    if not folder.is_dir():
        return [failed(str(folder), "", "no such folder")]
    rows: list[Row] = []
    covered: set[str] = set()
    files = sorted(path for path in folder.iterdir() if path.suffix not in PROSE)
    for path in files:
        compared_by = _kind(path)
        if compared_by is None:
            continue
        covered |= _belonging(path)
        rows += _guarded(path.name, lambda known=compared_by, path=path: known(folder, path))
    for path in files:
        if path.name not in covered:
            rows.append(failed(path.name, "", "not covered"))
    return rows or [failed(str(folder), "", "holds no fixtures")]


def _kind(path: Path) -> Callable[[Path, Path], Iterator[Row]] | None:
    told = _told(path) if path.suffix == ".json" else {}
    # PADing's files have the names of others', and only their content tells them.
    known = pading.kind(path.name, told) or pading_recipes.kind(path.name, told)
    if known is not None:
        return known
    for pattern, known in FILES.items():
        if re.fullmatch(pattern, path.name):
            return known
    if {"config", "arrays"} <= told.keys():
        return lambda folder, path: variant(folder, path.stem)
    if path.name == "meta.json" and mask2former.is_operator(told):
        return mask2former.operator
    if path.name == "meta.json" and vit_adapter.is_tables(told):
        return vit_adapter.tables
    if vit_p.is_variant(told):
        return vit_p.variant
    if path.name == "config.json" and vit_adapter.is_variant(told):
        return vit_adapter.variant
    if path.name == "config.json" and zero_shot.is_texts(told):
        return zero_shot.texts
    if path.name == "expected.json":
        return scores.scores
    return KINDS.get(told.get("kind", "")) if path.name == "config.json" else None


def _told(path: Path) -> dict[str, Any]:
    """What a JSON file has by name; nothing where it is no such."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _belonging(path: Path) -> set[str]:
    """The file itself and those that are read with it."""
    if path.name == "config.json":
        return {path.name, "io.npz", "state.safetensors", *vit_adapter.BESIDE, *pading.BESIDE, *zero_shot.BESIDE}
    told = _told(path) if path.suffix == ".json" else {}
    if vit_p.is_variant(told) or pading.is_generator(told):
        return {path.name, f"{path.stem}.npz", f"{path.stem}.safetensors"}
    if path.name == "expected.json":
        return {path.name, *scores.BESIDE, *(name for pair in scores.FILES.values() for name in pair)}
    if path.name == "meta.json":
        return {path.name, "tables.npz", *(f"{case}.npz" for case in _told(path))}
    weights = (
        re.search(r'"backbone_weights":\s*"([^"]+)"', path.read_text(encoding="utf-8"))
        if path.suffix == ".json"
        else None
    )
    return {path.name, f"{path.stem}.npz", *([weights[1]] if weights else [])}


def _guarded(name: str, compared: Callable[[], Iterator[Row]]) -> list[Row]:
    """What comes, and where that breaks off, a failed row that says why: a fixture may lack or hold anything."""
    rows: list[Row] = []
    try:
        for row in compared():
            rows.append(row)
    except Exception as error:
        rows.append(failed(name, "", f"{type(error).__name__}: {error}"))
    return rows
