"""Procedural scenes of sky, fields and water with shapes standing about: a data set that needs no download.

Every scene is a function of (seed, split, index) and of what shapes look like. Stuff has texture and colours that overlap
between classes, shapes vary in size, colour, turn and light, and hide each other by depth, each being a segment of its own.
"""

import colorsys
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import yaml
from jaxtyping import Float32, Int32, UInt8

from maskfirst.contracts import Dataset
from maskfirst.data.coding import DataError
from maskfirst.data.folder import choose
from maskfirst.data.vocabulary import load, only_things
from maskfirst.draw import to_picture, write_label_map
from maskfirst.files import write_aside
from maskfirst.formats.coco_instances import InstancesWriter
from maskfirst.formats.coco_panoptic import PanopticWriter
from maskfirst.frames import Size
from maskfirst.tasks import targets
from maskfirst.types import Sample, SegmentMap, Vocabulary

SKY, FIELD, WATER = range(3)
_STREAMS = {"train": "0", "val": "1", "test": "2"}
"""What sets the splits' random numbers apart."""


@dataclass(frozen=True)
class Look:
    """What shapes of a class have in common. `hue`: from and to, in turns of the colour circle."""

    form: Literal["circle", "square", "triangle", "star"]
    hue: tuple[float, float]


LOOKS = (
    Look("circle", (0.88, 1.2)),
    Look("square", (0.05, 0.37)),
    Look("triangle", (0.62, 0.94)),
    Look("star", (0.75, 1.07)),
)
"""Half of a colour is shared with a neighbour's: it helps to tell shapes apart, form decides."""
HUES = {"red": (0.94, 1.02), "yellow": (0.12, 0.19), "purple": (0.74, 0.84)}
"""That neither fields nor sky nor water have."""
COLORED = tuple(
    (f"{color} {form}", Look(form, hue)) for color, hue in HUES.items() for form in ("circle", "square", "triangle")
)
"""Name and look of each pair of a colour and a form."""


Picture = Float32[np.ndarray, "H W 3"]
Map = Float32[np.ndarray, "H W"]


class Scenes(Dataset):
    """Scenes made on the fly, the same at every call. The classes of shapes come after sky, field and water.

    `most`: shapes a scene. `scale`: how large they are.
    """

    most: ClassVar[int] = 7
    scale: ClassVar[float] = 1.0

    def __init__(
        self, words: Vocabulary, looks: Sequence[Look], split: str, length: int, size: Size, seed: int
    ) -> None:
        self.stream = int(choose(split, _STREAMS, "shapes"))
        self.split, self.length, self.size, self.seed = split, length, size, seed
        self.vocabulary, self.looks = words, tuple(looks)

    def __len__(self) -> int:
        return self.length

    def keys(self) -> Sequence[str]:
        return [f"{self.split}-{index:05d}" for index in range(self.length)]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        random = np.random.default_rng((self.seed, self.stream, index))
        pixels, ids, classes = _scene(random, self.size, self.looks, self.most, self.scale)
        return Sample(
            torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            torch.from_numpy(ids)[None],
            torch.tensor(classes),
            torch.zeros(len(classes), dtype=torch.bool),
            f"{self.split}-{index:05d}",
        )


class Shapes(Scenes):
    """Circles, squares, triangles and stars."""

    def __init__(
        self, split: str = "train", length: int = 512, size: tuple[int, int] = (96, 128), seed: int = 0
    ) -> None:
        """`split`: train, val or test, which share no scene. `size`: (height, width) px. Raises DataError."""
        super().__init__(load("shapes"), LOOKS, split, length, size, seed)


class ColoredShapes(Scenes):
    """Classes that are a colour and a form each: one that is withheld is put together from others.

    Shapes are fewer and larger, so that forms are soon told apart.
    """

    most = 4
    scale = 1.8

    def __init__(
        self, split: str = "train", length: int = 512, size: tuple[int, int] = (96, 128), seed: int = 0
    ) -> None:
        """As for Shapes."""
        super().__init__(load("colored_shapes"), [look for _, look in COLORED], split, length, size, seed)


