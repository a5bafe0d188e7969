"""Parity of zero-shot splits, scores and class vectors with the original PADing, and that a wrong number shows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures_dir import FIXTURES
from test_parity_mask2former import assert_all_hold, failing

SUBSET = Path(__file__).parent / "fixtures" / "zero_shot"


def test_the_subset_holds() -> None:
    assert_all_hold(SUBSET, 90)


def change(told: Any, keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        told = told[key]
    assert told[keys[-1]] != value
    told[keys[-1]] = value


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("panoptic.json", ("results", "PQ_un"), 23.4352454),
        ("panoptic.json", ("results", "SQ_se"), 3.3617093),
        ("panoptic.json", ("per_class_coco_id", "21", "pq"), 0.7256),
        ("panoptic_filter.json", ("seen_images", 0), 2),
        ("panoptic_filter.json", ("unseen_segments_kept", "2", 0), 185),
        ("panoptic_filter.json", ("all_categories", 0, "split"), "unseen"),
        ("lr_schedule.json", ("pretrain_panoptic", "lr", "0"), 2e-4),
    ],
)
def test_one_wrong_number_shows(tmp_path: Path, file: str, keys: tuple[Any, ...], value: Any) -> None:
    shutil.copytree(SUBSET, tmp_path / "copy")
    told = json.loads((SUBSET / file).read_text())
    change(told, keys, value)
    (tmp_path / "copy" / file).write_text(json.dumps(told))
    assert [row.file for row in failing(tmp_path / "copy")] == [file]


if FIXTURES is not None:

    @pytest.mark.parametrize(
        ("folder", "least"), [("text_embedding", 30), ("dataset_split", 8), ("evaluators", 511), ("facts", 138)]
    )
    def test_everything_of_the_original_holds(folder: str, least: int) -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / "pading" / folder, least)
