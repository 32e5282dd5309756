import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generators.export
from diffusion import sample_noise
from generators.export import export_diffusers
from generators.load import load
from generators.lora_file import FILE_NAME, load_lora, save_lora

METADATA = {"base_model": "tiny", "algorithm": "neighbor_grpo", "step": "40", "rewards": "glyph_match 1.0"}


@pytest.fixture
def trained(folder, randomize):
    """A generator from disk with a policy whose alpha is not its rank."""
    generator = load(str(folder))
    generator.adapters.add("policy", rank=4, alpha=6, targets=["attn", "ff"])
    randomize(generator, "policy")
    return generator


def picture(pipeline, generator):
    noise = sample_noise([5], generator.latent_shape())
    return pipeline("a red circle", num_inference_steps=3, latents=noise, max_sequence_length=0, output_type="pt").images


@pytest.mark.parametrize("whole_folder", [True, False])
def test_stock_diffusers_makes_the_same_picture(trained, folder, tmp_path, whole_folder):
    file = export_diffusers(trained, "policy", tmp_path / "export", METADATA)
    assert file == tmp_path / "export" / "pytorch_lora_weights.safetensors"
    assert list(file.parent.iterdir()) == [file]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    base = picture(pipeline, trained)
    if whole_folder:
        pipeline.load_lora_weights(file.parent)
    else:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    with trained.adapters.using("policy"):
        expected = picture(trained.pipeline, trained)
    assert torch.equal(picture(pipeline, trained), expected)
    assert (expected - base).abs().max() > 0.01


def test_the_file_says_what_it_is(trained, tmp_path):
    file = export_diffusers(trained, "policy", tmp_path, METADATA)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    lora = json.loads(metadata.pop("lora_adapter_metadata"))
    assert metadata == METADATA | {"rank": "4", "alpha": "6", "format": "pt"}
    assert (lora["transformer.r"], lora["transformer.lora_alpha"]) == (4, 6)
    keys = load_file(file).keys()
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in keys
    assert len(keys) == 2 * len(trained.adapters.lora("policy").modules)


def test_export_leaves_the_generator_as_it_was(trained, tmp_path):
    before = {name: (p.requires_grad, p.data_ptr()) for name, p in trained.transformer.named_parameters()}
    digest = trained.adapters.read("policy").digest
    export_diffusers(trained, "policy", tmp_path, METADATA)
    assert {name: (p.requires_grad, p.data_ptr()) for name, p in trained.transformer.named_parameters()} == before
    assert trained.adapters.read("policy").digest == digest
    assert (trained.adapters.names, trained.adapters.active) == (("policy",), None)


def test_a_bfloat16_base_exports_too(folder, randomize, tmp_path):
    generator = load(str(folder), dtype="bfloat16")
    generator.adapters.add("policy", rank=4, alpha=6)
    randomize(generator, "policy")
    tensors = load_file(export_diffusers(generator, "policy", tmp_path, METADATA))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_untrained_adapter_is_refused(trained, tmp_path):
    trained.adapters.add("new", rank=4, alpha=4)
    with pytest.raises(ValueError, match="adapter 'new' changes nothing: its B matrices are all zero"):
        export_diffusers(trained, "new", tmp_path / "export", METADATA)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused(trained, tmp_path, value):
    trained.adapters.parameters("policy")[3].data[0, 0] = value
    with pytest.raises(ValueError, match=r"'policy' is broken: .*attn.to_k.lora_B.weight and 0 more hold NaN or infinity"):
        export_diffusers(trained, "policy", tmp_path, METADATA)


def other_alpha(adapters, name, path, metadata):
    save_lora(adapters, name, path, metadata)
    save_file(load_file(path), path)  # the metadata is gone, and alpha with it


def other_keys(adapters, name, path, metadata):
    save_lora(adapters, name, path, metadata)
    with safe_open(path, framework="pt") as opened:
        kept = opened.metadata()
    save_file(dict(list(load_file(path).items())[4:]), path, metadata=kept)


