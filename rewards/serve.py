"""The far side of a reward: a scorer in a process of its own, as a Ray actor's class or behind HTTP.

    python -m rewards.serve ENTRY ...    the HTTP server as a program, for an interpreter that has the scorer's libraries and
                                         perhaps not the command line's

The protocol is described in rewards/transport/http.py.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from diffusion.types import Prompt
from rewards.build import build_scorer, check
from rewards.mixture import RewardError
from rewards.parts.compat import ensure_torchvision
from rewards.transport.http import TENSORS, TEXT
from rewards.transport.remote import RewardHost, write_request

MAX_REQUEST = 2**31
"""Bytes."""


class EntryHost(RewardHost):
    """A RewardHost that loads the scorer of an entry itself; what a Ray actor in another environment is made of."""

    def __init__(self, entry: Mapping[str, Any], device: str = "auto", threads: int | None = None) -> None:
        """entry: of an experiment, resolved. threads: torch's; its default if None. Raises ValueError as the scorer does."""
        ensure_torchvision()
        if threads is not None:
            torch.set_num_threads(threads)
        super().__init__(build_scorer(entry), device)


def server(host: RewardHost, address: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """Bound, to be started by `serve_forever`. port 0: any free one; `server_port` says which."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, TEXT, json.dumps(asdict(host.about())).encode())
            else:
                self._fail(404, f"{self.path}: not found; allowed: / and /score")

        def do_POST(self) -> None:
            length, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type", "").split(";")[0]
            if not length.isdecimal() or int(length) > MAX_REQUEST:
                self.close_connection = True  # its body is not read
                return self._fail(413, f"Content-Length {length!r}: must be given, and at most {MAX_REQUEST}")
            body = self.rfile.read(int(length))
            if self.path != "/score" or kind not in (TENSORS, TEXT):
                return self._fail(404, f"POST {self.path} of {kind!r}: allowed is /score of {TENSORS} or {TEXT}")
            try:
                reply = host.answer(body) if kind == TENSORS else scored_json(host, body)
            except RewardError as error:
                return self._fail(500 if error.__cause__ else 400, str(error))
            self._send(200, kind, reply)

        def _fail(self, status: int, problem: str) -> None:
            self._send(status, TEXT, json.dumps({"error": problem}).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            if not format.startswith('"%s"') or str(arguments[1]) >= "400":  # failed requests only
                super().log_message(format, *arguments)

    bound = ThreadingHTTPServer((address, port), Handler)
    bound.daemon_threads = True
    return bound


def scored_json(host: RewardHost, body: bytes) -> bytes:
    """The answer to a request in JSON. Raises RewardError."""
    try:
        request = json.loads(body)
        texts, files = request["prompts"], request["images"]
        arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")) for file in files]
    except Exception as error:  # of JSON, base64 and image files, each with errors of its own
        raise RewardError(f'not {{"prompts": [TEXT], "images": [PNG in base64]}}: {type(error).__name__}: {error}') from None
    if not arrays or len(texts) != len(arrays) or len({array.shape for array in arrays}) != 1:
        sizes = sorted({f"{array.shape[1]}x{array.shape[0]}" for array in arrays})
        raise RewardError(
            f"{len(texts)} prompts, {len(arrays)} images of {', '.join(sizes) or 'no'} pixels: "
            "must be one image for each prompt, all of one size"
        )
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    scores = load(host.answer(write_request(images, prompts, gradient=False)))["scores"]
    return json.dumps({"scores": scores.tolist()}).encode()


def main(arguments: Sequence[str]) -> int:
    """Prints one line of JSON on stdout: {"port": N} once it serves, or {"error": one line}."""
    parser = argparse.ArgumentParser(prog="python -m rewards.serve")
    parser.add_argument("entry", help="of an experiment, resolved, in JSON")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--check", action="store_true", help="only check that what the scorer loads exists")
    parser.add_argument("--child", action="store_true", help="end when stdin does")
    given = parser.parse_args(arguments)
    entry = json.loads(given.entry)

    def report(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    try:
        check([entry])
        if given.check:
            report(good=True)
            return 0
        if given.child:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        serving = server(EntryHost(entry, given.device, given.threads), given.address, given.port)
    except Exception as error:
        report(error=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        return 2
    report(port=serving.server_port)
    try:
        serving.serve_forever()
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_stdin() -> None:
    # Not sys.stdin, whose lock this thread would hold when the process ends otherwise.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
