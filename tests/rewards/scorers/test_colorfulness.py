"""Hasler and Süsstrunk's metric against numbers worked out by hand."""

import pytest
import torch

from diffusion.types import Prompt
from rewards.scorers.colorfulness import Colorfulness, colorfulness

RED, GREEN, BLUE, YELLOW, MAGENTA, CYAN = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)
GREY, BLACK, WHITE = (0.4, 0.4, 0.4), (0, 0, 0), (1, 1, 1)


def row(*colors):
    """[1, 3, 2, W], both rows the same pixels."""
    return torch.tensor(colors, dtype=torch.float32).T[None, :, None].repeat(1, 1, 2, 1)


def score(images):
    return Colorfulness()(images, [Prompt(str(i), "anything") for i in range(len(images))]).total


@pytest.mark.parametrize(
    ("colors", "expected"),
    [
        ((GREY,), 0),
        ((BLACK, GREY, WHITE), 0),
        ((RED,), 0.3 * 1.25**0.5),  # one colour spreads nowhere; (rg, yb) = (1, 0.5)
        ((BLUE,), 0.3),  # (0, -1)
        ((RED, GREEN), 1 + 0.3 * 0.5),  # (+-1, 0.5)
        ((YELLOW, BLUE), 1),  # (0, +-1)
        ((RED, CYAN), 1.25**0.5),  # +-(1, 0.5)
        ((RED, BLACK, BLACK, BLACK), (3 / 16 * 1.25) ** 0.5 + 0.3 * 1.25**0.5 / 4),
    ],
)
def test_a_few_pixels(colors, expected):
    assert score(row(*colors)).item() == pytest.approx(expected, abs=1e-7)


def test_the_most_colourful_image_reaches_the_bounds():
    # m of the docstring is 0.3 sqrt(1.25 / 1.09) = 0.32126 = 0.5 (2 share - 1), share 0.82126 of red and green.
    most = score(row(*[RED, GREEN] * 411, *[MAGENTA, CYAN] * 89)).item()
    assert most == pytest.approx((1.25 * 1.09) ** 0.5, abs=1e-5)
    low, high = Colorfulness.facts.bounds
    assert low < most < high < most + 1e-4


def test_the_grey_level_and_the_size_do_not_matter():
    noise = torch.rand(1, 3, 6, 4, generator=torch.Generator().manual_seed(0)) / 2
    assert score(noise + 0.4).item() == pytest.approx(score(noise).item(), abs=1e-6)
    assert score(noise.repeat(1, 1, 2, 3)).item() == pytest.approx(score(noise).item(), abs=1e-6)


@pytest.mark.parametrize("colors", [(GREY, GREY, GREY), (BLACK, WHITE, GREY)])
def test_the_gradient_of_a_grey_image_is_0(colors):
    images = row(*colors).requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert torch.equal(gradient, torch.zeros_like(images))


@pytest.mark.parametrize("tint", [1e-3, 1e-7, 1e-30])
def test_the_gradient_beside_grey_is_finite_and_does_not_fade(tint):
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = tint
    (gradient,) = torch.autograd.grad(score(images.requires_grad_()).sum(), images)
    assert gradient.isfinite().all()
    # M is proportional to the tint: (rg, yb) = tint (1, 0.5) in one of four pixels.
    assert gradient[0, 0, 0, 0].item() == pytest.approx((3 / 16 * 1.25) ** 0.5 + 0.3 * 1.25**0.5 / 4, rel=1e-6)


def test_the_gradient_of_one_colour_is_finite():
    images = row((0.3, 0.7, 0.1), (0.3, 0.7, 0.1), (0.3, 0.7, 0.1)).requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert gradient.isfinite().all()


def test_the_gradient_is_the_slope():
    noise = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(colorfulness, noise.requires_grad_())


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 3, 20, 28)])
def test_the_batch_leaves_every_bit_as_it_is(shape):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    together = score(noise)
    assert torch.equal(together, torch.cat([score(image[None]) for image in noise]))
    assert torch.equal(together.flip(0), score(noise.flip(0)))
    assert torch.equal(together, score(noise.contiguous(memory_format=torch.channels_last)))
