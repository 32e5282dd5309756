"""The tiny networks of the glyph world: small instances of stock diffusers and transformers classes.

8x8x8 latents in 2x2 patches make 16 image tokens, with 12 text tokens: a forward pass of 64 samples takes tens of milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from worlds.glyphs import COLORS, GLYPHS, IMAGE_SIZE, PLACES, RELATIONS

MAX_TOKENS = 12
"""Start, at most nine words ("a red circle left of a blue seven"), end, and one spare token."""
WORDS = sorted({"a", *COLORS, *GLYPHS, *(word for phrase in PLACES + RELATIONS for word in phrase.split())})
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 64
WIDTH = 128
LATENT_CHANNELS = 8


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the world is one token; any other text still encodes."""
    alphabet = sorted(ByteLevel.alphabet())
    pairs = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(vocab_size=100_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    pairs.train_from_iterator(WORDS, trainer)
    merges = [tuple(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, layers: int = 3) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """SD3 reads its second-to-last layer as context and its projected end token as the pooled prompt."""
    return CLIPTextModelWithProjection(text_config(tokenizer))


def new_vae() -> AutoencoderKL:
    """32x32x3 pixels <-> 8x8x8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_transformer() -> SD3Transformer2DModel:
    """2.3 M parameters, 4 joint blocks of width 128."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An image tower over 64 patches of 4x4 pixels and a text tower, 64 common dimensions."""
    text = text_config(tokenizer, width=96)
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text.to_dict() | {"projection_dim": 64}, vision_config=vision, projection_dim=64))
