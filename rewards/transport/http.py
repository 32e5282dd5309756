"""The HTTP client of a reward behind `odeon rewards serve`, whose other side is rewards/serve.py. No pickles.

    GET  /         JSON: the fields of diffusion.types.About
    POST /score    application/octet-stream: the request of rewards/transport/remote.py, and its answer
                   application/json: {"prompts": [TEXT], "images": [PNG in base64]} -> {"scores": [NUMBER]}, for other programs

What cannot be scored is answered with status 400, or 500 where the scorer failed, and JSON {"error": one line}. There is no
password and no encryption: serve inside a trusted network.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

from diffusion.types import About
from rewards.mixture import RewardError
from rewards.transport.remote import read_about

TIMEOUT = 600.0
"""Seconds for a batch."""
ABOUT_TIMEOUT = 10.0
"""Seconds for a server to state what it runs."""
TENSORS, TEXT = "application/octet-stream", "application/json"
# No proxy: one that is configured for the web should not receive images.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Client:
    """The way to a server; a `Transport`."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ValueError if there is no reward server at the URL, or it runs another reward than `name`."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"server {url!r}: allowed is http://HOST:PORT, without a password")
        self.url = url.rstrip("/")
        try:
            with _OPENER.open(self.url + "/", timeout=ABOUT_TIMEOUT) as response:
                described = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"server {url!r}: does not answer as a reward server: {_reason(error)}") from None
        try:
            self.about: About = read_about(described)
        except (TypeError, ValueError):
            raise ValueError(
                f"server {url!r}: is not a reward server of this version; start one with `odeon rewards serve {name}`"
            ) from None
        if self.about.label != name:
            raise ValueError(f"server {url!r}: runs {self.about.label!r}, not {name!r}")

    def __call__(self, request: bytes) -> bytes:
        """Raises RewardError."""
        posted = urllib.request.Request(self.url + "/score", request, {"Content-Type": TENSORS})
        try:
            with _OPENER.open(posted, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise RewardError(f"{self.url}: {_message(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RewardError(f"{self.url} does not answer: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        return f"{error.code} {error.reason}"
