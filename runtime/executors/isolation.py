"""Environments for scorers whose libraries cannot stand beside ours: built, checked, and used without Ray.

`odeon env build NAME` makes envs/NAME, a virtual environment with what envs/NAME.txt asks for. A reward's `env: envs/NAME` then
runs its scorer with that interpreter, in another process: a Ray actor in a Ray run (runtime/executors/ray/executor.py), a
child process that speaks HTTP on this machine's own address anywhere else. Odeon itself is not installed there; its rewards
are read from here.
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
"""What `rewards` imports beside torch, whatever the scorer."""
ASK = "import json, sys; from importlib.metadata import version; print(json.dumps([sys.version_info[:2], version('ray')]))"


def build_environment(name: str, requirements: Path | None) -> Path:
    """envs/NAME with this Python, this Ray and this torch, unless the requirements ask for another torch. Takes minutes.

    requirements: a file of pip; envs/NAME.txt unless given. Raises InputError for what is there already, or missing, and
    RuntimeError where pip fails; a folder that failed to become an environment is removed again.
    """
    folder = Path("envs") / name
    file = requirements or folder.with_suffix(".txt")
    if not file.is_file():
        raise InputError(f"{file}: there is no such file; write what pip is to install for {name} there, a line each")
    if folder.exists():
        raise InputError(f"{folder}: is there already; remove it to build it again")
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
    # Not resolved: what makes it the environment's interpreter is where it stands, often as a link to another one.
    return Path(env).expanduser().absolute() / "bin" / "python"


def variables() -> dict[str, str]:
    """What a process of another environment needs to find Odeon's rewards."""
    if not (ROOT / "pyproject.toml").is_file():
        raise InputError(f"env: needs Odeon installed from its source folder (pip install -e .), and runs from {ROOT}")
    return {"PYTHONPATH": str(ROOT)}


def problem_with(env: str) -> str | None:
    """Why its interpreter cannot work with this one, on the machine that asks; None if it can."""
    python = python_of(env)
    if not python.exists():
        return f"there is no {python}; make it with `odeon env build {Path(env).name}`"
    asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        return f"{python} has no Ray: {asked.stderr.strip().splitlines()[-1]}"
    (major, minor), ray = json.loads(asked.stdout)
    if (major, minor) != sys.version_info[:2]:
        return f"has Python {major}.{minor}, where {sys.version_info[0]}.{sys.version_info[1]} runs; both must be the same"
    if ray != version("ray"):
        return f"has Ray {ray}, where {version('ray')} runs; both must be the same"
    return None


def check_rewards(entries: Sequence[Mapping[str, Any]]) -> None:
    """Is there what the scorers will load, wherever they run? Loads no weights. Raises ValueError, in one line, if not."""
    check(entries)
    for entry in entries:
        if entry.get("env") is not None:
            preflight(entry)


def preflight(entry: Mapping[str, Any]) -> None:
    """Would the scorer of this entry run in its environment? Loads no weights. Raises ValueError, in one line, if not."""
    if (problem := problem_with(entry["env"])) is not None:
        raise ValueError(f"env {entry['env']!r}: {problem}")
    asked = subprocess.run([*command(entry), "--check"], env=os.environ | variables(), capture_output=True, text=True)
    try:
        said = json.loads(asked.stdout)
    except ValueError:
        words = asked.stderr.strip().splitlines()[-1:] or [f"exit code {asked.returncode}"]
        raise ValueError(f"env {entry['env']!r}: cannot run {entry['name']}: {words[0]}") from None
    if "error" in said:
        raise ValueError(f"env {entry['env']!r}: {said['error']}")


def command(entry: Mapping[str, Any], **options: Any) -> list[str]:
    """The server of rewards/transport/http.py, run by the interpreter of the entry's environment, or by this one."""
    python = python_of(entry["env"]) if entry.get("env") else Path(sys.executable)
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [str(python), "-m", "rewards.transport.http", json.dumps({**entry, "env": None}), *given]


def started(entry: Mapping[str, Any], **options: Any) -> tuple[subprocess.Popen[str], int]:
    """The entry's server as a child process, which ends with this one, and its port. Raises ValueError if none comes up."""
    process = subprocess.Popen(
        [*command(entry, **options), "--child"],
        env=os.environ | variables(),
        stdin=subprocess.PIPE,  # closed when this process ends, however it ends
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    said: dict[str, Any] = json.loads(line) if line else {"error": f"its server ended with code {process.wait()}"}
    if "error" in said:
        raise ValueError(f"{entry['name']}: {said['error']}")
    return process, said["port"]


class Child:
    """An entry's scorer in a child process; an `Ask`."""

    def __init__(self, entry: Mapping[str, Any], device: str, threads: int) -> None:
        """Raises ValueError where it does not come up."""
        self._process, port = started(entry, device=device, threads=threads)
        self._client = Client(f"http://127.0.0.1:{port}", entry["label"])
        self.about = self._client.about

    def __call__(self, request: bytes) -> bytes:
        return self._client(request)


def serve(entry: Mapping[str, Any], address: str, port: int, device: str) -> int:
    """Run the entry's scorer behind HTTP until it is stopped; the exit code."""
    try:
        process, port = started(entry, address=address, port=port, device=device)
        about = Client(f"http://{address}:{port}", entry["label"]).about
    except ValueError as error:
        raise InputError(str(error)) from None
    gradient = "with gradient" if about["differentiable"] else "without gradient"
    print(f"{entry['label']} ({gradient}) at http://{address}:{port}; ctrl-C ends it", flush=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 130


def packages_hash(env: str) -> str:
    """sha256 of the names and versions of all packages in it."""
    found = sorted(path.name for path in Path(env).expanduser().glob("lib/python*/site-packages/*.dist-info"))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
