"""The rating of an image by a vision-language model, behind any server of OpenAI's chat completions, such as vLLM.

One request for each image: the caption in a template, the image as a PNG inside the request. The answer must contain exactly
one number in the required form, from `low` to `high`; anything else stops the run and shows the prompt and the answer, because
the run would be trained on a guess. The score is

    (number - low) / (high - low)

Requests may cost money, so this process sends at most `max_requests`, repeated ones included. With Ray each worker is a process
of its own, and a resumed run counts from zero.

The key comes from an environment variable; only its name is in the experiment. It is read when a request is sent and not
stored; redirections are not followed, since they could send it to another host.

The wording of the question is ours. The request's form is OpenAI's, platform.openai.com/docs/api-reference/chat.

Axes: B images, sent with 8 bits a channel.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.mixture import RewardError
from rewards.parts.facts import Facts

TEMPLATE = """This picture was made for the description: {prompt}

How well does it show what is described, and how well is it made? Judge both by one number from {low} to {high}, the best.
Answer with this line and nothing else:
Score: NUMBER"""
PATTERN = r"(?im)^[\s*]*score[\s*]*:[\s*]*(-?\d+(?:\.\d+)?)[\s*.]*$"
OPTIONS = {"temperature": 0, "max_tokens": 64}
LONGEST_WAIT = 60.0
"""The longest pause before a request is repeated, in seconds, even if the server or the doubling requires more."""
SHOWN = 300
"""Characters of a server's response in an error."""


