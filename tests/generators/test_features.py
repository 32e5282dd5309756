"""Frozen vision transformers: the features of stock transformers, preprocessing, gradients, errors."""

import json

import pytest
import torch
import transformers

from diffusion import ImageFeatures
from diffusion.discriminator import Heads, hinge_generator
from generators.features import chosen_blocks, load_features

DEPTH, WIDTH, PATCH, SIDE = 4, 16, 4, 16
SHARED = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "patch_size": PATCH}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}


def new_network(kind):
    """Small, with random weights; DINOv2 has position embeddings of another size, which it interpolates."""
    torch.manual_seed(0)
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**SHARED, image_size=24))
    if kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**SHARED, image_size=24, num_register_tokens=3)
        return transformers.Dinov2WithRegistersModel(config)
    vision = {**SHARED, "intermediate_size": 32, "image_size": SIDE}
    if kind == "clip_vision_model":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=TEXT))


KINDS = ("dinov2", "dinov2_with_registers", "clip", "clip_vision_model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        new_network(kind).save_pretrained(found[kind])
        config = {
            "do_center_crop": True,
            "size": {"shortest_edge": 20},
            "crop_size": {"height": SIDE, "width": SIDE},
            "image_mean": MEAN,
            "image_std": STD,
        }
        (found[kind] / "preprocessor_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the DINOv2 folder, to be damaged."""
    for file in folders["dinov2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(file, **changes):
    """Without the keys that are None."""
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def images(side=SIDE, batch=2):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_are_hidden_states_of_stock_transformers(folders, kind):
    features = load_features(str(folders[kind]), device="cpu")
    assert isinstance(features, ImageFeatures)
    network = new_network(kind).eval()
    network = network.vision_model if kind == "clip" else network
    pixels = (images() - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    with torch.no_grad():
        states = network(pixel_values=pixels, output_hidden_states=True).hidden_states
    special = {"dinov2_with_registers": 4}.get(kind, 1)
    found = features(images())
    assert tuple(features.channels) == (WIDTH,) * 4
    assert len(found) == 4
    for block, layer in enumerate(found, start=1):
        assert layer.shape == (2, WIDTH, 4, 4)
        for row in range(4):
            for column in range(4):
                expected = states[block][:, special + 4 * row + column]
                torch.testing.assert_close(layer[:, :, row, column], expected, rtol=1e-5, atol=1e-6)


def test_a_patch_has_its_place_on_the_grid(folders):
    """What changes most is the patch that was changed."""
    features = load_features(str(folders["dinov2"]), layers=[1], device="cpu")
    changed = images()
    changed[:, :, 4:8, 12:16] = 1 - changed[:, :, 4:8, 12:16]
    difference = (features(changed)[0] - features(images())[0]).norm(dim=1)
    assert difference.flatten(1).argmax(1).tolist() == [4 * 1 + 3] * 2


def test_other_sizes_are_resized_to_the_whole_of_the_input(folders):
    features = load_features(str(folders["dinov2"]), device="cpu")
    flat = torch.tensor([0.3, 0.5, 0.7]).reshape(1, 3, 1, 1)
    expected = features(flat.expand(1, 3, SIDE, SIDE))
    for sides in [(32, 32), (10, 10), (24, 40)]:
        for one, other in zip(features(flat.expand(1, 3, *sides)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    large = images(side=33).requires_grad_()
    features(large)[-1].square().sum().backward()
    assert (large.grad.abs().sum(1) > 0).all(), "every pixel has a gradient, the border included"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_frozen_and_yet_differentiable(folders, kind):
    features = load_features(str(folders[kind]), device="cpu")
    network = features.network
    before = {name: value.clone() for name, value in network.state_dict(keep_vars=False).items()}
    buffers = [buffer.clone() for buffer in network.buffers()]
    heads, seen = Heads(features.channels, width=8), images().requires_grad_()
    loss = hinge_generator(heads(features(seen)))
    loss.backward()
    assert seen.grad.abs().sum() > 0
    assert not any(module.training for module in network.modules())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(buffers, network.buffers(), strict=True))


def test_the_gradient_against_finite_differences(folders):
    features = load_features(str(folders["dinov2"]), layers=[1, 3], device="cpu")
    direction, seen = torch.randn(images().shape, generator=torch.Generator().manual_seed(2)), images().requires_grad_()

    def loss(images):
        return sum(layer.square().mean() for layer in features(images))

    (gradient,) = torch.autograd.grad(loss(seen), seen)
    step = 1e-2
    slope = (loss(images() + step * direction) - loss(images() - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


def test_the_glyph_worlds_clip():
    features = load_features("embedded:glyphs-clip", device="cpu")
    assert tuple(features.channels) == (96, 96, 96), "three blocks, each once"
    assert [tuple(layer.shape) for layer in features(images(side=32))] == [(2, 96, 8, 8)] * 3


def test_bfloat16_networks_have_float32_features(folders):
    exact = load_features(str(folders["clip"]), device="cpu")
    rounded = load_features(str(folders["clip"]), device="cpu", dtype=torch.bfloat16)
    for one, other in zip(rounded(images()), exact(images()), strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((0.25, 0.5, 0.75, 1.0), 12, [3, 6, 9, 12]),
        ((0.25, 0.5, 0.75, 1.0), 3, [1, 2, 3]),
        ((0.01,), 12, [1]),
        ((1.0,), 12, [12]),
        ((1,), 12, [1]),
        ((12, 2), 12, [12, 2]),
    ],
)
def test_layers_are_block_numbers_or_fractions(layers, depth, expected):
    assert chosen_blocks(layers, depth) == expected


@pytest.mark.parametrize("layers", [[0], [5], [-1], [0.0], [1.5], []])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(ValueError, match=r"^layers \["):
        chosen_blocks(layers, 4)


def refusal(folder):
    with pytest.raises(ValueError, match=r"weights|preprocessor_config") as error:
        load_features(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_places_that_are_no_vision_network(folder, tmp_path_factory):
    assert "no such folder (allowed: embedded:glyphs-clip, a local folder" in refusal("does-not-exist")
    assert "no such embedded model" in refusal("embedded:glyphs-clop")
    assert "no config.json" in refusal(tmp_path_factory.mktemp("empty"))
    assert "model_type in config.json is 'llama'; allowed: clip" in refusal("embedded:glyphs-rewriter")
    (folder / "model.safetensors").unlink()
    assert "no .safetensors file" in refusal(folder)


def test_missing_weights(folder):
    edit(folder / "config.json", num_hidden_layers=DEPTH + 1)
    assert "tensors are missing, for example encoder.layer.4" in refusal(folder)


def test_preprocessing_that_does_not_fit(folder, folders):
    file = folder / "preprocessor_config.json"
    edit(file, crop_size={"height": 18, "width": 18})
    assert "images are preprocessed to (18, 18), no multiple of the patches, 4" in refusal(folder)
    edit(file, crop_size=None, size={"longest_edge": 16})
    assert "size {'longest_edge': 16}; allowed: a number, or a height and width" in refusal(folder)
    edit(file, image_std=None)
    assert "no image_std" in refusal(folder)
    file.unlink()
    assert "preprocessor_config.json: no such file" in refusal(folder)
    for part in folders["clip"].iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    edit(file, crop_size=20)
    assert "images are preprocessed to (20, 20), but the network takes 16" in refusal(folder)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"size": 20, "crop_size": 16}, (16, 16)),
        ({"size": {"height": 12, "width": 8}, "crop_size": None}, (12, 8)),
        ({"size": {"shortest_edge": 8}, "do_center_crop": False}, (8, 8)),
    ],
)
def test_sizes_of_a_preprocessor(folder, sizes, expected):
    edit(folder / "preprocessor_config.json", **sizes)
    layer = load_features(str(folder), layers=[1], device="cpu")(images())[0]
    assert layer.shape[2:] == (expected[0] // PATCH, expected[1] // PATCH)