def write_demo(folder: Path | str, count: int = 12, size: tuple[int, int] = (192, 256), seed: int = 0) -> list[Path]:
    """Writes `count` scenes as files, three quarters of them for training, in the layout that the `folder` data set reads.

    Pictures in `images/{train,val}`, label maps in `annotations/{train,val}`, names in `classes.yaml`; the same truth in
    COCO's formats under `coco`. Returns the paths of the pictures. Raises files.DiskError, DataError for a count below 2.
    """
    if count < 2:
        raise DataError(f"a demo of {count} scenes cannot have a training and a validation split; ask for 2 or more")
    folder = Path(folder)
    words = load("shapes")
    things = only_things(words)
    pictures = []
    held = max(1, count // 4)
    for split, length in (("train", count - held), ("val", held)):
        scenes = Shapes(split, length, size, seed)
        instances = InstancesWriter(folder / "coco" / f"instances_{split}.json", things)
        panoptic = PanopticWriter(folder / "coco" / f"panoptic_{split}.json", words)
        for index, sample in enumerate(scenes[index] for index in range(length)):
            truth, name = sample.truth, f"{sample.key}.jpg"
            pictures.append(folder / "images" / split / name)
            with write_aside(pictures[-1]) as aside:
                to_picture(sample.image).save(aside, "JPEG", quality=95)
            write_label_map(folder / "annotations" / split / f"{sample.key}.png", truth.label_map(), words)
            panoptic.add(index, name, SegmentMap.of(truth))
            shapes = targets(truth, words, "instance")
            order = torch.tensor([things.names.index(words.names[kind]) for kind in shapes.classes], dtype=torch.int64)
            instances.add(index, name, replace(shapes, classes=order))
        instances.close()
        panoptic.close()
    with write_aside(folder / "classes.yaml") as aside:
        rows = [
            {"name": name, "color": list(words.colors[i]), "thing": i in words.things, "id": words.ids[i]}
            for i, name in enumerate(words.names)
        ]
        aside.write_text(yaml.safe_dump({"classes": rows}, sort_keys=False, default_flow_style=None), encoding="utf-8")
    return pictures


def _scene(
    rng: np.random.Generator, size: Size, looks: Sequence[Look], most: int, scale: float
) -> tuple[UInt8[np.ndarray, "H W 3"], Int32[np.ndarray, "H W"], list[int]]:
    """The pixels, the segment of every pixel, and the segments' classes. Lengths inside are in heights of the picture."""
    y, x = _grid(size)
    horizon = rng.uniform(0.2, 0.5) + _wave(rng, x, 0.04) + rng.uniform(-0.06, 0.06) * x
    owner = np.where(y < horizon, SKY, FIELD).astype(np.int32)
    if rng.random() < 0.75:
        shore = horizon + rng.uniform(0.03, 0.3) + _wave(rng, x, 0.05)
        owner[(y > shore) & (y < shore + rng.uniform(0.12, 0.5) + _wave(rng, x, 0.04))] = WATER
    stuff = (_sky(rng, size), _field(rng, size), _water(rng, size))
    picture = np.select([(owner == index)[..., None] for index in (SKY, FIELD)], stuff[:2], stuff[2])

    light = rng.uniform(0, 2 * math.pi)
    classes = [SKY, FIELD, WATER]
    feet = sorted(rng.uniform(0.25, 1.0, rng.integers(2, most + 1)).tolist())  # the nearer, the later and the larger
    for foot in feet:
        kind = int(rng.integers(len(looks)))
        radius = scale * (0.05 + 0.16 * foot) * math.exp(rng.normal(0, 0.25))
        center = (foot - radius * rng.uniform(-0.2, 1), rng.uniform(0, size[1] / size[0]))
        _stamp(rng, picture, owner, len(classes), looks[kind], center, radius, light)
        classes.append(len((SKY, FIELD, WATER)) + kind)

    gain, cast = rng.uniform(0.6, 1.15), rng.uniform(0.92, 1.08, 3)
    picture = picture * (gain * cast).astype(np.float32) + rng.normal(0, 0.02, (*size, 1)).astype(np.float32)
    seen = np.bincount(owner.ravel(), minlength=len(classes)) > 0
    order = (np.cumsum(seen) - 1).astype(np.int32)
    pixels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return pixels, order[owner], [index for index, visible in zip(classes, seen, strict=True) if visible]


def _stamp(
    rng: np.random.Generator,
    picture: Picture,
    owner: Int32[np.ndarray, "H W"],
    segment: int,
    look: Look,
    center: tuple[float, float],
    radius: float,
    light: float,
) -> None:
    """Paints one shape over what is there, in `picture` and `owner`."""
    height, width = owner.shape
    top, left = (max(0, int((c - radius) * height)) for c in center)
    bottom, right = (min(n, int((c + radius) * height) + 2) for n, c in zip((height, width), center, strict=True))
    turn, color = rng.uniform(0, 2 * math.pi), _color(rng, look.hue, (0.35, 1.0), (0.4, 1.0))
    stripes, rim = rng.random() < 0.3, rng.random() < 0.4
    if top >= bottom or left >= right:
        return
    window = (slice(top, bottom), slice(left, right))
    y, x = (axis[window] for axis in _grid((height, width)))
    v, u = (y - center[0]) / radius, (x - center[1]) / radius
    across, along = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
    reach = _reach(look.form, across, along)
    inside = reach < 1
    shade = 1 + 0.35 * (u * math.cos(light) + v * math.sin(light))
    if stripes:
        shade = shade * np.where(np.sin(along * 12) > 0, 1, 0.65)
    if rim:
        shade = np.where(reach > 0.82, shade * 0.4, shade)
    picture[window][inside] = (shade[..., None] * color)[inside]
    owner[window][inside] = segment


def _reach(kind: str, u: Map, v: Map) -> Map:
    """How far out a point is, 1 on the shape's border, in coordinates of the circle that it is drawn in."""
    if kind == "circle":
        return np.hypot(u, v)
    if kind == "square":
        return np.maximum(np.abs(u), np.abs(v)) * math.sqrt(2)
    if kind == "triangle":
        lean = math.sqrt(3) * np.abs(u)
        return np.maximum(2 * v, lean - v)
    # A star's border, from a tip at angle 0 to a notch at 36 degrees and radius 0.45, is a straight line.
    notch, tip = math.pi / 5, np.abs(np.mod(np.arctan2(v, u), 2 * math.pi / 5) - math.pi / 5)
    angle = notch - tip
    return np.hypot(u, v) * ((np.sin(angle) + 0.45 * np.sin(notch - angle)) / (0.45 * math.sin(notch)))


def _sky(rng: np.random.Generator, size: Size) -> Picture:
    y, _ = _grid(size)
    zenith, low = _color(rng, (0.5, 0.68), (0.1, 0.7), (0.5, 0.95)), _color(rng, (0.05, 0.65), (0.05, 0.35), (0.7, 1.0))
    clouds = np.clip(_noise(rng, size, 4) + 0.5 * _noise(rng, size, 9) - rng.uniform(-0.3, 0.6), 0, 1)[..., None]
    clear = zenith + (low - zenith) * np.clip(2 * y, 0, 1)[..., None]
    return clear + (0.92 - clear) * clouds


def _field(rng: np.random.Generator, size: Size) -> Picture:
    y, x = _grid(size)
    grain = 0.12 * rng.standard_normal(size, dtype=np.float32) + 0.2 * _noise(rng, size, 8)
    furrows = 0.1 * np.sin(rng.uniform(20, 60) * (x + rng.uniform(-1, 1) * y))
    return _color(rng, (0.1, 0.42), (0.25, 0.8), (0.3, 0.75)) * (1 + grain + furrows)[..., None]


def _water(rng: np.random.Generator, size: Size) -> Picture:
    y, _ = _grid(size)
    ripples = np.sin(rng.uniform(60, 120) * y + 4 * _noise(rng, size, 6))
    return _color(rng, (0.45, 0.68), (0.15, 0.8), (0.3, 0.8)) * (1 + 0.18 * ripples)[..., None]


def _color(
    rng: np.random.Generator, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
) -> Float32[np.ndarray, "3"]:
    """A colour from these ranges, RGB 0..1."""
    return np.array(colorsys.hsv_to_rgb(*(rng.uniform(*limits) for limits in (hue, saturation, value))), np.float32)


def _wave(rng: np.random.Generator, x: Map, height: float) -> Map:
    return height * np.sin(rng.uniform(2, 9) * x + rng.uniform(0, 2 * math.pi))


def _noise(rng: np.random.Generator, size: Size, cells: int) -> Map:
    """Smooth noise of variance below 1, with about `cells` bumps along the height."""
    rows, columns = cells + 1, cells * size[1] // size[0] + 2
    return _spread(size[0], rows) @ rng.standard_normal((rows, columns), dtype=np.float32) @ _spread(size[1], columns).T


@functools.lru_cache(maxsize=32)
def _spread(length: int, knots: int) -> Float32[np.ndarray, "length knots"]:
    """The matrix that interpolates `knots` values to `length`."""
    place = np.linspace(0, knots - 1, length)[:, None]
    return np.clip(1 - np.abs(place - np.arange(knots)), 0, 1).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _grid(size: Size) -> tuple[Map, Map]:
    """(y, x) of the pixels' centres, in heights of the picture."""
    y, x = np.meshgrid(*(((np.arange(n) + 0.5) / size[0]).astype(np.float32) for n in size), indexing="ij")
    return y, x
