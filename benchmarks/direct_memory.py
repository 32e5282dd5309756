"""Peak memory of one update by the number of solver steps: DRTune and full back-propagation, on the glyph teacher.

    python benchmarks/direct_memory.py [--batch 8] [--steps 10 25 50]

On a CPU memory is computed from the allocator's events, as torch's profiler records them; on a GPU it is max_memory_allocated.
Both are relative to the start of the update: states, activations and gradients, not the networks. DRTune runs to the last step,
with all K steps trained, its most expensive case; full back-propagation goes through all steps, and `recomputed` is the same
with activations recomputed in the backward pass, as in DRaFT-K and AlignProp.

Prints a table and last one JSON line: {"drtune_growth": peak at the most steps over that at the fewest, less the stored states,
"full_growth": the same for full back-propagation, "recomputed_growth": ..., "peaks": MiB}.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from align.direct import DirectRows, rollout_with_gradient
from align.drtune import equally_spaced
from diffusion import SOLVERS, Prompt, Scores, Teacher, Tools, sample_noise
from diffusion.objective import judged
from generators import load
from rewards.scorers.symmetry import Symmetry

K = 3
MIB = 2**20


def peak(update: Callable[[], None], device: torch.device) -> int:
    """Bytes above those at the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, changed in events:
        now += changed
        most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = load("embedded:glyphs", device=str(device))
    generator.adapters.add("policy", rank=16, alpha=32, seed=0)
    texts = ["a red circle left of a blue seven"] * given.batch
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    condition, noise = generator.encode(texts), sample_noise(range(given.batch), generator.latent_shape(), device=device)
    reward = Symmetry()

    def judge(latents: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return reward(generator.decode(latents), prompts)

    def update(steps: int, method: str) -> Callable[[], None]:
        drtune = method == "drtune"
        trained = tuple(sorted(steps - t for t in equally_spaced(1, K, steps))) if drtune else range(steps)
        rows = DirectRows(noise, condition, prompts, trained, steps - 1)
        grid = generator.time_grid(steps, even=True)
        tools = Tools(
            step=1,
            predict=generator,
            unguided=generator,
            path=generator.path,
            solver=SOLVERS["euler"],
            grid=grid,
            judge=judge,
            codec=generator,
            rng=torch.Generator(),
            teacher=Teacher(
                lambda x, t, condition, scale: generator(x, t, condition, None), SOLVERS["euler"], grid, (1.0, 1.0)
            ),
            parameters=generator.adapters.parameters,
        )

        def run() -> None:
            clean = rollout_with_gradient(
                lambda x, t: generator(x, t, condition, "policy"),
                rows,
                tools,
                detach_input=drtune,
                recompute=method == "recomputed",
            )
            judged(clean, rows.prompts, tools, None).value.backward()

        return run

    methods = ("drtune", "full", "recomputed")
    update(min(given.steps), "full")()  # gradients are allocated once
    peaks = {method: {steps: peak(update(steps, method), device) for steps in given.steps} for method in methods}
    stored = {steps: steps * noise.nbytes for steps in given.steps}
    print(f"peak MiB of one update, batch {given.batch}, {device.type}")
    print(f"| solver steps | {' | '.join(methods)} | stored states |")
    print("| --- | --- | --- | --- | --- |")
    for steps in given.steps:
        print(f"| {steps} | {' | '.join(f'{peaks[m][steps] / MIB:.2f}' for m in methods)} | {stored[steps] / MIB:.3f} |")
    few, many = min(given.steps), max(given.steps)
    growth = {f"{m}_growth": (peaks[m][many] - stored[many]) / (peaks[m][few] - stored[few]) for m in methods}
    print(json.dumps({**growth, "peaks": {m: {str(s): peaks[m][s] / MIB for s in given.steps} for m in methods}}))


if __name__ == "__main__":
    main()
