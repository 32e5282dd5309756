"""The proxy of JPEG's bits: its steps against Pillow and scipy, its sums by hand, its scores against real files."""

import math
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dctn

import rewards
from diffusion.types import Prompt
from rewards.scorers.compressibility import Compressibility, bits_per_pixel, blocks, dct, dct_matrix, rate, size, steps, ycbcr
from rewards.scorers.jpeg_size import JPEGSize


def prompts(images):
    return [Prompt(str(i), "anything") for i in range(len(images))]


def score(images, **knobs):
    return Compressibility(**knobs)(images, prompts(images)).total


def flat(color, height=16, width=16):
    return torch.tensor(color, dtype=torch.float32)[None, :, None, None].expand(1, 3, height, width)


def bits(c):
    """Of one coefficient."""
    return math.log2(1 + math.sqrt(c**2 + 0.01) - 0.1)


def test_the_transform_is_orthonormal():
    assert (dct_matrix() @ dct_matrix().T - torch.eye(8)).abs().max() < 1e-15


def test_the_transform_is_the_dct():
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert np.allclose(dct(noise), dctn(noise.numpy(), axes=(1, 2), norm="ortho"), atol=1e-14)
    assert dct(torch.ones(8, 8))[0, 0].item() == pytest.approx(8)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 95, 100])
def test_the_steps_are_those_that_pillow_writes(quality):
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    expected = [tables[0], tables[1], tables[1]]
    assert steps(quality).flatten(1).tolist() == [list(table) for table in expected]


def test_the_colours_are_those_of_pillow():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).convert("YCbCr")).astype(float) - 128
    planes = ycbcr(torch.from_numpy(image / 255).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(planes - expected).max() <= 1  # Pillow's are integers


def test_blocks_lie_as_in_reading():
    numbers = torch.arange(16.0 * 24).view(1, 1, 16, 24).expand(1, 3, 16, 24)
    cut = blocks(numbers)
    assert cut.shape == (1, 3, 2, 3, 8, 8)
    assert torch.equal(cut[0, 0, 1, 2], numbers[0, 0, 8:16, 16:24])


def test_blocks_are_filled_with_the_last_row_and_column():
    noise = torch.rand(1, 3, 9, 15, generator=torch.Generator().manual_seed(0))
    filled = torch.cat([noise, noise[..., -1:]], 3)
    filled = torch.cat([filled, *[filled[:, :, -1:]] * 7], 2)
    assert filled.shape == (1, 3, 16, 16)
    assert torch.equal(blocks(noise), blocks(filled))
    assert torch.equal(score(noise), score(filled))


def test_rate_by_hand():
    coefficients = torch.zeros(1, 3, 1, 2, 8, 8)
    coefficients[0, 0, 0, :, 0, 0] = torch.tensor([3.0, 10.0])  # costs 3, then 7 more
    coefficients[0, 2, 0, 1, 5, 6] = -15
    assert rate(coefficients).item() == pytest.approx(2 + 3 + 4, abs=0.07)  # log2 of 1 + 3, 1 + 7 and 1 + 15
    assert rate(coefficients).item() == pytest.approx(bits(3) + bits(7) + bits(15))


def test_size_is_the_absolute_value_without_its_kink():
    numbers = torch.tensor([0, 0.24, -0.24, 0.75, -100], dtype=torch.float64, requires_grad=True)
    sizes = size(numbers)  # 0.1^2 + 0.24^2 = 0.26^2
    assert sizes.tolist() == pytest.approx([0, 0.16, 0.16, 0.65664, 99.90005], abs=1e-5)
    (slope,) = torch.autograd.grad(sizes.sum(), numbers)
    assert slope.tolist() == pytest.approx([0, 24 / 26, -24 / 26, 0.99123, -1], abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 12)])
