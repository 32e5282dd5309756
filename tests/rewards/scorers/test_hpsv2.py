import dataclasses
import gzip
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffusion.types import Prompt
from rewards.parts import compat
from rewards.parts.files import read_checkpoint
from rewards.parts.open_clip import Sizes, measure, shapes, to_transformers
from rewards.scorers.hpsv2 import HPSv2, Preprocess, clean
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:4]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]
VIT_H = Sizes(
    embed=1024,
    image=224,
    patch=14,
    vision_width=1280,
    vision_layers=32,
    vision_hidden=5120,
    text_width=1024,
    text_layers=24,
    text_hidden=4096,
    context=77,
    words=49408,
)


@pytest.fixture(scope="module")
def knobs(hps_folder, clip_folder):
    return {"weights": str(hps_folder), "tokenizer": str(clip_folder)}


@pytest.fixture(scope="module")
def reward(knobs):
    return HPSv2(**knobs)


@pytest.fixture(scope="module")
def images():
    return render([parse(text) for text in TEXTS], seed=0)


@pytest.fixture
def tensors(hps_folder):
    return dict(read_checkpoint(hps_folder / "HPS_v2.1_compressed.pt"))


def test_the_real_architecture():
    """ViT-H/14: 686 tensors and 986.1 million weights; 16 heads of 80 and 16 heads of 64."""
    wanted = shapes(VIT_H)
    assert len(wanted) == 686
    assert round(sum(torch.Size(shape).numel() for shape in wanted.values()) / 1e6, 1) == 986.1
    assert (VIT_H.vision_heads, VIT_H.text_heads) == (16, 16)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    assert measure(Path("x"), tensors) == VIT_H
    converted = to_transformers(tensors)
    assert len(converted) == 686 + 2 * 2 * (32 + 24), "in_proj's weight and bias make three each"


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_heads_of_the_image_towers_of_open_clip(width, heads):
    assert dataclasses.replace(VIT_H, vision_width=width).vision_heads == heads