@pytest.mark.parametrize("spoiled", [other_alpha, other_keys])
def test_what_diffusers_reads_differently_is_not_kept(trained, tmp_path, monkeypatch, spoiled):
    monkeypatch.setattr(generators.export, "save_lora", spoiled)
    with pytest.raises(RuntimeError, match="diffusers reads the exported adapter 'policy' as other weights or another alpha"):
        export_diffusers(trained, "policy", tmp_path, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_other_latents_are_refused(trained, tmp_path, monkeypatch):
    latents = generators.export._latents
    noise = iter([0.0, 1.0])
    monkeypatch.setattr(generators.export, "_latents", lambda *arguments: latents(*arguments) + next(noise))
    with pytest.raises(RuntimeError, match="diffusers makes other latents from the exported adapter 'policy': off by"):
        export_diffusers(trained, "policy", tmp_path, METADATA)


@pytest.mark.parametrize("as_folder", [True, False])
def test_start_from_an_exported_adapter(trained, folder, tmp_path, as_folder):
    file = export_diffusers(trained, "policy", tmp_path, METADATA)
    fresh = load(str(folder))
    lora = load_lora(fresh.adapters, "policy", file.parent if as_folder else file)
    assert lora == trained.adapters.lora("policy")
    assert fresh.adapters.read("policy").digest == trained.adapters.read("policy").digest
    assert all(parameter.requires_grad for parameter in fresh.adapters.parameters("policy"))
    load_lora(fresh.adapters, "frozen", file, trainable=False)
    assert not any(parameter.requires_grad for parameter in fresh.adapters.parameters("frozen"))


def test_start_from_somebody_elses_lora(trained, folder, tmp_path):
    """bfloat16, no metadata: alpha is the rank, as diffusers takes it."""
    key = "transformer.transformer_blocks.1.attn.to_v"
    a, b = torch.ones(2, 32, dtype=torch.bfloat16), torch.full((32, 2), 0.5, dtype=torch.bfloat16)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "theirs.safetensors")
    lora = load_lora(trained.adapters, "start", tmp_path / "theirs.safetensors")
    assert (lora.rank, lora.alpha, lora.modules) == (2, 2, ("transformer_blocks.1.attn.to_v",))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with trained.adapters.using("start"):
        torch.testing.assert_close(picture(trained.pipeline, trained), picture(pipeline, trained), rtol=0, atol=1e-5)


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def resized(key_part, resize):
    return lambda tensors: {key: resize(value) if key_part in key else value for key, value in tensors.items()}


def without(key):
    return lambda tensors: {other: value for other, value in tensors.items() if other != "transformer." + key}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (renamed("transformer.proj_out", "text_encoder.proj_out"), r"2 unexpected (text_encoder.proj_out.lora_A.weight, "),
        (renamed("transformer.", "base_model.model."), r"4 unexpected (base_model.model.context_embedder.lora_A.weight, "),
        (
            renamed("proj_out", "blocks.9"),
            r"2 unexpected (transformer.blocks.9.lora_A.weight, ",
        ),
        (without("proj_out.lora_A.weight"), r"1 unexpected (transformer.proj_out.lora_B.weight)"),
        (without("proj_out.lora_B.weight"), r"1 missing (transformer.proj_out.lora_B.weight)"),
        (resized("proj_out.lora_A", lambda a: a[:, :16]), r"(transformer.proj_out.lora_A.weight (4, 16), expected (4, 32))"),
        (resized("proj_out.lora_A", lambda a: a[:2]), r"(transformer.proj_out.lora_A.weight (2, 32), expected (4, 32))"),
    ],
)
def test_a_lora_that_does_not_fit_names_the_keys(trained, tmp_path, change, problem):
    path = tmp_path / "lora.safetensors"
    trained.adapters.add("small", rank=4, alpha=4, targets=["context_embedder", "proj_out"])
    save_lora(trained.adapters, "small", path, METADATA)
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        load_lora(trained.adapters, "start", path)
    assert str(error.value).startswith(f"LoRA {str(path)!r} does not fit this network at one rank: ")
    assert "\n" not in str(error.value)
    assert trained.adapters.names == ("policy", "small")


def test_files_that_are_no_plain_lora(trained, tmp_path):
    with pytest.raises(ValueError, match=r"there is no \.safetensors file and no folder with pytorch_lora_weights.safetensors"):
        load_lora(trained.adapters, "start", tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"there is no \.safetensors file"):
        load_lora(trained.adapters, "start", tmp_path)
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(1, 32)}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True, "transformer.alpha_pattern": {}})}
    save_file(tensors, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(ValueError, match="is not plain: it sets use_rslora"):
        load_lora(trained.adapters, "start", tmp_path)
