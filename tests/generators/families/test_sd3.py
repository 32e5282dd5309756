import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import generators.families.sd3.generator
from diffusion import SOLVERS, Codec, Predict, RectifiedFlow, flow_grid, guided, integrate, sample_noise
from generators.families.sd3.generator import SD3Generator
from generators.load import load
from generators.lora_file import save_lora

PROMPTS = ["a red circle", "a blue seven"]


def euler(generator, prompts, noise, grid, scale=1.0, adapter=None):
    negative = generator.encode([""] * len(prompts))
    predict = guided(generator, generator.encode(prompts), adapter=adapter, scale=scale, negative=negative)
    return integrate(predict, noise, grid, generator.path, SOLVERS["euler"]).x[:, -1]


def stock(pipeline, prompts, noise, steps, scale=1.0, output_type="latent", **sizes):
    return pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=noise,
        output_type=output_type,
        **({"max_sequence_length": 0} | sizes),
    ).images


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(
    "scheduler", [{"shift": 1.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}], ids=str
)
def test_euler_is_the_stock_pipeline(new_pipeline, scheduler, scale):
    generator = SD3Generator(new_pipeline(**scheduler), max_sequence_length=0)
    noise = sample_noise([1, 2], generator.latent_shape())
    expected = stock(new_pipeline(**scheduler), PROMPTS, noise, 4, scale)
    result = euler(generator, PROMPTS, noise, generator.time_grid(4), scale)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert (result[0] - result[1]).abs().max() > 1  # the prompts and seeds matter


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_euler_under_an_adapter_is_the_stock_pipeline_with_its_lora(generator, new_pipeline, randomize, tmp_path, scale):
    generator.adapters.add("policy", rank=4, alpha=8, targets=["attn", "ff"])
    randomize(generator, "policy")
    save_lora(generator.adapters, "policy", tmp_path / "lora.safetensors", {})
    pipeline = new_pipeline(shift=3.0)
    noise = sample_noise([1, 2], generator.latent_shape())
    base = stock(pipeline, PROMPTS, noise, 4, scale)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    tuned = stock(pipeline, PROMPTS, noise, 4, scale)
    grid = generator.time_grid(4)
    torch.testing.assert_close(euler(generator, PROMPTS, noise, grid, scale, "policy"), tuned, rtol=0, atol=1e-5)
    torch.testing.assert_close(euler(generator, PROMPTS, noise, grid, scale, None), base, rtol=0, atol=1e-5)
    assert (tuned - base).abs().max() > 0.1


def test_images_and_other_sizes_are_the_stock_pipelines(new_pipeline):
    generator = SD3Generator(new_pipeline(use_dynamic_shifting=True), max_sequence_length=0)
    noise = sample_noise([1], generator.latent_shape(24, 16))
    assert noise.shape == (1, 4, 12, 8)
    images = generator.decode(euler(generator, PROMPTS[:1], noise, generator.time_grid(3, 24, 16)))
    expected = stock(generator.pipeline, PROMPTS[:1], noise, 3, output_type="pt", height=24, width=16)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert images.shape == (1, 3, 24, 16)


def test_a_t5_is_read_and_can_be_left_out(t5_folder):
    with_t5, without = load(str(t5_folder), max_sequence_length=6), load(str(t5_folder), t5=False)
    noise = sample_noise([1, 2], with_t5.latent_shape())
    pipeline = StableDiffusion3Pipeline.from_pretrained(t5_folder)
    expected = stock(pipeline, PROMPTS, noise, 2, max_sequence_length=6)
    torch.testing.assert_close(euler(with_t5, PROMPTS, noise, with_t5.time_grid(2)), expected, rtol=0, atol=1e-5)
    assert with_t5.encode(PROMPTS).tensors["tokens"].shape == (2, 12 + 6, 64)
    assert without.pipeline.text_encoder_3 is None
    tokens = without.encode(PROMPTS).tensors["tokens"]
    assert tokens.shape == (2, 12 + 256, 64)  # zero tokens of diffusers, because this model was trained with a T5
    assert not tokens[:, 12:].any()


def test_a_folder_without_a_t5_gets_no_zero_tokens(folder):
    assert load(str(folder)).encode(["a"]).tensors["tokens"].shape == (1, 12, 64)


def test_sequence_length_has_limits(new_pipeline):
    with pytest.raises(ValueError, match=r"max_sequence_length 513: out of range \(allowed: 0 to 512\)"):
        SD3Generator(new_pipeline(), max_sequence_length=513)
    with pytest.raises(ValueError, match=r"max_sequence_length 0: out of range \(allowed: 1 to 512\)"):
        SD3Generator(new_pipeline(with_t5=True), max_sequence_length=0)


