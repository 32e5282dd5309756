import numpy as np
import pytest
import torch

from worlds.glyphs import (
    COLORS,
    DIGITS,
    Scene,
    Thing,
    digit_bitmaps,
    glyph_masks,
    parse,
    random_scene,
    render,
)
from worlds.glyphs.renderer import BACKGROUND, place


def test_images_are_float32_rgb_in_range_and_depend_on_the_seed():
    scenes = [random_scene(np.random.default_rng(i)) for i in range(20)]
    images = render(scenes, seed=3)
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, render(scenes, seed=3))
    assert not torch.equal(images, render(scenes, seed=4))


def test_an_image_does_not_depend_on_its_batch():
    scenes = [random_scene(np.random.default_rng(i)) for i in range(9)]
    torch.testing.assert_close(render(scenes, seed=0)[:4], render(scenes[:4], seed=0), rtol=0, atol=0)


def test_a_square_is_where_the_box_says_and_as_large():
    square = glyph_masks()["square"]
    coverage = place(square, torch.tensor([[10.0, 20.0, 10.0, 0.0]]))[0]
    # The mask fills 0.8 of its box: an 8x8 square around (10, 20).
    assert coverage.sum() == pytest.approx(64.0, abs=0.5)
    assert coverage[16:24, 6:14].min() > 0.98
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    assert ((coverage * x).sum() / coverage.sum()).item() == pytest.approx(10.0, abs=0.02)
    assert ((coverage * y).sum() / coverage.sum()).item() == pytest.approx(20.0, abs=0.02)


def test_tilt_turns_without_changing_the_area():
    square = glyph_masks()["square"]
    upright, turned = (place(square, torch.tensor([[16.0, 16.0, 16.0, tilt]])) for tilt in (0.0, 0.3))
    assert turned.sum().item() == pytest.approx(upright.sum().item(), rel=0.01)
    assert (turned - upright).abs().max() > 0.5


@pytest.mark.parametrize(
    ("text", "brighter", "darker"),
    [
        ("a white square on the left", (slice(None), slice(0, 16)), (slice(None), slice(16, 32))),
        ("a white square on the right", (slice(None), slice(16, 32)), (slice(None), slice(0, 16))),
        ("a white square at the top", (slice(0, 16), slice(None)), (slice(16, 32), slice(None))),
        ("a white square at the bottom", (slice(16, 32), slice(None)), (slice(0, 16), slice(None))),
    ],
)
def test_places(text, brighter, darker):
    for image in render([parse(text)] * 20, seed=0).mean(1):
        assert image[brighter].sum() > image[darker].sum() + 20


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations(relation):
    scene = Scene((Thing("red", "square"), Thing("blue", "square")), relation)
    for image in render([scene] * 20, seed=0):
        red, blue = (image[0] > 0.6) & (image[2] < 0.5), (image[2] > 0.6) & (image[0] < 0.5)
        (red_y, red_x), (blue_y, blue_x) = (m.nonzero().float().mean(0) for m in (red, blue))
        gap = {"left of": blue_x - red_x, "right of": red_x - blue_x, "above": blue_y - red_y, "below": red_y - blue_y}
        assert gap[relation] > 12


def test_colours_and_background_are_the_named_ones():
    for color, rgb in COLORS.items():
        image = render([Scene((Thing(color, "square"),))], seed=5)[0]
        middle = image.flatten(1)[:, (image - image[:, :1, :1]).abs().sum(0).flatten() > 0.9 * (torch.tensor(rgb) - 0.3).norm()]
        torch.testing.assert_close(middle.median(1).values, torch.tensor(rgb), rtol=0, atol=0.05)
        assert BACKGROUND[0] <= image[0, 0, 0] <= BACKGROUND[1]


def test_drawn_and_reference_digits_are_disjoint_and_complete():
    drawn, reference = (digit_bitmaps(writers).flatten(2) for writers in ("drawn", "reference"))
    assert drawn.shape == reference.shape == (10, 70, 64)
    assert torch.cdist(drawn, reference).min() > 0
    assert [len(glyph_masks()[name]) for name in DIGITS] == [70] * 10


def test_slices_do_not_change_the_images(monkeypatch):
    scenes = [random_scene(np.random.default_rng(i)) for i in range(7)]
    whole = render(scenes, seed=0)
    monkeypatch.setattr("worlds.glyphs.renderer.SLICE", 3)
    assert torch.equal(render(scenes, seed=0), whole)
