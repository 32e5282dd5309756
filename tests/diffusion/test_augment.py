"""DiffAugment: each change by hand on a 2x2 image, the public code's formulas, draws, gradients."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.augment import Strengths, apply_augmentation, augment, draw_augmentation

NONE = Strengths(0, 0, 0, 0, 0)
RGB = torch.tensor([[0.2, 0.4], [0.6, 0.8]]) + torch.tensor([-0.1, 0.0, 0.1])[:, None, None]
"""[3, 2, 2]: the mean over channels is the matrix, the mean over the image 0.5."""


def only(draw=(), **strengths):
    """RGB after the changes that have a strength, for the first numbers of the draw, the others 0.5, in the middle."""
    numbers = torch.tensor([[*draw, *[0.5] * (7 - len(draw))]])
    return apply_augmentation(RGB[None], numbers, Strengths(**{**vars(NONE), **strengths}))[0]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_brightness_adds_the_same_to_all():
    torch.testing.assert_close(only([0.9], brightness=0.25), RGB + 0.2)
    torch.testing.assert_close(only([0.0], brightness=0.25), RGB - 0.25)


def test_saturation_scales_the_distance_to_the_mean_over_channels():
    red = torch.tensor([[0.2, 0.4], [0.6, 0.8]]) - 0.15
    torch.testing.assert_close(only([0.5, 0.75], saturation=1)[0], red)
    grey = only([0.5, 0.0], saturation=1)
    torch.testing.assert_close(grey, torch.tensor([[0.2, 0.4], [0.6, 0.8]]).expand(3, 2, 2))


def test_contrast_scales_the_distance_to_the_mean_over_the_image():
    green = torch.tensor([[0.35, 0.45], [0.55, 0.65]])
    torch.testing.assert_close(only([0.5, 0.5, 0.0], contrast=0.5)[1], green)


def test_translation_shifts_by_whole_pixels_and_leaves_grey():
    """At strength 0.5 a side of 2 shifts by -1, 0 or 1, each for a third of the numbers."""
    down = only([0.5, 0.5, 0.5, 0.1, 0.5], translation=0.5)
    torch.testing.assert_close(down, torch.stack([torch.full((3, 2), 0.5), RGB[:, 0]], dim=1))
    left = only([0.5, 0.5, 0.5, 0.5, 0.9], translation=0.5)
    torch.testing.assert_close(left, torch.stack([RGB[:, :, 1], torch.full((3, 2), 0.5)], dim=2))
    assert torch.equal(only([0.5] * 7, translation=0.5), RGB)


def test_cutout_leaves_grey():
    """At strength 0.5 a side of 2 loses one pixel, the first or the second."""
    expected = RGB.clone()
    expected[:, 0, 1] = 0.5
    assert torch.equal(only([0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.8], cutout=0.5), expected)


def public_code(x, draw):
    """DiffAugment_pytorch.py of mit-han-lab/data-efficient-gans for images x in [-1, 1], with given uniform numbers [B, 7]."""
    column = draw[:, :, None, None, None].to(x)
    x = x + (column[:, 0] - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (column[:, 1] * 2) + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    x = (x - mean) * (column[:, 2] + 0.5) + mean
    sides = x.shape[2:]
    whole = draw[:, 3:, None, None]
    shift = [int(side * 0.125 + 0.5) for side in sides]
    shift_x, shift_y = ((whole[:, i] * (2 * shift[i] + 1)).long() - shift[i] for i in range(2))
    batch, grid_x, grid_y = torch.meshgrid(*(torch.arange(n) for n in (len(x), *sides)), indexing="ij")
    grid_x = torch.clamp(grid_x + shift_x + 1, 0, sides[0] + 1)
    grid_y = torch.clamp(grid_y + shift_y + 1, 0, sides[1] + 1)
    x = F.pad(x, [1, 1, 1, 1]).permute(0, 2, 3, 1)[batch, grid_x, grid_y].permute(0, 3, 1, 2)
    size = [int(side * 0.5 + 0.5) for side in sides]
    offset_x, offset_y = ((whole[:, 2 + i] * (sides[i] + 1 - size[i] % 2)).long() for i in range(2))
    batch, grid_x, grid_y = torch.meshgrid(*(torch.arange(n) for n in (len(x), *size)), indexing="ij")
    grid_x = torch.clamp(grid_x + offset_x - size[0] // 2, min=0, max=sides[0] - 1)
    grid_y = torch.clamp(grid_y + offset_y - size[1] // 2, min=0, max=sides[1] - 1)
    mask = torch.ones(len(x), *sides).to(x)
    mask[batch, grid_x, grid_y] = 0
    return x * mask.unsqueeze(1)


@pytest.mark.parametrize("sides", [(8, 8), (9, 6), (5, 12)])
def test_the_same_as_the_public_code(sides):
    images = torch.rand(32, 3, *sides, generator=rng(), dtype=torch.float64)
    draw = draw_augmentation(32, rng(1))
    expected = (public_code(2 * images - 1, draw) + 1) / 2
    torch.testing.assert_close(apply_augmentation(images, draw), expected, rtol=0, atol=1e-7)


def test_without_strength_nothing_changes():
    images = torch.rand(4, 3, 5, 6, generator=rng())
    assert torch.equal(augment(images, rng(), NONE), images)


def test_two_batches_can_share_a_draw():
    images = torch.rand(4, 3, 8, 8, generator=rng())
    draw = draw_augmentation(4, rng(1))
    both = apply_augmentation(images, draw), apply_augmentation(images.clone(), draw)
    assert torch.equal(*both)
    assert torch.equal(both[0][1:3], apply_augmentation(images[1:3], draw[1:3])), "rows are independent"


def test_the_seed_determines_the_result():
    images = torch.rand(4, 3, 8, 8, generator=rng())
    first, same, other = (augment(images, rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first, apply_augmentation(images, draw_augmentation(4, rng(3))))
    assert not torch.equal(*augment(images[:1].repeat(2, 1, 1, 1), rng(3))), "each image has its own numbers"


def test_the_gradient_against_finite_differences():
    images = torch.rand(2, 3, 3, 4, generator=rng(), dtype=torch.float64, requires_grad=True)
    draw = draw_augmentation(2, rng(1))
    assert torch.autograd.gradcheck(lambda x: apply_augmentation(x, draw, Strengths(translation=0.4)), images)


def test_the_largest_number_stays_in_range():
    """Of a float32 in [0, 1), the largest is 1 - 2^-24."""
    most = torch.full((1, 7), 1 - 2**-24)
    for side in range(2, 100):
        square = torch.rand(1, 3, side, side, generator=rng())
        shifted = apply_augmentation(square, most, Strengths(0, 0, 0, 0.5, 0))
        half = int(side * 0.5 + 0.5)
        assert torch.equal(shifted[:, :, : side - half, : side - half], square[:, :, half:, half:])
