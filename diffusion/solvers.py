"""Deterministic solvers of the sampling ODE: one step, one signature, explicit state.

Every step takes the state x at time t to time s < t, evaluating the network through `predict`, and returns the new state
with the history that the next step needs. History is what a multistep method keeps of earlier steps; it starts empty, and
with an empty history every method takes a single-step method's step. A step to s = 0 is first order in every solver, and
returns the clean prediction: there lambda = log(alpha / sigma) is infinite, and no derivative in lambda can be formed.

| solver   | order | evaluations a step       | source |
| -------- | ----- | ------------------------ | ------ |
| euler    | 1     | 1                        | DDIM: Song et al. 2020, arXiv 2010.02502, eq. 12 |
| heun     | 2     | 2; 1 for a step to s = 0 | Karras et al. 2022, arXiv 2206.00364, algorithm 1 |
| dpmpp_2m | 2     | 1                        | Lu et al. 2022, arXiv 2211.01095, algorithm 2 |
| unipc    | 3     | 1                        | UniPC-2, B(h) = e^-h - 1: Zhao et al. 2023, arXiv 2302.04867 |

`consistency` does not solve the ODE but samples from a few-step student: each step takes the clean prediction and, except for
the last, noises it again to the next time (multistep consistency sampling: Song et al. 2023, arXiv 2303.01469, algorithm 1). It
gives what diffusers' FlowMatchLCMScheduler gives on the same grid and noise.

Without its corrector unipc is of order 2 and equals dpmpp_2m.

Starting at pure noise (lambda = -inf) is exact in the multistep methods too. The first step is first order, which stays
finite; in the second, the previous step is infinitely long in lambda, so the weight of its slope is 0 and the order
drops by one without a special case.

diffusers 0.42 agrees on every grid that ends at 0. On a grid that ends above 0 it still makes the last step first order
(UniPC always, DPM-Solver++ below 15 steps); here only a step to s = 0 is.

Axes: B samples. Times are float64 tensors, [] or [B], in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.path import Path, combine

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [] or [B]) -> the path's native prediction [B, ...]: a network with condition, adapter and guidance bound."""


@dataclass(frozen=True)
class Node:
    """An earlier network evaluation, as later steps use it."""

    t: Tensor
    """[] or [B] float64"""
    x: Tensor
    """[B, ...] the state the step started from; after a corrector, not the one the network was evaluated at"""
    clean: Tensor
    """[B, ...] the network's clean prediction"""


History = tuple[Node, ...]
"""Newest first."""


class Step(Protocol):
    def __call__(
        self, path: Path, predict: Predictor, x: Tensor, t: Tensor, s: Tensor, history: History
    ) -> tuple[Tensor, History]:
        """x [B, ...] at time t -> (x [B, ...] at time s, the history for the next step)."""
        ...


def euler(path: Path, predict: Predictor, x: Tensor, t: Tensor, s: Tensor, history: History) -> tuple[Tensor, History]:
    """Euler on the flow path; DDIM, which is Euler in sigma / alpha, on the variance-preserving one."""
    return path.step(x, t, s, predict(x, t)), ()


def heun(path: Path, predict: Predictor, x: Tensor, t: Tensor, s: Tensor, history: History) -> tuple[Tensor, History]:
    """An Euler step, then the same step again with the mean of the slopes at its two ends.

    A step from pure noise on a variance-preserving path (zero terminal SNR) stays first order.
    """
    prediction = predict(x, t)
    first = path.step(x, t, s, prediction)
    if not (s > 0).any():
        return first, ()
    change = path.slope(first, s, predict(first, s)) - path.slope(x, t, prediction)
    weight = torch.where(s > 0, path.slope_coefficient(t, s) / 2, 0.0)
    return combine((torch.ones_like(weight), first), (weight, change)), ()


def dpmpp_2m(path: Path, predict: Predictor, x: Tensor, t: Tensor, s: Tensor, history: History) -> tuple[Tensor, History]:
    """DPM-Solver++(2M), the midpoint form of the paper: two clean predictions, one of them from the history."""
    node = Node(t, x, path.clean(x, t, predict(x, t)))
    return _extrapolate(path, node, history, s), (node,)


def unipc(
    path: Path, predict: Predictor, x: Tensor, t: Tensor, s: Tensor, history: History, corrector: bool = True
) -> tuple[Tensor, History]:
    """UniPC of predictor order 2. The evaluation at x first corrects x and then serves the step to s; it is not repeated.

    The state returned is the predicted one, at which the network is evaluated next; the state at the end of a solve is never
    corrected, since nothing is evaluated there.
    """
    clean = path.clean(x, t, predict(x, t))
    if corrector and history:
        x = _correct(path, history, t, clean)
    node = Node(t, x, clean)
    return _extrapolate(path, node, history, s), (node, *history[:1])


