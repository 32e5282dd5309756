"""Prompts -> rollouts.

prompts.py    prompt sets: text, JSONL, Parquet, datasets, the embedded ones; which prompts a step draws
worker.py     prompt groups with their seeds; the rollout worker: groups -> images and the states on the way
"""

from rollouts.prompts import prompts_of_step, read_prompts
from rollouts.worker import Group, RolloutWorker, seed_groups

__all__ = ["Group", "RolloutWorker", "prompts_of_step", "read_prompts", "seed_groups"]
