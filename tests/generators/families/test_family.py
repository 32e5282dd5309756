import pytest

from generators.families import DEFAULT, FAMILIES
from generators.families.family import Geometry

GEOMETRY = Geometry(channels=16, factor=8, patch=2, default=1024, limit=3072)


def test_sizes_by_hand():
    assert GEOMETRY.latent_shape() == (16, 128, 128)
    assert GEOMETRY.latent_shape(768, 1344) == (16, 96, 168)
    assert GEOMETRY.tokens() == 64 * 64
    assert GEOMETRY.tokens(768, 1344) == 48 * 84


@pytest.mark.parametrize("pixels", [0, -16, 1000, 3088])
def test_sizes_that_do_not_fit(pixels):
    message = rf"width {pixels}: not allowed here \(allowed: multiples of 16 up to 3072\)"
    with pytest.raises(ValueError, match=message):
        GEOMETRY.latent_shape(None, pixels)
    with pytest.raises(ValueError, match=message):
        GEOMETRY.tokens(width=pixels)


def test_sd3_reads_its_sizes_from_the_configs():
    configs = {
        "transformer": {"patch_size": 2, "pos_embed_max_size": 192, "sample_size": 128, "in_channels": 16},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }
    assert FAMILIES["sd3"].geometry(configs) == GEOMETRY


def test_families_are_found_by_their_names():
    assert all(FAMILIES[name].name == name for name in FAMILIES)
    assert DEFAULT in FAMILIES
