"""Held-out evaluation: sampling and scoring, the statistics of a comparison, the reward-hacking watch. Knows no loop."""
