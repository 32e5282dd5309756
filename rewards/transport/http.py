"""A scorer behind HTTP: the server of `odeon rewards serve`, and its client. JSON with PNGs, or safetensors; no pickles.

    GET  /         JSON: label, differentiable, abstains, bounds
    POST /score    application/octet-stream: rewards/transport/remote.py's request, answered in kind
                   application/json: {"prompts": [TEXT], "images": [PNG in base64]} -> {"scores": [NUMBER]}, for other programs

What cannot be scored is answered with the status 400, or 500 where the scorer failed, and JSON {"error": one line}. There is no
password and no encryption: serve inside a network that is trusted.

    python -m rewards.transport.http ENTRY ...    the server as a program, for an interpreter that has the scorer's libraries
                                                  and perhaps none of the command line's
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from diffusion.types import Prompt
from rewards.mixture import RewardError
from rewards.registry import check
from rewards.transport.remote import Host, write_request

TIMEOUT = 600.0
"""Seconds that a batch may take."""
LONGEST_WAIT = 10.0
"""Seconds for a server to say what it runs."""
LARGEST = 2**31
"""Bytes of a request."""
TENSORS, TEXT = "application/octet-stream", "application/json"
# Straight to the server: pictures do not go through a proxy that was set up for the web.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Client:
    """The way to a server; an `Ask`."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ValueError where there is no such server, or it runs something else than `name`."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"server {url!r}: allowed is http://HOST:PORT, without a password")
        self.url = url.rstrip("/")
        try:
            with _OPENER.open(self.url + "/", timeout=LONGEST_WAIT) as response:
                self.about: Mapping[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"server {url!r}: does not answer as a server of rewards: {_reason(error)}") from None
        if not isinstance(self.about, dict) or "differentiable" not in self.about:
            raise ValueError(f"server {url!r}: is no server of rewards; start one with `odeon rewards serve {name}`")
        if self.about["label"] != name:
            raise ValueError(f"server {url!r}: runs {self.about['label']!r}, not {name!r}")

    def __call__(self, request: bytes) -> bytes:
        """Raises RewardError."""
        asked = urllib.request.Request(self.url + "/score", request, {"Content-Type": TENSORS})
        try:
            with _OPENER.open(asked, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise RewardError(f"{self.url}: {_said(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RewardError(f"{self.url} does not answer: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        return f"{error.code} {error.reason}"


def server(host: Host, address: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """Bound, and to be started by `serve_forever`. port 0: any that is free; `server_port` says which."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, TEXT, json.dumps(host.about()).encode())
            else:
                self._fail(404, f"{self.path} is nothing here; there are / and /score")

        def do_POST(self) -> None:
            length, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type", "").split(";")[0]
            if not length.isdecimal() or int(length) > LARGEST:
                self.close_connection = True  # its body is not read
                return self._fail(413, f"Content-Length {length!r}: must be given, and at most {LARGEST}")
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
            if not format.startswith('"%s"') or str(arguments[1]) >= "400":  # a line for what goes wrong, none for the rest
                super().log_message(format, *arguments)

    made = ThreadingHTTPServer((address, port), Handler)
    made.daemon_threads = True
    return made


def scored_json(host: Host, body: bytes) -> bytes:
    """The JSON form of a request, answered. Raises RewardError."""
    try:
        said = json.loads(body)
        texts, files = said["prompts"], said["images"]
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")) for file in files]
    except Exception as error:  # of JSON, base64 and picture files, each with errors of its own
        raise RewardError(f'no {{"prompts": [TEXT], "images": [PNG in base64]}}: {type(error).__name__}: {error}') from None
    if not pictures or len(texts) != len(pictures) or len({picture.shape for picture in pictures}) != 1:
        sizes = sorted({f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures})
        raise RewardError(
            f"{len(texts)} prompts, {len(pictures)} images of {', '.join(sizes) or 'no'} pixels: must be as many, of one size"
        )
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    request = write_request(images, [Prompt(str(i), text) for i, text in enumerate(texts)], gradient=False)
    return json.dumps({"scores": load(host.answer(request))["scores"].tolist()}).encode()


def main(arguments: Sequence[str]) -> int:
    """Says one line of JSON on stdout: {"port": N} once it serves, or {"error": one line}."""
    parser = argparse.ArgumentParser(prog="python -m rewards.transport.http")
    parser.add_argument("entry", help="of an experiment, resolved, in JSON")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--check", action="store_true", help="only look whether there is what the scorer loads")
    parser.add_argument("--child", action="store_true", help="end when stdin does")
    given = parser.parse_args(arguments)
    entry = json.loads(given.entry)

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        check([entry])
        if given.check:
            say(good=True)
            return 0
        if given.child:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        serving = server(Host(entry, given.device, given.threads), given.address, given.port)
    except Exception as error:
        say(error=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        return 2
    say(port=serving.server_port)
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
