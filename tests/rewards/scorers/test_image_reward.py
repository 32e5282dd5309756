import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from diffusion.types import Prompt
from rewards.parts import compat
from rewards.parts.clip import MEAN, STD
from rewards.parts.files import read_checkpoint
from rewards.scorers.image_reward import ImageReward
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:4]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]
PACKAGE = pytest.mark.skipif(find_spec("ImageReward") is None, reason="image-reward is not installed; make rewards")


@pytest.fixture
def images():
    """8-bit, so that a PIL image is the same."""
    return (render([parse(text) for text in TEXTS], seed=0) * 255).round() / 255


@pytest.fixture(scope="module")
def knobs(image_reward_folder):
    return {"weights": str(image_reward_folder), "tokenizer": str(image_reward_folder)}


@pytest.fixture(scope="module")
def reward(knobs):
    return ImageReward(**knobs)


@pytest.fixture
def copy(image_reward_folder, tmp_path):
    return shutil.copytree(image_reward_folder, tmp_path / "weights")


def pil(image):
    return Image.fromarray(np.ascontiguousarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))


@pytest.fixture(scope="module")
def package(reward, image_reward_folder):
    """The package's own network: loaded by its own `load`, from the same file, for images of 32 pixels instead of 224."""
    with compat.importing_image_reward():
        import ImageReward as RM
        from ImageReward.ImageReward import _transform
        from ImageReward.models.BLIP import blip_pretrain
        from ImageReward.models.BLIP.vit import VisionTransformer
    tower = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, drop_path_rate=0.1)
    files = (str(image_reward_folder / "ImageReward.pt"), str(image_reward_folder / "med_config.json"))
    with compat.built_from(blip_pretrain, reward.tokenizer, tower, 128):
        network = RM.load(files[0], device="cpu", med_config=files[1])
    network.preprocess = _transform(32)
    return network


def channels(values):
    """One value for each colour channel, to multiply images with."""
    return torch.tensor(values)[:, None, None]


@PACKAGE
def test_equals_the_package_exactly_at_equal_pixels(knobs, reward, package, images):
    by_ones = ImageReward(**knobs, micro_batch=1)
    theirs = torch.tensor([package.score(text, pil(image)) for text, image in zip(TEXTS, images, strict=True)])
    assert theirs.std() > 0.02
    assert torch.equal(by_ones(images, PROMPTS).total, theirs)
    assert reward(images, PROMPTS).total.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


@PACKAGE
@pytest.mark.parametrize("size", [(48, 48), (40, 64), (70, 45), (24, 20)])
def test_close_to_the_package_where_images_are_resized(reward, package, size):
    """PIL rounds to 8 bits after each pass: a pixel moves by little more than one level on smooth images."""
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(coarse, size, mode="bilinear") * 255).round() / 255
    theirs = torch.stack([package.preprocess(pil(image)) for image in images])
    assert ((reward.preprocess(images) - theirs) * channels(STD)).abs().max() < 1.1 / 255
    scores = torch.tensor([package.score(text, pil(image)) for text, image in zip(TEXTS, images, strict=True)])
    assert (reward(images, PROMPTS).total - scores).abs().max() < 0.003


@PACKAGE
def test_the_package_ranks_the_same(reward, package, images):
    same = [PROMPTS[0]] * 4
    ranking, _ = package.inference_rank(TEXTS[0], [pil(image) for image in images])
    ours = reward(images, same).total.argsort(descending=True).argsort() + 1
    assert ranking == ours.tolist()


@PACKAGE
def test_the_gradient_reaches_every_pixel_through_resizing(reward):
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    (gradient,) = torch.autograd.grad(reward(images.requires_grad_(), PROMPTS).total.sum(), images)
    assert (gradient != 0).all()


@PACKAGE
def test_overshoot_of_resizing_is_clipped(reward):
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 30:] = 1
    pixels = reward.preprocess(edge) * channels(STD) + channels(MEAN)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


@PACKAGE
def test_a_score_without_gradient_is_the_same_to_the_last_bit_in_any_batch(reward):
    images = torch.rand(19, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % 4] for i in range(19)]
    together = reward(images, prompts).total
    for rows in (slice(0, 1), slice(3, 5), slice(5, 8), slice(7, 18), slice(18, 19)):
        assert torch.equal(reward(images[rows], prompts[rows]).total, together[rows])


@PACKAGE
def test_bfloat16_leaves_the_head_alone(knobs):
    network = ImageReward(**knobs, dtype="bfloat16").model
    assert {p.dtype for p in network.blip.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.mlp.parameters()} == {torch.float32}


