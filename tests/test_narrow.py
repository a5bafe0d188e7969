"""ViT-Adapter's recipes learn and are evaluated as they say, narrowed; `python -m bench.narrow` does it for all of them."""

from pathlib import Path

import pytest
from bench.narrow import HALF, narrow


@pytest.mark.parametrize(
    ("name", "windows", "augmented", "views"),
    [("adapter-deit-t-upernet-ade20k", 2, 28, 12), ("adapter-beit-b-mask2former-pascal-context", 2, 26, 12)],
)
def test_a_recipe_halves_its_loss_and_sees_all_its_windows_and_views(
    tmp_path: Path, name: str, windows: int, augmented: int, views: int
) -> None:
    found = narrow(name, (48, 80), tmp_path)
    assert found["loss"]["ratio"] <= HALF
    for told, shown, seen in (("plain", windows, 1), ("augmented", augmented, views)):
        assert found[told]["as_told"]
        assert (found[told]["windows"], found[told]["views"]) == (shown, seen)
    assert found["augmented"]["mirrored"] == views // 2
    assert found["held"]
