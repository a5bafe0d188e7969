"""Random changes of training samples: the picture and its one map of segments move together.

The ordinary SegViT training chain is scale, crop, flip, photometric, pad; ViT-P's is resized_crop, rotate, flip. All draw from
torch's global random state and leave the sample they are given as it was.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

from maskfirst.contracts import Augmentation
from maskfirst.frames import Fit, Size
from maskfirst.types import VOID, Sample


class RandomScale(Augmentation):
    """Another size, the aspect kept: bilinear for the picture, nearest for the segments, both by half-pixel centres."""

    def __init__(self, low: float = 0.5, high: float = 2.0, fit: Fit | None = None) -> None:
        """A ratio from low..high multiplies the limits of `fit`, or the picture's own size where that is None."""
        self.low, self.high, self.fit = low, high, fit or Fit()

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample.image.shape[-2:]
        size = self.fit.size((height, width), _uniform(self.low, self.high))
        if size == (height, width):
            return sample
        image = F.interpolate(sample.image[None], size=size, mode="bilinear", align_corners=False)[0]
        ids = sample.ids.index_select(1, _nearest(height, size[0])).index_select(2, _nearest(width, size[1]))
        return replace(sample, image=image, ids=ids)


class RandomCrop(Augmentation):
    """A part of the picture, or all of it along an axis where it is no longer than the crop."""

    def __init__(self, size: tuple[int, int], most: float = 0.75, tries: int = 10) -> None:
        """`size`: (height, width) px. A crop is drawn anew, `tries` times at most, while it shows fewer than two classes or
        one of them fills `most` or more of its pixels that have a class; `most` of 1 takes the first.
        """
        self.size, self.most, self.tries = size, most, tries

    def __call__(self, sample: Sample) -> Sample:
        for _ in range(self.tries if self.most < 1 else 0):
            crop = self._crop(sample)
            if _largest_share(crop.ids, crop.classes) < self.most:
                return crop
        return self._crop(sample)

    def _crop(self, sample: Sample) -> Sample:
        (height, width), (tall, wide) = sample.image.shape[-2:], self.size
        y, x = _below(max(height - tall, 0) + 1), _below(max(width - wide, 0) + 1)
        window = (slice(None), slice(y, y + tall), slice(x, x + wide))
        return replace(sample, image=sample.image[window].contiguous(), ids=sample.ids[window].contiguous())


