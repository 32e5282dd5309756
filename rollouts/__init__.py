"""Prompts -> rollouts. Imports diffusion/, inputs/ and worlds/ alone.

prompts.py    prompt sets: text, JSONL, Parquet, datasets, the embedded ones; the prompts of a training step
images.py     real images with captions: folders, WebDatasets, data sets; their latents as a source of rollouts
tables.py     data sets of Hugging Face's `datasets`, for both
worker.py     prompt groups with their seeds; the rollout worker: groups -> trajectories and images
store.py      the frozen teacher's trajectories, drawn once and read from disk afterwards
records.py    the content-addressed store of tensors beneath it
"""

from rollouts.prompts import prompts_of_step, read_prompts
from rollouts.worker import Worker, seed_groups

__all__ = ["Worker", "prompts_of_step", "read_prompts", "seed_groups"]
