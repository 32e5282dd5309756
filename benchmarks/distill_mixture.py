"""CCM and fixed-gap consistency on a 2-D Gaussian mixture with an exact teacher: one-step errors at equal student updates.

Data: eight Gaussians on a circle. The teacher's velocity is the closed form, sampled with 40 Euler steps. The student is the
teacher plus a small network that starts at zero, as a LoRA does. `paired`: root mean square distance of the one-step sample
to the end of the teacher's trajectory from the same noise; `energy`: energy distance between the two sets of samples. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from mixture import EULER, PATH, Student, energy_distance, teacher

from diffusion import Condition, Prompt, Rollout, Teacher, Tools, Trajectory, integrate
from distill.ccm import CCM, CCMConfig
from distill.consistency import Consistency, ConsistencyConfig

STEPS = 40


def trajectories(number: int, seed: int) -> Rollout:
    x = torch.randn(number, 2, generator=torch.Generator().manual_seed(seed))
    grid = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    solve = integrate(teacher, x, grid, PATH, EULER, record=range(STEPS + 1))
    condition = Condition({"none": torch.zeros(number, 1)})
    return Rollout([Prompt("", "")] * number, condition, torch.arange(number), torch.arange(number), solve)


def train(method: Any, seed: int, updates: int) -> tuple[float, float]:
    """(paired, energy) of one-step samples from noise that was not trained on"""
    torch.manual_seed(seed)
    student = Student()
    target, given = copy.deepcopy(student), trajectories(4096, seed)
    networks = {"policy": student, "target": target}
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for step in range(1, updates + 1):
        rng = torch.Generator().manual_seed(10**6 * seed + step)
        rows = torch.randint(len(given), (256,), generator=rng)
        trajectory = Trajectory(given.trajectory.x[rows], given.trajectory.t)
        part = Rollout([Prompt("", "")] * 256, given.condition[rows], torch.arange(256), rows, trajectory)
        tools = Tools(
            step=step,
            predict=lambda x, t, condition, adapter: networks[adapter](x, t),
            unguided=lambda x, t, condition, adapter: networks[adapter](x, t),
            path=PATH,
            solver=EULER,
            grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
            judge=None,  # type: ignore[arg-type]
            codec=None,  # type: ignore[arg-type]
            rng=rng,
            teacher=Teacher(lambda x, t, condition, scale: teacher(x, t), EULER, given.trajectory.t, (1.0, 1.0)),
            parameters=lambda player: list(student.parameters()),
        )
        loss = method.loss("policy", method.items(part, None, tools), tools)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        with torch.no_grad():
            for own, leader in zip(target.parameters(), student.parameters(), strict=True):
                own.lerp_(leader, 0.1)
    held = trajectories(2000, seed + 10**5).trajectory.x
    with torch.no_grad():
        one_step = held[:, 0] - student(held[:, 0], torch.ones(()))
    error = (one_step - held[:, -1]).square().sum(1).mean().sqrt().item()
    return error, energy_distance(one_step, held[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1000)
    arguments = parser.parse_args()
    methods = {"ccm": lambda: CCM(CCMConfig()), "consistency": lambda: Consistency(ConsistencyConfig(gap=1))}
    results: dict[str, Any] = {}
    for name, new in methods.items():
        runs = [train(new(), seed, arguments.updates) for seed in range(arguments.seeds)]
        results[name] = {"paired": [run[0] for run in runs], "energy": [run[1] for run in runs]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
