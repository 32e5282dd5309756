"""Brightness and symmetry against numbers worked out by hand."""

import pytest
import torch

from diffusion.types import Prompt
from rewards.scorers.brightness import Brightness
from rewards.scorers.symmetry import Symmetry

PROMPT = [Prompt("1", "anything")]


def flat(red, green, blue):
    return torch.tensor([red, green, blue])[None, :, None, None].expand(1, 3, 4, 6)


@pytest.mark.parametrize(
    ("color", "brightness"),
    [((0, 0, 0), 0), ((1, 1, 1), 1), ((1, 0, 0), 0.2126), ((0, 1, 0), 0.7152), ((0, 0, 1), 0.0722), ((0.5, 0.5, 0.5), 0.5)],
)
def test_brightness_of_a_flat_image(color, brightness):
    assert Brightness()(flat(*map(float, color)), PROMPT).total.item() == pytest.approx(brightness, abs=1e-6)


def test_brightness_gradient():
    images = torch.rand(1, 3, 4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(Brightness()(images, PROMPT).total.sum(), images)
    assert gradient == pytest.approx(flat(0.2126 / 24, 0.7152 / 24, 0.0722 / 24), abs=1e-8)


def row(*pixels):
    """One row of grey pixels."""
    return torch.tensor(pixels)[None, None, None, :].expand(1, 3, 1, -1)


@pytest.mark.parametrize(
    ("pixels", "symmetry"),
    [
        ((0.2, 0.7, 0.7, 0.2), 1),
        ((0.1, 0.9, 0.1), 1),  # the middle column mirrors itself
        ((0.0, 0.0, 1.0, 1.0), 0),
        ((0.0, 0.5, 0.5, 0.4), 1 - (0.4 + 0 + 0 + 0.4) / 4),
    ],
)
def test_symmetry_of_a_row(pixels, symmetry):
    assert Symmetry()(row(*pixels), PROMPT).total.item() == pytest.approx(symmetry, abs=1e-6)


def test_symmetry_is_about_left_and_right_only():
    upside_down = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(1, 3, 2, 2)
    assert Symmetry()(upside_down, PROMPT).total.item() == 1


def test_symmetry_gradient_does_not_fade():
    images = row(0.5, 0.3, 0.3001, 0.9).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Symmetry()(images, PROMPT).total.sum(), images)
    # Each pixel stands in two of the 12 differences.
    assert gradient[0, 0, 0].tolist() == pytest.approx([2 / 12, 2 / 12, -2 / 12, -2 / 12])
