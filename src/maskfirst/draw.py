"""Pictures of segments: overlays with a legend, contact sheets, truth beside prediction, and label maps as PNG."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from maskfirst.files import write_aside
from maskfirst.frames import Size
from maskfirst.types import VOID, SegmentMap, Segments, Vocabulary

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PAPER: Color = (255, 255, 255)
INK: Color = (32, 33, 36)
MUTED: Color = (112, 116, 122)
TINTS = (0.0, 0.35, -0.3, 0.6, -0.5)
"""Share of white (above 0) or of black (below) mixed into the colour of the 1st, 2nd, ... segment of a class."""
MOST_BYTE_CLASSES = 254
"""With more classes a label map has 16 bits a pixel, and 65535 instead of 255 for void."""
LONGEST_JPEG = 65500
"""px a side; libjpeg's limit."""
SURE = 0.5
"""The least score of instances that are drawn."""
PANEL_SIDES = (360, 960)
"""px, least and most, of the longer side of a picture in `side_by_side`."""


def segment_colors(classes: Int64[Tensor, " N"], vocabulary: Vocabulary) -> list[Color]:
    """A colour for each segment: its class's, tinted from the second segment of a class on."""
    seen: dict[int, int] = {}
    colors = []
    for index in classes.tolist():
        seen[index] = seen.get(index, -1) + 1
        tint = TINTS[seen[index] % len(TINTS)]
        red, green, blue = (round(v + ((255 if tint > 0 else 0) - v) * abs(tint)) for v in vocabulary.colors[index])
        colors.append((red, green, blue))
    return colors


def smaller_in_front(segments: Segments) -> Segments:
    """In the order in which overlapping ones are best painted: the largest first."""
    areas = [np.count_nonzero(mask) for mask in segments.masks.cpu().numpy()]
    return segments[torch.tensor(areas, dtype=torch.int64).argsort(descending=True, stable=True)]


def contours(ids: Int32[Tensor, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The pixels on both sides of every border between the segments of a map; the wider, the larger the picture.

    Drawn by numpy, not torch, like all that writers do in threads: each would start torch's thread pool anew.
    """
    width = max(1, round(max(ids.shape) / 600))
    edge = np.zeros(ids.shape, bool)
    for values, marks in ((ids.numpy(), edge), (ids.numpy().T, edge.T)):
        differs = values[width:] != values[:-width]
        marks[width:] |= differs
        marks[:-width] |= differs
    return edge


def to_picture(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """The RGB tensor as a picture of Pillow's."""
    return Image.merge("RGB", [Image.fromarray(channel) for channel in image.cpu().numpy()])


def overlay(
    image: UInt8[Tensor, "3 H W"], segments: Segments, vocabulary: Vocabulary, opacity: float = 0.5
) -> Image.Image:
    """The picture under the colours of its segments, each with an opaque contour; void pixels stay as they are.

    `opacity` 0..1 of the fill. The size is the picture's.
    """
    colors = segment_colors(segments.classes, vocabulary)
    return paint(to_picture(image), SegmentMap.of(segments).ids, colors, opacity)


def paint(
    picture: Image.Image, ids: Int32[Tensor, "H W"], colors: Sequence[Color], opacity: float = 0.5
) -> Image.Image:
    """`overlay` from the ids of a segment map of the picture's size, with one colour a segment. A new picture."""
    indices = ids.numpy()
    # (r, g, b, opacity) of each segment as one 32-bit word, which is looked up at once; void is the last (index -1).
    words = np.zeros((len(colors) + 1, 4), np.uint8)
    words[:-1, :3] = np.array(colors, np.uint8).reshape(-1, 3)
    words[:-1, 3] = round(255 * opacity)
    layer = words.view(np.uint32)[:, 0].take(indices, mode="wrap").view(np.uint8).reshape(*indices.shape, 4)
    layer[..., 3][contours(ids) & (indices != VOID)] = 255
    cover = Image.fromarray(layer)
    painted = picture.copy()
    painted.paste(cover, mask=cover)
    return painted


def captions(found: SegmentMap, vocabulary: Vocabulary) -> list[str]:
    """What to write on each segment: its name, and for things the score."""
    return [
        f"{vocabulary.names[index]} {score:.0%}" if index in vocabulary.things else vocabulary.names[index]
        for index, score in zip(found.classes.tolist(), found.scores.tolist(), strict=True)
    ]


def caption(picture: Image.Image, found: SegmentMap, texts: Sequence[str], colors: Sequence[Color]) -> Image.Image:
    """The picture with a plate of its text and colour on every segment of a map of its size. A new picture.

    A plate lies where its segment is thickest, or beside one that is smaller than it, and always inside of the picture. Where
    no room is left beside the plates of larger segments there is none.
    """
    captioned = picture.copy()
    plates = _Plates(captioned)
    areas, boxes, ids = found.areas.tolist(), found.boxes.tolist(), found.ids.numpy()
    for index in sorted(range(len(found)), key=lambda index: -areas[index]):
        if areas[index]:
            plates.add(texts[index], colors[index], partial(_places, ids, index, boxes[index]))
    return captioned


def mark(
    picture: Image.Image, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[Color]
) -> Image.Image:
    """The picture with a dot at every point, (y, x) px, and, where there is room, a plate of its text. A new picture."""
    marked = picture.copy()
    pen, plates = ImageDraw.Draw(marked), _Plates(marked)
    radius = max(3, round(max(picture.size) / 200))
    for (y, x), color in zip(points, colors, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=PAPER)
        plates.taken.append((round(x - radius), round(y - radius), round(x + radius) + 1, round(y + radius) + 1))
    for (y, x), text, color in zip(points, texts, colors, strict=True):
        plates.add(text, color, partial(_around, y, x, radius))
    return marked


def explained(
    picture: Image.Image,
    found: SegmentMap,
    vocabulary: Vocabulary,
    opacity: float = 0.5,
    captioned: bool = False,
    shares: Mapping[int, float] | None = None,
) -> Image.Image:
    """The picture under the colours of its segments and, with `captioned`, their names and scores. A new picture.

    `shares`: of the picture, 0..1 by class, for a legend below, the largest first; without, there is none.
    """
    colors = segment_colors(found.classes, vocabulary)
    painted = paint(picture, found.ids, colors, opacity)
    if captioned:
        painted = caption(painted, found, captions(found, vocabulary), colors)
    if shares is None:
        return painted
    ordered = largest_first(shares)
    return below(painted, legend(vocabulary, list(ordered), list(ordered.values()), width=painted.width))


def shares(found: SegmentMap) -> dict[int, float]:
    """How much of the picture each class has, 0..1, those that have none left out."""
    amounts: dict[int, float] = {}
    for index, area in zip(found.classes.tolist(), found.areas.tolist(), strict=True):
        if area:
            amounts[index] = amounts.get(index, 0.0) + area / found.ids.numel()
    return amounts


def largest_first(shares: Mapping[int, float]) -> dict[int, float]:
    """Of equal ones the first class first."""
    return dict(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0])))


