"""Cheap labels: interiors that thin things keep, and a box a region."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bench import cheap_labels
from PIL import Image

from maskfirst.data.coco import COCOBoxes
from maskfirst.data.folder import Folder


def test_interiors_lose_a_rim_and_never_all() -> None:
    wide, thin = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    wide[2:18, 3:27] = thin[:, 8:11] = True
    expected = np.zeros_like(wide)
    expected[6:14, 7:23] = True
    assert (cheap_labels.interior(wide, 4.0) == expected).all()
    # Three px wide: its middle line, but for the ends.
    kept = cheap_labels.interior(thin, 4.0)
    assert kept[1:-1, 9].all()
    assert not kept[:, [8, 10]].any()


def test_what_is_written_is_read_as_labels_and_as_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.full((24, 32), 255, np.uint8)
    labels[2:22, 2:12], labels[4:12, 16:30], labels[14:16, 16:18] = 8, 8, 3
    for folder, picture in (("images", np.zeros((24, 32, 3), np.uint8)), ("annotations", labels)):
        (tmp_path / folder / "train").mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / folder / "train" / "a.png")
    monkeypatch.setattr(sys, "argv", ["cheap_labels", str(tmp_path), "--smallest", "25"])
    cheap_labels.main()
    coarse = Folder(str(tmp_path), labels="coarse/{split}", vocabulary="camvid")[0]
    # Without a rim of 2 px: half of their depths, 5 and 4 px, are less than 4.
    assert (coarse.ids[0] >= 0).sum() == 6 * 16 + 4 * 10
    assert coarse.classes.tolist() == [8]
    told = json.loads((tmp_path / "boxes_train.json").read_text())
    assert [each["bbox"] for each in told["annotations"]] == [[2, 2, 10, 20], [16, 4, 14, 8]]
    boxes = COCOBoxes(str(tmp_path), annotations="boxes_train.json", images="images/train", vocabulary="camvid")[0]
    assert boxes.classes.tolist() == [8, 8]
    assert (boxes.ids[0] >= 0).sum() == 200 + 112
