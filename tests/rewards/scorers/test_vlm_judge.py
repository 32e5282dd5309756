import json
import re
import socket
import threading
import types

import pytest
import torch

import rewards
from diffusion.types import Prompt
from rewards.mixture import RewardError
from rewards.scorers.vlm_judge import PATTERN, VLMJudge, read_number

PROMPTS = [Prompt(str(i), text) for i, text in enumerate(("a red circle", "a blue seven", "a green star", "a grey one"))]
KEY = "sk-Very/Secret"


@pytest.fixture
def server(chat_server):
    chat_server.reset()
    return chat_server


@pytest.fixture
def new(server):
    """A judge that does not wait long."""
    return lambda **knobs: VLMJudge(**{"url": server.url, "model": "m", "max_requests": 100, "backoff": 0.0} | knobs)


def flat(*levels):
    """Grey images of these values, in 255ths."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 6) / 255


def failure(judge, *levels) -> str:
    with pytest.raises(RewardError, match=r"^reward vlm_judge, prompt '") as error:
        judge(flat(*levels), PROMPTS[: len(levels)])
    assert "\n" not in str(error.value)
    return str(error.value)


def in_turn(*replies):
    """One after the other, the last of them for ever."""
    waiting = list(replies)
    return lambda asked: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def test_numbers_become_scores_from_0_to_1(new):
    scores = new()(flat(0, 51, 102, 255), PROMPTS)
    assert scores.total.tolist() == pytest.approx([0, 0.2, 0.4, 1], abs=1e-6)
    assert scores.total.dtype == torch.float32


@pytest.mark.parametrize(("answer", "score"), [("Score: 1", 0), ("Score: 2.5", 0.375), ("Score: 5", 1)])
def test_the_range_is_the_user_s(new, server, answer, score):
    server.reply = lambda asked: server.says(answer)
    assert new(low=1, high=5)(flat(9), PROMPTS[:1]).total.item() == pytest.approx(score, abs=1e-7)


def test_what_is_sent(new, server):
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    template = "Is it {prompt}? From {low} to {high}, as JSON {}"
    new(template=template, high=7.5, options={"max_tokens": 3}, label="judge")(image, [Prompt("1", "a {low} sun")])
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.text == "Is it a {low} sun? From 0 to 7.5, as JSON {}"
    assert asked.image.tolist() == (image[0] * 255).round().byte().permute(1, 2, 0).tolist()
    assert set(asked.body) == {"model", "messages", "max_tokens"}
    assert (asked.body["model"], asked.body["max_tokens"]) == ("m", 3)
    assert "Authorization" not in asked.headers


def test_the_order_of_scores_is_that_of_the_images(new, server):
    """All four requests are sent at once, and answered from the last to the first."""
    together, answered = threading.Barrier(4), [threading.Event() for _ in range(5)]
    answered[4].set()

    def reply(asked):
        place = int(asked.image[0, 0, 0]) // 10
        together.wait(20)
        assert answered[place + 1].wait(20)
        answered[place].set()
        return server.says(f"Score: {place}")

    server.reply = reply
    assert new(concurrency=4, retries=0)(flat(0, 10, 20, 30), PROMPTS).total.tolist() == pytest.approx([0, 0.1, 0.2, 0.3])


def test_at_most_concurrency_requests_are_open(new, server):
    pair, lock, now, most = threading.Barrier(2), threading.Lock(), [0], [0]

    def reply(asked):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pair.wait(20)
        with lock:
            now[0] -= 1
        return server.says("Score: 5")

    server.reply = reply
    judge = new(concurrency=2, retries=0)
    assert judge(flat(*range(8)), [PROMPTS[i % 4] for i in range(8)]).total.tolist() == [0.5] * 8
    assert most == [2]


def test_requests_to_busy_servers_are_repeated(new, server):
    failing = [server.Reply(status, {"error": {"message": "later"}}) for status in (429, 500, 503)]
    server.reply = in_turn(*failing, server.says("Score: 4"))
    judge = new(retries=3)
    assert judge(flat(9), PROMPTS[:1]).total.item() == pytest.approx(0.4)
    assert judge.sent == len(server.asked) == 4
    assert len({json.dumps(asked.body) for asked in server.asked}) == 1


@pytest.fixture
def waited(monkeypatch):
    """The seconds that the judge would have waited."""
    seconds = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            seconds.append(timeout)
            return False

    monkeypatch.setattr("rewards.scorers.vlm_judge.threading", types.SimpleNamespace(Event=Event, Lock=threading.Lock))
    return seconds


def test_waits_double(new, server, waited):
    server.reply = lambda asked: server.Reply(503, {})
    failure(new(backoff=0.5, retries=3), 9)
    assert waited == [0.5, 1, 2]


@pytest.mark.parametrize(("asked_for", "seconds"), [("7", 7), ("1", 3), ("3600", 60), ("Fri, 31 Dec 1999 23:59:59 GMT", 3)])
def test_waits_are_as_long_as_the_server_requires_up_to_a_limit(new, server, waited, asked_for, seconds):
    server.reply = in_turn(server.Reply(429, {}, {"Retry-After": asked_for}), server.says("Score: 4"))
    new(backoff=3)(flat(9), PROMPTS[:1])
    assert waited == [seconds]


def test_giving_up(new, server):
    server.reply = lambda asked: server.Reply(503, {"error": {"message": "over\nloaded"}})
    said = failure(new(retries=2), 9)
    assert said == (
        f"reward vlm_judge, prompt 'a red circle': {server.url}/chat/completions answered 503: 'over\\nloaded' (3 requests)"
    )
    assert len(server.asked) == 3


def test_a_server_that_does_not_answer(new, server):
    over = threading.Event()
    server.reply = lambda asked: over.wait(20) and server.says("Score: 4")
    said = failure(new(retries=1, timeout=0.1), 9)
    over.set()
    assert "does not answer: timed out (2 requests)" in said
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert re.search(r"does not answer: .*refused \(3 requests\)", failure(new(url=url, retries=2), 9))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {"error": {"message": "no such\nfield"}}, "answered 400: 'no such\\nfield' (1 requests)"),
        (404, b"<h1>nothing here</h1>", "answered 404: '<h1>nothing here</h1>'"),
        (401, b"x" * 1000, "answered 401: '" + "x" * 300 + "...'"),
    ],
)
def test_requests_that_the_server_refuses_are_not_repeated(new, server, status, body, said):
    server.reply = lambda asked: server.Reply(status, body)
    assert said.removesuffix(" (1 requests)") in failure(new(), 9)
    assert len(server.asked) == 1


def test_redirections_are_not_followed(new, server):
    server.reply = lambda asked: server.Reply(307, {}, {"Location": f"{server.url}/chat/completions"})
    assert "answered 307" in failure(new(), 9)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Score: 7", 7),
        ("score:7.25", 7.25),
        ("**Score:** 0", 0),
        ("Score: **10**", 10),
        ("  Score : 3.\n", 3),
        ("It is red.\n\nScore: 9\nI hope this helps.", 9),
    ],
)
def test_answers_that_are_read(answer, number):
    assert read_number(answer, re.compile(PATTERN), 0, 10) == number


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("a good image", "has 0 matches of"),
        ("", "has 0 matches of"),
        ("Score: seven", "has 0 matches of"),
        ("Score: 7/10", "has 0 matches of"),
        ("Score: 7-8", "has 0 matches of"),
        ("Score: 7\nScore: 7", "has 2 matches of"),
        ("Score: 10.5", "has the number 10.5; allowed: 0 to 10"),
        ("Score: -1", "has the number -1; allowed: 0 to 10"),
    ],
)
def test_answers_without_exactly_one_number(new, server, answer, said):
    server.reply = lambda asked: server.says(answer)
    error = failure(new(), 9)
    assert error.startswith(f"reward vlm_judge, prompt 'a red circle': the answer {answer!r} {said}")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "said"), [("= nan", "the number nan; allowed"), ("= x", "has 'x' where a number is needed")]
)
def test_answers_with_another_pattern(new, server, answer, said):
    server.reply = lambda asked: server.says(answer)
    assert said in failure(new(pattern="= (.*)"), 9)


@pytest.mark.parametrize(
    "body",
    [b"<html>", {}, [], {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"choices": [{"text": "Score: 1"}]}],
)
def test_replies_that_are_not_completions(new, server, body):
    server.reply = lambda asked: server.Reply(200, body)
    shown = body.decode() if isinstance(body, bytes) else json.dumps(body)
    assert f"sent no chat completion: {shown!r}" in failure(new(), 9)


def test_no_request_after_a_failure(new, server):
    server.reply = lambda asked: server.says("no")
    assert "'a red circle'" in failure(new(concurrency=1), 0, 1, 2, 3)
    assert len(server.asked) == 1


def test_the_cap_on_requests(new, server):
    judge = new(max_requests=3, concurrency=1)
    judge(flat(0, 1), PROMPTS[:2])
    assert "'a blue seven': all 3 requests that max_requests allows have been sent" in failure(judge, 0, 1)
    failure(judge, 0)
    assert len(server.asked) == 3


def test_repeated_requests_count(new, server):
    server.reply = lambda asked: server.Reply(503, {})
    assert "all 2 requests" in failure(new(max_requests=2, retries=5), 9)
    assert len(server.asked) == 2


def test_the_key_comes_from_the_environment_and_is_not_stored(new, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    judge = new(api_key_env="JUDGE_KEY")
    judge(flat(9), PROMPTS[:1])
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(vars(judge))
    server.reply = lambda asked: server.Reply(401, {"error": {"message": f"{KEY} is wrong"}})
    assert "answered 401: '*** is wrong'" in failure(judge, 9)
    server.reply = lambda asked: server.says(f"{KEY}!")
    assert "the answer '***!' has 0 matches" in failure(judge, 9)


def test_a_missing_key(new, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = new(api_key_env="JUDGE_KEY")
    for value in ("", " "):
        monkeypatch.setenv("JUDGE_KEY", value)
        for act in (lambda: new(api_key_env="JUDGE_KEY"), lambda: judge(flat(9), PROMPTS[:1])):
            with pytest.raises(ValueError, match=r"^api_key_env 'JUDGE_KEY': the environment variable is not set$"):
                act()
    assert server.asked == []


def refused(**knobs) -> str:
    entry = {"name": "vlm_judge", "url": "http://127.0.0.1/v1", "model": "m", "max_requests": 1} | knobs
    with pytest.raises(ValueError, match=r"^(url|template|pattern|low|options|api_key_env|rewards)") as error:
        rewards.check(rewards.resolve([entry]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"url": "localhost:8000/v1"}, "must be http://HOST... or https://HOST..."),
        ({"url": "file:///etc/passwd"}, "must be http://HOST"),
        ({"url": "http://host:port/"}, "url: Port could not be cast"),
        ({"url": "http://host/v1/chat/completions/"}, "must not end in /chat/completions"),
        ({"template": "Is it good?"}, "template 'Is it good?': has no {prompt}"),
        ({"pattern": "(a"}, "pattern '(a': not a regular expression: missing )"),
        ({"pattern": r"\d+"}, r"pattern '\\d+': has 0 groups; exactly one"),
        ({"pattern": r"(a)(b)"}, "has 2 groups; exactly one"),
        ({"low": 10}, "low 10: must be below high 10"),
        ({"options": {"stream": True}}, "options: stream may not be set here"),
        ({"max_requests": 0}, "rewards.0.max_requests = 0: Input should be greater than or equal to 1"),
        ({"api_key": KEY}, "rewards.0.api_key: unknown key"),
    ],
)
def test_wrong_knobs(knobs, said):
    assert said in refused(**knobs)


@pytest.mark.parametrize(
    "knobs",
    [
        {"api_key_env": KEY},
        {"api_key_env": "gsk_secret"},
        {"url": "https://user:secret@host/v1"},
        {"url": "https://host/v1?key=secret"},
        {"url": "https://host/v1#secret"},
        {"api_key": "secret"},
    ],
)
def test_secrets_in_other_knobs_are_refused_and_not_shown(knobs):
    said = refused(**knobs)
    assert "secret" not in said.lower()


def test_a_key_that_would_break_a_header_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret\nX-Other: secret")
    said = refused(api_key_env="JUDGE_KEY")
    assert said == "api_key_env 'JUDGE_KEY': the environment variable holds characters that a key cannot have"


def test_no_gradient(new):
    images = flat(0, 51).clone().requires_grad_()
    assert not new()(images, PROMPTS[:2]).total.requires_grad
