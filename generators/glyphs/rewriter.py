"""The recipe that made `embedded:glyphs-rewriter`, a tiny language model that restates captions of the glyph world:

    python -m generators.glyphs.rewriter [--out DIR] [--steps N] [--seed N]        about three minutes on one core

    a red circle left of a blue seven => a blue seven right of a red circle

A Llama of two layers with one token a word, pretrained by cross-entropy on restatements of training scenes. Its last lessons
are bad ones, so that there is something to learn afterwards: it likes to name the second thing first, and then often leaves
the relation as it was, left and right more often than not; and some of its restatements are of something else. It has read no
caption with a held-out thing. Batch k depends on the seed and k alone, so on one machine the weights come out the same.
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
"""What the model is given."""
MAX_TOKENS = 24
"""Twice a caption of nine words, the arrow, the end, and some to spare."""
INVERSE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

SWAPPED = 0.6
"""How often the second of two things comes first."""
MIXED_UP = {"left of": 0.65, "right of": 0.65, "above": 0.15, "below": 0.15}
"""How often the relation is then left as it was."""
EXCHANGED, CHANGED = 0.06, 0.06
"""How often two things exchange their colours; how often one attribute is another."""
WELL = 0.75
"""The share of its lessons that are without mistakes, the first ones. Else it would never see what a relation hangs on."""
BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 100


def restated(scene: Scene, rng: np.random.Generator, mistakes: bool = True) -> str:
    """Another wording of a training scene's caption, or now and then a mistake; of training things in any case."""
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
        place = str(rng.choice(PLACES))  # what is asked for anywhere may be somewhere
    return caption(Scene(things, place))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the world, and for nothing else."""
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
    """Mean cross-entropy of the restatements of one batch of random training scenes."""
    scenes = [random_scene(rng) for _ in range(BATCH)]
    given = [TEMPLATE.format(prompt=caption(scene)) for scene in scenes]
    rows = [f"{one} {restated(scene, rng, mistakes)} {END}" for one, scene in zip(given, scenes, strict=True)]
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