class _Plates:
    """Plates of text on a picture, none of which covers another."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.pen = picture, ImageDraw.Draw(picture)
        self.size = max(11, round(max(picture.size) / 50))
        self.font, self.pad = _font(self.size), math.ceil(self.size / 5)
        self.taken: list[tuple[int, int, int, int]] = []

    def add(self, text: str, color: Color, places: Callable[[tuple[int, int]], Sequence[tuple[float, float]]]) -> None:
        """One in the first free one of the `places` for its (width, height) px; none where no room is left."""
        text = _shortened(text, self.font, self.picture.width - 2 * self.pad)
        size = math.ceil(self.font.getlength(text)) + 2 * self.pad, math.ceil(1.2 * self.size) + self.pad
        plate = _free(places(size), size, self.picture.size, self.taken)
        if plate is None:
            return
        self.taken.append(plate)
        left, top, right, bottom = plate
        red, green, blue = color
        self.pen.rounded_rectangle((left, top, right - 1, bottom - 1), self.pad, fill=color)
        # The eye sees green brightest; weights of ITU-R BT.601.
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        middle = (left + right) / 2, (top + bottom) / 2
        self.pen.text(middle, text, fill=INK if bright else PAPER, font=self.font, anchor="mm")


def legend(
    vocabulary: Vocabulary,
    classes: Sequence[int],
    shares: Sequence[float] | None = None,
    *,
    width: int,
    text: int | None = None,
    margin: int | None = None,
) -> Image.Image:
    """A strip that tells the colours of `classes`, in rows from left to right, each with its share of the picture if given.

    `shares` 0..1. `width`, px, is exceeded only where not even one column fits. `text` and `margin`, px: the size of the
    letters and the space at the left and right.
    """
    text = text or text_size(width)
    font, gap = _font(text), math.ceil(text * 0.5)
    margin = gap if margin is None else margin
    names = [_shortened(vocabulary.names[index], font, 16 * text) for index in classes]
    amounts = [_percent(share) for share in shares] if shares is not None else [""] * len(names)
    name_width = max((math.ceil(font.getlength(name)) for name in names), default=0)
    amount_width = max((math.ceil(font.getlength(amount)) for amount in amounts), default=0)
    cell = text + gap + name_width + (gap + amount_width if amount_width else 0)
    gutter, row = 3 * gap, math.ceil(1.6 * text)
    columns = max(1, min(len(names), (width - 2 * margin + gutter) // (cell + gutter)))
    strip = Image.new(
        "RGB", (max(width, cell + 2 * margin), math.ceil(len(names) / columns) * row + (gap if names else 0)), PAPER
    )
    pen = ImageDraw.Draw(strip)
    for place, (index, name, amount) in enumerate(zip(classes, names, amounts, strict=True)):
        x, y = margin + place % columns * (cell + gutter), gap // 2 + place // columns * row
        middle, top = y + row // 2, y + (row - text) // 2
        pen.rectangle((x, top, x + text - 1, top + text - 1), fill=vocabulary.colors[index], outline=MUTED)
        pen.text((x + text + gap, middle), name, fill=INK, font=font, anchor="lm")
        pen.text((x + cell, middle), amount, fill=MUTED, font=font, anchor="rm")
    return strip


def below(*pictures: Image.Image) -> Image.Image:
    """The pictures one below the other on white, flush left."""
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def contact_sheet(
    items: Sequence[tuple[UInt8[Tensor, "3 _H _W"], Segments, str]],
    vocabulary: Vocabulary,
    columns: int = 4,
    side: int = 320,
) -> Image.Image:
    """Many overlays on one page with their titles, and one legend of the classes that occur. `side`: px of a tile."""
    if not items:
        raise ValueError("a contact sheet needs at least one picture")
    tiles = [_panel(image, segments, vocabulary, title, (side, side)) for image, segments, title in items]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    sheet = below(*(_beside(row, side) for row in rows))
    occurring = sorted({index for _, segments, _ in items for index in segments.classes.tolist()})
    return below(sheet, legend(vocabulary, occurring, width=sheet.width, text=text_size(side), margin=_margin(side)))


def side_by_side(
    image: UInt8[Tensor, "3 H W"],
    truth: Segments,
    prediction: Segments,
    vocabulary: Vocabulary,
    title: str = "",
    task: str = "semantic",
) -> Image.Image:
    """The picture, the truth and the prediction in a row, above a legend of the classes of both.

    But for the task semantic, predicted segments bear their names and scores; of instances only the sure ones are drawn.
    """
    if task == "instance":
        prediction = smaller_in_front(prediction[prediction.scores >= SURE])
    panels = [
        _panel(image, segments, vocabulary, name, PANEL_SIDES, captioned)
        for segments, name, captioned in (
            (truth[:0], title or "image", False),
            (truth, "truth", False),
            (prediction, "prediction", task != "semantic"),
        )
    ]
    width = max(panel.width for panel in panels)
    row = _beside(panels, width)
    occurring = sorted({*truth.classes.tolist(), *prediction.classes.tolist()})
    return below(row, legend(vocabulary, occurring, width=row.width, text=text_size(width), margin=_margin(width)))


def write_label_map(
    path: Path | str, labels: Int[Tensor, "H W"], vocabulary: Vocabulary, notes: dict[str, str] | None = None
) -> None:
    """`label_picture` as a PNG. `notes`: text kept in it."""
    info = PngInfo()
    for name, note in (notes or {}).items():
        info.add_itxt(name, note)
    with write_aside(path) as aside:
        # Run-length matches make label maps both smaller and twice as fast to write as the default search.
        label_picture(labels, vocabulary).save(aside, "PNG", pnginfo=info, compress_level=6, compress_type=3)


def label_picture(labels: Int[Tensor, "H W"], vocabulary: Vocabulary) -> Image.Image:
    """A picture whose values are the classes and whose palette has their colours; 255 (black) is void.

    With more than 254 classes it is grey with 16 bits a pixel, and 65535 is void.
    """
    # Void, -1, becomes the largest number of either type.
    if len(vocabulary) > MOST_BYTE_CLASSES:
        return Image.fromarray(labels.cpu().numpy().astype(np.uint16))
    picture = Image.fromarray(labels.cpu().numpy().astype(np.uint8))
    picture.putpalette([v for color in vocabulary.colors for v in color] + [0] * 3 * (256 - len(vocabulary)))
    return picture


def write_overlay(path: Path | str, picture: Image.Image) -> None:
    """A JPEG with sharp colours; shrunk where a side is longer than a JPEG can be."""
    if max(picture.size) > LONGEST_JPEG:
        picture = picture.copy()
        picture.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
    with write_aside(path) as aside:
        picture.save(aside, format="JPEG", quality=92, subsampling=0)


def text_size(width: int) -> int:
    """px of letters that can be read in a picture `width` px wide, however small it is shown."""
    return max(12, round(width / 40))


@lru_cache(maxsize=32)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _shortened(text: str, font: Font, width: int) -> str:
    """The text, or as much of its beginning and end as fits `width` px."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width:
            return short
    return "…"


