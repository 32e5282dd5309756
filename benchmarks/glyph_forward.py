"""Time of one forward pass of the teacher, batch 64, no gradient, which dominates the cost of experiments on the glyph world.

    python benchmarks/glyph_forward.py [--batch 64] [--threads 2] [--repeats 50]

Prints one JSON line: median and 10th percentile in milliseconds, and the parameters in millions.
"""

import argparse
import json
import time

import torch

from generators import load

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--batch", type=int, default=64)
arguments.add_argument("--threads", type=int, default=2)
arguments.add_argument("--repeats", type=int, default=50)
options = arguments.parse_args()
torch.set_num_threads(options.threads)

generator = load("embedded:glyphs")
condition = generator.encode(["a red circle left of a blue seven"] * options.batch)
x = torch.randn(options.batch, *generator.latent_shape(32, 32))
t = torch.full((options.batch,), 0.5)
milliseconds = []
with torch.no_grad():
    for _ in range(options.repeats + 5):
        start = time.perf_counter()
        generator(x, t, condition, adapter=None)
        milliseconds.append((time.perf_counter() - start) * 1e3)
median, fast = torch.tensor(milliseconds[5:]).quantile(torch.tensor([0.5, 0.1])).tolist()
parameters = sum(p.numel() for p in generator.adapters.network.parameters()) / 1e6
print(
    json.dumps(
        {
            "batch": options.batch,
            "threads": options.threads,
            "median_ms": round(median, 1),
            "p10_ms": round(fast, 1),
            "parameters_m": round(parameters, 2),
        }
    )
)