def _hold(path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(ratio, gain) of `x_s = ratio x_t + gain x_0`, the exact step if the clean prediction did not change.

    DPM-Solver++ of order 1: ratio = sigma_s / sigma_t, gain = -alpha_s (e^-h - 1). With e^-h written out it stays exact
    where h is infinite.
    """
    ratio = path.sigma(s) / path.sigma(t)
    return ratio, path.alpha(s) - path.alpha(t) * ratio


def _extrapolate(path: Path, node: Node, history: History, s: Tensor) -> Tensor:
    """DPM-Solver++(2M), algorithm 2; the same as UniPC's predictor of order 2 with B(h) = e^-h - 1 and rho = 1/2.

    Hold D = m_0 + (h / 2 h_previous) (m_0 - m_previous) over the step, m the clean predictions. Without history D = m_0.
    """
    ratio, gain = _hold(path, node.t, s)
    if not history:
        return combine((ratio, node.x), (gain, node.clean))
    previous = history[0]
    now = path.half_log_snr(node.t)
    h, h_previous = path.half_log_snr(s) - now, now - path.half_log_snr(previous.t)
    weight = torch.where(s > 0, gain * h / (2 * h_previous), 0.0)
    return combine((ratio, node.x), (gain + weight, node.clean), (-weight, previous.clean))


def _correct(path: Path, history: History, t: Tensor, clean: Tensor) -> Tensor:
    """UniC of UniPC: repeats the step that ended at t, now that the clean prediction at t is known.

    With m_0 at the step's start, m_1 at t, m_previous one node earlier:
    x_t = ratio x + gain (m_0 + rho_1 (m_previous - m_0) / r + rho_2 (m_1 - m_0)).
    """
    node, *rest = history
    ratio, gain = _hold(path, node.t, t)
    if not rest:  # order 1: UniC-1 fixes rho_2 = 1/2
        return combine((ratio, node.x), (gain / 2, node.clean), (gain / 2, clean))
    previous = rest[0]
    start = path.half_log_snr(node.t)
    h = path.half_log_snr(t) - start
    r = (path.half_log_snr(previous.t) - start) / h
    rho_1, rho_2 = unic_weights(h, r)
    w_1, w_2 = gain * rho_1 / r, gain * rho_2
    return combine((ratio, node.x), (gain - w_1 - w_2, node.clean), (w_1, previous.clean), (w_2, clean))


def unic_weights(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(rho_1, rho_2) of UniC-2: rho_1 + rho_2 = phi_2 / phi_1 and r rho_1 + rho_2 = 2 phi_3 / phi_1, all phi at -h.

    h > 0 is the step in lambda, r < 0 the position of the previous node in units of h. phi_1(z) = (e^z - 1) / z, phi_k+1(z) =
    (phi_k(z) - 1 / k!) / z. At r = -inf the weights are (0, phi_2 / phi_1).
    """
    phi_1 = torch.expm1(-h) / -h
    phi_2 = (phi_1 - 1) / -h
    phi_3 = (phi_2 - 0.5) / -h
    rho_1 = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
    return rho_1, phi_2 / phi_1 - rho_1


@dataclass(frozen=True)
class Solver:
    step: Step
    evaluations: int
    """Network evaluations of one step, except a step to t = 0, which always takes one."""
    renoises: bool = False
    """Every step but the last needs fresh noise, which `integrate` adds in place of `step`; see `noisy_steps`."""


SOLVERS = {
    "euler": Solver(euler, 1),
    "heun": Solver(heun, 2),
    "dpmpp_2m": Solver(dpmpp_2m, 1),
    "unipc": Solver(unipc, 1),
    "consistency": Solver(euler, 1, renoises=True),
}


def noisy_steps(solver: Solver, steps: int) -> range:
    """The steps, 0..S-1, of an S-step solve for which this solver needs fresh noise."""
    return range(steps - 1) if solver.renoises else range(0)


def evaluations(solver: Solver, grid: Tensor, noisy: Collection[int] = ()) -> int:
    """Network evaluations of a solve on the grid [S+1]; guidance multiplies them by `guidance_evaluations`.

    noisy: steps that add fresh noise, which take one evaluation each.
    """
    steps = len(grid) - 1
    single = {*noisy, *([steps - 1] if grid[-1] == 0 else [])}
    return solver.evaluations * (steps - len(single)) + len(single)