class ResizedCrop(Augmentation):
    """A part of the picture of another area and aspect, stretched to a size, as classifiers are trained on.

    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015; ViT-P draws half of the picture or more.
    """

    def __init__(
        self,
        size: tuple[int, int],
        area: tuple[float, float] = (0.5, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        """`size`: (height, width) px. `area`: fractions of the picture's. `aspect`: widths by heights, even in their logarithm.

        A part that does not fit is drawn anew, 10 times at most; after these, and where a part leaves nothing that has a class,
        it is the whole picture.
        """
        self.size, self.area, self.aspect = size, area, aspect

    def __call__(self, sample: Sample) -> Sample:
        cut = stretched(self._part(sample), self.size)
        return cut if _named(cut) else stretched(sample, self.size)

    def _part(self, sample: Sample) -> Sample:
        height, width = sample.image.shape[-2:]
        for _ in range(10):
            area = height * width * _uniform(*self.area)
            aspect = math.exp(_uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < tall <= height and 0 < wide <= width:
                y, x = _below(height - tall + 1), _below(width - wide + 1)
                window = (slice(None), slice(y, y + tall), slice(x, x + wide))
                return replace(sample, image=sample.image[window], ids=sample.ids[window])
        return sample


class Rotate(Augmentation):
    """Turned about its centre by any angle, its size kept: bilinear for the picture, nearest for the segments."""

    def __init__(self, degrees: float = 60.0, fill: tuple[int, int, int] = (124, 116, 104)) -> None:
        """`degrees`: at most, either way. `fill`: RGB 0..255 of what is turned into the picture, which has no class; by default
        ImageNet's mean, rounded. Where nothing that has a class would be left the sample stays as it is.
        """
        self.degrees, self.fill = degrees, fill

    def __call__(self, sample: Sample) -> Sample:
        angle = math.radians(_uniform(-self.degrees, self.degrees))
        height, width = sample.image.shape[-2:]
        y = torch.arange(height)[:, None] + 0.5 - height / 2
        x = torch.arange(width) + 0.5 - width / 2
        # Where each pixel's centre comes from, px from the picture's corner.
        rows = math.cos(angle) * y - math.sin(angle) * x + height / 2
        columns = math.sin(angle) * y + math.cos(angle) * x + width / 2
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        nearest = sample.ids[:, rows.long().clamp(0, height - 1), columns.long().clamp(0, width - 1)]
        turned = replace(sample, ids=torch.where(inside, nearest, VOID))
        if not _named(turned):
            return sample
        fill = torch.tensor(self.fill, dtype=torch.float)[:, None, None]
        grid = torch.stack([2 * columns / width - 1, 2 * rows / height - 1], -1)
        # Outside is 0, and 0 is the colour that fills.
        image = F.grid_sample((sample.image - fill)[None], grid[None], align_corners=False)[0] + fill
        return replace(turned, image=image.round_().clamp_(0, 255).to(torch.uint8))


class Resize(Augmentation):
    """All of the picture, stretched to a size whatever its aspect."""

    def __init__(self, size: tuple[int, int]) -> None:
        """`size`: (height, width) px."""
        self.size = size

    def __call__(self, sample: Sample) -> Sample:
        return stretched(sample, self.size)


class RandomFlip(Augmentation):
    """Left for right."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, image=sample.image.flip(-1), ids=sample.ids.flip(-1)) if _chance(self.p) else sample


class Photometric(Augmentation):
    """Brightness, contrast, saturation and hue, each changed or not by the toss of a coin; contrast is first or last.

    Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, in mmsegmentation's order and ranges.
    """

    def __init__(
        self, brightness: float = 32.0, contrast: float = 0.5, saturation: float = 0.5, hue: float = 0.1, p: float = 0.5
    ) -> None:
        """`brightness` in 0..255 is added or taken away at most; `contrast` and `saturation` (of HSV) are multiplied by
        1 - c .. 1 + c; `hue`: turns of the colour circle at most, either way; `p`: the chance of each change.
        """
        self.brightness, self.contrast, self.saturation, self.hue, self.p = brightness, contrast, saturation, hue, p

    def __call__(self, sample: Sample) -> Sample:
        pixels = sample.image.float()
        if _chance(self.p):
            pixels = (pixels + _uniform(-self.brightness, self.brightness)).clamp_(0, 255)
        early = _chance(0.5)
        factor = _uniform(1 - self.contrast, 1 + self.contrast) if _chance(self.p) else 1.0
        if early and factor != 1:
            pixels = (pixels * factor).clamp_(0, 255)
        saturation = _uniform(1 - self.saturation, 1 + self.saturation) if _chance(self.p) else 1.0
        turn = _uniform(-self.hue, self.hue) if _chance(self.p) else 0.0
        if saturation != 1 or turn != 0:
            pixels = recolored(pixels, saturation, turn)
        if not early and factor != 1:
            pixels = (pixels * factor).clamp_(0, 255)
        return replace(sample, image=pixels.round_().to(torch.uint8))


class Pad(Augmentation):
    """Pixels without a class at the bottom and right, up to a size; an axis that is longer stays as it is."""

    def __init__(self, size: tuple[int, int], fill: tuple[int, int, int] = (124, 116, 104)) -> None:
        """`size`: (height, width) px. `fill`: RGB 0..255, best what the backbone normalises to about 0; by default
        ImageNet's mean, rounded.
        """
        self.size, self.fill = size, fill

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample.image.shape[-2:]
        tall, wide = max(height, self.size[0]), max(width, self.size[1])
        if (tall, wide) == (height, width):
            return sample
        image = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, tall, wide)
        image[:, :height, :width] = sample.image
        ids = F.pad(sample.ids, (0, wide - width, 0, tall - height), value=VOID)
        return replace(sample, image=image, ids=ids)


def stretched(sample: Sample, size: Size) -> Sample:
    """The sample at `size` px: bilinear for the picture, without aliases where it shrinks, nearest for the segments."""
    height, width = sample.image.shape[-2:]
    if (height, width) == tuple(size):
        return sample
    image = F.interpolate(sample.image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)[
        0
    ]
    ids = sample.ids.index_select(1, _nearest(height, size[0])).index_select(2, _nearest(width, size[1]))
    return replace(sample, image=image.round_().clamp_(0, 255).to(torch.uint8), ids=ids)


def recolored(pixels: Float[Tensor, "3 H W"], saturation: float, turn: float) -> Float[Tensor, "3 H W"]:
    """RGB 0..255 with its HSV saturation multiplied (and cut at 1) and its hue turned by `turn` of the colour circle."""
    red, green, blue = pixels
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    wanted = torch.minimum(chroma * saturation, value)
    chroma = chroma.clamp_min_(1e-6)
    if turn == 0:
        return value - (value - pixels) * (wanted / chroma)
    sixths = torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4)
    sixths = torch.where(value == red, (green - blue) / chroma, sixths) + 6 * turn
    channels = []
    for offset in (5, 3, 1):
        place = (sixths + offset).remainder_(6)
        channels.append(value - wanted * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels)


def _largest_share(ids: Int32[Tensor, "L H W"], classes: Int64[Tensor, " N"]) -> float:
    """The share that the most frequent class has of the pixels with a class; 1 where there are none."""
    pixels = torch.bincount(ids.flatten() + 1, minlength=len(classes) + 1)[1:]
    per_class = torch.bincount(classes, weights=pixels)
    total = float(per_class.sum())
    return float(per_class.max()) / total if total else 1.0


def _nearest(length: int, wanted: int) -> Int64[Tensor, " wanted"]:
    """Of `length` pixels, the one under the centre of each of `wanted`."""
    return ((torch.arange(wanted) + 0.5) * (length / wanted)).long().clamp_(max=length - 1)


def _named(sample: Sample) -> bool:
    """Whether a pixel of it has a class."""
    return bool((sample.ids != VOID).any())


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _chance(p: float) -> bool:
    return torch.rand(()).item() < p


def _below(count: int) -> int:
    return int(torch.randint(count, ()).item())
