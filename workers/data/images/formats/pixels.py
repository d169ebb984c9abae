"""Pixels of an image file as they are meant: upright, RGB, 8 bits a channel."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from workers.data.images.formats.base import DECODE_ERRORS

#: What brings an image upright, by the value of its orientation tag; 1 needs nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Pillow's modes of more than 8 bits a channel. It cuts their values off at 255 when it converts them.
_INTEGERS, _FLOATS = ("I", "I;16", "I;16L", "I;16B", "I;16N"), ("F",)
#: TIFF's tag of the bits of a sample.
_BITS_PER_SAMPLE = 258


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has more than 8 bits a channel."""
    return image.mode in (*_INTEGERS, *_FLOATS)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Read the first frame, turn it as its EXIF data say, and scale deep pixels to 8 bits by the range of their type.

    ValueError where the range of the values is not that of 16 bits (integers) or of 0 to 1 (floats).
    """
    image.load()  # Pillow turns TIFF files while it loads them, and then drops the tag
    turn = _TURNS.get(_orientation(image))
    shallow = _to_8_bits(image) if is_deep(image) else image
    upright = shallow if turn is None else shallow.transpose(turn)
    return upright.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Read the orientation tag; 1 where there is none, or where the EXIF data are damaged: the pixels are not."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return found if isinstance(found, int) else 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    top = 1.0 if image.mode in _FLOATS else float(_largest(image))
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top:  # not a number is not either
        raise ValueError(f"pixels of mode {image.mode} have values of {low:g} to {high:g}; allowed: 0 to {top:g}")
    if image.mode == "I" and image.format == "TIFF" and 0 < high <= 255:
        raise ValueError(
            f"32-bit pixels have values of {low:g} to {high:g}, so whether 8 bits or 16 are meant is open; "
            "allowed: 16-bit values, or a file of 8 bits a pixel"
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _largest(image: Image.Image) -> int:
    """The largest value of an integer type; 32-bit files hold 16-bit values, some TIFF files 12-bit ones."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return int((1 << min(16, int(bits[0]))) - 1)