class VLMJudge:
    """A vision-language model's number for image and caption, mapped from low..high to [0, 1]. Not differentiable.

    Results are in the order of the images, independent of the concurrency. Whether the same image gets the same score again
    depends on the server; temperature 0 helps.
    """

    facts = Facts(differentiable=False, licence="the model's")

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        url: str = Field(description="Of the server, up to /chat/completions: http://localhost:8000/v1. Without credentials.")
        model: str = Field(description="The model's name on the server.")
        max_requests: int = Field(ge=1, description="How many requests this process may send before the run stops.")
        template: str = Field(TEMPLATE, description="The question; {prompt}, {low} and {high} are filled in.")
        pattern: str = Field(
            PATTERN, description="A regular expression that must match exactly once; its one group is the number."
        )
        low: float = Field(0.0, allow_inf_nan=False, description="The lowest number allowed; its score is 0.")
        high: float = Field(10.0, allow_inf_nan=False, description="The highest number allowed; its score is 1.")
        options: dict[str, Any] = Field(OPTIONS, description="Further keys of the request, as the server defines them.")
        api_key_env: str | None = Field(None, description="NAME of the environment variable with the key, not the key itself.")
        concurrency: int = Field(8, ge=1, description="Concurrent requests.")
        retries: int = Field(4, ge=0, description="How often a request is repeated after 429, 5xx, or a timeout.")
        backoff: float = Field(
            1.0, ge=0, allow_inf_nan=False, description="Seconds before the first repetition; doubled each time."
        )
        timeout: float = Field(60.0, gt=0, allow_inf_nan=False, description="Seconds without data from the server.")

    @staticmethod
    def check(
        url: str,
        template: str,
        pattern: str,
        low: float,
        high: float,
        options: Mapping[str, Any],
        api_key_env: str | None,
        **_: Any,
    ) -> None:
        """Sends no request. Values that may hold a secret by mistake are not shown in errors."""
        _check_url(url)
        if "{prompt}" not in template:
            raise ValueError(f"template {template[:SHOWN]!r}: has no {{prompt}}, so the question would not contain the caption")
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {pattern!r}: not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"pattern {pattern!r}: has {groups} groups; exactly one, around the number, is needed")
        if not low < high:
            raise ValueError(f"low {low:g}: must be below high {high:g}")
        if taken := sorted({"model", "messages", "stream"} & set(options)):
            raise ValueError(f"options: {taken[0]} may not be set here")
        if api_key_env is not None:
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
                raise ValueError("api_key_env: must be the NAME of an environment variable, in capitals, never the key itself")
            _key(api_key_env)

    def __init__(
        self,
        url: str,
        model: str,
        max_requests: int,
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        low: float = 0.0,
        high: float = 10.0,
        options: Mapping[str, Any] = OPTIONS,
        api_key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 4,
        backoff: float = 1.0,
        timeout: float = 60.0,
        label: str = "vlm_judge",
    ) -> None:
        """The knobs of Config. Raises ValueError as `check` does."""
        self.check(url, template, pattern, low, high, options, api_key_env)
        self.about = self.facts.about(label)
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.template, self.pattern = template, re.compile(pattern)
        self.low, self.high = low, high
        self.options = dict(options)
        self.api_key_env = api_key_env
        self.concurrency, self.retries, self.backoff, self.timeout = concurrency, retries, backoff, timeout
        self.max_requests = max_requests
        self.sent = 0
        self._counting = threading.Lock()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError where a request or an answer fails."""
        urls = [data_url(image) for image in images.detach().cpu()]
        stop, failed = threading.Event(), list[Exception]()

        def judge(url: str, prompt: Prompt) -> float:
            try:
                return math.nan if stop.is_set() else self._score(url, prompt, stop)
            except Exception as error:
                failed.append(error)
                stop.set()
                return math.nan

        with ThreadPoolExecutor(self.concurrency) as threads:
            try:
                scores = list(threads.map(judge, urls, prompts))
            finally:  # also after an interruption: no further requests
                stop.set()
        if failed:  # the first error; the others may be its consequence
            raise failed[0]
        total = torch.tensor(scores, dtype=torch.float32, device=images.device)
        return Scores(total, {self.about.label: total})

    def _score(self, url: str, prompt: Prompt, stop: threading.Event) -> float:
        """One image's score, in [0, 1]."""
        given = {"prompt": prompt.text, "low": f"{self.low:g}", "high": f"{self.high:g}"}
        text = re.sub(r"\{(prompt|low|high)\}", lambda found: given[found[1]], self.template)
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        body = self.options | {"model": self.model, "messages": [{"role": "user", "content": content}]}
        reply = self._send(json.dumps(body).encode(), prompt, stop)
        try:
            answer = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            answer = None
        if not isinstance(answer, str):
            raise self._error(prompt, f"{self.url} sent no chat completion: {self._quoted(reply.decode(errors='replace'))}")
        try:
            number = read_number(answer, self.pattern, self.low, self.high)
        except ValueError as error:
            raise self._error(prompt, f"the answer {self._quoted(answer)} {error}") from None
        return (number - self.low) / (self.high - self.low)

    def _send(self, body: bytes, prompt: Prompt, stop: threading.Event) -> bytes:
        """The body of the server's final reply."""
        headers = {"Content-Type": "application/json", "User-Agent": "odeon"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {_key(self.api_key_env)}"
        request = urllib.request.Request(self.url, body, headers)
        for tried in range(self.retries + 1):
            self._count(prompt)
            pause = self.backoff * 2**tried
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{self.url} answered {error.code}: {self._quoted(_message(error))}"
                if error.code != 429 and error.code < 500:
                    raise self._error(prompt, problem) from None
                retry_after = error.headers.get("Retry-After", "")
                pause = max(pause, float(retry_after) if retry_after.isdecimal() else 0.0)
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                problem = f"{self.url} does not answer: {str(reason) or type(reason).__name__}"
            if tried < self.retries and stop.wait(min(pause, LONGEST_WAIT)):
                break
        raise self._error(prompt, f"{problem} ({tried + 1} requests)")

    def _count(self, prompt: Prompt) -> None:
        with self._counting:
            if self.sent == self.max_requests:
                raise self._error(prompt, f"all {self.max_requests} requests that max_requests allows have been sent")
            self.sent += 1

    def _error(self, prompt: Prompt, problem: str) -> RewardError:
        return RewardError(f"reward {self.about.label}, prompt {prompt.text!r}: {problem}")

    def _quoted(self, response: str) -> str:
        """A server's response on one line, truncated, with the key masked if it contains it."""
        if self.api_key_env is not None:
            response = response.replace(_key(self.api_key_env), "***")
        return repr(response if len(response) <= SHOWN else response[:SHOWN] + "...")


def data_url(image: Tensor) -> str:
    """image [3, H, W] float in [0, 1], on the CPU -> a data URL with its 8-bit PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_number(answer: str, pattern: re.Pattern[str], low: float, high: float) -> float:
    """The number in the answer. Raises ValueError, whose message follows "the answer ...", unless it is one, in low..high."""
    found = pattern.findall(answer)
    if len(found) != 1:
        raise ValueError(f"has {len(found)} matches of {pattern.pattern!r}; exactly one is needed")
    try:
        number = float(found[0])
    except ValueError:
        raise ValueError(f"has {found[0]!r} where a number is needed") from None
    if not low <= number <= high:  # also for NaN
        raise ValueError(f"has the number {number:g}; allowed: {low:g} to {high:g}")
    return number


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirection)


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises for an invalid one
    except ValueError as error:
        raise ValueError(f"url: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("url: must be http://HOST... or https://HOST..., up to and without /chat/completions")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"url of {parts.hostname}: must not hold a user, a password, ? or #; the key comes from api_key_env")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError(f"url {url!r}: must not end in /chat/completions, which is added")


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_env {variable!r}: the environment variable is not set")
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"api_key_env {variable!r}: the environment variable holds characters that a key cannot have")
    return key


def _message(error: urllib.error.HTTPError) -> str:
    """The body of an error response; its message alone where it has OpenAI's form."""
    try:
        body = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body or error.reason
