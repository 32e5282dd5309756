import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generators.export
from generators.export import export_diffusers
from generators.load import load
from generators.lora_file import save_lora

METADATA = {"base_model": "tiny", "algorithm": "neighbor_grpo", "step": "40", "rewards": "glyph_match 1.0"}


@pytest.mark.parametrize("whole_folder", [True, False])
def test_stock_diffusers_makes_the_same_image(trained, image, folder, tmp_path, whole_folder):
    file = export_diffusers(trained, "policy", tmp_path / "export", METADATA)
    assert file == tmp_path / "export" / "pytorch_lora_weights.safetensors"
    assert list(file.parent.iterdir()) == [file]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    base = image(pipeline, trained)
    if whole_folder:
        pipeline.load_lora_weights(file.parent)
    else:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    with trained.adapters.using("policy"):
        expected = image(trained.pipeline, trained)
    assert torch.equal(image(pipeline, trained), expected)
    assert (expected - base).abs().max() > 0.01


def test_the_metadata_of_the_file(trained, tmp_path):
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
    with pytest.raises(ValueError, match="adapter 'new': changes nothing, its B matrices are all zero"):
        export_diffusers(trained, "new", tmp_path / "export", METADATA)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused(trained, tmp_path, value):
    trained.adapters.parameters("policy")[3].data[0, 0] = value
    with pytest.raises(ValueError, match=r"adapter 'policy': NaN or infinity in .*attn.to_k.lora_B.weight and 0 more tensors"):
        export_diffusers(trained, "policy", tmp_path, METADATA)


def other_alpha(adapters, name, path, metadata):
    save_lora(adapters, name, path, metadata)
    save_file(load_file(path), path)  # drops the metadata, and with it alpha


def other_keys(adapters, name, path, metadata):
    save_lora(adapters, name, path, metadata)
    with safe_open(path, framework="pt") as opened:
        kept = opened.metadata()
    save_file(dict(list(load_file(path).items())[4:]), path, metadata=kept)


@pytest.mark.parametrize("spoiled", [other_alpha, other_keys])
def test_what_diffusers_reads_differently_is_not_kept(trained, tmp_path, monkeypatch, spoiled):
    monkeypatch.setattr(generators.export, "save_lora", spoiled)
    with pytest.raises(RuntimeError, match="adapter 'policy': diffusers reads other weights or another alpha from"):
        export_diffusers(trained, "policy", tmp_path, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_other_latents_are_refused(trained, tmp_path, monkeypatch):
    latents = trained.sample_stock
    noise = iter([0.0, 1.0])
    monkeypatch.setattr(trained, "sample_stock", lambda *arguments: latents(*arguments) + next(noise))
    with pytest.raises(RuntimeError, match="adapter 'policy': diffusers makes other latents from the exported file, error"):
        export_diffusers(trained, "policy", tmp_path, METADATA)
