"""A tiny random SD3 pipeline with all parts of the real ones: dual attention, qk norm, a last block without text output."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusion import sample_noise
from generators.families.sd3.generator import SD3Generator
from generators.glyphs import networks
from generators.load import load

T5_WORDS = ["a", "red", "blue", "circle", "seven"]


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(networks.text_config(tokenizer, width=32, layers=2))


def new_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in T5_WORDS)]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_pipeline(tokenizer: CLIPTokenizer, with_t5: bool = False, **scheduler: object) -> StableDiffusion3Pipeline:
    """Random weights, always the same; larger than the initial ones of diffusers, so that prompts and times matter."""
    torch.manual_seed(0)
    t5, t5_tokenizer = new_t5() if with_t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=new_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=new_vae(),
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    for network in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        for parameter in network.parameters() if network else ():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.8 * parameter.shape[1] ** -0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With threads that wait for a busy core, networks this small take up to 200 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    return networks.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def new_pipeline(tokenizer) -> Callable[..., StableDiffusion3Pipeline]:
    return partial(build_pipeline, tokenizer)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, new_pipeline) -> Path:
    """A saved pipeline without a T5, shift 3."""
    path = tmp_path_factory.mktemp("sd3")
    new_pipeline(shift=3.0).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, new_pipeline) -> Path:
    path = tmp_path_factory.mktemp("sd3-t5")
    new_pipeline(with_t5=True).save_pretrained(path)
    return path


@pytest.fixture
def generator(new_pipeline) -> SD3Generator:
    return SD3Generator(new_pipeline(shift=3.0), max_sequence_length=0)


@pytest.fixture
def randomize():
    """Fill the B matrices of an adapter with random values."""

    def fill(generator: SD3Generator, name: str, seed: int = 0, std: float = 0.1) -> None:
        rng = torch.Generator().manual_seed(seed)
        for key, parameter in generator.adapters.named_parameters(name).items():
            if ".lora_B." in key:
                parameter.data.normal_(0, std, generator=rng)

    return fill


@pytest.fixture
def trained(folder, randomize) -> SD3Generator:
    """A generator from disk with a policy whose alpha is not its rank."""
    generator = load(str(folder))
    generator.adapters.add("policy", rank=4, alpha=6, targets=["attn", "ff"])
    randomize(generator, "policy")
    return generator


@pytest.fixture
def image():
    """The image [1, 3, H, W] that a stock pipeline makes of a prompt and noise."""

    def sample(pipeline: StableDiffusion3Pipeline, generator: SD3Generator) -> torch.Tensor:
        noise = sample_noise([5], generator.latent_shape())
        return pipeline("a red circle", num_inference_steps=3, latents=noise, max_sequence_length=0, output_type="pt").images

    return sample
