"""Image files of every mode, orientation and kind of damage."""

import io

import numpy as np
import pytest
from PIL import Image

from inputs.images import ImageError, read_image

RAMP = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def file_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    image = read_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "YCbCr"])
def test_modes(mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = Image.fromarray(RAMP).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(file_of(image, kind)), expected)


@pytest.mark.parametrize("values", [RAMP.astype(np.uint16) * 257, RAMP.astype(np.int32) * 257])
def test_sixteen_bits_are_scaled(values):
    kind = "PNG" if values.dtype == np.uint16 else "TIFF"
    assert np.array_equal(pixels(file_of(Image.fromarray(values), kind))[..., 0], RAMP)


def test_transparency_is_put_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)
    found = pixels(file_of(Image.fromarray(rgba)))
    assert found[0, 0].tolist() == [200, 0, 0]
    assert found[0, 1].tolist() == found[1, 1].tolist() == [255, 255, 255]
    assert found[1, 0].tolist() == [127, 127, 127]
    palette = Image.fromarray(RAMP).convert("P")
    data = file_of(palette, transparency=0)
    assert pixels(data)[0, 0].tolist() == [255, 255, 255]
    assert pixels(file_of(Image.fromarray(rgba).convert("LA")))[0, 1].tolist() == [255, 255, 255]


def test_the_orientation_of_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    image = Image.fromarray(np.repeat(RAMP[:4], 3).reshape(4, 8, 3))
    turned = pixels(file_of(image, exif=exif))
    assert turned.shape == (8, 4, 3)
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert pixels(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cannot be read as an image (0 bytes)"),
        (b"<html>not found</html>", "cannot be read as an image (22 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "cannot be read as an image"),
        (file_of(NOISE)[:2000], "cannot be read as an image (2000 bytes)"),
        (file_of(NOISE, "JPEG")[:900], "cannot be read as an image (900 bytes)"),
        (file_of(NOISE)[:5000] + b"\0" * 4000, "cannot be read as an image"),
        (file_of(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "has floating-point values; convert it to 8 or 16 bits"),
    ],
    ids=["empty", "html", "lfs", "truncated-png", "truncated-jpeg", "damaged-png", "float"],
)
def test_what_cannot_be_read_is_one_line_with_the_name(data, problem):
    with pytest.raises(ImageError) as error:
        read_image(data, "photos/3.jpg")
    assert str(error.value).startswith(f"image photos/3.jpg: {problem}")
    assert "\n" not in str(error.value)


def test_an_image_that_is_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert pixels(file_of(Image.fromarray(RAMP))).shape == (8, 8, 3), "up to twice the limit Pillow only warns"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(ImageError, match=r"^image x: is too large: "):
        read_image(file_of(Image.fromarray(RAMP)), "x")
