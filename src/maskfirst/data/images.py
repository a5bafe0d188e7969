"""Pictures and label maps from untrusted files: sizes are checked before decoding, mistakes are named.

The formats are few on purpose; each file is opened by the decoder that its first bytes ask for and by no other.
"""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from maskfirst.errors import UserError

PIXELS = 178_000_000
"""The most pixels a picture may have."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

T = TypeVar("T")
Readable = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""What a picture may be given as: see `as_rgb`."""
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture, its label map or its masks that cannot be read; the message names the file and what is wrong with it.

    It is of this picture alone: whoever goes through many names it and goes on.
    """


class TooLargeError(ImageError):
    """A picture of more pixels than are taken, which was not decoded."""


def read_image(path: Path | str, limit: int = PIXELS) -> UInt8[Tensor, "3 H W"]:
    """A picture as RGB 0..255, upright by its EXIF orientation; the first one of an animation.

    Grey, 1-bit, palette, 16-bit and CMYK are converted, alpha is dropped. `limit`: the most pixels.
    Raises ImageError.
    """
    return _read(Path(path), limit, _rgb)


def as_rgb(picture: Readable, limit: int = PIXELS) -> UInt8[Tensor, "3 H W"]:
    """A picture of any kind as RGB 0..255.

    A path, or the bytes of a file; one of Pillow's; a numpy array of bytes, (H, W), (H, W, 1), (H, W, 3) or with alpha
    (H, W, 4), in the order red, green, blue; or a tensor (3, H, W) of bytes.

    `limit`: the most pixels of what may not be decoded yet. Raises ImageError, which says what would do.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(Path(picture), limit)
    if isinstance(picture, bytes):
        return _decoded(io.BytesIO(picture), "these bytes", limit, _rgb)
    if isinstance(picture, Image.Image):
        name = "this picture of Pillow's"
        _check_size(picture, name, limit)
        return _converted(lambda: _rgb(_upright(picture), b""), name)
    if isinstance(picture, np.ndarray):
        return _of_array(picture)
    if isinstance(picture, Tensor):
        return _of_tensor(picture)
    raise ImageError(
        f"{type(picture).__name__}: no picture; give a path, the bytes of a file, a picture of Pillow's, or an array or a "
        "tensor of bytes"
    )


def _of_array(array: np.ndarray) -> UInt8[Tensor, "3 H W"]:
    shape = tuple(array.shape)
    if array.dtype != np.uint8:
        remedy = "(255 * array).round().astype(np.uint8)" if array.dtype.kind == "f" else "array.astype(np.uint8)"
        raise ImageError(f"an array of {array.dtype} {shape}: a picture has bytes 0..255; {remedy} makes some of it")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in shape:
        hint = "; array.transpose(1, 2, 0) turns it" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(
            f"an array of shape {shape}: a picture is (height, width), or that with 1, 3 or 4 channels{hint}"
        )
    channels = np.ascontiguousarray(array[..., :3].transpose(2, 0, 1))
    # A copy where it was none yet, as the caller may write into his array.
    return torch.from_numpy(channels.copy() if np.shares_memory(channels, array) else channels).expand(3, -1, -1)


def _of_tensor(tensor: Tensor) -> UInt8[Tensor, "3 H W"]:
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.uint8:
        remedy = "(255 * tensor).round().byte()" if tensor.is_floating_point() else "tensor.byte()"
        raise ImageError(f"a tensor of {tensor.dtype} {shape}: a picture has bytes 0..255; {remedy} makes some of it")
    if tensor.ndim != 3 or shape[0] != 3 or 0 in shape:
        hint = "; tensor.permute(2, 0, 1) turns it" if tensor.ndim == 3 and shape[2] == 3 else ""
        raise ImageError(f"a tensor of shape {shape}: a picture is (3, height, width){hint}")
    return tensor


def read_label_map(path: Path | str, colors: bool = False, limit: int = PIXELS) -> Integer[np.ndarray, "H W"]:
    """The numbers that a label map holds: 8-bit or 16-bit grey, 1-bit, or the indices (not the colours) of a palette.

    With `colors`, the colours instead, packed as r * 65536 + g * 256 + b. `limit`: the most pixels. Raises ImageError.
    """
    return _read(Path(path), limit, _packed if colors else _indices)


