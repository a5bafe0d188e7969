"""Frame: how one picture was laid on a network's canvas, and the way back for masks.

Sizes are (height, width) in pixels, places are (y, x); all resizing is bilinear with half-pixel centres.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def resize(maps: Float[Tensor, "*N H W"], size: Size) -> Float[Tensor, "*N H2 W2"]:
    """Bilinear, half-pixel centres, no antialias (cv2's INTER_LINEAR and the originals' `resize`)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def up_to_multiple(size: Size, multiple: int) -> Size:
    """The smallest size whose sides are multiples of `multiple` and that has room for `size`."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


@dataclass(frozen=True)
class Fit:
    """The rule that chooses a picture's size before it is given to a network; keeps the aspect, but for `round_up`.

    `long` and `short` are limits in pixels that both hold. With `least`, the short side becomes max(short, least)
    and the long side is free (mmseg's `min_size`). All None: the picture keeps its size. `round_up`: each side then grows to
    a multiple of it, px, which changes the aspect a little. The originals resize a second time for that; here both are one.
    """

    long: int | None = None
    short: int | None = None
    least: int | None = None
    round_up: int = 1

    def __post_init__(self) -> None:
        if self.round_up < 1:
            raise ValueError(f"round_up: {self.round_up} must be at least 1; sides become multiples of it")

    def size(self, original: Size, scale: float = 1.0) -> Size:
        """The size for a picture of size `original`, with the limits multiplied by `scale`."""
        factor = self._factor(original, scale)
        height, width = (max(1, int(side * factor + 0.5)) for side in original)
        return up_to_multiple((height, width), self.round_up)

    def _factor(self, original: Size, scale: float) -> float:
        """What the sides are multiplied by, before they are rounded."""
        if self.long is None and self.short is None and self.least is None:
            return scale
        long = None if self.long is None else int(self.long * scale)
        short = None if self.short is None else int(self.short * scale)
        if self.least is not None:
            short, long = max(v for v in (short, self.least) if v is not None), None
        factors = []
        if long is not None:
            factors.append(long / max(original))
        if short is not None:
            factors.append(short / min(original))
        return min(factors)


@dataclass(frozen=True)
class Frame:
    """One view of one picture. The canvas shows the resized picture from `origin` on, padded where it ends.

    `original` size of the picture as it came; `inner` size after resizing; `outer` size of the canvas;
    `origin` (y, x) of the canvas's corner in the resized picture; `flipped`: mirrored left to right after resizing.
    """

    original: Size
    inner: Size
    outer: Size
    origin: tuple[int, int] = (0, 0)
    flipped: bool = False

    @classmethod
    def fit(
        cls, original: Size, fit: Fit | None = None, scale: float = 1.0, multiple: int = 1, pad: int = 0
    ) -> "Frame":
        """The whole picture, resized by `fit`, on a canvas padded at the bottom and right.

        The canvas's sides are `pad` px at least, and multiples of `multiple`.
        """
        inner = (fit or Fit()).size(original, scale)
        return cls(original, inner, up_to_multiple((max(inner[0], pad), max(inner[1], pad)), multiple))

    def flip(self) -> "Frame":
        return replace(self, flipped=not self.flipped)

    def windows(self, size: Size, stride: Size, multiple: int = 1, pad: int = 0) -> list[list["Frame"]]:
        """Rows of overlapping windows of `size` px that cover the resized picture; the last of each axis ends at its border.

        They run over the picture padded to `pad` px a side at least; those that would show padding alone are left out. What is
        still smaller than the window gives one smaller window on that axis, padded to `multiple`.
        """
        starts, outer = [], []
        for visible, window, step in zip(self.inner, size, stride, strict=True):
            length = max(visible, pad)
            count = max(length - window + step - 1, 0) // step + 1
            places = [max(min(i * step, length - window), 0) for i in range(count)]
            starts.append([place for place in places if place < visible])
            outer.append(min(window, length))
        canvas = up_to_multiple((outer[0], outer[1]), multiple)
        return [[replace(self, outer=canvas, origin=(y, x)) for x in starts[1]] for y in starts[0]]

    @property
    def visible(self) -> Size:
        """Size of the part of the canvas that shows the picture, the rest being padding."""
        return (
            min(self.outer[0], self.inner[0] - self.origin[0]),
            min(self.outer[1], self.inner[1] - self.origin[1]),
        )

    def resized(self, image: Shaped[Tensor, "C H W"]) -> Float[Tensor, "C H2 W2"]:
        """The picture at the frame's inner size, mirrored if the frame is."""
        picture = resize(image.to(torch.promote_types(image.dtype, torch.float32)), self.inner)
        return picture.flip(-1) if self.flipped else picture

    def cut(self, picture: Float[Tensor, "C H W"], fill: Sequence[float] = (0.0, 0.0, 0.0)) -> Float[Tensor, "C H2 W2"]:
        """This frame's canvas out of the resized picture; `fill` is one value a channel for the padding."""
        (y, x), (height, width) = self.origin, self.visible
        part = picture[:, y : y + height, x : x + width]
        if self.visible == self.outer:
            return part
        canvas = torch.as_tensor(fill, dtype=part.dtype, device=part.device).view(-1, 1, 1).repeat(1, *self.outer)
        canvas[:, :height, :width] = part
        return canvas

    def apply(
        self, image: Shaped[Tensor, "C H W"], fill: Sequence[float] = (0.0, 0.0, 0.0)
    ) -> Float[Tensor, "C H2 W2"]:
        """The canvas of a picture, float, in the picture's own value range."""
        return self.cut(self.resized(image), fill)

    def lay(self, masks: Bool[Tensor, "N H W"]) -> Bool[Tensor, "N H2 W2"]:
        """Masks of the picture on the canvas; a pixel is inside where more than half of it is, and never in the padding."""
        if not len(masks):
            return masks.new_zeros(0, *self.outer)
        return self.apply(masks, (0.0,) * len(masks)) > 0.5

    def trim(self, maps: Float[Tensor, "*N h w"]) -> Float[Tensor, "*N H W"]:
        """Maps over the whole canvas, enlarged to it, without the padding; still mirrored if the frame is."""
        height, width = self.visible
        return resize(maps, self.outer)[..., :height, :width]

    def restore(self, maps: Float[Tensor, "*N h w"]) -> Float[Tensor, "*N H W"]:
        """Maps over the whole canvas brought back to the original picture. Frames that show all of it only."""
        if self.origin != (0, 0) or self.visible != self.inner:
            raise ValueError(
                f"a window of {self.outer} px at {self.origin} cannot be restored alone; stitch its row first"
            )
        maps = self.trim(maps)
        return resize(maps.flip(-1) if self.flipped else maps, self.original)
