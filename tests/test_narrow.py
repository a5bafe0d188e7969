"""ViT-Adapter's recipes, narrowed, learn and are shown what they say; `python -m bench.narrow` does this with all of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.narrow import narrow, overrides

from maskfirst import recipe

NAMES = [name for name in recipe.names() if name.startswith("adapter-")]
CHANGED = (
    r"proposer(\.backbone(\.trunk)?)?\.((mask_|auxiliary_)?width|heads|stem|(en|de)coder_feedforward|pretrained)|data\..*|"
    r"augment\.\d\.(size|fit\.(long|short|least))|"
    r"train\.(steps|batch|precision|optimizer\.lr|evaluate_every|log_steps|pictures|workers)"
)
"""Places in a recipe that narrowing may reach."""


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """The places where two trees differ, and those that one of them lacks."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {*before, *after}:
            yield from differences(before.get(key), after.get(key), f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and "size" not in place:
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}.{index}")
    elif before != after:
        yield place


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_sizes_data_and_what_50_steps_ask_for_is_overridden(name: str, tmp_path: Path) -> None:
    whole = recipe.load(name)
    told = recipe.override(whole, overrides(whole, tmp_path))
    places = [*differences(whole.tree, told.tree)]
    assert {"train.steps", "proposer.width", "proposer.backbone.trunk.width"} <= set(places)
    assert [place for place in places if not re.fullmatch(CHANGED, place)] == []


# To take seconds: narrower than there, with fewer steps and points, and rates for these.
TRUNK = ["proposer.backbone.stem=8", "proposer.backbone.heads=2", "proposer.backbone.trunk={width: 16, heads: 1}"]
UPERNET = [*TRUNK, "proposer.width=16", "train={steps: 20, optimizer: {lr: 3e-2}}"]
MASK2FORMER = [
    *TRUNK, "proposer={width: 32, mask_width: 32}", "criterion.points=512", "train={steps: 40, optimizer: {lr: 8e-3}}"
]  # fmt: skip
# Windows along a side of a square picture in its six sizes, of 256, 384, 512, 640, 768 and 896 px, by 512 px each 341 px; and
# of 480, 480, 520, 650, 780 and 910 px, by 480 px each 320 px.
ADE20K = (1, 1, 1, 2, 2, 3)
PASCAL_CONTEXT = (1, 1, 2, 2, 2, 3)


@pytest.mark.parametrize(
    ("name", "changes", "sides"),
    [
        ("adapter-deit-t-upernet-ade20k", UPERNET, ADE20K),
        ("adapter-beit-l-upernet-pascal-context", UPERNET, PASCAL_CONTEXT),
        ("adapter-beit-b-mask2former-pascal-context", MASK2FORMER, PASCAL_CONTEXT),
    ],
)
def test_loss_is_halved_and_every_window_of_every_view_is_shown(
    name: str, changes: list[str], sides: tuple[int, ...], tmp_path: Path
) -> None:
    row = narrow(name, (96, 96), tmp_path, changes)
    assert row["loss"]["ratio"] <= 0.5
    plain, augmented = ([row[told][key] for key in ("views", "mirrored", "windows")] for told in ("plain", "augmented"))
    assert plain == [1, 0, sides[2] ** 2]
    assert augmented == [12, 6, 2 * sum(side**2 for side in sides)]
    assert row["held"]