def _read(path: Path, limit: int, convert: Callable[[Image.Image, bytes], T]) -> T:
    """`convert` of the upright picture and the first bytes of its file."""
    try:
        with open(path, "rb") as file:
            return _decoded(file, str(path), limit, convert)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(
    file: io.BufferedReader | io.BytesIO, name: str, limit: int, convert: Callable[[Image.Image, bytes], T]
) -> T:
    """As `_read`, of an open file that is called `name`."""

    def found() -> T:
        head = file.read(32)
        file.seek(0)
        image = _opened(file, head)
        _check_size(image, name, limit)
        _load(image)
        return convert(_upright(image), head)

    return _converted(found, name)


def _check_size(image: Image.Image, name: str, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise TooLargeError(
            f"{name}: {width} x {height} px, more than the limit of {limit / 1e6:.4g} million; not decoded"
        )


def _converted(work: Callable[[], T], name: str) -> T:
    """What Pillow makes of a picture that is called `name`. Raises ImageError in place of all that Pillow raises."""
    try:
        return work()
    except TooLargeError:
        raise
    except _UnfitError as error:
        raise ImageError(f"{name}: {error}") from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it") from error
    except Exception as error:
        # Only Pillow ran, on bytes that anyone may have written: whatever it raises speaks of the file.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageError(f"{name}: broken or cut short: {reason}") from error


class _UnfitError(ValueError):
    """A picture of a kind that is not taken."""


def _opened(file: io.BufferedReader | io.BytesIO, head: bytes) -> Image.Image:
    """The picture with its header read, without its pixels.

    `Image.open` is not used, as it warns about large pictures by a limit that is the whole process's.
    """
    if not head:
        raise _UnfitError("the file is empty (0 bytes)")
    if head.startswith(JPEG):
        return JpegImagePlugin.JpegImageFile(file)
    if head.startswith(PNG):
        return PngImagePlugin.PngImageFile(file)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImagePlugin.TiffImageFile(file)
    if head.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile(file)
    raise _UnfitError("not a JPEG, PNG, WebP, TIFF, BMP or GIF file")


def _load(image: Image.Image) -> None:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
        return
    with warnings.catch_warnings():
        # This decoder alone warns by Pillow's own limit. The others do without, as the filters are all threads'.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # A broken EXIF block says nothing about the pixels.
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, head: bytes) -> UInt8[Tensor, "3 H W"]:
    if image.mode.startswith("I;16"):
        # The high byte, which is also what the decoders keep of 16-bit RGB.
        return torch.from_numpy((_grey16(image) >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
    if image.mode in ("I", "F"):
        raise _UnfitError(f"pixels of 32 bits ({'integers' if image.mode == 'I' else 'floats'}); save it with 8 or 16")
    if image.mode == "P" and "transparency" in image.info:
        # By way of RGBA, or Pillow warns that it is about to drop the transparency.
        image = image.convert("RGBA")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _indices(image: Image.Image, head: bytes) -> Integer[np.ndarray, "H W"]:
    if head.startswith(JPEG):
        raise _UnfitError("a JPEG, which blurs class numbers into each other; label maps must be lossless, as PNG is")
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    if image.mode in ("L", "LA", "P", "PA"):
        values = np.array(image if len(image.mode) == 1 else image.getchannel(0))
        # Pillow stretches the values of 2-bit and 4-bit grey PNGs to 0..255. Byte 24 of a PNG: bits; byte 25: 0 for grey.
        stretch = {2: 85, 4: 17}.get(head[24], 1) if head.startswith(PNG) and head[25] == 0 else 1
        return values // np.uint8(stretch)
    if image.mode.startswith("I;16"):
        return _grey16(image)
    if image.mode == "I":
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise _UnfitError(f"numbers from {values.min()} to {values.max()}; those of a label map lie in 0..65535")
        return values.astype(np.uint16)
    raise _UnfitError(
        f"colours ({image.mode}) in place of class numbers; save it as one channel of numbers, "
        "or set `colors: true` if it is painted in the vocabulary's colours"
    )


def _packed(image: Image.Image, head: bytes) -> Integer[np.ndarray, "H W"]:
    if head.startswith(JPEG):
        raise _UnfitError("a JPEG, which blurs colours into each other; label maps must be lossless, as PNG is")
    red, green, blue = _rgb(image, head).numpy().astype(np.int32)
    return red << 16 | green << 8 | blue


def _grey16(image: Image.Image) -> Integer[np.ndarray, "H W"]:
    return np.array(image).astype(np.uint16)