def test_a_flat_image_costs_its_first_block_s_first_coefficients(height, width):
    """At quality 50 the first steps are 16 and 17; 256 pixels in four blocks."""
    assert score(flat((1, 1, 1), height, width), quality=50).item() == pytest.approx(-bits(8 * 127 / 16) / 256, abs=1e-7)
    luminance = bits(8 * (128 - 0.299 * 255) / 16)
    blue, red = bits(8 * 255 * 0.299 / 1.772 / 17), bits(8 * 127.5 / 17)
    expected = -(luminance + blue + red) / 256
    assert score(flat((1, 0, 0), height, width), quality=50).item() == pytest.approx(expected, abs=1e-7)


def test_grey_of_128_costs_nothing():
    assert score(flat((128 / 255,) * 3)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("vertical", "step"), [(False, 11), (True, 12)])
def test_one_wave_costs_one_coefficient(vertical, step):
    """The second entries of the table's first row and first column are 11 and 12."""
    wave = torch.cos((2 * torch.arange(8) + 1) * math.pi / 16) / 4 + 128 / 255
    image = wave.expand(1, 3, 8, 8)
    given = score(image.transpose(2, 3) if vertical else image, quality=50).item()
    assert given == pytest.approx(-bits(255 / 4 * 2 * 8**0.5 / step) / 64, abs=1e-5)


@pytest.fixture(scope="module")
def sweep():
    """Six smooth images, each with 12 amounts of noise: [72, 3, 64, 64]."""
    rng = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(6, 3, 5, 5, generator=rng), (64, 64), mode="bicubic", align_corners=True)
    noise = torch.randn(6, 3, 64, 64, generator=rng)
    levels = torch.linspace(0, 0.4, 12)[:, None, None, None, None]
    return (smooth * 0.6 + 0.2 + levels * noise).clamp(0, 1).flatten(0, 1)


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_it_goes_with_the_size_of_the_file(sweep, quality):
    real = JPEGSize(quality)(sweep, prompts(sweep)).total
    pair = torch.stack([score(sweep, quality=quality), real])
    assert torch.corrcoef(pair)[0, 1] > 0.98


def test_lower_quality_costs_less(sweep):
    scores = torch.stack([score(sweep[6:], quality=quality) for quality in (10, 30, 50, 75, 95, 100)])
    assert (scores.diff(dim=0) < 0).all()


def test_no_image_costs_more_than_the_bounds():
    rng = torch.Generator().manual_seed(0)
    harsh = torch.rand(8, 3, 32, 32, generator=rng).round()
    scores = score(harsh, quality=100)
    assert (scores > Compressibility.facts.bounds[0]).all()
    assert (scores < 0.7 * Compressibility.facts.bounds[0]).all()


@pytest.mark.parametrize("size", [(8, 8), (9, 10)])
def test_the_gradient_is_the_slope(size):
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda images: bits_per_pixel(images, 95), noise.requires_grad_())


@pytest.mark.parametrize("level", [0.0, 0.3, 128 / 255, 1.0])
def test_the_gradient_of_a_flat_image_is_that_of_its_first_block_s_mean(level):
    images = torch.full((1, 3, 12, 20), level, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert gradient.isfinite().all()
    first = gradient[..., :8, :8]
    assert (first - first.mean((2, 3), keepdim=True)).abs().max() < 1e-9
    assert gradient[..., 8:].abs().max() < 1e-9
    assert gradient[..., 8:, :].abs().max() < 1e-9


def test_climbing_makes_the_file_smaller(sweep):
    before = sweep[24:30]
    images = before.clone().requires_grad_()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(score(images).sum(), images)
        images = (images + 0.01 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    size = JPEGSize()
    assert (size(images, prompts(images)).total > size(before, prompts(before)).total).all()


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 3, 20, 28)])
def test_the_batch_leaves_every_bit_as_it_is(shape):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    together = score(noise)
    assert torch.equal(together, torch.cat([score(image[None]) for image in noise]))
    assert torch.equal(together.flip(0), score(noise.flip(0)))
    assert torch.equal(together, score(noise.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("quality", [0, 101])
def test_qualities_that_jpeg_does_not_have(quality):
    with pytest.raises(ValueError, match=rf"^rewards\.0\.quality = {quality}: Input should be "):
        rewards.resolve([{"name": "compressibility", "quality": quality}])
