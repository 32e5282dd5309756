import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel

from diffusion.types import Prompt
from rewards.scorers.aesthetic import KEYS, Aesthetic, read_head
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:4]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def reward(head_file, clip_folder):
    return Aesthetic(str(head_file), str(clip_folder))


@pytest.fixture
def images():
    return (render([parse(text) for text in TEXTS], seed=0) * 255).round() / 255


@pytest.fixture
def tensors(head_file):
    return torch.load(head_file, weights_only=True)


class Original(nn.Module):
    """The predictor as its source has it: dropout between the layers, and `layers` in the keys."""

    def __init__(self, *widths):
        super().__init__()
        a, b, c, d, e, f = widths
        self.layers = nn.Sequential(
            nn.Linear(a, b),
            nn.Dropout(0.2),
            nn.Linear(b, c),
            nn.Dropout(0.2),
            nn.Linear(c, d),
            nn.Dropout(0.1),
            nn.Linear(d, e),
            nn.Linear(e, f),
        )


def test_equals_the_original_on_transformers_features(reward, head_file, clip_folder, images):
    original = Original(64, 32, 16, 8, 4, 1).eval()
    original.load_state_dict(torch.load(head_file, weights_only=True))
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(
        [(image * 255).byte().permute(1, 2, 0).numpy() for image in images], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(pixel_values=pixels).pooler_output
        expected = original.layers(features / features.norm(dim=1, keepdim=True))[:, 0]
    scores = reward(images, PROMPTS).total
    assert scores.std() > 0.1
    assert scores == pytest.approx(expected, abs=2e-6)
    assert reward.image_features(images) == pytest.approx(features / features.norm(dim=1, keepdim=True), abs=1e-6)


def test_the_published_head_fits(tmp_path):
    """The file's own widths and keys."""
    original = Original(768, 1024, 128, 64, 16, 1)
    torch.save(original.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    head = read_head(str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth"))
    features = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(features), original.eval().layers(features))


def test_a_head_worked_out_by_hand(tmp_path):
    weights = [[[1.0, 2.0], [0.0, -1.0]], [[1.0, 1.0]], [[2.0], [3.0]], [[1.0, -1.0]], [[-4.0]]]
    biases = [[0.5, 0.0], [1.0], [0.0, 1.0], [0.0], [5.0]]
    pairs = [torch.tensor(value) for pair in zip(weights, biases, strict=True) for value in pair]
    save_file(dict(zip(KEYS, pairs, strict=True)), tmp_path / "head.safetensors")
    # [1, 2] -> [5.5, -2] -> [4.5] -> [9, 14.5] -> [-5.5] -> [27]
    assert read_head(str(tmp_path / "head.safetensors"))(torch.tensor([[1.0, 2.0]])).tolist() == [[27.0]]


def test_captions_do_not_matter(reward, images):
    assert torch.equal(reward(images, PROMPTS).total, reward(images, PROMPTS[::-1]).total)


def test_the_gradient_is_the_slope(reward, images):
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).total.sum(), leaf)
    step = 1e-3 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    measured = (reward(images + step, PROMPTS).total - reward(images - step, PROMPTS).total) / 2
    assert measured == pytest.approx((gradient * step).sum((1, 2, 3)), rel=0.01)


def test_a_score_without_gradient_is_the_same_to_the_last_bit_in_any_batch(reward):
    images = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % 4] for i in range(11)]
    together = reward(images, prompts).total
    for rows in (slice(0, 1), slice(3, 5), slice(7, 11)):
        assert torch.equal(reward(images[rows], prompts[rows]).total, together[rows])


def test_half_precision_heads_are_read_in_float32(tensors, tmp_path):
    torch.save({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "head.pth")
    head = read_head(str(tmp_path / "head.pth"))
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert torch.equal(head[0].weight, tensors["layers.0.weight"].half().float())


def test_bfloat16_leaves_the_head_alone(head_file, clip_folder):
    reward = Aesthetic(str(head_file), str(clip_folder), dtype="bfloat16")
    assert {p.dtype for part in (reward.tower, reward.projection) for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}


def refused(file, act=read_head) -> str:
    with pytest.raises(ValueError, match=r"^head '.*': ") as error:
        act(str(file))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"head {str(file)!r}: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.2.bias": None}, "lacks layers.2.bias; allowed: layers.0.weight, layers.0.bias, layers.2.weight"),
        ({"layers.9.weight": torch.ones(1, 1)}, "has the unexpected layers.9.weight; allowed: layers.0.weight"),
        ({"layers.0.weight": [1.0]}, "not a mapping of names to tensors"),
        ({"layers.0.weight": torch.ones(3)}, "layers.0.weight is torch.float32 [3], not floating point in 2 axes"),
        ({"layers.4.bias": torch.ones(8).long()}, "layers.4.bias is torch.int64 [8], not floating point in 1 axes"),
        ({"layers.4.weight": torch.ones(8, 17)}, "layers.4 has weight [8, 17] and bias [8], where [8, 16] and [8] are needed"),
        ({"layers.0.bias": torch.ones(31)}, "layers.0 has weight [32, 64] and bias [31], where [32, 64] and [32] are needed"),
        (
            {"layers.7.weight": torch.ones(2, 4), "layers.7.bias": torch.ones(2)},
            "layers.7 has weight [2, 4] and bias [2], where [1, 4] and [1] are needed",
        ),
    ],
)
def test_invalid_heads(tensors, tmp_path, change, said):
    changed = {key: value for key, value in (tensors | change).items() if value is not None}
    torch.save(changed, tmp_path / "head.pth")
    assert refused(tmp_path / "head.pth").startswith(said)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_not_heads(tensors, tmp_path, capsys):
    file = tmp_path / "head.pth"
    assert refused(file) == "no such file; the original is sac+logos+ava1-l14-linearMSE.pth"
    for written in (b"", b"<!DOCTYPE html>", b"PK\3\4 cut off"):
        file.write_bytes(written)
        assert refused(file).startswith("not a checkpoint of plain tensors")
        file.with_suffix(".safetensors").write_bytes(written)
        assert refused(file.with_suffix(".safetensors")).startswith("not a checkpoint of plain tensors")
    torch.save(Code(), file)
    assert refused(file).startswith("not a checkpoint of plain tensors")
    assert capsys.readouterr().out == ""
    torch.save([1, 2], file)
    assert refused(file) == "not a mapping of names to tensors"


def test_a_head_for_other_features(clip_folder, tensors, tmp_path):
    torch.save(tensors | {"layers.0.weight": torch.ones(32, 768)}, tmp_path / "head.pth")
    said = refused(tmp_path / "head.pth", lambda head: Aesthetic(head, str(clip_folder)))
    assert said == f"needs features of 768 dimensions; weights {str(clip_folder)!r} give 64"


def test_it_is_checked_without_loading_the_network(head_file, clip_folder, tmp_path):
    Aesthetic.check(str(head_file), str(clip_folder), 8)
    assert "no such file" in refused(tmp_path / "none.pth", lambda head: Aesthetic.check(head, str(clip_folder), 8))
    with pytest.raises(ValueError, match=r"^weights .*: not a transformers model folder \(no config\.json\)$"):
        Aesthetic.check(str(head_file), str(tmp_path), 8)
