"""RMS contrast against numbers worked out by hand."""

import pytest
import torch

from diffusion.types import Prompt
from rewards.scorers.brightness import Brightness
from rewards.scorers.contrast import Contrast, contrast


def row(*colors):
    """[1, 3, 2, W], both rows the same pixels; a number is a grey one."""
    colors = [(color,) * 3 if isinstance(color, (int, float)) else color for color in colors]
    return torch.tensor(colors, dtype=torch.float32).T[None, :, None].repeat(1, 1, 2, 1)


def score(images):
    return Contrast()(images, [Prompt(str(i), "anything") for i in range(len(images))]).total


@pytest.mark.parametrize(
    ("colors", "expected"),
    [
        ((0.3, 0.3, 0.3), 0),
        ((0, 1), 0.5),
        ((0, 0, 0, 1), 3**0.5 / 4),
        ((0.2, 0.4, 0.6), 0.2 * (2 / 3) ** 0.5),  # over 3 pixels, not 2
        (((1, 0, 0), (0, 0, 0)), 0.2126 / 2),
        (((0, 1, 0), (0, 0, 1)), (0.7152 - 0.0722) / 2),
    ],
)
def test_a_few_pixels(colors, expected):
    assert score(row(*colors)).item() == pytest.approx(expected, abs=1e-7)


def test_half_black_half_white_is_the_upper_bound():
    halves = torch.zeros(1, 3, 32, 32)
    halves[..., 16:] = 1
    assert score(halves).item() == Contrast.facts.bounds[1] == 0.5


def test_it_is_the_spread_of_brightness():
    noise = torch.rand(1, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    pixels = noise.flatten(2).permute(2, 1, 0)[..., None]
    brightness = Brightness()(pixels, [Prompt(str(i), "anything") for i in range(24)]).total
    assert score(noise).item() == pytest.approx(brightness.std(correction=0).item(), abs=1e-6)


def test_colours_of_one_luminance_have_no_contrast():
    red = 0.5
    assert score(row((red, 0, 0), (0, red * 0.2126 / 0.7152, 0))).item() == pytest.approx(0, abs=1e-7)


def test_the_gradient_of_a_black_image_is_0():
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert torch.equal(gradient, torch.zeros_like(images))


@pytest.mark.parametrize("level", [0.1, 0.3, 0.7, 1.0])
def test_the_gradient_of_a_flat_image_is_finite(level):
    images = torch.full((1, 3, 5, 7), level, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("step", [1e-3, 1e-7, 1e-30])
def test_the_gradient_beside_flat_does_not_fade(step):
    images = torch.zeros(1, 3, 2, 2)
    images[0, :, 0, 0] = step
    (gradient,) = torch.autograd.grad(score(images.requires_grad_()).sum(), images)
    # Contrast is proportional to the step, sqrt(3) / 4 of it for one pixel of four.
    assert gradient[0, :, 0, 0].tolist() == pytest.approx([3**0.5 / 4 * share for share in (0.2126, 0.7152, 0.0722)], rel=1e-6)


def test_the_gradient_is_the_slope():
    noise = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(contrast, noise.requires_grad_())


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 3, 20, 28)])
def test_the_batch_leaves_every_bit_as_it_is(shape):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    together = score(noise)
    assert torch.equal(together, torch.cat([score(image[None]) for image in noise]))
    assert torch.equal(together.flip(0), score(noise.flip(0)))
    assert torch.equal(together, score(noise.contiguous(memory_format=torch.channels_last)))
