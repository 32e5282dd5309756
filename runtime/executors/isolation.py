"""Environments for scorers whose libraries conflict with ours: built, checked, and used without Ray.

`odeon env build NAME` makes envs/NAME, a virtual environment with the requirements of envs/NAME.txt. A reward with
`env: envs/NAME` runs with that interpreter, in another process: a Ray actor in a Ray run (runtime/executors/ray/executor.py),
in all other cases a child process with HTTP on the loopback address. Odeon itself is not installed there; its rewards are
imported from this source folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rewards
from rewards import check
from rewards.transport.http import Client
from runtime.experiment.config import InputError

ROOT = Path(rewards.__file__).parents[1]
NEEDED = ("numpy", "pillow", "pydantic", "safetensors")
"""What `rewards` imports besides torch, for every scorer."""
VERSIONS = "import json, sys; from importlib.metadata import version; print(json.dumps([sys.version_info[:2], version('ray')]))"


def build_environment(name: str, requirements: Path | None) -> Path:
    """Make envs/NAME with this Python, this Ray and this torch, unless the requirements name another torch. Takes minutes.

    requirements: a pip requirements file; envs/NAME.txt if None. Raises InputError if the environment exists or the file does
    not, and RuntimeError if pip fails; the incomplete folder is then removed.
    """
    folder = Path("envs") / name
    file = requirements or folder.with_suffix(".txt")
    if not file.is_file():
        raise InputError(f"{file}: no such file; it must list what pip installs for {name}, one requirement a line")
    if folder.exists():
        raise InputError(f"{folder}: already exists; remove it to build it again")
    wanted = file.read_text()
    torch_first = (
        [] if any(_names_torch(line) for line in wanted.splitlines()) else [f"torch=={version('torch').split('+')[0]}"]
    )
    try:
        _run(sys.executable, "-m", "venv", folder)
        pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
        if torch_first:
            _run(*pip, *torch_first)
        _run(*pip, *torch_first, "-r", file, f"ray=={version('ray')}", *NEEDED)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _names_torch(line: str) -> bool:
    return line.replace("=", " ").replace("<", " ").replace(">", " ").replace("~", " ").split()[:1] == ["torch"]


def _run(*command: str | Path) -> None:
    if code := subprocess.run([str(word) for word in command]).returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with code {code}")


def python_of(env: str) -> Path:
    # Not resolved: it is often a link, and only its own path makes it the environment's interpreter.
    return Path(env).expanduser().absolute() / "bin" / "python"


def variables() -> dict[str, str]:
    """The environment variables with which a process of another environment finds Odeon's rewards."""
    if not (ROOT / "pyproject.toml").is_file():
        raise InputError(f"env: needs Odeon installed from its source folder (pip install -e .); it is installed in {ROOT}")
    return {"PYTHONPATH": str(ROOT)}


def problem_with(env: str) -> str | None:
    """Why its interpreter cannot work with this one, on this machine; None if it can."""
    python = python_of(env)
    if not python.exists():
        return f"no such file: {python}; make it with `odeon env build {Path(env).name}`"
    printed = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True)
    if printed.returncode:
        return f"{python} has no Ray: {printed.stderr.strip().splitlines()[-1]}"
    (major, minor), ray = json.loads(printed.stdout)
    if (major, minor) != sys.version_info[:2]:
        return f"has Python {major}.{minor}, but this is {sys.version_info[0]}.{sys.version_info[1]}; both must be the same"
    if ray != version("ray"):
        return f"has Ray {ray}, but this is {version('ray')}; both must be the same"
    return None


def check_rewards(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that what the scorers will load exists, in each scorer's environment. Loads no weights. Raises ValueError."""
    check(entries)
    for entry in entries:
        if entry.get("env") is not None:
            preflight(entry)


def preflight(entry: Mapping[str, Any]) -> None:
    """Check that the scorer of this entry can run in its environment. Loads no weights. Raises ValueError."""
    if (problem := problem_with(entry["env"])) is not None:
        raise ValueError(f"env {entry['env']!r}: {problem}")
    checked = subprocess.run([*command(entry), "--check"], env=os.environ | variables(), capture_output=True, text=True)
    try:
        report = json.loads(checked.stdout)
    except ValueError:
        problem = (checked.stderr.strip().splitlines() or [f"exit code {checked.returncode}"])[-1]
        raise ValueError(f"env {entry['env']!r}: cannot run {entry['name']}: {problem}") from None
    if "error" in report:
        raise ValueError(f"env {entry['env']!r}: {report['error']}")


def command(entry: Mapping[str, Any], **options: Any) -> list[str]:
    """The command of `python -m rewards.serve` with the interpreter of the entry's environment, or with this one."""
    python = python_of(entry["env"]) if entry.get("env") else Path(sys.executable)
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [str(python), "-m", "rewards.serve", json.dumps({**entry, "env": None}), *given]


def started(entry: Mapping[str, Any], **options: Any) -> tuple[subprocess.Popen[str], int]:
    """The entry's server as a child process, which ends with this one, and its port. Raises ValueError if it does not start."""
    process = subprocess.Popen(
        [*command(entry, **options), "--child"],
        env=os.environ | variables(),
        stdin=subprocess.PIPE,  # closed when this process ends, however it ends
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    report: dict[str, Any] = json.loads(line) if line else {"error": f"its server ended with code {process.wait()}"}
    if "error" in report:
        raise ValueError(f"{entry['name']}: {report['error']}")
    return process, report["port"]


class Child:
    """An entry's scorer in a child process; a `Transport`."""

    def __init__(self, entry: Mapping[str, Any], device: str, threads: int) -> None:
        """Raises ValueError if it does not start."""
        self._process, port = started(entry, device=device, threads=threads)
        self._client = Client(f"http://127.0.0.1:{port}", entry["label"])
        self.about = self._client.about

    def __call__(self, request: bytes) -> bytes:
        return self._client(request)


def serve(entry: Mapping[str, Any], address: str, port: int, device: str) -> int:
    """Run the entry's scorer behind HTTP until it is stopped; returns the exit code."""
    try:
        process, port = started(entry, address=address, port=port, device=device)
        about = Client(f"http://{address}:{port}", entry["label"]).about
    except ValueError as error:
        raise InputError(str(error)) from None
    gradient = "with gradient" if about.differentiable else "without gradient"
    print(f"{entry['label']} ({gradient}) at http://{address}:{port}; Ctrl-C stops it", flush=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 130


def packages_hash(env: str) -> str:
    """sha256 of the names and versions of all packages in the environment."""
    found = sorted(path.name for path in Path(env).expanduser().glob("lib/python*/site-packages/*.dist-info"))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
