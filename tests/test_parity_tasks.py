"""Parity with Mask2Former's post-processing and criterion, and with the reference evaluators: their fixtures hold."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fixtures_dir import FIXTURES
from test_parity_mask2former import assert_all_hold, change, failing

if FIXTURES is not None:
    PROPOSALS = FIXTURES / "proposals"

    @pytest.mark.parametrize(
        ("folder", "least"),
        [(PROPOSALS / "inference_m2f", 52), (PROPOSALS / "criterion_m2f", 29), (FIXTURES / "metrics", 71)],
        ids=lambda value: value.name if isinstance(value, Path) else "",
    )
    def test_everything_holds(folder: Path, least: int) -> None:
        assert_all_hold(folder, least)

    @pytest.mark.parametrize(
        ("folder", "key", "shown"),
        [
            ("inference_m2f", "class_logits", "semantic, masks_first"),
            ("inference_m2f", "low_mask_logits", "low_post_logits"),
            ("criterion_m2f", "final_masks", "final_cost_0"),
            ("criterion_m2f", "aux1_random_points", "out_loss_mask_1"),
        ],
    )
    def test_one_perturbed_number_shows(tmp_path: Path, folder: str, key: str, shown: str) -> None:
        shutil.copytree(PROPOSALS / folder, tmp_path / "copy", copy_function=shutil.copyfile)
        (tmp_path / "copy").chmod(0o755)
        with np.load(PROPOSALS / folder / "io.npz") as archive:
            array = archive[key]
        array.flat[0] += 0.2
        change(tmp_path / "copy" / "io.npz", key, array)
        assert shown in {row.name for row in failing(tmp_path / "copy")}

    def test_one_other_score_shows(tmp_path: Path) -> None:
        assert FIXTURES is not None
        told = json.loads((FIXTURES / "metrics" / "expected.json").read_text())
        told["panoptic"]["Things"]["sq"] += 1e-7
        shutil.copytree(FIXTURES / "metrics", tmp_path / "copy", copy_function=shutil.copyfile)
        (tmp_path / "copy").chmod(0o755)
        (tmp_path / "copy" / "expected.json").write_text(json.dumps(told))
        assert [row.name for row in failing(tmp_path / "copy")] == ["panoptic.Things.sq"]
