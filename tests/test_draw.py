"""Pictures hold what they should: colours where segments are, legends that fit, label maps that read back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfirst import draw
from maskfirst.data.images import read_label_map
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
VOCABULARY = Vocabulary(("sky", "road", "car"), frozenset({2}), (RED, GREEN, BLUE), (0, 1, 2))


def many(count: int) -> Vocabulary:
    colors = tuple((index % 256, index // 256, 128) for index in range(count))
    return Vocabulary(tuple(f"class {index}" for index in range(count)), frozenset(), colors, tuple(range(count)))


def scene(height: int = 40, width: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey picture; sky on the left, road on the right, void in the lower third."""
    labels = torch.zeros(height, width, dtype=torch.int64)
    labels[:, width // 2 :] = 1
    labels[2 * height // 3 :] = VOID
    return torch.full((3, height, width), 100, dtype=torch.uint8), labels


def colors_in(picture: Image.Image) -> set:
    return {color for _, color in picture.getcolors(picture.width * picture.height) or ()}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def inked(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) != 255).any(-1)


def test_overlay_mixes_colour_into_the_fill_and_leaves_void_alone():
    image, labels = scene()
    painted = np.asarray(draw.overlay(image, Segments.from_label_map(labels), VOCABULARY, opacity=0.25))
    assert painted.shape == (40, 60, 3)
    assert painted[10, 10].tolist() == pytest.approx([125, 75, 75], abs=1)
    assert painted[10, 50].tolist() == pytest.approx([75, 125, 75], abs=1)
    assert (painted[labels.numpy() == VOID] == 100).all()


def test_contours_are_opaque_on_both_sides_of_a_border_and_nowhere_else():
    image, labels = scene()
    painted = np.asarray(draw.overlay(image, Segments.from_label_map(labels), VOCABULARY))
    assert painted[10, 29].tolist() == list(RED)
    assert painted[10, 30].tolist() == list(GREEN)
    assert painted[25, 10].tolist() == list(RED), "along void as well"
    assert painted[0, 0].tolist() != list(RED), "the picture's own border is no contour"
    assert (painted[10] == RED).all(-1).sum() == 1


def test_opacity_0_leaves_contours_only():
    image, labels = scene()
    painted = np.asarray(draw.overlay(image, Segments.from_label_map(labels), VOCABULARY, opacity=0.0))
    edge = draw.contours(SegmentMap.of(Segments.from_label_map(labels)).ids) & (labels.numpy() != VOID)
    assert (painted[~edge] == 100).all()
    assert (painted[edge] != 100).any(-1).all()


def test_no_segments_give_the_picture_itself():
    image, _ = scene()
    empty = Segments.from_label_map(torch.full((40, 60), VOID))
    assert (np.asarray(draw.overlay(image, empty, VOCABULARY)) == 100).all()


def test_later_segments_lie_on_top_as_in_the_label_map():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, :, :4] = masks[1, :, 2:] = True
    segments = Segments(masks, torch.tensor([1, 0]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    order = SegmentMap.of(segments).ids
    assert order[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(segments.classes[order.long()], segments.label_map())


def test_things_of_one_class_get_colours_of_their_own_near_the_class():
    colors = draw.segment_colors(torch.tensor([2, 0, 2, 2, 2]), VOCABULARY)
    assert colors[:2] == [BLUE, RED]
    assert len(set(colors)) == 5
    assert all(max(color) == color[2] for color in (colors[0], *colors[2:])), "blue stays blue"


@pytest.mark.parametrize("width", [40, 300, 480, 2000])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_no_legend_clips_its_text(width, count):
    vocabulary = many(count)
    strip = draw.legend(vocabulary, list(range(count)), [1 / count] * count, width=width)
    assert strip.width >= width
    ink = inked(strip)
    assert not ink[0].any()
    assert not ink[-1].any()
    assert not ink[:, 0].any()
    assert not ink[:, -1].any()
    assert colors_in(strip) >= set(vocabulary.colors)


def test_legend_columns_are_aligned_and_fill_the_width_they_have():
    vocabulary, width = many(12), 600
    strip = np.asarray(draw.legend(vocabulary, list(range(12)), [1 / 12] * 12, width=width))
    corners = [tuple(np.argwhere((strip == color).all(-1))[0]) for color in vocabulary.colors]
    rows, columns = sorted({y for y, _ in corners}), sorted({x for _, x in corners})
    assert len(rows) * len(columns) >= 12 > len(rows) * len(columns) - len(columns)
    assert len(set(np.diff(columns))) <= 1
    assert len(set(np.diff(rows))) <= 1
    assert len(columns) >= 3


def test_letters_grow_with_the_picture():
    small, large = (draw.legend(VOCABULARY, [0], width=width) for width in (480, 1920))
    assert large.height > 3 * small.height
    assert draw.text_size(64) == draw.text_size(300) == 12


def test_a_name_that_is_too_long_keeps_its_ends():
    name = "traffic light for pedestrians, trams, and everybody else on the northern side"
    long = Vocabulary((name,), frozenset(), (RED,), (0,))
    assert draw.legend(long, [0], width=200).width < 300


def test_a_contact_sheet_shows_every_picture_at_one_size():
    image, labels = scene()
    tall = torch.full((3, 90, 30), 100, dtype=torch.uint8)
    items = [(image, Segments.from_label_map(labels), f"picture {i}") for i in range(4)]
    items.append((tall, Segments.from_label_map(torch.full((90, 30), 2)), "a/very/long/path/that/fits/nowhere.png"))
    sheet = draw.contact_sheet(items, VOCABULARY, columns=3, side=120)
    assert 3 * 120 < sheet.width < 3 * 120 + 40
    assert sheet.height > 2 * 120
    assert not inked(sheet)[:, -1].any()
    assert colors_in(sheet) >= {RED, GREEN, BLUE}
    with pytest.raises(ValueError, match="at least one"):
        draw.contact_sheet([], VOCABULARY)


def test_side_by_side_shows_picture_truth_and_prediction():
    image, labels = scene(360, 480)
    truth, prediction = Segments.from_label_map(labels), Segments.from_label_map(torch.full((360, 480), 2))
    page = np.asarray(draw.side_by_side(image, truth, prediction, VOCABULARY, "street 7"))
    thirds = np.array_split(page[60:330], 3, axis=1)
    greys = [(third == 100).all(-1).mean() for third in thirds]
    assert greys[0] > 0.9
    assert greys[1] == pytest.approx(1 / 3, abs=0.1)
    assert greys[2] == 0
    assert (page == GREEN).all(-1).any()
    assert (page == BLUE).all(-1).any()


def test_side_by_side_draws_the_sure_instances_with_their_names():
    image = torch.full((3, 360, 480), 100, dtype=torch.uint8)
    masks = torch.zeros(3, 360, 480, dtype=torch.bool)
    masks[0, 100:300, 50:400] = masks[1, 150:180, 100:150] = masks[2, 0:60] = True
    found = Segments(masks[[1, 0, 2]], torch.tensor([2, 1, 0]), torch.tensor([0.9, 0.8, 0.1]), torch.zeros(3).bool())
    page = colors_in(draw.side_by_side(image, found[:0], found, VOCABULARY, task="instance"))
    assert {GREEN, BLUE} <= page, "the small one, though it comes first, is not covered by the large one"
    assert RED not in page, "not sure enough"
    plain = draw.side_by_side(image, found[:0], found, VOCABULARY)
    assert RED in colors_in(plain)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 700), (700, 3), (3000, 1500)])
