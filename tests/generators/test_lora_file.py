import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from generators.export import export_diffusers
from generators.load import load
from generators.lora_file import FILE_NAME, load_lora, save_lora

METADATA = {"base_model": "tiny"}


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


def test_start_from_a_lora_without_metadata(trained, image, folder, tmp_path):
    """bfloat16, no metadata: alpha is the rank, as in diffusers."""
    key = "transformer.transformer_blocks.1.attn.to_v"
    a, b = torch.ones(2, 32, dtype=torch.bfloat16), torch.full((32, 2), 0.5, dtype=torch.bfloat16)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "theirs.safetensors")
    lora = load_lora(trained.adapters, "start", tmp_path / "theirs.safetensors")
    assert (lora.rank, lora.alpha, lora.modules) == (2, 2, ("transformer_blocks.1.attn.to_v",))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with trained.adapters.using("start"):
        torch.testing.assert_close(image(trained.pipeline, trained), image(pipeline, trained), rtol=0, atol=1e-5)


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
    assert str(error.value).startswith(f"LoRA {str(path)!r}: does not fit this network with a single rank: ")
    assert "\n" not in str(error.value)
    assert trained.adapters.names == ("policy", "small")


def test_files_that_are_not_plain_loras(trained, tmp_path):
    with pytest.raises(ValueError, match=r"there is no \.safetensors file and no folder with pytorch_lora_weights.safetensors"):
        load_lora(trained.adapters, "start", tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"there is no \.safetensors file"):
        load_lora(trained.adapters, "start", tmp_path)
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(1, 32)}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True, "transformer.alpha_pattern": {}})}
    save_file(tensors, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(ValueError, match="not a plain LoRA, it sets use_rslora"):
        load_lora(trained.adapters, "start", tmp_path)
