"""Parity with the original OneFormer: its fixtures hold, and the runner that says so fails where it should."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fixtures_dir import FIXTURES
from test_parity_mask2former import assert_all_hold, change, failing

SUBSET = Path(__file__).parent / "fixtures" / "oneformer" / "oneformer_text"


def test_the_subset_holds() -> None:
    assert_all_hold(SUBSET, 18)


@pytest.mark.parametrize("key", ["contrastive_logits", "texts", "grad_logit_scale"])
def test_one_wrong_number_shows(tmp_path: Path, key: str) -> None:
    shutil.copytree(SUBSET, tmp_path / "copy")
    with np.load(SUBSET / "io.npz") as archive:
        array = np.array(archive[key])
    array.flat[0] += 0.2
    change(tmp_path / "copy" / "io.npz", key, array)
    assert {row.file for row in failing(tmp_path / "copy")} == {"io.npz"}


def test_one_wrong_token_shows(tmp_path: Path) -> None:
    shutil.copytree(SUBSET, tmp_path / "copy")
    told = (SUBSET / "tokens.json").read_text()
    (tmp_path / "copy" / "tokens.json").write_text(told.replace("15304", "15305"))
    assert [row.file for row in failing(tmp_path / "copy")] == ["tokens.json"]


if FIXTURES is not None:

    @pytest.mark.parametrize(
        ("folder", "least"), [("oneformer_head", 25), ("oneformer_text", 21), ("inference_of", 4), ("criterion_of", 30)]
    )
    def test_everything_of_the_original_holds(folder: str, least: int) -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / "proposals" / folder, least)
