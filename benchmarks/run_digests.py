"""Digests of short runs: evidence that a change of the code does not change a bit of the results.

Runs each case for 5 steps, inline and under Ray, and hashes its final adapters and every column of its metrics except times
and memory. Digests depend on the machine and on torch, so both versions must run on one machine:

    python benchmarks/run_digests.py --out before.json          in the old checkout
    python benchmarks/run_digests.py --against before.json      in the new one; names every column that differs

Prints one JSON line. Exit code 1 if anything differs, or if inline and Ray differ from each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SMALL = [
    *("run.steps=5", "run.evaluate_every=5", "run.checkpoint_every=5", "run.trackers=[]", "run.threads=1"),
    *("prompts.heldout_number=4", "rollouts.groups_per_step=4"),
]
TWO_REWARDS = "rewards.train=[{name: glyph_match}, {name: brightness}]"
CASES: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("quickstart", []),
    "drtune": ("drtune_clip_glyphs", []),
    "refl": ("refl_clip_glyphs", []),
    "draft_lv": ("draft_clip_glyphs", ["objective.low_variance=2"]),
    "alignprop": ("alignprop_clip_glyphs", []),
    "accumulation": ("quickstart", ["optimizer.accumulation=2", "objective.inner_updates=2"]),
    "ema": ("drtune_clip_glyphs", ["optimizer.ema=0.9"]),
    "gradient_checkpointing": ("drtune_clip_glyphs", ["run.gradient_checkpointing=true", "objective.reference_weight=0.1"]),
    "guidance": ("quickstart", ["generator.guidance=2.5", "rollouts.solver=heun"]),
    "normalize_then_sum": (
        "quickstart",
        [TWO_REWARDS, "rewards.multi_objective_aggregation=normalize_then_sum", "objective.spread_weights=false"],
    ),
    "isolated": ("quickstart", ["rewards.train=[{name: glyph_match}, {name: symmetry, env: TWIN}]"]),
}
"""{case: (experiment, overrides)}; TWIN stands for an environment with another interpreter."""
EXCLUDED = ("time/", "seconds", "memory/")
RENAMED = {"average": "ema"}
"""{adapter's name in checkpoints of earlier versions: its name now}"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digests_of(folder: Path) -> dict[str, str]:
    """{"adapter/NAME" or a metric's name: digest} of a run's folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line if not key.startswith(EXCLUDED)}
    found = {key: digest(json.dumps([line.get(key) for line in lines]).encode()) for key in sorted(keys)}
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors = load_file(file)
        content = b"".join(key.encode() + tensors[key].contiguous().numpy().tobytes() for key in sorted(tensors))
        found[f"adapter/{RENAMED.get(file.stem, file.stem)}"] = digest(content)
    return found


def run(case: str, executor: str, folder: Path, twin: Path) -> tuple[dict[str, str], float]:
    """The case's digests, and the seconds the command took."""
    name, overrides = CASES[case]
    workers = ["rollouts.workers=2"] if executor == "ray" else []
    given = [override.replace("TWIN", str(twin)) for override in [*SMALL, *workers, *overrides]]
    command = [sys.executable, "-m", "runtime.cli", "launch", f"experiments/{name}.yaml", *given]
    start = time.monotonic()
    ran = subprocess.run(
        [*command, "--executor", executor, "--run-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"{case}, {executor}: exit code {ran.returncode}\n{ran.stderr}")
    return digests_of(folder), round(time.monotonic() - start, 1)


def new_twin(folder: Path) -> Path:
    """Another interpreter with this one's packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--executor", nargs="*", choices=("inline", "ray"), default=["inline", "ray"])
    parser.add_argument("--out", type=Path, help="file to write the digests to")
    parser.add_argument("--against", type=Path, help="file of digests to compare with")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, str]]] = {}
    seconds: dict[str, float] = {}
    different: dict[str, list[str]] = {}
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    with tempfile.TemporaryDirectory() as temporary:
        twin = new_twin(Path(temporary) / "twin")
        for case in arguments.case:
            found[case] = {}
            for executor in arguments.executor:
                name = f"{case}/{executor}"
                found[case][executor], seconds[name] = run(case, executor, Path(temporary) / case / executor, twin)
                print(f"{name}: {seconds[name]} s", file=sys.stderr)
                if (known := before.get(case, {}).get(executor)) and (keys := differences(known, found[case][executor])):
                    different[name] = keys
            if len(arguments.executor) == 2 and (keys := differences(found[case]["inline"], found[case]["ray"])):
                different[f"{case}, inline and Ray"] = keys
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps({"cases": len(seconds), "seconds": round(sum(seconds.values())), "different": different}))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