@PACKAGE
def test_captions_are_padded_and_cut_off_at_35_tokens(reward, images):
    seen = []
    encoder = reward.model.blip.text_encoder
    hook = encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    reward(images[:2], [Prompt("0", "red"), Prompt("1", "red " * 50)])
    hook.remove()
    ids = seen[0]
    known = reward.tokenizer.get_vocab()
    assert ids.shape == (8, 35)
    assert ids[0].tolist() == [known["[CLS]"], known["red"], known["[SEP]"]] + [known["[PAD]"]] * 32
    assert ids[1, -1] == known["[SEP]"]
    assert (known["[DEC]"], known["[ENC]"]) == (len(known) - 2, len(known) - 1)


@PACKAGE
def test_files_by_name_and_safetensors(knobs, copy, reward, images):
    save_file(read_checkpoint(copy / "ImageReward.pt"), copy / "mine.safetensors")
    for weights in (copy / "ImageReward.pt", copy / "mine.safetensors"):
        again = ImageReward(str(weights), tokenizer=knobs["tokenizer"])
        assert torch.equal(again(images, PROMPTS).total, reward(images, PROMPTS).total)
    (copy / "med_config.json").rename(copy / "other.json")
    again = ImageReward(str(copy), str(copy / "other.json"), knobs["tokenizer"])
    assert torch.equal(again(images, PROMPTS).total, reward(images, PROMPTS).total)


def refused(*arguments, **knobs) -> str:
    with pytest.raises(ValueError, match=r"^(weights|med_config|tokenizer|image_reward) ") as error:
        ImageReward(*arguments, **knobs)
    assert "\n" not in str(error.value)
    return str(error.value)


@PACKAGE
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("mlp.layers.7.bias"), "1 of ImageReward's tensors are missing, for example mlp.layers.7.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "1 tensors are not ImageReward's, for example extra"),
        (lambda t: t.update({"mlp.layers.7.bias": torch.ones(2)}), "mlp.layers.7.bias is [2], where ImageReward has [1]"),
        (
            lambda t: t.pop("blip.visual_encoder.pos_embed"),
            "(no blip.visual_encoder.pos_embed of 3 axes)",
        ),
    ],
)
def test_incomplete_checkpoints(knobs, copy, change, said):
    tensors = read_checkpoint(copy / "ImageReward.pt")
    change(tensors)
    torch.save(tensors, copy / "changed.pt")
    assert said in refused(**{**knobs, "weights": str(copy / "changed.pt")})


@PACKAGE
def test_configurations_that_do_not_fit(knobs, copy):
    config = json.loads((copy / "med_config.json").read_text())
    for key, value, said in (
        ("hidden_size", 64, "hidden_size is 64; allowed: 768"),
        ("add_cross_attention", False, "add_cross_attention is False; allowed: True"),
        ("num_hidden_layers", 3, "26 of ImageReward's tensors are missing"),
    ):
        (copy / "med_config.json").write_text(json.dumps({**config, key: value}))
        assert said in refused(**{**knobs, "weights": str(copy)})
    (copy / "med_config.json").write_text("<html>")
    assert "not JSON" in refused(**{**knobs, "weights": str(copy)})
    (copy / "med_config.json").unlink()
    assert "no med_config.json in this folder" in refused(**{**knobs, "weights": str(copy / "ImageReward.pt")})


@PACKAGE
def test_a_tokenizer_of_another_network(knobs, copy):
    (copy / "vocab.txt").write_text((copy / "vocab.txt").read_text() + "\nmore")
    assert "tokens; the checkpoint" in refused(knobs["weights"], tokenizer=str(copy))


@PACKAGE
def test_places_that_do_not_exist(knobs, tmp_path):
    assert "no such file or folder" in refused(**{**knobs, "weights": "weights/ImageReward.pt"})
    assert "no ImageReward.pt in this folder" in refused(**{**knobs, "weights": str(tmp_path)})
    assert "(no vocab.txt or tokenizer.json)" in refused(**{**knobs, "tokenizer": str(tmp_path)})


@PACKAGE
def test_the_hub_without_network(knobs, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(tokenizer=knobs["tokenizer"]).startswith(
        "weights 'THUDM/ImageReward': it is not a local folder, not in the cache"
    )
    assert refused(knobs["weights"]).startswith("tokenizer 'google-bert/bert-base-uncased': it is not a local folder")


@pytest.mark.skipif(find_spec("ImageReward") is not None, reason="image-reward is installed")
def test_without_the_package(knobs):
    assert refused(**knobs).startswith("image_reward needs ImageReward, ")


def test_the_layout_of_the_real_checkpoint(image_reward_shapes_of):
    """625 tensors, 446.7 million weights: ViT-L/16 at 224 pixels, BERT base with cross attention, the head."""
    real = image_reward_shapes_of(image=224, patch=16, vision=1024, blocks=24, layers=12, hidden=3072, words=30524)
    assert len(real) == 625
    numbers = sum(torch.Size(shape).numel() for key, shape in real.items() if not key.endswith("position_ids"))
    assert round(numbers / 1e6, 1) == 446.7
