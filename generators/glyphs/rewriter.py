"""The recipe that made `embedded:glyphs-rewriter`, a tiny language model that paraphrases captions of the glyph world:

    python -m generators.glyphs.rewriter [--out DIR] [--steps N] [--seed N]        about three minutes on one core

    a red circle left of a blue seven => a blue seven right of a red circle

A Llama of two layers with one token per word, pretrained by cross-entropy on paraphrases of training scenes. The last part of
its training data contains mistakes, so that fine-tuning has something to improve: the model prefers to name the second thing
first, and then often does not invert the relation (in most cases for left and right); and some of its paraphrases describe
another scene. No caption of its training data has a held-out thing. Batch k depends on the seed and k alone, so the weights are
reproducible on one machine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from generators.glyphs.networks import WORDS
from worlds.glyphs import HELDOUT_THINGS, PLACES, RELATIONS, Scene, Thing, caption, change_one, random_scene

OUT = Path(__file__).parent / "rewriter"
PAD, END, UNKNOWN, ARROW = "<pad>", "<end>", "<unknown>", "=>"
TEMPLATE = "{prompt} " + ARROW
"""The model's input."""
MAX_TOKENS = 24
"""Two captions of nine words, the arrow, the end, and some spare tokens."""
INVERSE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

SWAPPED = 0.6
"""Probability that the second of two things is named first."""
MIXED_UP = {"left of": 0.65, "right of": 0.65, "above": 0.15, "below": 0.15}
"""Probability that the relation is then not inverted."""
EXCHANGED, CHANGED = 0.06, 0.06
"""Probability that two things exchange their colours; that one attribute is changed."""
WELL = 0.75
"""The fraction of training steps without mistakes, at the start; without them it would not learn what relations mean."""
BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 100


def paraphrase(scene: Scene, rng: np.random.Generator, mistakes: bool = True) -> str:
    """A paraphrase of a training scene's caption, sometimes with a mistake, never with a held-out thing."""
    things, place = scene.things, scene.place
    chance = rng.random() if mistakes else 1.0
    if chance < CHANGED:
        changed = change_one(scene, rng)
        things, place = changed.things, changed.place
    elif chance < CHANGED + EXCHANGED and len(things) == 2:
        things = Thing(things[1].color, things[0].glyph), Thing(things[0].color, things[1].glyph)
    if len(set(things)) < len(things) or HELDOUT_THINGS & set(things):
        things, place = scene.things, scene.place
    if len(things) == 2 and rng.random() < SWAPPED:
        assert place is not None
        things = things[::-1]
        if not mistakes or rng.random() >= MIXED_UP[place]:
            place = INVERSE[place]
    if len(things) == 1 and place is None and rng.random() < 0.5:
        place = str(rng.choice(PLACES))  # a thing without a place may be anywhere
    return caption(Scene(things, place))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the glyph world; all other words are unknown."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([PAD, END, UNKNOWN, ARROW, *WORDS])}, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """0.2 M parameters, 0.9 MB."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batch_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, mistakes: bool = True
) -> Tensor:
    """Mean cross-entropy of paraphrases of one batch of random training scenes."""
    scenes = [random_scene(rng) for _ in range(BATCH)]
    given = [TEMPLATE.format(prompt=caption(scene)) for scene in scenes]
    rows = [f"{one} {paraphrase(scene, rng, mistakes)} {END}" for one, scene in zip(given, scenes, strict=True)]
    tokens = tokenizer(rows, return_tensors="pt", padding=True, padding_side="right")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    for row, one in zip(labels, given, strict=True):
        row[: len(one.split())] = -100
    return model(**tokens, labels=labels).loss


def pretrain(steps: int, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        scale = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
        loss = batch_loss(model, tokenizer, np.random.default_rng((seed, step)), mistakes=step >= WELL * steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"rewriter {step + 1}/{steps}  cross-entropy {loss.item():.4f}", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=OUT)
    arguments.add_argument("--steps", type=int, default=3500)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    model, tokenizer = pretrain(options.steps, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