def block(tensors, prefix, x, heads, mask=None):
    """A layer of open_clip's transformer, written with torch's own attention: x [L, B, width]."""
    p = {name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
    width = x.shape[-1]
    y = F.layer_norm(x, (width,), p["ln_1.weight"], p["ln_1.bias"])
    y, _ = F.multi_head_attention_forward(
        y, y, y, width, heads, p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None, False, 0.0,
        p["attn.out_proj.weight"], p["attn.out_proj.bias"], training=False, need_weights=False, attn_mask=mask,
    )  # fmt: skip
    x = x + y
    y = F.layer_norm(x, (width,), p["ln_2.weight"], p["ln_2.bias"])
    y = F.gelu(F.linear(y, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"]))
    return x + F.linear(y, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])


def by_hand(tensors, pixels, ids):
    """The checkpoint's score straight from its tensors: pixels [B, 3, S, S], ids [B, L] -> [B]."""
    t = tensors
    x = F.conv2d(pixels, t["visual.conv1.weight"], stride=t["visual.conv1.weight"].shape[-1]).flatten(2).permute(0, 2, 1)
    x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + t["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], t["visual.ln_pre.weight"], t["visual.ln_pre.bias"]).transpose(0, 1)
    for i in range(2):
        x = block(t, f"visual.transformer.resblocks.{i}", x, heads=2)
    image = F.layer_norm(x[0], x.shape[-1:], t["visual.ln_post.weight"], t["visual.ln_post.bias"]) @ t["visual.proj"]
    y = (t["token_embedding.weight"][ids] + t["positional_embedding"]).transpose(0, 1)
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for i in range(3):
        y = block(t, f"transformer.resblocks.{i}", y, heads=1, mask=mask)
    y = F.layer_norm(y, y.shape[-1:], t["ln_final.weight"], t["ln_final.bias"])
    text = y[ids.argmax(1), torch.arange(len(ids))] @ t["text_projection"]
    return F.cosine_similarity(image, text)


def test_equals_the_checkpoint_s_own_arithmetic(reward, tensors, images):
    images = images.clone().requires_grad_()
    ids = torch.cat([reward.towers.tokens(text) for text in TEXTS])
    expected = by_hand(tensors, reward.preprocess(images), ids)
    scores = reward(images, PROMPTS).total
    assert scores.std() > 0.01
    assert (scores - expected).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_versions_are_different_files(knobs, hps_folder, reward, images):
    old = HPSv2(**knobs, version="v2.0")(images, PROMPTS).total
    assert (old - reward(images, PROMPTS).total).abs().max() > 0.01
    as_file = {**knobs, "weights": str(hps_folder / "HPS_v2_compressed.pt")}
    assert torch.equal(HPSv2(**as_file)(images, PROMPTS).total, old)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_tensors_in_either_format(knobs, tensors, tmp_path, reward, images, suffix):
    path = tmp_path / f"hps{suffix}"
    (torch.save if suffix == ".pt" else save_file)(tensors, path)
    found = HPSv2(**{**knobs, "weights": str(path)})(images, PROMPTS).total
    assert torch.equal(found, reward(images, PROMPTS).total)


def test_half_precision_files_are_scored_in_float32(knobs, tensors, tmp_path, reward, images):
    path = tmp_path / "hps.pt"
    torch.save({"state_dict": {key: tensor.half() for key, tensor in tensors.items()}}, path)
    half = HPSv2(**{**knobs, "weights": str(path)})
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert (half(images, PROMPTS).total - reward(images, PROMPTS).total).abs().max() < 0.01


def test_tokens(reward):
    ids = reward.towers.tokens("a red circle")
    start, end = reward.towers.tokenizer.bos_token_id, reward.towers.tokenizer.eos_token_id
    assert ids.shape == (1, 12)
    assert ids[0, 0] == start
    assert ids[0, 4:].tolist() == [end] + [0] * 7
    long = reward.towers.tokens("red " * 40)
    assert long.shape == (1, 12)
    assert long[0, -1] == end
    assert end == reward.towers.tokenizer.vocab_size - 1, "the highest number, which the package looks for"


def test_captions_are_cleaned():
    assert clean("  \u201cTom &amp;amp; Jerry\u201d\n it\u2019s \u02bctis") == "\"Tom & Jerry\" it's 'tis"


def test_preprocessing_in_numbers():
    """An image of the right size is only normalised; the crop's odd pixel follows Python's round."""
    prepare = Preprocess(4, antialias=True)
    grey = prepare(torch.full((1, 3, 4, 4), 0.5))
    assert grey[0, :, 0, 0].tolist() == pytest.approx([0.0690, 0.1614, 0.3328], abs=1e-4)
    for width, left in [(5, 0), (6, 1), (7, 2), (9, 2)]:
        ramp = torch.arange(width) / 10
        cropped = prepare(ramp.expand(1, 3, 4, width))[0, 0, 0] * 0.26862954 + 0.48145466
        assert cropped.tolist() == pytest.approx([(left + i) / 10 for i in range(4)], abs=1e-6)
    assert prepare(torch.rand(1, 3, 9, 13)).shape == (1, 3, 4, 4)


def test_antialiasing_is_a_choice(knobs, reward):
    noise = torch.rand(4, 3, 80, 64, generator=torch.Generator().manual_seed(0))
    jagged = HPSv2(**knobs, antialias=False)
    assert (jagged.preprocess(noise) - reward.preprocess(noise)).abs().max() > 0.5
    assert (jagged(noise, PROMPTS).total - reward(noise, PROMPTS).total).abs().max() > 1e-3


def test_the_gradient_reaches_every_pixel_through_resizing(reward):
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).total.sum(), images)
    assert (gradient != 0).all()


def test_a_score_without_gradient_is_the_same_to_the_last_bit_in_any_batch(reward):
    images = torch.rand(19, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % 4] for i in range(19)]
    together = reward(images, prompts).total
    for rows in (slice(0, 1), slice(3, 5), slice(5, 8), slice(7, 18), slice(18, 19)):
        assert torch.equal(reward(images[rows], prompts[rows]).total, together[rows])


def test_a_caption_is_encoded_once_and_memory_is_bounded(knobs, images, monkeypatch):
    reward = HPSv2(**knobs)
    asked = []
    encode = reward.towers.text
    monkeypatch.setattr(reward.towers, "text", lambda text: asked.append(text) or encode(text))
    for _ in range(2):
        reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert asked == TEXTS[:2]
    monkeypatch.setattr("rewards.parts.clip.CACHED_CAPTIONS", 2)
    reward(images, PROMPTS)
    assert len(reward.captions._known) == 2


def refused(**knobs) -> str:
    with pytest.raises(ValueError, match=r"^(weights|tokenizer|backend) ") as error:
        HPSv2(**knobs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("visual.proj"), "1 of CLIP's tensors are missing, for example visual.proj"),
        (lambda t: t.pop("transformer.resblocks.1.ln_2.bias"), "1 of CLIP's tensors are missing, for example transformer.res"),
        (lambda t: t.update(score=torch.ones(1)), "1 tensors are not CLIP's, for example score"),
        (lambda t: t.update({"visual.ln_pre.bias": torch.ones(7)}), "visual.ln_pre.bias is [7], where CLIP has [128]"),
        (lambda t: t.update({"visual.positional_embedding": torch.ones(16, 128)}), "is [16, 128], where CLIP has [17, 128]"),
    ],
)
def test_incomplete_checkpoints(knobs, tensors, tmp_path, change, said):
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "hps.pt")
    assert said in refused(**{**knobs, "weights": str(tmp_path / "hps.pt")})