def test_panels_of_any_shape(height, width):
    image, labels = scene(height, width)
    segments = Segments.from_label_map(labels)
    page = draw.side_by_side(image, segments, segments, VOCABULARY)
    assert page.width < 3100
    assert page.height < 1300


@pytest.mark.parametrize(
    ("count", "void", "dtype"), [(3, 255, np.uint8), (254, 255, np.uint8), (300, 65535, np.uint16)]
)
def test_label_maps_read_back(tmp_path, count, void, dtype):
    labels = torch.randint(VOID, count, (20, 30))
    labels[0, :2] = torch.tensor([VOID, count - 1])
    draw.write_label_map(tmp_path / "map.png", labels, many(count), {"Source": "straße.jpg"})
    values = read_label_map(tmp_path / "map.png")
    assert values.dtype == dtype
    assert (values == np.where(labels == VOID, void, labels)).all()
    assert opened(tmp_path / "map.png").info["Source"] == "straße.jpg"
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"], "nothing is left beside it"


def test_a_label_map_shows_the_colours_of_its_classes(tmp_path):
    draw.write_label_map(tmp_path / "map.png", torch.tensor([[0, 1, 2, VOID]]), VOCABULARY)
    picture = opened(tmp_path / "map.png").convert("RGB")
    assert np.asarray(picture)[0].tolist() == [list(RED), list(GREEN), list(BLUE), [0, 0, 0]]


def test_overlays_keep_their_colours_on_disk(tmp_path):
    image, labels = scene(64, 64)
    painted = draw.overlay(image, Segments.from_label_map(labels), VOCABULARY)
    draw.write_overlay(tmp_path / "deep" / "overlay.jpg", painted)
    back = np.asarray(opened(tmp_path / "deep" / "overlay.jpg")).astype(int)
    assert np.abs(back - np.asarray(painted)).mean() < 4


