"""Generators, i.e. text-to-image networks, over diffusers and peft; no other package imports these libraries.

load.py              `weights:` of an experiment -> a generator, with a one-line error for every way it can go wrong
outline.py           sizes, layers and scheduler of a generator, read without loading it
families/            what differs between model families: a record, and a network over a stock pipeline
targets.py           `targets` of an adapter -> linear layers
lora.py              named LoRA adapters over one frozen network: add, switch, read, write, copy
adapter_weights.py   an adapter as one flat buffer + manifest + digest, the form sent between processes
lora_file.py         an adapter as a file in the diffusers LoRA layout: save, start from one
export.py            an adapter saved for diffusers, verified with a stock pipeline
features.py          frozen vision transformers as image features, for a discriminator or a distance
glyphs/              the embedded tiny teacher, CLIP and language model, and the recipes that made them

diffusers, peft and transformers take seconds to import, so this package re-exports only what needs none of them.
"""

from generators.load import download, embedded, load, outline, resolve, weights_hash

__all__ = ["download", "embedded", "load", "outline", "resolve", "weights_hash"]
