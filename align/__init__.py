"""Reward alignment: one algorithm, one file, each an Objective of diffusion/types.py. Knows no plumbing and no other room.

neighbor_grpo.py    Neighbor GRPO: ODE rollouts from neighbouring noise, any solver, any reward
"""

from align.neighbor_grpo import NeighborGRPO

ALGORITHMS = {"neighbor_grpo": NeighborGRPO}
"""What an experiment's `objective.algorithm` may name."""

__all__ = ["ALGORITHMS", "NeighborGRPO"]
