"""The networks: one adapter per model family over diffusers + peft, LoRA, export. Nothing else imports either library.

load.py              `weights:` of an experiment -> a generator; every way it can go wrong in one line
outline.py           what is known of a generator without loading it: sizes, layers, scheduler
targets.py           what `targets` of an adapter may say, and the layers it means
sd3.py               Stable Diffusion 3 and 3.5: prompts, velocity, pictures, the pipeline's own time grid
lora.py              named LoRA adapters over one frozen network: add, switch, read, write, copy
adapter_weights.py   an adapter as one flat buffer + manifest + digest, as it travels between processes
lora_file.py         an adapter as a file in the diffusers LoRA layout: save, start from one
export.py            a saved adapter, proven by a stock diffusers pipeline
glyphs/              the embedded tiny teacher and the recipe that made it

diffusers, peft and transformers take seconds to import, so this package re-exports only what needs none of them.
"""

from generators.load import download, embedded, load, outline, resolve, weights_hash

__all__ = ["download", "embedded", "load", "outline", "resolve", "weights_hash"]
