"""The one image loader, used in training, evaluation and use, so that all three see the same pixels.

Whatever is not plainly a whole, ordinary picture inside its folder is refused with its path and the reason; it is
never replaced, and never read in part.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Protocol

from llava_kit.errors import Problem, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is read.  Pillow knows many more, and some of them start other programs."""
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""What Pillow's decoders raise on broken files, beside their own errors."""


class ImageLimits(Protocol):
    """The part of a recipe's limits that concerns images."""

    @property
    def max_pixels(self) -> int: ...
    @property
    def max_aspect(self) -> float: ...


def resolve_image(folder: Path, name: str) -> Path:
    """The path of the image ``name`` inside ``folder``; whether it exists shows when it is loaded.

    Raises:
        SampleError: the name is no relative path that stays inside the folder, links included.
    """
    if not name or "\0" in name:
        raise SampleError(Problem(repr(name), "this is no file name"))
    if "://" in name or name.startswith("data:"):
        raise SampleError(
            Problem(name, "images are read from files, not from addresses", f"put the file into {folder}")
        )
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise SampleError(Problem(name, "an image's path must be relative", f"to the image folder {folder}"))
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        raise SampleError(Problem(name, "the path leads out of the image folder", "it must not contain '..'"))
    path = Path(folder) / name
    root = os.path.realpath(folder)
    try:
        target = os.path.realpath(path)
    except (OSError, ValueError) as error:  # names that no file can have
        raise SampleError(Problem(ascii(name), f"this is no file name: {error}")) from error
    if os.path.commonpath([root, target]) != root:
        raise SampleError(Problem(str(path), f"a link leads out of the image folder {folder}"))
    return path


def load_image(path: Path, limits: ImageLimits) -> Image:
    """The picture in a file: RGB, upright, first frame, opaque.

    Raises:
        SampleError: there is no such file, it is no regular file, no picture, broken, or beyond the limits.
    """
    where = str(path)
    try:
        # O_NONBLOCK: a pipe that poses as an image must not hold up the run.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise SampleError(Problem(where, "there is no such image")) from None
    except (OSError, ValueError) as error:
        raise SampleError(Problem(where, f"the image cannot be opened: {_reason(error)}")) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise SampleError(Problem(where, "this is no regular file"))
    with os.fdopen(handle, "rb") as file:
        return decode_image(file, where, limits)


def decode_image(file: IO[bytes], where: str, limits: ImageLimits) -> Image:
    """The picture in an open file, as :func:`load_image` gives it; ``where`` names it in messages.

    Raises:
        SampleError: it is no picture, broken, or beyond the limits.
    """
    from PIL import Image, ImageFile, UnidentifiedImageError

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # somebody's import switched it on for the whole process
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, where, limits)
            image.load()
            return _to_rgb(_upright(image), where)
    except UnidentifiedImageError:
        what = "this is no picture in a format that is read"
        raise SampleError(Problem(where, what, f"use one of {', '.join(FORMATS)}")) from None
    except Image.DecompressionBombError as error:
        raise SampleError(Problem(where, f"the image is too large: {_reason(error)}")) from error
    except DECODE_ERRORS as error:
        raise SampleError(Problem(where, f"the image is broken: {_reason(error)}")) from error


def _check_size(size: tuple[int, int], where: str, limits: ImageLimits) -> None:
    """Refuse by the header alone, before a small file can unpack into gigabytes."""
    width, height = size
    if width < 1 or height < 1:
        raise SampleError(Problem(where, f"the image has no pixels: {width}×{height}"))
    if width * height > limits.max_pixels:
        what = f"the image is too large: {width}×{height} pixels, where {limits.max_pixels:,} are allowed"
        raise SampleError(Problem(where, what, "scale it down or raise limits.max_pixels"))
    if max(size) > limits.max_aspect * min(size):
        what = f"the image is too thin: {width}×{height}, where 1 to {limits.max_aspect:g} is allowed"
        raise SampleError(Problem(where, what, "crop it or raise limits.max_aspect"))


def _upright(image: Image) -> Image:
    """Turned as its EXIF orientation says; an EXIF block that cannot be read says nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def _to_rgb(image: Image, where: str) -> Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, where)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image, where: str) -> Image:
    """Grey of more than 8 bits, scaled by the range of its type; Pillow alone would cut everything above 255 off."""
    import numpy as np
    from PIL import Image

    grey_HW = np.asarray(image).astype(np.float64)
    low, high = grey_HW.min(), grey_HW.max()
    top = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= top):  # also false for NaN
        what = f"the grey values are out of range: {low:g} to {high:g}, where 0 to {top:g} is allowed"
        raise SampleError(Problem(where, what, "save the image with 8 or 16 bits"))
    return Image.fromarray(np.rint(grey_HW * (255.0 / top)).astype(np.uint8))


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
