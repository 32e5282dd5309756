"""The file's size, against Pillow itself."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from diffusion.types import Prompt
from rewards.scorers.jpeg_size import JPEGSize, jpeg_bytes


def score(images, **knobs):
    return JPEGSize(**knobs)(images, [Prompt(str(i), "anything") for i in range(len(images))]).total


@pytest.fixture
def noise():
    """Black, then more and more noise."""
    levels = torch.tensor([0.0, 0.1, 0.3, 1.0])[:, None, None, None]
    return torch.rand(4, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * levels


def test_it_is_minus_the_kilobytes_of_pillow_s_file(noise):
    """The convention's own call: Pillow's default at quality 95, which is 4:2:0."""
    for image, given in zip(noise, score(noise).tolist(), strict=True):
        file = BytesIO()
        Image.fromarray(np.rint(image.numpy() * 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=95)
        assert given == pytest.approx(-len(file.getvalue()) / 1000, rel=1e-6)


def test_it_is_below_0_and_falls_with_noise(noise):
    scores = score(noise)
    assert (scores < JPEGSize.facts.bounds[1]).all()
    assert (scores.diff() < 0).all()


def test_colours_are_kept_at_half_the_resolution():
    """Colours of one luminance that change from pixel to pixel average to grey, and are then as cheap as grey."""
    stripes = np.full((16, 16, 3), 128, np.uint8)
    stripes[:, ::2, 2] += 40
    stripes[:, 1::2, 2] -= 40
    full = BytesIO()
    Image.fromarray(stripes).save(full, "JPEG", quality=95, subsampling="4:4:4")
    assert jpeg_bytes(stripes, 95) < full.tell()


def test_images_are_rounded_to_8_bits():
    image = torch.zeros(1, 3, 16, 16)
    image[..., ::2] = 0.49 / 255
    assert torch.equal(score(image), score(torch.zeros(1, 3, 16, 16)))
    image[..., ::2] = 0.51 / 255
    assert score(image, quality=100) < score(torch.zeros(1, 3, 16, 16), quality=100)


def test_lower_quality_makes_smaller_files(noise):
    scores = torch.stack([score(noise[2:], quality=quality) for quality in (10, 50, 75, 95, 100)])
    assert (scores.diff(dim=0) < 0).all()


def test_no_gradient(noise):
    scores = score(noise.requires_grad_())
    assert not scores.requires_grad
    assert torch.equal(scores, score(noise.detach()))


def test_the_batch_leaves_every_bit_as_it_is(noise):
    assert torch.equal(score(noise), torch.cat([score(image[None]) for image in noise]))
    assert torch.equal(score(noise), score(noise.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("quality", [0, 101])
def test_qualities_that_jpeg_does_not_have(quality):
    with pytest.raises(ValueError, match=rf"^rewards\.0\.quality = {quality}: Input should be "):
        rewards.resolve([{"name": "jpeg_size", "quality": quality}])