def test_widths_without_a_rule_for_heads(knobs, tmp_path):
    wanted = shapes(dataclasses.replace(VIT_H, vision_width=100, vision_layers=1, text_layers=1, text_width=64, words=8))
    torch.save({key: torch.zeros(shape) for key, shape in wanted.items()}, tmp_path / "hps.pt")
    said = refused(**{**knobs, "weights": str(tmp_path / "hps.pt")})
    assert "widths 100 and 64 do not divide into open_clip's heads" in said


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file ran')",))


def test_files_that_are_not_checkpoints(knobs, tmp_path):
    path = tmp_path / "hps.pt"
    for content in (Trap(), [1], {}, {"state_dict": {"a": 1}}):
        torch.save(content, path)
        refused(**{**knobs, "weights": str(path)})
    path.write_bytes(b"<html>")
    assert "not a checkpoint of plain tensors" in refused(**{**knobs, "weights": str(path)})
    (tmp_path / "hps.safetensors").write_bytes(b"<html>")
    assert "not a checkpoint of plain tensors" in refused(**{**knobs, "weights": str(tmp_path / "hps.safetensors")})


def test_places_that_do_not_exist(knobs, tmp_path, clip_folder):
    assert "no such file or folder" in refused(**{**knobs, "weights": "weights/hps.pt"})
    assert "no HPS_v2.1_compressed.pt in this folder" in refused(**{**knobs, "weights": str(tmp_path)})
    assert "no such file or folder" in refused(**{**knobs, "tokenizer": "clip"})
    assert "(no tokenizer.json or vocab.json)" in refused(**{**knobs, "tokenizer": str(tmp_path)})


def test_a_tokenizer_of_another_network(knobs, tensors, tmp_path):
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:-1].clone()
    torch.save(tensors, tmp_path / "hps.pt")
    assert "tokens; the checkpoint" in refused(**{**knobs, "weights": str(tmp_path / "hps.pt")})


def test_the_hub_without_network(knobs, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(tokenizer=knobs["tokenizer"]).startswith("weights 'xswu/HPSv2': it is not a local folder, not in the cache")
    assert refused(weights=knobs["weights"]).startswith("tokenizer 'openai/clip-vit-large-patch14': it is not a local folder")


def test_what_is_in_the_cache_needs_no_network(knobs, monkeypatch, tmp_path, hps_folder, clip_folder, reward, images):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for hub_id, folder in (("xswu/HPSv2", hps_folder), ("openai/clip-vit-large-patch14", clip_folder)):
        cached = tmp_path / f"models--{hub_id.replace('/', '--')}"
        (cached / "snapshots").mkdir(parents=True)
        (cached / "snapshots" / commit).symlink_to(folder)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    assert torch.equal(HPSv2()(images, PROMPTS).total, reward(images, PROMPTS).total)


@pytest.mark.skipif(find_spec("hpsv2") is not None, reason="hpsv2 is installed")
def test_the_package_s_back_end_without_the_package(knobs):
    said = refused(**knobs, backend="hpsv2")
    assert said.startswith("backend 'hpsv2' needs hpsv2, ")
    assert "`make rewards`" in said


# Against the package and against open_clip, with CLIP's real vocabulary of 49408 tokens, which open_clip brings.

PACKAGES = pytest.mark.skipif(
    find_spec("hpsv2") is None or find_spec("open_clip") is None, reason="hpsv2 and open_clip are not installed; make rewards"
)
SMALL = dataclasses.replace(
    VIT_H, vision_width=128, vision_layers=3, vision_hidden=512, text_width=64, text_layers=2, text_hidden=256, embed=64
)
CAPTIONS = [
    "A cat, wearing a hat & 12 rings!",
    "  the \u201cTom &amp; Jerry\u201d show\nisn\u2019t on  ",
    "caf\u00e9 \u65e5\u672c \U0001f680 naïve --ar 16:9",
    "masterpiece, best quality, " * 30,
]


@pytest.fixture(scope="module")
def real_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    merges = gzip.decompress(compat.open_clip_vocabulary().read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocabulary, [tuple(merge.split()) for merge in merges]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, random_tensors_of):
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": random_tensors_of(shapes(SMALL))}, path)
    return path


@pytest.fixture(scope="module")
def eight_bit():
    """8-bit, so that a PIL image is the same."""
    coarse = torch.rand(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (260, 331), mode="bilinear") * 255).round() / 255


