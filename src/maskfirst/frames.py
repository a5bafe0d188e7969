"""Frame: how one picture was laid on a network's canvas, and the way back for masks.

Sizes are (height, width) in pixels, places are (y, x); all resizing is bilinear with half-pixel centres.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def resize(maps: Float[Tensor, "*N H W"], size: Size) -> Float[Tensor, "*N H2 W2"]:
    """Bilinear, half-pixel centres, no antialias (cv2's INTER_LINEAR and the originals' `resize`)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


@dataclass(frozen=True)
class Fit:
    """The rule that chooses a picture's size before it is given to a network; keeps the aspect.

    `long` and `short` are limits in pixels that both hold. With `least`, the short side becomes max(short, least)
    and the long side is free (mmseg's `min_size`). All None: the picture keeps its size.
    """

    long: int | None = None
    short: int | None = None
    least: int | None = None

    def size(self, original: Size, scale: float = 1.0) -> Size:
        """The size for a picture of size `original`, with the limits multiplied by `scale`."""
        height, width = original
        if self.long is None and self.short is None and self.least is None:
            return (
                (height, width)
                if scale == 1.0
                else (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
            )
        long = None if self.long is None else int(self.long * scale)
        short = None if self.short is None else int(self.short * scale)
        if self.least is not None:
            short, long = max(v for v in (short, self.least) if v is not None), None
        factors = []
        if long is not None:
            factors.append(long / max(original))
        if short is not None:
            factors.append(short / min(original))
        factor = min(factors)
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


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
    def fit(cls, original: Size, fit: Fit | None = None, scale: float = 1.0, multiple: int = 1) -> "Frame":
        """The whole picture, resized by `fit`, on a canvas padded at the bottom and right to a multiple of `multiple`."""
        inner = (fit or Fit()).size(original, scale)
        return cls(original, inner, (-(-inner[0] // multiple) * multiple, -(-inner[1] // multiple) * multiple))

    def flip(self) -> "Frame":
        return replace(self, flipped=not self.flipped)

    def windows(self, size: Size, stride: Size, multiple: int = 1) -> list[list["Frame"]]:
        """Rows of overlapping windows of `size` px that cover the resized picture; the last of each axis ends at its border.

        A picture smaller than the window gives one smaller window on that axis, padded to `multiple`.
        """
        starts, outer = [], []
        for length, window, step in zip(self.inner, size, stride, strict=True):
            count = max(length - window + step - 1, 0) // step + 1
            starts.append([max(min(i * step, length - window), 0) for i in range(count)])
            outer.append(-(-min(window, length) // multiple) * multiple)
        return [[replace(self, outer=(outer[0], outer[1]), origin=(y, x)) for x in starts[1]] for y in starts[0]]

    @property
    def visible(self) -> Size:
        """Size of the part of the canvas that shows the picture, the rest being padding."""
        return (
            min(self.outer[0], self.inner[0] - self.origin[0]),
            min(self.outer[1], self.inner[1] - self.origin[1]),
        )

    def resized(self, image: Shaped[Tensor, "C H W"]) -> Float[Tensor, "C H2 W2"]:
        """The picture at the frame's inner size, mirrored if the frame is."""
        picture = resize(image.float(), self.inner)
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
