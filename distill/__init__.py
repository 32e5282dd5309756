"""Few-step distillation: one file per method, each to be read beside its paper. What they share is in distillation.py.

Methods read the frozen teacher's trajectories; they never call a worker, a reward or an optimiser themselves.
"""

from distill.ccm import CCM
from distill.consistency import Consistency
from distill.dmd2 import DMD2
from distill.pcm import PCM
from distill.reflow import Reflow

ALGORITHMS = {"ccm": CCM, "consistency": Consistency, "reflow": Reflow, "pcm": PCM, "dmd2": DMD2}
"""{`objective.algorithm`: the objective's class}"""

__all__ = ["ALGORITHMS"]
