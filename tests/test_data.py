"""Files of every kind, good and bad; the layouts of the data sets; vocabularies; scenes of shapes."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycoco

from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.contracts import Dataset
from maskfirst.data import shapes
from maskfirst.data import vocabulary as vocabularies
from maskfirst.data.ade20k import ADE20K, ADE20KInstance
from maskfirst.data.augment import Pad, RandomCrop, RandomFlip, RandomScale
from maskfirst.data.coco import COCOInstance, COCOPanoptic
from maskfirst.data.coco_stuff import COCOStuff10K, COCOStuff164K
from maskfirst.data.coding import Coding, DataError, Merged
from maskfirst.data.folder import Folder
from maskfirst.data.images import ImageError, read_image, read_label_map
from maskfirst.data.pascal_context import PascalContext
from maskfirst.data.shapes import COLORED, ColoredShapes, Scenes, Shapes, write_demo
from maskfirst.data.vocabulary import VocabularyError, contrasting, from_names, load, only_things
from maskfirst.tasks import targets
from maskfirst.types import TASKS, VOID

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6)
COLORS = np.stack([RAMP * 10, 255 - RAMP * 10, RAMP], -1)
NAMES = ["road", "tree", "car"]


def png(size: tuple[int, int], bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG file by hand, for the sorts that Pillow cannot write; `size` (width, height)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    return image


def pair(root: Path, name: str, labels: np.ndarray, split: str = "train") -> None:
    """A picture and its label map in the default layout."""
    rng = np.random.default_rng(zlib.crc32(f"{split}/{name}".encode()))
    save(root / f"images/{split}/{name}.jpg", rng.integers(0, 255, (*labels.shape, 3), dtype=np.uint8))
    save(root / f"annotations/{split}/{name}.png", labels)


def rgb(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}", COLORS, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(rgb(path), COLORS)
    assert read_image(path).dtype == torch.uint8


def test_jpeg_and_its_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.png", "JPEG", quality=95)
    assert np.abs(rgb(tmp_path / "a.png").astype(int) - flat).max() <= 3


def test_first_picture_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 3), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (rgb(tmp_path / "a.gif") == (255, 0, 0)).all()


def test_grey_is_three_equal_channels(tmp_path: Path) -> None:
    assert np.array_equal(rgb(save(tmp_path / "a.png", RAMP)), np.repeat(RAMP[..., None], 3, -1))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}", RAMP.astype(np.uint16) * 2560 + 7)
    assert np.array_equal(rgb(path)[..., 0], RAMP * 10)


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    deep = (COLORS.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (tmp_path / "a.png").write_bytes(png((6, 4), 16, 2, rows))
    assert np.array_equal(rgb(tmp_path / "a.png"), COLORS)


def test_one_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RAMP % 2 == 1)
    assert np.array_equal(rgb(path)[..., 1], (RAMP % 2) * 255)


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP)
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    image.save(tmp_path / "a.png")
    assert np.array_equal(rgb(tmp_path / "a.png"), np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)], -1))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP)
    image.putpalette([value for index in range(256) for value in (index, 0, 0)])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128] + [255] * 254))
    assert np.array_equal(rgb(tmp_path / "a.png")[..., 0], RAMP)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.concatenate([COLORS, np.full((4, 6, 1), 3, np.uint8)], -1))
    assert np.array_equal(rgb(path), COLORS)
    Image.fromarray(np.stack([RAMP, RAMP], -1)).save(tmp_path / "b.png")
    assert np.array_equal(rgb(tmp_path / "b.png")[..., 2], RAMP)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = rgb(tmp_path / "a.jpg")[4, 4].astype(int)
    assert red[0] > 240
    assert red[1] < 15
    assert red[2] < 15


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, turn: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / f"a.{ending}", COLORS, exif=exif)
    # The eight ways to turn a picture, as the EXIF standard lists them: where its stored first row and column go.
    upright = {
        1: COLORS,
        2: COLORS[:, ::-1],
        3: COLORS[::-1, ::-1],
        4: COLORS[::-1],
        5: COLORS.transpose(1, 0, 2),
        6: COLORS.transpose(1, 0, 2)[:, ::-1],
        7: COLORS.transpose(1, 0, 2)[::-1, ::-1],
        8: COLORS.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(rgb(path), upright[turn])


def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", COLORS, exif=b"Exif\0\0rubbish that is no TIFF header")
    assert read_image(path).shape == (3, 4, 6)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_cut_short(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{ending}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"a\.{ending}: broken or cut short: .") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_empty_foreign_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.jpg: the file is empty \(0 bytes\)"):
        read_image(tmp_path / "empty.jpg")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ImageError, match=r"page\.jpg: not a JPEG, PNG, WebP, TIFF, BMP or GIF"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(ImageError, match=r"gone\.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r"directory"):
        read_image(tmp_path)


def test_other_formats_that_pillow_knows_are_refused(tmp_path: Path) -> None:
    for kind in ("PPM", "TGA", "ICO"):
        Image.fromarray(COLORS).save(tmp_path / "a.png", kind)
        with pytest.raises(ImageError, match="not a JPEG"):
            read_image(tmp_path / "a.png")


def test_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png((50_000, 50_000), 8, 2, bytes(1000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("its pixels were decoded"))
    for read in (read_image, read_label_map):
        with pytest.raises(ImageError, match=r"huge\.png: 50000 x 50000 px, more than the limit of 178 million"):
            read(path)


def test_size_between_pillows_own_limits_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for ending in ("png", "tif", "bmp", "jpg", "webp"):
        assert read_image(save(tmp_path / f"a.{ending}", COLORS)).shape == (3, 4, 6)


def test_limit_is_the_callers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", COLORS)
    assert read_image(path, limit=24).shape == (3, 4, 6)
    with pytest.raises(ImageError, match=r"6 x 4 px, more than the limit"):
        read_image(path, limit=23)


def test_floats_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", RAMP.astype(np.float32))
    for read in (read_image, read_label_map):
        with pytest.raises(ImageError, match=r"a\.tif"):
            read(tmp_path / "a.tif")


# --- label maps ---------------------------------------------------------------------------------------------------


def test_label_maps_hold_numbers(tmp_path: Path) -> None:
    assert np.array_equal(read_label_map(save(tmp_path / "grey.png", RAMP)), RAMP)
    palette(RAMP).save(tmp_path / "palette.png")
    assert np.array_equal(read_label_map(tmp_path / "palette.png"), RAMP)
    deep = RAMP.astype(np.uint16) * 1000
    assert np.array_equal(read_label_map(save(tmp_path / "deep.png", deep)), deep)
    assert np.array_equal(read_label_map(save(tmp_path / "deep.tif", deep)), deep)
    assert np.array_equal(read_label_map(save(tmp_path / "bit.png", RAMP % 2 == 1)), RAMP % 2)
    save(tmp_path / "long.tif", RAMP.astype(np.int32) * 1000)
    assert np.array_equal(read_label_map(tmp_path / "long.tif"), deep)


@pytest.mark.parametrize(("bits", "row", "wanted"), [(2, b"\x1b", [0, 1, 2, 3]), (4, b"\x01\x2f", [0, 1, 2, 15])])
def test_few_bits_of_grey_are_not_stretched(tmp_path: Path, bits: int, row: bytes, wanted: list[int]) -> None:
    (tmp_path / "a.png").write_bytes(png((4, 1), bits, 0, b"\0" + row))
    assert read_label_map(tmp_path / "a.png").tolist() == [wanted]


def test_small_palette_is_not_stretched(tmp_path: Path) -> None:
    palette(RAMP % 3).save(tmp_path / "a.png", bits=2)
    assert np.array_equal(read_label_map(tmp_path / "a.png"), RAMP % 3)


def test_colours_and_jpegs_are_no_label_maps(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.png: colours \(RGB\) in place of class numbers; .*`colors: true`"):
        read_label_map(save(tmp_path / "a.png", COLORS))
    Image.fromarray(RAMP).save(tmp_path / "b.png", "JPEG")
    for colors in (False, True):
        with pytest.raises(ImageError, match=r"b\.png: a JPEG, which blurs"):
            read_label_map(tmp_path / "b.png", colors)


def test_numbers_beyond_sixteen_bits_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", RAMP.astype(np.int32) - 1)
    with pytest.raises(ImageError, match=r"numbers from -1 to 22"):
        read_label_map(tmp_path / "a.tif")


# --- vocabularies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "things", "some"),
    [
        ("ade20k", 150, 100, {0: "wall", 12: "person", 149: "flag"}),
        ("coco_stuff_171", 171, 80, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
        ("pascal_context_59", 59, 36, {0: "aeroplane", 58: "wood"}),
        ("pascal_context_60", 60, 36, {0: "background", 1: "aeroplane"}),
        ("ade20k_panoptic", 150, 100, {0: "wall", 149: "flag"}),
        ("ade20k_things", 100, 100, {0: "bed", 99: "flag"}),
        ("cityscapes", 19, 8, {0: "road", 18: "bicycle"}),
        ("cityscapes_things", 8, 8, {0: "person", 7: "bicycle"}),
        ("coco_80", 80, 80, {0: "person", 79: "toothbrush"}),
        ("coco_133", 133, 80, {79: "toothbrush", 80: "banner", 132: "rug-merged"}),
        ("coco_48", 48, 48, {0: "person", 47: "toaster"}),
        ("coco_48_17", 65, 65, {47: "toaster", 48: "bus", 64: "snowboard"}),
        ("coco_65", 65, 65, {0: "person", 64: "toothbrush"}),
        ("coco_65_15", 80, 80, {64: "toothbrush", 65: "airplane", 79: "hair drier"}),
        ("coco_stuff_156", 156, 73, {0: "person", 155: "wood"}),
        ("coco_stuff_156_15", 171, 80, {155: "wood", 156: "cow", 170: "wall-concrete"}),
        ("mapillary_vistas", 65, 37, {0: "Bird", 64: "Ego Vehicle"}),
        ("potsdam", 6, 0, {0: "impervious_surface", 5: "clutter"}),
        ("chase_db1", 2, 0, {0: "background", 1: "vessel"}),
        ("camvid", 11, 3, {0: "Sky", 3: "Road", 10: "Bicyclist"}),
        ("shapes", 7, 4, {0: "sky", 6: "star"}),
        ("colored_shapes", 12, 9, {3: "red circle", 11: "purple triangle"}),
        ("objects365", 365, 365, {0: "Person", 46: "Bicycle", 364: "Table Tennis"}),
    ],
)
def test_bundled_vocabularies(name: str, count: int, things: int, some: dict[int, str]) -> None:
    words = load(name)
    assert (len(words), len(words.things)) == (count, things)
    assert all(words.names[index] == word for index, word in some.items())
    assert len(set(words.ids)) == count


def test_all_bundled_vocabularies_are_tested() -> None:
    assert set(vocabularies.bundled()) == {
        "ade20k",
        "ade20k_panoptic",
        "ade20k_things",
        "cityscapes",
        "cityscapes_things",
        "coco_80",
        "coco_133",
        "coco_48",
        "coco_48_17",
        "coco_65",
        "coco_65_15",
        "coco_stuff_156",
        "coco_stuff_156_15",
        "coco_stuff_171",
        "mapillary_vistas",
        "pascal_context_59",
        "pascal_context_60",
        "camvid",
        "chase_db1",
        "potsdam",
        "shapes",
        "colored_shapes",
        "objects365",
    }


def test_dataset_numbers() -> None:
    assert load("coco_stuff_171").ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    assert load("coco_stuff_171").ids[-1] == 182
    assert load("ade20k").ids == tuple(range(1, 151))
    assert load("camvid").colors[3] == (128, 64, 128)
    assert load("coco_133").ids[78:82] == (89, 90, 92, 93)
    assert load("cityscapes").ids == (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    assert load("mapillary_vistas").ids == tuple(range(1, 66))


@pytest.mark.parametrize(
    ("part", "whole"),
    [("ade20k_things", "ade20k_panoptic"), ("cityscapes_things", "cityscapes"), ("coco_80", "coco_133")],
)
def test_vocabularies_of_instances_are_the_things_of_the_whole(part: str, whole: str) -> None:
    few, all_ = load(part), load(whole)
    things = sorted(all_.things)
    assert few.names == tuple(all_.names[index] for index in things)
    assert few.ids == tuple(all_.ids[index] for index in things)
    assert few.colors == tuple(all_.colors[index] for index in things)


def test_vocabularies_of_ade20k_differ_in_their_numbers_alone() -> None:
    labels, panoptic = load("ade20k"), load("ade20k_panoptic")
    assert (labels.names, labels.colors, labels.things) == (panoptic.names, panoptic.colors, panoptic.things)
    assert [number - 1 for number in labels.ids] == list(panoptic.ids)


def test_vocabulary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("road\n\ntree \ncar\n", encoding="utf-8")
    assert load("a.txt", tmp_path).names == ("road", "tree", "car")
    (tmp_path / "a.yaml").write_text("[road, {name: car, color: [1, 2, 3], thing: true, id: 26}]", encoding="utf-8")
    words = load(tmp_path / "a.yaml")
    assert words.names == ("road", "car")
    assert words.things == {1}
    assert words.ids == (0, 26)
    assert words.colors[1] == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, colour: [1, 2, 3]}", r"class 0: unknown key 'colour'\. Did you mean 'color'\?"),
        ("- no", "class 0: the name must be text, got False; quote it"),
        ("- {name: a, color: [1, 2, 300]}", r"class 0 \(a\): color must be three numbers 0..255"),
        ("- {name: a, thing: 1}", "`thing` must be true or false"),
        ("[a, b, a]", "names occur twice in the vocabulary: a"),
        ("names: [a]", "expected a list of classes"),
        ("[a", "not YAML"),
        ("[]", "at least one name"),
    ],
)
def test_bad_vocabulary_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(VocabularyError, match=rf"a\.yaml: .*{message}") as caught:
        load("a.yaml", tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_vocabulary_names_the_nearest() -> None:
    with pytest.raises(VocabularyError, match=r"'camvit'.* Did you mean 'camvid'\? Bundled: ade20k, "):
        load("camvit")


def test_colours_are_distinct_and_stay_when_names_are_added() -> None:
    colors = np.array(contrasting(171))
    apart = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(171)
    assert apart.min() >= 30
    assert contrasting(9) == contrasting(171)[:9]
    assert from_names(NAMES, things=["car"]).things == {2}
    with pytest.raises(VocabularyError, match="Did you mean 'car'"):
        from_names(NAMES, things=["cars"])


# --- the folder data set ------------------------------------------------------------------------------------------


def test_pairs_by_stem_through_all_folders(tmp_path: Path) -> None:
    labels = np.array([[0, 0, 2], [2, 2, 255]], np.uint8)
    pair(tmp_path, "city/b", labels)
    pair(tmp_path, "a", labels)
    save(tmp_path / "images/train/.hidden.jpg", COLORS)
    data = Folder(str(tmp_path), vocabulary=NAMES)
    assert list(data.keys()) == ["a", "city/b"]
    sample = data[1]
    assert sample.key == "city/b"
    assert sample.image.shape == (3, 2, 3)
    assert sample.ids.dtype == torch.int32
    assert sample.ids.tolist() == [[[0, 0, 1], [1, 1, VOID]]]
    assert sample.classes.tolist() == [0, 2]
    assert not sample.crowd.any()
    assert sample.truth.label_map().tolist() == [[0, 0, 2], [2, 2, VOID]]
    assert [len(s.key) for s in data] == [1, 6], "iterating ends by itself"


def test_layout_ending_and_limit_are_free(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"rgb/{name}.PNG", COLORS)
        save(tmp_path / f"masks/val/{name}_mask.png", RAMP % 3)
    data = Folder(str(tmp_path), "rgb", "masks/{split}", "val", vocabulary=NAMES, ending="_mask.png", limit=2)
    assert list(data.keys()) == ["a", "b"]
    assert np.array_equal(data[1].truth.label_map().numpy(), RAMP % 3)


@pytest.mark.parametrize(
    ("settings", "labels", "wanted"),
    [
        ({}, [0, 1, 2, 255], [0, 1, 2, VOID]),
        ({"ignore": 3}, [0, 1, 2, 3], [0, 1, 2, VOID]),
        ({"shift": -1}, [0, 1, 3, 255], [VOID, 0, 2, VOID]),
        ({"shift": 1, "ignore": 7}, [0, 1, 7], [1, 2, VOID]),
        ({"ids": {7: 0, 8: "car", 0: None}}, [7, 8, 0, 255], [0, 2, VOID, VOID]),
    ],
)
def test_what_numbers_mean(tmp_path: Path, settings: dict, labels: list[int], wanted: list[int]) -> None:
    for dtype in (np.uint8, np.uint16):
        pair(tmp_path, "a", np.array([labels], dtype))
        assert Folder(str(tmp_path), vocabulary=NAMES, **settings)[0].truth.label_map().tolist() == [wanted]


def test_a_map_without_any_class(tmp_path: Path) -> None:
    pair(tmp_path, "a", np.full((3, 4), 255, np.uint8))
    sample = Folder(str(tmp_path), vocabulary=NAMES)[0]
    assert (sample.ids == VOID).all()
    assert len(sample.classes) == len(sample.truth) == 0


def test_painted_label_maps(tmp_path: Path) -> None:
    words = {"classes": [{"name": "road", "color": [128, 64, 128]}, {"name": "tree", "color": [0, 0, 255]}]}
    (tmp_path / "classes.yaml").write_text(json.dumps(words), encoding="utf-8")
    painted = np.array([[[128, 64, 128], [0, 0, 0], [0, 0, 255]]], np.uint8)
    pair(tmp_path, "a", painted[..., 0])
    save(tmp_path / "annotations/train/a.png", painted)
    assert Folder(str(tmp_path), colors=True)[0].truth.label_map().tolist() == [[0, VOID, 1]]
    with pytest.raises(ImageError, match="colors: true"):
        Folder(str(tmp_path))[0]
    painted[0, 0] += 1
    save(tmp_path / "annotations/train/a.png", painted)
    with pytest.raises(
        DataError, match=r"a\.png: color \(129, 65, 129\) at \(y 0, x 0\) is no class: 2 classes by colour"
    ):
        Folder(str(tmp_path), colors=True)[0]


def test_numbers_that_are_no_class_are_named_with_their_place(tmp_path: Path) -> None:
    labels = np.zeros((5, 6), np.uint8)
    labels[3, 4:] = 37
    pair(tmp_path, "a", labels)
    with pytest.raises(DataError, match=r"train/a\.png: value 37 at \(y 3, x 4\) is no class: 3 classes, ignore 255;"):
        Folder(str(tmp_path), vocabulary=NAMES)[0]
    with pytest.raises(DataError, match=r"value 37 .*3 classes, ignore 255, shift -1;"):
        Folder(str(tmp_path), vocabulary=NAMES, shift=-1)[0]
    with pytest.raises(DataError, match=r"value 37 .*3 classes by `ids`"):
        Folder(str(tmp_path), vocabulary=NAMES, ids={0: "road"})[0]


def test_sizes_must_agree(tmp_path: Path) -> None:
    pair(tmp_path, "a", np.zeros((4, 6), np.uint8))
    save(tmp_path / "annotations/train/a.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(DataError, match=r"a\.png: 5 x 4 px, but .*a\.jpg has 6 x 4 px$"):
        Folder(str(tmp_path), vocabulary=NAMES)[0]
    save(tmp_path / "annotations/train/a.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(DataError, match=r"was it drawn on the picture before its EXIF rotation\?"):
        Folder(str(tmp_path), vocabulary=NAMES)[0]


def test_images_without_labels_are_counted_and_named(tmp_path: Path) -> None:
    pair(tmp_path, "ok", np.zeros((2, 2), np.uint8))
    for name in "wxyz":
        save(tmp_path / f"images/train/{name}.jpg", COLORS)
    data = Folder(str(tmp_path), vocabulary=NAMES)
    for use in (lambda: len(data), lambda: data[0], data.keys):
        with pytest.raises(
            DataError, match=r"4 of 5 images have no label map: w\.jpg, x\.jpg, y\.jpg, \.\.\.; .*`maskfirst check`"
        ):
            use()
    assert [p.key for p in data.listing.pairs] == ["ok"]
    assert len(data.listing.images) == 4


def test_labels_without_images_are_left_out(tmp_path: Path) -> None:
    pair(tmp_path, "a", np.zeros((2, 2), np.uint8))
    save(tmp_path / "annotations/train/b.png", RAMP)
    data = Folder(str(tmp_path), vocabulary=NAMES)
    assert len(data) == 1
    assert [path.name for path in data.listing.labels] == ["b.png"]


def test_missing_folders_name_the_nearest(tmp_path: Path) -> None:
    pair(tmp_path / "streets", "a", RAMP % 3)
    root = str(tmp_path / "streets")
    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: Folder(str(tmp_path / "street"), vocabulary=NAMES),
            r"street: no such folder\. Did you mean 'streets'\?",
        ),
        (
            lambda: Folder(root, split="trian", vocabulary=NAMES),
            r"no folder 'trian'\. Did you mean 'train'\? It has: train\.",
        ),
        (lambda: Folder(root, labels="annotation/{split}", vocabulary=NAMES), r"Did you mean 'annotations'\?"),
    ]
    for build, message in cases:
        with pytest.raises(DataError, match=message):
            build()


def test_empty_split(tmp_path: Path) -> None:
    pair(tmp_path, "a", RAMP)
    for name in ("images", "annotations"):
        (tmp_path / name / "val").mkdir()
    with pytest.raises(DataError, match=r"images/val: no pictures here .*the split is empty"):
        Folder(str(tmp_path), split="val", vocabulary=NAMES)


def test_same_stem_twice(tmp_path: Path) -> None:
    pair(tmp_path, "a", RAMP % 3)
    save(tmp_path / "images/train/a.png", COLORS)
    with pytest.raises(DataError, match=r"a\.(jpg|png) and a\.(jpg|png) share a stem"):
        Folder(str(tmp_path), vocabulary=NAMES)


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    pair(tmp_path, "a", RAMP % 3)
    (tmp_path / "images/train/again").symlink_to(tmp_path / "images")
    assert len(Folder(str(tmp_path), vocabulary=NAMES)) == 1


def test_vocabulary_comes_from_the_folder(tmp_path: Path) -> None:
    pair(tmp_path, "a", RAMP % 3)
    with pytest.raises(VocabularyError, match=r"no classes\.yaml or .* in this folder; add one, or set `vocabulary:`"):
        Folder(str(tmp_path))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    assert Folder(str(tmp_path)).vocabulary.names == tuple(NAMES)
    (tmp_path / "mine.txt").write_text("x\ny\nz", encoding="utf-8")
    assert Folder(str(tmp_path), vocabulary="mine.txt").vocabulary.names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": {0: "raod"}}, r"ids: 0 stands for unknown class 'raod'\. Did you mean 'road'\?"),
        ({"ids": {0: 3}}, r"ids: 0 stands for class 3, but there are 3 \(0\.\.2\)"),
        ({"ids": {0: 0}, "shift": -1}, "set one of `shift`, `ids` and `colors`"),
    ],
)
def test_contradictory_codings(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Coding(from_names(NAMES), **settings)


# --- merging of classes --------------------------------------------------------------------------------------------


def test_classes_are_merged_by_name(tmp_path: Path) -> None:
    words = [
        "road",
        {"name": "van", "color": [1, 1, 1], "thing": True, "id": 7},
        "lane",
        {"name": "car", "thing": True},
        "x",
    ]
    (tmp_path / "classes.yaml").write_text(json.dumps(words), encoding="utf-8")
    pair(tmp_path, "a", np.array([[0, 1, 2, 3, 4, 255]], np.uint8))
    data = Folder(str(tmp_path), merge={"vehicle": ["van", "car"], "road": ["lane"], "void": ["x"]})
    assert data.vocabulary.names == ("road", "vehicle")
    assert data.vocabulary.things == {1}
    assert data.vocabulary.ids == (0, 7), "a new class has what its first member had"
    assert data.vocabulary.colors[1] == (1, 1, 1)
    assert data[0].truth.label_map().tolist() == [[0, 1, 0, 1, VOID, VOID]]
    mixed = Folder(str(tmp_path), merge={"thing or stuff": ["van", "road"]})
    assert mixed.vocabulary.things == {2}, "what takes stuff in cannot be counted"
    assert mixed.vocabulary.names == ("thing or stuff", "lane", "car", "x")
    later = Folder(str(tmp_path), merge={"car": ["van"]})
    assert later.vocabulary.names == ("road", "car", "lane", "x")
    assert later.vocabulary.ids == (0, 3, 2, 4), "a class that stays keeps its own"


def test_painted_classes_are_merged_too(tmp_path: Path) -> None:
    words = [{"name": name, "color": [10 * index, 0, 9]} for index, name in enumerate(NAMES)]
    (tmp_path / "classes.yaml").write_text(json.dumps(words), encoding="utf-8")
    painted = np.array([[[0, 0, 9], [10, 0, 9], [20, 0, 9], [0, 0, 0]]], np.uint8)
    pair(tmp_path, "a", painted[..., 0])
    save(tmp_path / "annotations/train/a.png", painted)
    data = Folder(str(tmp_path), colors=True, merge={"ground": ["road", "tree"]})
    assert data[0].truth.label_map().tolist() == [[0, 0, 1, VOID]]
    painted[0, 3] = 5
    save(tmp_path / "annotations/train/a.png", painted)
    with pytest.raises(DataError, match=r"color \(5, 5, 5\) .* 3 classes by colour, black for none, merged into 2"):
        data[0]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"a": ["raod"]}, r"merge: a: unknown class 'raod'\. Did you mean 'road'\?"),
        ({"a": ["road"], "b": ["road"]}, "merge: 'road' is counted as both 'a' and 'b'"),
        ({"void": NAMES}, "merge: leaves no class at all"),
    ],
)
def test_merges_that_cannot_be(merge: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Merged(Coding(from_names(NAMES)), merge)


# --- instances by components ---------------------------------------------------------------------------------------


PARK = np.array(
    [
        [2, 2, 0, 0, 0, 2],
        [2, 0, 2, 0, 0, 0],
        [0, 0, 0, 2, 0, 2],
        [1, 0, 1, 0, 0, 255],
    ],
    np.uint8,
)
"""Trees that do not touch are one segment; a car reaches over corners; two cars are of one pixel."""


def test_things_become_instances_where_they_do_not_touch(tmp_path: Path) -> None:
    pair(tmp_path, "a", PARK)
    (tmp_path / "classes.yaml").write_text("[road, tree, {name: car, thing: true}]", encoding="utf-8")
    data = Folder(str(tmp_path), instances="components")
    sample = data[0]
    assert sample.classes.tolist() == [0, 1, 2, 2, 2]
    assert not sample.crowd.any()
    cars = sample.truth.masks[sample.classes == 2]
    assert cars.sum((1, 2)).tolist() == [5, 1, 1]
    assert torch.equal(sample.truth.label_map(), Folder(str(tmp_path))[0].truth.label_map())
    assert len(targets(sample.truth, data.vocabulary, "instance")) == 3
    assert targets(sample.truth, data.vocabulary, "semantic").classes.tolist() == [0, 1, 2]


def test_specks_are_a_crowd_of_their_class(tmp_path: Path) -> None:
    pair(tmp_path, "a", PARK)
    (tmp_path / "classes.yaml").write_text("[road, tree, {name: car, thing: true}]", encoding="utf-8")
    data = Folder(str(tmp_path), instances="components", smallest=2)
    sample = data[0]
    assert sample.classes.tolist() == [0, 1, 2, 2]
    assert sample.crowd.tolist() == [False, False, False, True]
    assert sample.truth.masks[-1].nonzero().tolist() == [[0, 5], [2, 5]]
    assert sample.truth.masks[-2].sum() == 5
    assert len(targets(sample.truth, data.vocabulary, "panoptic")) == 3
    assert torch.equal(targets(sample.truth, data.vocabulary, "semantic").masks[2], torch.from_numpy(PARK == 2))
    none = Folder(str(tmp_path), instances="components", smallest=100)[0]
    assert none.crowd.tolist() == [False, False, True]


def test_components_need_things_and_a_size(tmp_path: Path) -> None:
    pair(tmp_path, "a", PARK)
    with pytest.raises(
        DataError, match=r"`instances: components` needs a vocabulary with things; mark them, \{name: car"
    ):
        Folder(str(tmp_path), vocabulary=NAMES, instances="components")
    (tmp_path / "classes.yaml").write_text("[road, tree, {name: car, thing: true}]", encoding="utf-8")
    with pytest.raises(DataError, match="smallest: should be at least 1 px, got 0"):
        Folder(str(tmp_path), instances="components", smallest=0)
    pair(tmp_path, "a", np.full((3, 4), 255, np.uint8))
    assert len(Folder(str(tmp_path), instances="components")[0].truth) == 0


# --- the layouts of the public data sets ---------------------------------------------------------------------------


def test_ade20k(tmp_path: Path) -> None:
    save(tmp_path / "images/validation/ADE_val_1.jpg", COLORS)
    save(tmp_path / "annotations/validation/ADE_val_1.png", np.where(RAMP < 3, 0, 150).astype(np.uint8))
    data = ADE20K(str(tmp_path), split="val")
    assert list(data.keys()) == ["ADE_val_1"]
    assert data[0].classes.tolist() == [149]
    assert data[0].ids[0, 0].tolist() == [VOID] * 3 + [0] * 3
    with pytest.raises(DataError, match=r"ade20k: no split 'valid'\. Did you mean 'val'\? Known: train, val\."):
        ADE20K(str(tmp_path), split="valid")


def test_ade20k_instances(tmp_path: Path) -> None:
    """Red is the class, 1..100 of the things; green the instance, which may be the same number in two classes."""
    colors = np.zeros((4, 6, 3), np.uint8)
    colors[0, :3], colors[0, 3:], colors[1, :2], colors[2, :2] = (5, 1, 0), (5, 2, 0), (100, 1, 0), (7, 0, 0)
    save(tmp_path / "images/training/ADE_train_1.jpg", COLORS)
    save(tmp_path / "annotations_instance/training/ADE_train_1.png", colors)
    data = ADE20KInstance(str(tmp_path))
    sample = data[0]
    assert [data.vocabulary.names[index] for index in sample.classes] == ["door", "door", "flag"]
    assert sample.ids[0, :2].tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, VOID, VOID, VOID, VOID]]
    assert (sample.ids[0, 2:] == VOID).all(), "a class without an instance is none"
    assert not sample.crowd.any()
    assert len(targets(sample.truth, data.vocabulary, "instance")) == 3
    colors[3, 1] = (101, 1, 0)
    save(tmp_path / "annotations_instance/training/ADE_train_1.png", colors)
    with pytest.raises(DataError, match=r"color \(101, 1, 0\) at \(y 3, x 1\) is no class: 100 classes as red for"):
        data[0]


@pytest.mark.parametrize("layout", ["released", "prepared"])
def test_coco_stuff_164k(tmp_path: Path, layout: str) -> None:
    """As released: category - 1, with gaps. As prepared elsewhere: the class, in folders of other names."""
    words = load("coco_stuff_171")
    released = np.array([[0, 12, 181], [255, 0, 0]], np.uint8)
    if layout == "released":
        save(tmp_path / "val2017/1.jpg", COLORS[:2, :3])
        save(tmp_path / "stuffthingmaps/val2017/1.png", released)
    else:
        save(tmp_path / "images/val2017/1.jpg", COLORS[:2, :3])
        save(tmp_path / "annotations/val2017/1_labelTrainIds.png", np.array([[0, 11, 170], [255, 0, 0]], np.uint8))
        save(tmp_path / "annotations/val2017/1.png", released)
    sample = COCOStuff164K(str(tmp_path), "val")[0]
    assert [words.ids[index] for index in sample.classes] == [1, 13, 182]
    assert sample.truth.label_map().tolist() == [[0, 11, 170], [VOID, 0, 0]]
    if layout == "released":
        save(tmp_path / "stuffthingmaps/val2017/1.png", released - (released == 12))
        with pytest.raises(DataError, match=r"value 11 at \(y 0, x 1\) is no class"):
            COCOStuff164K(str(tmp_path), "val")[0]


def test_coco_stuff(tmp_path: Path) -> None:
    save(tmp_path / "images/train2014/COCO_1.jpg", COLORS)
    save(tmp_path / "annotations/train2014/COCO_1_labelTrainIds.png", np.where(RAMP < 3, 0, 171).astype(np.uint8))
    save(tmp_path / "annotations/train2014/COCO_1.png", RAMP)
    data = COCOStuff10K(str(tmp_path))
    assert data[0].classes.tolist() == [170]
    assert data.vocabulary.names[170] == "wood"


@pytest.mark.parametrize(("classes", "wanted"), [(59, [58]), (60, [0, 59])])
def test_pascal_context(tmp_path: Path, classes: int, wanted: list[int]) -> None:
    for name in ("2008_1", "2008_2"):
        save(tmp_path / f"JPEGImages/{name}.jpg", COLORS)
        save(tmp_path / f"SegmentationClassContext/{name}.png", np.where(RAMP < 3, 0, 59).astype(np.uint8))
    lists = tmp_path / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2008_2\n")
    data = PascalContext(str(tmp_path), "val", classes)
    assert list(data.keys()) == ["2008_2"]
    assert data[0].classes.tolist() == wanted
    (lists / "train.txt").write_text("2008_1\n2008_3\n")
    with pytest.raises(DataError, match=r"train\.txt: lists 1 pictures that .*JPEGImages lacks: 2008_3"):
        PascalContext(str(tmp_path), "train", classes)
    with pytest.raises(DataError, match=r"trian\.txt: the list"):
        PascalContext(str(tmp_path), "trian", classes)


def test_potsdam_and_chase_by_folder(tmp_path: Path) -> None:
    """Layouts that need no kind of their own, with the keys that docs/datasets.md tells and their recipes have."""
    save(tmp_path / "img_dir/val/2_10_0.png", np.zeros((1, 4, 3), np.uint8))
    save(tmp_path / "ann_dir/val/2_10_0.png", np.array([[0, 1, 6, 255]], np.uint8))
    sample = read_by("potsdam", tmp_path)[0]
    assert sample.classes[sample.ids[0, 0, 1:3].long()].tolist() == [0, 5]
    assert sample.ids[0, 0, [0, 3]].tolist() == [VOID, VOID]
    save(tmp_path / "images/validation/Image_01L.png", np.zeros((1, 2, 3), np.uint8))
    save(tmp_path / "annotations/validation/Image_01L_1stHO.png", np.array([[0, 1]], np.uint8))
    sample = read_by("chase-db1", tmp_path)[0]
    assert sample.ids[0, 0].tolist() == sample.classes.tolist() == [0, 1]


def read_by(name: str, root: Path) -> Dataset:
    """The validation pictures in a folder, as the recipe of that data set reads them."""
    recipe = recipes.load(f"adapter-beit-l-mask2former-{name}", [f"data.val.root={root}"])
    return Experiment(recipe).dataset("val")


# --- shapes -------------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_at_every_call_and_differ_between_splits() -> None:
    one, again = Shapes("val", 4)[3], Shapes("val", 9)[3]
    assert torch.equal(one.image, again.image)
    assert torch.equal(one.ids, again.ids)
    assert one.key == again.key == "val-00003"
    pictures = {
        Shapes(split, 2, seed=seed)[i].image.numpy().tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for i in (0, 1)
    }
    assert len(pictures) == 12


@pytest.mark.parametrize("data", [Shapes(length=40), ColoredShapes(length=90)], ids=["shapes", "colored_shapes"])
def test_scenes_have_whole_truth(data: Scenes) -> None:
    assert len(data) == len(data.keys())
    several = 0
    for sample in data:
        assert sample.image.shape == (3, 96, 128)
        assert sample.ids.shape == (1, 96, 128)
        assert sample.ids.min() == 0, "every pixel belongs to something"
        assert sorted(sample.ids.unique().tolist()) == list(range(len(sample.classes)))
        stuff = [index for index in sample.classes.tolist() if index not in data.vocabulary.things]
        assert len(stuff) == len(set(stuff)), "stuff is one segment a class"
        things = [index for index in sample.classes.tolist() if index in data.vocabulary.things]
        several += len(things) > len(set(things))
    assert several > 5, "things of one class are segments apart"
    seen = torch.cat([sample.classes for sample in data]).bincount(minlength=len(data.vocabulary))
    assert (seen >= 10).all(), seen
    with pytest.raises(DataError, match="Did you mean 'train'"):
        Shapes("trian")


def test_colored_shapes_have_their_color() -> None:
    data = ColoredShapes(length=60)
    assert data.vocabulary.names[3:] == tuple(name for name, _ in COLORED)
    for sample in data:
        for index, kind in enumerate(sample.classes.tolist()):
            inside = sample.image[:, sample.ids[0] == index].float()
            if kind < 3 or inside.shape[1] < 50:
                continue
            red, green, blue = inside.mean(1).tolist()
            color = data.vocabulary.names[kind].split()[0]
            assert {"red": red > max(green, blue), "yellow": min(red, green) > blue, "purple": min(red, blue) > green}[
                color
            ], (sample.key, color)


@pytest.mark.parametrize(
    ("kind", "area"), [("circle", np.pi), ("square", 2.0), ("triangle", 27**0.5 / 4), ("star", 1.32)]
)
def test_shapes_have_their_form(kind: str, area: float) -> None:
    axis = np.linspace(-1.2, 1.2, 400, dtype=np.float32)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    inside = shapes._reach(kind, u, v) < 1
    assert inside.sum() * (2.4 / 399) ** 2 == pytest.approx(area, rel=0.02)
    assert np.hypot(u, v)[inside].max() <= 1.001


def test_demo_is_read_by_the_folder_data_set_and_by_coco_tools(tmp_path: Path) -> None:
    pictures = write_demo(tmp_path / "demo", count=5, size=(48, 64))
    assert len(pictures) == 5
    assert all(path.is_file() for path in pictures)
    words = load("shapes")
    for split, count in (("train", 4), ("val", 1)):
        data = Folder(str(tmp_path / "demo"), split=split)
        assert data.vocabulary == words
        made = Shapes(split, count, (48, 64))
        assert list(data.keys()) == list(made.keys())
        for one, other in zip(data, made, strict=True):
            assert torch.equal(one.truth.label_map(), other.truth.label_map())
            assert (one.image.float() - other.image.float()).abs().mean() < 8
        check_coco(tmp_path / "demo/coco", split, made)
    with pytest.raises(DataError, match="ask for 2 or more"):
        write_demo(tmp_path / "none", count=1)


def check_coco(folder: Path, split: str, made: Shapes) -> None:
    """Read without a line of ours: what lies there is COCO's."""
    words = made.vocabulary
    panoptic = json.loads((folder / f"panoptic_{split}.json").read_text())
    instances = json.loads((folder / f"instances_{split}.json").read_text())
    assert [category["name"] for category in panoptic["categories"]] == list(words.names)
    assert [category["name"] for category in instances["categories"]] == [words.names[i] for i in sorted(words.things)]
    for index, sample in enumerate(made):
        truth = sample.truth
        annotation = panoptic["annotations"][index]
        assert annotation["image_id"] == panoptic["images"][index]["id"] == index
        painted = np.asarray(Image.open(folder / f"panoptic_{split}" / annotation["file_name"])).astype(int)
        ids = painted @ (1, 256, 65536)
        assert len(annotation["segments_info"]) == len(truth)
        for part, mask, kind in zip(
            annotation["segments_info"], truth.masks.numpy(), truth.classes.tolist(), strict=True
        ):
            assert np.array_equal(ids == part["id"], mask)
            assert part["category_id"] == words.ids[kind]
            assert part["area"] == mask.sum()
        mine = [a for a in instances["annotations"] if a["image_id"] == index]
        things = [i for i, kind in enumerate(truth.classes.tolist()) if kind in words.things]
        assert len(mine) == len(things)
        for a, i in zip(mine, things, strict=True):
            mask = truth.masks[i].numpy()
            assert a["category_id"] == words.ids[truth.classes[i]]
            assert np.array_equal(pycoco.decode(a["segmentation"]), mask)
            x, y, width, height = map(int, a["bbox"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum() == a["area"]
    assert len({a["id"] for a in instances["annotations"]}) == len(instances["annotations"])


def test_demo_is_read_by_the_coco_data_sets(tmp_path: Path) -> None:
    write_demo(tmp_path, count=4, size=(48, 64))
    made = Shapes("train", 3, (48, 64))
    panoptic = COCOPanoptic(str(tmp_path), annotations="coco/panoptic_{split}.json", images="images/{split}")
    instances = COCOInstance(str(tmp_path), annotations="coco/instances_{split}.json", images="images/{split}")
    assert panoptic.vocabulary == made.vocabulary
    assert instances.vocabulary == only_things(made.vocabulary)
    assert list(panoptic.keys()) == list(instances.keys()) == list(made.keys())
    for index, sample in enumerate(made):
        truth = sample.truth
        assert torch.equal(panoptic[index].truth.masks, truth.masks)
        assert torch.equal(panoptic[index].truth.classes, truth.classes)
        things = targets(truth, made.vocabulary, "instance")
        assert torch.equal(instances[index].truth.masks, things.masks)


# --- truth on its way through augmentation -------------------------------------------------------------------------


def test_segments_keep_their_names_through_augmentation(tmp_path: Path) -> None:
    """Instances of several layers and panoptic truth: what is left of each has its class and crowd mark."""
    write_demo(tmp_path, count=8, size=(96, 128))
    sets: list[Dataset] = [
        COCOPanoptic(str(tmp_path), annotations="coco/panoptic_{split}.json", images="images/{split}"),
        COCOInstance(str(tmp_path), annotations="coco/instances_{split}.json", images="images/{split}"),
        Folder(str(tmp_path), instances="components", smallest=20),
    ]
    steps = [RandomScale(0.5, 1.5), RandomCrop((64, 64), most=1.0), RandomFlip(), Pad((64, 64))]
    torch.manual_seed(0)
    left = 0
    for data in sets:
        for sample in data:
            before = sample
            for step in steps:
                sample = step(sample)
            assert sample.ids.shape[1:] == (64, 64)
            present = [number for number in sample.ids.unique().tolist() if number != VOID]
            truth = sample.truth
            assert truth.classes.tolist() == before.classes[present].tolist()
            assert truth.crowd.tolist() == before.crowd[present].tolist()
            assert truth.masks.flatten(1).any(1).all()
            left += len(truth)
            for task in TASKS:
                wanted = targets(truth, data.vocabulary, task)
                assert not wanted.crowd.any()
                assert wanted.masks.flatten(1).any(1).all()
    assert left > 60
