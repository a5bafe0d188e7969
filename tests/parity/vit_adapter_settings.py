"""ViT-Adapter but for its network: how pictures are laid, what labels mean, the colours, and what steps the weights."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskfirst import recipe as recipes
from maskfirst.frames import Frame
from maskfirst.segmenter import Inference

from .foreign import NotCoveredError, Settings
from .rows import Row, equal


def read_json(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return json.load(file)


def inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `inference` of a recipe that lays pictures as a config of the original's does in its test.

    Its `fit` is for augmented testing, too: a config has one of both. Raises NotCoveredError.
    """
    load, test = (Settings(step, "test_pipeline") for step in config["test_pipeline"])
    load.only("type", "LoadImageFromFile")
    test.only("type", "MultiScaleFlipAug")
    scale = test.need("img_scale")
    section: dict[str, Any] = {
        "fit": {"long": max(scale), "short": min(scale)},
        "multiple": 1,
        "scales": test.take("img_ratios", [1.0]),
        "flip": test.need("flip"),
        "average": "softmax",
    }
    normalised = False
    for content in test.need("transforms"):
        step = Settings(content, "transforms")
        kind = step.need("type")
        if kind == "Resize":
            step.only("keep_ratio", False, True)
        elif kind == "SETR_Resize":
            step.only("keep_ratio", False, True)
            step.only("setr_multi_scale", False, True)
            section["fit"] = {"short": min(scale), "least": min(step.need("crop_size"))}
        elif kind == "ResizeToMultiple":
            section["fit"]["round_up"] = step.need("size_divisor")
        elif kind == "PadShortSide":
            step.only("pad_val", 0)
            step.only("seg_pad_val", 255)
            section |= {"pad": step.need("size"), "fill": "mean" if normalised else "black"}
        elif kind == "Normalize":
            normalised = True
        elif kind in ("ImageToTensor", "Collect"):
            step.only("keys", None, ["img"])
        elif kind != "RandomFlip":
            raise NotCoveredError(f"transforms: {kind}")
        step.done()
    test.done()
    windows = Settings(config["test_cfg"], "test_cfg")
    windows.only("mode", "slide")
    section |= {"window": windows.need("crop_size"), "stride": windows.need("stride")}
    windows.done()
    return section


def test_geometry(folder: Path, path: Path) -> Iterator[Row]:
    """Sizes after resizing and padding, and windows, of every view of pictures of many sizes."""
    configs = read_json(folder.parent / "manifests" / "config_summary.json.gz")
    for case, told in read_json(path).items():
        node = inference(configs[told["config"]])
        settings = recipes.construct(node, Inference, menus={}, where="inference", source=path.name)
        ours = [list(settings.window), list(settings.stride)]
        yield equal(path.name, f"{case}: windows and strides", ours, [told["crop"], told["stride"]])
        for row in told["cases"]:
            height, width = row["ori"]
            views = settings.views((height, width), 1, augment=True)
            found = [_told(view, settings.windows(view, 1)) for view in views]
            for number, (view, wanted) in enumerate(zip(found, row["views"], strict=False)):
                yield equal(path.name, f"{case}: {height}x{width}, view {number}", view, wanted)
            yield equal(path.name, f"{case}: {height}x{width}, views", len(found), len(row["views"]))


def _told(view: Frame, windows: Sequence[Frame]) -> dict[str, Any]:
    """A view as the fixture tells it, where places are listed of four windows at most."""
    spans = [[y, y + window.outer[0], x, x + window.outer[1]] for window in windows for y, x in [window.origin]]
    return {
        "tensor": list(view.outer),
        "img_shape": list(view.inner),
        "pad_shape": list(view.outer),
        "flip": view.flipped,
        "num_windows": len(windows),
        "min_window": [min(window.outer[axis] for window in windows) for axis in (0, 1)],
        "windows": spans if len(spans) <= 4 else None,
    }


FILES = {
    r"test_resize_and_windows.*\.json": test_geometry,
}
"""File name -> what compares it."""
