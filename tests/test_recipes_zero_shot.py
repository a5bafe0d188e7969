"""The published zero-shot splits: each recipe's data is checked, on pictures made in COCO's forms."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfirst import cli
from maskfirst.data.coco_stuff import WORDS
from maskfirst.data.vocabulary import load
from maskfirst.data.zero_shot import names_of
from maskfirst.formats.coco_instances import InstancesWriter
from maskfirst.formats.coco_panoptic import PanopticWriter
from maskfirst.recipe import names
from maskfirst.types import SegmentMap, Vocabulary

RECIPES = [name for name in names() if name.startswith("pading-")]
SIDE = 4
"""Every class of a picture is a square of so many pixels a side."""
SIZE = (44, 64)


def squares(classes: Sequence[int]) -> SegmentMap:
    """A square of each class, row by row, the rest of the picture being of the last one."""
    ids = torch.full(SIZE, len(classes) - 1, dtype=torch.int32)
    for place in range(len(classes)):
        y, x = (SIDE * side for side in divmod(place, SIZE[1] // SIDE))
        ids[y : y + SIDE, x : x + SIDE] = place
    count = len(classes)
    return SegmentMap(ids, torch.tensor(classes), torch.ones(count), torch.zeros(count, dtype=torch.bool))


def shown(vocabulary: Vocabulary, unseen: str, hide: bool) -> list[int]:
    """The classes of a picture: all, or the seen ones alone."""
    hidden = names_of(unseen) if hide else ()
    return [index for index, name in enumerate(vocabulary.names) if name not in hidden]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures a split, in every form that the recipes read; of those for training the second shows nothing unseen."""
    root = tmp_path_factory.mktemp("coco")
    random = np.random.default_rng(0)
    data = root / "data" / "coco"
    for folder in ("train2014", "train2017", "val2014", "val2017"):
        for key in (1, 2):
            path = data / folder / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (*SIZE, 3), np.uint8)).save(path)
    stuff = load(WORDS)
    for split in ("train", "val"):
        hide = split == "train"
        panoptic = load("coco_133")
        writer = PanopticWriter(data / "annotations" / f"panoptic_{split}2017.json", panoptic)
        for key in (1, 2):
            found = squares(shown(panoptic, "coco_panoptic_14", hide and key == 2))
            writer.add(key, f"{key}.jpg", found)
            labels = squares(shown(stuff, "coco_stuff_15", hide and key == 2))
            values = (np.array(stuff.ids) - 1)[labels.classes[labels.ids.long()].numpy()].astype(np.uint8)
            path = data / "stuffthingmaps" / f"{split}2017" / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
        writer.close()
        for ending, unseen in (("48_17", "coco_17"), ("65_15", "coco_15")):
            words = load(f"coco_{ending}")
            kind = "seen" if hide else "gzsi"
            instances = InstancesWriter(data / "ZSIS" / f"instances_{split}2014_{kind}_{ending}.json", words)
            for key in (1, 2):
                instances.add(key, f"{key}.jpg", squares(shown(words, unseen, hide)).segments)
            instances.close()
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_published_splits_pass_check(
    name: str, coco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(coco)
    ended = cli.app(["check", name, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert not ended