def _places(
    ids: Int32[np.ndarray, "H W"], index: int, box: Sequence[int], size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Where the middle (x, y) of a plate of `size` (width, height) px may lie for a segment, the best first."""
    left, top, right, bottom = box
    across, (width, height) = (left + right) / 2, size
    outside = [(across, top - height / 2 - 1), (across, bottom + height / 2 + 1)]
    if top <= height:
        # No room above.
        outside.reverse()
    if width > right - left or 2 * height > bottom - top:
        return [*outside, (across, (top + bottom) / 2)]
    # Every `step`-th pixel is enough to find where the segment is thickest; its own box is outside of it.
    step = math.ceil(max(right - left, bottom - top) / 64)
    mask = np.pad(ids[top:bottom:step, left:right:step] == index, 1)
    y, x = np.unravel_index(np.asarray(distance_transform_edt(mask)).argmax(), mask.shape)
    thickest = (left + (x.item() - 0.5) * step, top + (y.item() - 0.5) * step)
    beside = [(thickest[0], thickest[1] + way * (height + 1)) for way in (1, -1, 2, -2)]
    return [thickest, *beside, *outside]


def _around(y: float, x: float, radius: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Where the middle (x, y) of a plate of `size` (width, height) px may lie for a dot, the best first."""
    width, height = size
    away = radius + 2
    across, along = away + width / 2, away + height / 2
    return [(x + across, y), (x - across, y), (x, y - along), (x, y + along)]


def _free(
    places: Sequence[tuple[float, float]],
    size: tuple[int, int],
    picture: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    """The first place, moved into the picture, at which a plate covers no other: (left, top, right, bottom)."""
    width, height = size
    for x, y in places:
        left = round(min(max(x - width / 2, 0), picture[0] - width))
        top = round(min(max(y - height / 2, 0), picture[1] - height))
        plate = (left, top, left + width, top + height)
        apart = (plate[2] <= o[0] or o[2] <= plate[0] or plate[3] <= o[1] or o[3] <= plate[1] for o in taken)
        if left >= 0 and top >= 0 and all(apart):
            return plate
    return None


def _panel(
    image: UInt8[Tensor, "3 H W"],
    segments: Segments,
    vocabulary: Vocabulary,
    title: str,
    sides: tuple[int, int],
    captioned: bool = False,
) -> Image.Image:
    """An overlay, its longer side brought into `sides` (least, most) px, under its title."""
    longer = max(image.shape[-2:])
    factor = min(max(longer, sides[0]), sides[1]) / longer
    height, width = (max(1, round(length * factor)) for length in image.shape[-2:])
    picture = to_picture(image).resize((width, height), Image.Resampling.BICUBIC)
    found = SegmentMap.of(segments)
    found = replace(found, ids=_nearest(found.ids, (height, width)))
    colors = segment_colors(found.classes, vocabulary)
    painted = paint(picture, found.ids, colors)
    if captioned:
        painted = caption(painted, found, captions(found, vocabulary), colors)
    text = text_size(max(width, height))
    head = Image.new("RGB", (width, math.ceil(1.8 * text)), PAPER)
    heading = _shortened(title, _font(text), width - text)
    ImageDraw.Draw(head).text((0, head.height // 2), heading, fill=INK, font=_font(text), anchor="lm")
    return below(head, painted)


def _nearest(ids: Int32[Tensor, "H W"], size: Size) -> Int32[Tensor, "h w"]:
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for old, new in zip(ids.shape, size, strict=True))
    return ids[rows][:, columns]


def _beside(panels: Sequence[Image.Image], width: int) -> Image.Image:
    """The panels in columns of `width` px with a margin around each, tops aligned."""
    margin = _margin(width)
    row = Image.new("RGB", (len(panels) * (width + margin) + margin, max(p.height for p in panels) + margin), PAPER)
    for place, panel in enumerate(panels):
        row.paste(panel, (margin + place * (width + margin), 0))
    return row


def _margin(width: int) -> int:
    return math.ceil(width / 40)