def scores_and_gradient(score, images):
    images = images.clone().requires_grad_()
    scores = score(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


@PACKAGES
def test_equals_the_package_and_open_clip(real_vocabulary, checkpoint, eight_bit):
    import open_clip

    prompts = [Prompt(str(i), text) for i, text in enumerate(CAPTIONS)]
    ours = HPSv2(str(checkpoint), tokenizer=str(real_vocabulary))
    theirs = HPSv2(str(checkpoint), backend="hpsv2")
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"layers": 3, "width": 128, "head_width": 64, "patch_size": 14, "image_size": 224},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    ).eval()
    model.load_state_dict(read_checkpoint(checkpoint))

    def with_open_clip(images):
        text = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(CAPTIONS), normalize=True)
        return (model.encode_image(ours.preprocess(images), normalize=True) * text).sum(1)

    scores, gradient = scores_and_gradient(lambda images: ours(images, prompts).total, eight_bit)
    assert scores.std() > 0.01
    for other in (lambda images: theirs(images, prompts).total, with_open_clip):
        other_scores, other_gradient = scores_and_gradient(other, eight_bit)
        assert (scores - other_scores).abs().max() < 1e-5
        assert (gradient - other_gradient).norm() < 1e-4 * other_gradient.norm()


@PACKAGES
def test_equals_the_package_s_own_score(real_vocabulary, checkpoint, eight_bit):
    """Its `img_score.score`, from a PIL image, with its own transform. It wants a network to load the checkpoint into."""
    from torchvision.transforms.functional import to_pil_image

    theirs = HPSv2(str(checkpoint), backend="hpsv2")
    ours = HPSv2(str(checkpoint), tokenizer=str(real_vocabulary))
    with compat.importing_hpsv2():
        from hpsv2 import img_score
        from hpsv2.src.open_clip import image_transform
    theirs.model.output_dict = True
    img_score.model_dict.update(model=theirs.model, preprocess_val=image_transform(224, is_train=False))
    for image, text in zip(eight_bit, CAPTIONS, strict=True):
        (wanted,) = img_score.score(to_pil_image(image), text, cp=str(checkpoint))
        for reward in (ours, theirs):
            assert reward(image[None], [Prompt("0", text)]).total.item() == pytest.approx(float(wanted), abs=1e-5)


@PACKAGES
def test_both_back_ends_take_bfloat16(real_vocabulary, checkpoint, eight_bit):
    prompts = [Prompt(str(i), text) for i, text in enumerate(CAPTIONS)]
    exact, gradient = scores_and_gradient(
        lambda images: HPSv2(str(checkpoint), backend="hpsv2")(images, prompts).total, eight_bit
    )
    for knobs in ({"tokenizer": str(real_vocabulary)}, {"backend": "hpsv2"}):
        reward = HPSv2(str(checkpoint), **knobs, dtype="bfloat16")
        assert {parameter.dtype for parameter in reward.model.parameters() if parameter.ndim > 0} == {torch.bfloat16}
        scores, coarse = scores_and_gradient(lambda images, reward=reward: reward(images, prompts).total, eight_bit)
        assert (scores.dtype, coarse.dtype) == (torch.float32, torch.float32)
        assert 0 < (scores - exact).abs().max() < 0.1 * exact.std()
        assert F.cosine_similarity(coarse.flatten(1), gradient.flatten(1)).min() > 0.999


@PACKAGES
def test_prepares_images_as_the_package_to_the_last_bit(eight_bit):
    with compat.importing_hpsv2():
        from hpsv2.src.open_clip import image_transform
    from torchvision.transforms.functional import to_pil_image

    for size in ((260, 331), (333, 250), (224, 224), (97, 130)):
        image = F.interpolate(eight_bit[:1], size).mul(255).round() / 255
        theirs = image_transform(224, is_train=False)(to_pil_image(image[0]))
        assert torch.equal(Preprocess(224, antialias=True)(image)[0], theirs)


@PACKAGES
def test_captions_become_the_package_s_tokens(real_vocabulary, checkpoint):
    ours = HPSv2(str(checkpoint), tokenizer=str(real_vocabulary)).towers
    theirs = HPSv2(str(checkpoint), backend="hpsv2").towers
    for text in [*CAPTIONS, "", *read_prompts("evaluation")]:
        assert torch.equal(ours.tokens(text), theirs.tokens(text)), text
