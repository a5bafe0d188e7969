"""Parity with the original PADing: its fixtures hold, and the runner that says so fails where it should."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fixtures_dir import FIXTURES
from test_parity_mask2former import assert_all_hold, change, failing

SUBSET = Path(__file__).parent / "fixtures" / "pading"


@pytest.mark.parametrize(("folder", "least"), [("unit_losses", 35), ("convert", 6)])
def test_the_subset_holds(folder: str, least: int) -> None:
    assert_all_hold(SUBSET / folder, least)


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("unit_losses", "mmd_b_grad_gen"),
        ("unit_losses", "align_a_grad_s2"),
        ("unit_losses", "net_relation"),
        ("convert", "instance_48_17_out_bias"),
    ],
)
def test_one_wrong_number_shows(tmp_path: Path, folder: str, key: str) -> None:
    shutil.copytree(SUBSET / folder, tmp_path / "copy")
    with np.load(SUBSET / folder / "io.npz") as archive:
        array = np.array(archive[key])
    array.flat[0] += 0.2
    change(tmp_path / "copy" / "io.npz", key, array)
    assert {row.file for row in failing(tmp_path / "copy")} == {"io.npz"}


if FIXTURES is not None:

    @pytest.mark.parametrize(
        ("folder", "least"),
        [
            ("unit_losses", 39),
            ("generator", 17),
            ("step_panoptic", 343),
            ("step_instance", 343),
            ("infer_semantic", 6),
            ("infer_panoptic", 29),
            ("e2e_panoptic_tiny", 39),
            ("convert", 21),
            ("manifests", 40),
        ],
    )
    def test_everything_of_the_original_holds(folder: str, least: int) -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / "pading" / folder, least)
