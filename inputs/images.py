"""Image files as people have them, read as 8-bit RGB: any mode, orientation and size, and every way to fail in one line."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageError(RuntimeError):
    """An image that cannot be read; the message is one line that names it."""


def read_image(data: bytes, name: str) -> Image.Image:
    """The content of an image file -> RGB. name: for errors. Of an animation, the first frame.

    Turned as its EXIF orientation says; transparency is put on white; 16-bit grey is scaled to 8 bits. Raises ImageError for
    what is no image, is damaged or truncated, has floating-point values, which have no fixed range, or is too large for
    Pillow's limit (about 180 megapixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except _FloatingPoint:
        problem = "has floating-point values; convert it to 8 or 16 bits"
    except Image.DecompressionBombError as error:
        problem = f"is too large: {error}"
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        problem = f"cannot be read as an image ({len(data)} bytes): {str(error).splitlines()[0] if str(error) else error!r}"
    raise ImageError(f"image {name}: {problem}")


class _FloatingPoint(Exception):
    pass


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise _FloatingPoint
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