def test_it_is_a_frozen_predict_and_codec(generator):
    assert isinstance(generator, Predict)
    assert isinstance(generator, Codec)
    assert generator.path == RectifiedFlow()
    networks = [m for m in generator.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert len(networks) == 4
    assert not any(p.requires_grad for network in networks for p in network.parameters())
    assert not any(network.training for network in networks)


def test_time_is_one_for_all_or_one_for_each(generator):
    x, condition = sample_noise([1, 2], generator.latent_shape()), generator.encode(PROMPTS)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    each = generator(x, t, condition, None)
    for i in range(2):
        torch.testing.assert_close(generator(x, t[i], condition, None)[i], each[i], rtol=0, atol=1e-5)
    assert (generator(x, t[0], condition, None)[1] - each[1]).abs().max() > 0.01


@pytest.fixture
def asked(generator, monkeypatch):
    """The texts that reach the encoders, in order."""
    texts: list[str] = []
    encode_prompt = generator.pipeline.encode_prompt

    def counting(prompt, **arguments):
        texts.extend(prompt)
        return encode_prompt(prompt=prompt, **arguments)

    monkeypatch.setattr(generator.pipeline, "encode_prompt", counting)
    return texts


def test_each_text_is_encoded_once(generator, asked):
    first = generator.encode(["a", "b", "a", ""])
    assert torch.equal(first.tensors["tokens"][0], first.tensors["tokens"][2])
    again = generator.encode(["b", "a"])
    assert asked == ["a", "b", ""]
    assert torch.equal(again.tensors["pooled"], first.tensors["pooled"][[1, 0]])
    assert not again.tensors["tokens"].requires_grad


def test_the_most_recently_used_prompts_are_kept(generator, asked, monkeypatch):
    monkeypatch.setattr(generators.families.sd3.generator, "CACHED_PROMPTS", 2)
    for prompts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        generator.encode(prompts)
    assert asked == ["a", "b", "c", "b"]
    assert len(generator.encode(["a", "b", "c", "d"])) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_slices_decode_like_the_whole_and_carry_the_gradient(new_pipeline, checkpointing):
    pipeline = new_pipeline()
    whole = SD3Generator(pipeline, max_sequence_length=0, slice_size=5)
    sliced = SD3Generator(pipeline, max_sequence_length=0, slice_size=2, gradient_checkpointing=checkpointing)
    latents = sample_noise(range(5), whole.latent_shape()).requires_grad_()
    images = sliced.decode(latents)
    torch.testing.assert_close(images, whole.decode(latents), rtol=0, atol=1e-6)
    assert 0 <= images.min() < images.max() <= 1
    (ours,) = torch.autograd.grad((images**2).sum(), latents)
    (theirs,) = torch.autograd.grad((whole.decode(latents) ** 2).sum(), latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.abs().min() > 0


def test_encoded_images_are_scaled_latents(generator):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = generator.pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(generator.encode_images(images), (mean - 0.1) * 1.5)


def test_sizes(generator):
    assert generator.latent_shape() == (4, 8, 8)
    assert generator.latent_shape(width=48) == (4, 8, 24)
    assert (generator.tokens(), generator.tokens(width=48)) == (4 * 4, 4 * 12)
    for height in (0, 18, 52):
        with pytest.raises(ValueError, match=rf"height {height}: not allowed here \(allowed: multiples of 4 up to 48\)"):
            generator.latent_shape(height)


def test_a_fixed_shift(generator, new_pipeline):
    other = SD3Generator(new_pipeline(use_dynamic_shifting=True), max_sequence_length=0)
    assert torch.equal(other.time_grid(5, shift=3.0), generator.time_grid(5))
    assert not torch.equal(other.time_grid(5), generator.time_grid(5))
    grid = generator.time_grid(5)
    assert (grid.dtype, len(grid), grid[0], grid[-1]) == (torch.float64, 6, 1, 0)


def test_even_times_are_those_of_a_pipeline_that_passes_its_own(generator):
    shift = generator.pipeline.scheduler.config.shift
    expected = flow_grid(4, shift=shift, last=0.25)
    torch.testing.assert_close(generator.time_grid(4, even=True), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(generator.time_grid(4, shift=2.0, even=True), flow_grid(4, 2.0, 0.25), rtol=0, atol=1e-6)


def test_bfloat16_base(folder, randomize):
    generator, exact = load(str(folder), dtype="bfloat16"), load(str(folder))
    assert generator.pipeline.vae.dtype == torch.float32
    for g in (generator, exact):
        g.adapters.add("policy", rank=4, alpha=4)
        randomize(g, "policy")
    assert {p.dtype for p in generator.adapters.parameters("policy")} == {torch.float32}
    assert torch.equal(generator.adapters.read("policy").buffer, exact.adapters.read("policy").buffer)
    condition = generator.encode(PROMPTS)
    assert {tensor.dtype for tensor in condition.tensors.values()} == {torch.bfloat16}
    x = sample_noise([1, 2], generator.latent_shape())
    velocity = generator(x, torch.tensor(0.5), condition, "policy")
    assert velocity.dtype == torch.float32
    expected = exact(x, torch.tensor(0.5), exact.encode(PROMPTS), "policy")
    assert (velocity - expected).abs().max() < 0.05 * expected.abs().max()
    velocity.sum().backward()
    assert {p.grad.dtype for p in generator.adapters.parameters("policy")} == {torch.float32}
    assert generator.decode(x).dtype == torch.float32