def test_a_picture_longer_than_a_jpeg_can_be_is_shrunk(tmp_path):
    draw.write_overlay(tmp_path / "long.jpg", Image.new("RGB", (70_000, 20), RED))
    assert opened(tmp_path / "long.jpg").width == draw.LONGEST_JPEG


def on_map(ids: torch.Tensor, classes: list[int], scores: list[float] | None = None) -> SegmentMap:
    count = len(classes)
    return SegmentMap(
        ids.int(), torch.tensor(classes), torch.tensor(scores or [1.0] * count), torch.zeros(count, dtype=torch.bool)
    )


def plates(found: SegmentMap, texts: list[str], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """The pixels that the plate of each segment, in a colour of its own, covers on a white picture."""
    colors = [(10 + index, 0, 90) for index in range(len(texts))]
    page = np.asarray(draw.caption(Image.new("RGB", (size[1], size[0]), "white"), found, texts, colors))
    marked = {index: (page == color).all(-1) for index, color in enumerate(colors)}
    return {index: pixels for index, pixels in marked.items() if pixels.any()}


def box_of(pixels: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(pixels)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_captions_tell_names_and_the_scores_of_things():
    found = on_map(torch.tensor([[0, 1]]), [0, 2], [0.5, 0.934])
    assert draw.captions(found, VOCABULARY) == ["sky", "car 93%"]


def test_a_plate_lies_where_its_segment_is_thickest():
    ids = torch.full((300, 500), VOID)
    ids[10:20, :] = 0
    ids[100:280, 300:480] = 0
    left, top, right, bottom = box_of(plates(on_map(ids, [2]), ["car"], (300, 500))[0])
    assert abs((left + right) / 2 - 390) < 10
    assert abs((top + bottom) / 2 - 190) < 10


def test_a_small_segment_is_not_hidden_by_its_plate():
    for y, nearest in ((100, 98), (4, 16)):
        ids = torch.full((300, 500), VOID)
        ids[y : y + 10, 200:210] = 0
        pixels = plates(on_map(ids, [2]), ["a car"], (300, 500))[0]
        assert not pixels[y : y + 10, 200:210].any()
        left, top, right, bottom = box_of(pixels)
        assert left < 205 < right
        assert min(abs(top - nearest), abs(bottom - nearest)) <= 2


@pytest.mark.parametrize(("y", "x"), [(0, 0), (0, 490), (290, 0), (290, 490)])
def test_plates_stay_inside_of_the_picture(y, x):
    ids = torch.full((300, 500), VOID)
    ids[y : y + 10, x : x + 10] = 0
    text = "a rather long name"
    page = draw.caption(Image.new("RGB", (500, 300), "white"), on_map(ids, [2]), [text], [(9, 9, 9)])
    full = draw.caption(Image.new("RGB", (900, 900), "white"), on_map(torch.zeros(900, 900), [2]), [text], [(9, 9, 9)])
    assert inked(page).sum() > 0.3 * inked(full).sum()
    left, top, right, bottom = box_of(inked(page))
    assert right - left > 80
    assert 0 <= left < right <= 500
    assert 0 <= top < bottom <= 300


def test_plates_do_not_cover_each_other_and_some_give_way():
    count = 60
    ids = torch.full((120, 400), VOID)
    for index in range(count):
        ids[40:60, 5 * index : 5 * index + 5] = index
    ids[70:120, :] = count
    shown = plates(on_map(ids, [2] * count + [0]), [f"car {index}" for index in range(count)] + ["sky"], (120, 400))
    assert 3 < len(shown) < count
    assert count in shown, "the largest comes first"
    boxes = [box_of(pixels) for pixels in shown.values()]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_picture_smaller_than_its_text_has_no_plate_or_a_shortened_one():
    for size in ((4, 4), (40, 30), (12, 200)):
        page = draw.caption(
            Image.new("RGB", (size[1], size[0]), "white"), on_map(torch.zeros(size), [2]), ["traffic light"], [BLUE]
        )
        assert page.size == (size[1], size[0])
    assert not plates(on_map(torch.zeros(4, 4), [2]), ["x"], (4, 4))


def test_segments_without_a_pixel_have_no_plate():
    found = on_map(torch.zeros(100, 100), [0, 1])
    assert list(plates(found, ["sky", "road"], (100, 100))) == [0]


def test_text_can_be_read_on_light_and_on_dark_plates():
    found = on_map(torch.zeros(200, 300), [0])
    for color, letters in (((250, 240, 200), draw.INK), ((60, 0, 0), draw.PAPER)):
        page = draw.caption(Image.new("RGB", (300, 200), (0, 255, 0)), found, ["WWW"], [color])
        assert letters in colors_in(page)
