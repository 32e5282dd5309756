"""A scorer in this process, over HTTP, and over the messages that Ray's actors use must give the same scores."""

import base64
import io
import json
import threading
import urllib.error
import urllib.request
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import load

import rewards
from diffusion.types import About, Prompt
from rewards.mixture import RewardError, score
from rewards.names import own_knobs
from rewards.serve import EntryHost, server
from rewards.transport.http import Client
from rewards.transport.remote import RemoteReward, read_about, read_request, write_request

PROMPTS = [Prompt("1", "a red circle", {"place": "left", "n": [1, 2]}), Prompt("2", "a blue seven")]


class Near:
    """The messages without a network: a `Transport` that records requests."""

    def __init__(self, host):
        self.host, self.about, self.requests = host, read_about(json.loads(json.dumps(asdict(host.about())))), []

    def __call__(self, request):
        self.requests.append(request)
        return self.host.answer(request)


def entry(**given):
    return rewards.resolve([given])[0]


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


@pytest.fixture
def serve():
    running = []

    def start(host):
        running.append(serving := server(host))
        threading.Thread(target=serving.serve_forever, args=[0.02], daemon=True).start()
        return f"http://127.0.0.1:{serving.server_port}"

    yield start
    for serving in running:
        serving.shutdown()
        serving.server_close()


@pytest.fixture(params=["symmetry", "compressibility", "clip_score", "glyph_match", "jpeg_size"])
def everywhere(request, clip_folder, serve):
    """One reward in three places: in this process, over the messages alone, over HTTP."""
    given = entry(name=request.param, **({"weights": str(clip_folder)} if request.param == "clip_score" else {}))
    host = EntryHost(given, "cpu")
    here = rewards.scorer(request.param)(label=request.param, **own_knobs(given))
    return here, RemoteReward(Near(host), request.param), RemoteReward(Client(serve(host), request.param), request.param)


def test_scores_and_gradients_are_the_same_in_all_places(everywhere, images):
    here, *others = everywhere
    expected = score(here, images, PROMPTS).total
    for there in others:
        assert there.about == here.about
        got = score(there, images, PROMPTS)
        assert (got.total - expected).abs().max() <= 1e-6
        assert torch.equal(got.parts[here.about.label], got.total)
        if not here.about.differentiable:
            assert not there(images.clone().requires_grad_(), PROMPTS).total.requires_grad
            continue
        weights = torch.tensor([2.0, -1.0])
        gradients = []
        for reward in (here, there):
            leaf = images.clone().requires_grad_()
            gradients.append(torch.autograd.grad((weights * reward(leaf, PROMPTS).total).sum(), leaf)[0])
        assert gradients[0].abs().max() > 0
        assert (gradients[1] - gradients[0]).abs().max() <= 1e-5 * gradients[0].abs().max()


def test_the_gradient_is_requested_only_if_needed(images):
    near = Near(EntryHost(entry(name="symmetry"), "cpu"))
    reward = RemoteReward(near, "mine")
    reward(images, PROMPTS)
    with torch.no_grad():
        reward(images.requires_grad_(), PROMPTS)
    reward(images, PROMPTS).total.sum().backward()
    assert [read_request(request)[2] for request in near.requests] == [False, False, True]
    assert list(reward(images, PROMPTS).parts) == ["mine"]


def test_there_is_no_second_derivative(images):
    reward = RemoteReward(Near(EntryHost(entry(name="symmetry"), "cpu")), "symmetry")
    (gradient,) = torch.autograd.grad(reward(images.requires_grad_(), PROMPTS).total.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_request_is_complete(images):
    got, prompts, gradient = read_request(write_request(images, PROMPTS, gradient=True))
    assert torch.equal(got, images)
    assert prompts == PROMPTS
    assert gradient


def test_invalid_requests():
    for wrong in (b"", b"x" * 100, write_request(torch.zeros(1), [], False)[:50]):
        with pytest.raises(RewardError, match=r"^not a request for scores: "):
            read_request(wrong)


def test_extra_values_are_transferred(images, tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, log_metric, **columns):\n    log_metric('length', 5.0)\n    return [None, 0.5]\n"
    )
    near = Near(EntryHost(entry(name=f"python:{tmp_path}/f.py:f", trl=True), "cpu"))
    scores = score(RemoteReward(near, "f"), images, PROMPTS)
    assert scores.total.isnan().tolist() == [True, False]
    assert scores.extra["length"].tolist() == [5.0, 5.0]


def test_every_failure_of_the_host_is_a_reward_error(images, tmp_path, serve):
    (tmp_path / "f.py").write_text("def f(images, prompts, **meta):\n    return {}[0]\n")
    host = EntryHost(entry(name=f"python:{tmp_path}/f.py:f"), "cpu")
    for ask in (Near(host), Client(serve(host), "f")):
        with pytest.raises(RewardError, match=r"f raised KeyError"):
            RemoteReward(ask, "f")(images, PROMPTS)
    with pytest.raises(RewardError, match="takes float32"):
        RemoteReward(Near(EntryHost(entry(name="symmetry"), "cpu")), "symmetry")(images[:1], PROMPTS)


def post(url, body, kind):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def png(value, side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_server_answers_json(serve):
    url = serve(EntryHost(entry(name="brightness"), "cpu"))
    with urllib.request.urlopen(url + "/") as response:
        assert json.load(response) == asdict(About("brightness", True)) | {"bounds": [0.0, 1.0]}
    status, said = post(
        url + "/score", json.dumps({"prompts": ["a", "b"], "images": [png(51), png(255)]}).encode(), "application/json"
    )
    assert status == 200
    assert said["scores"] == pytest.approx([0.2, 1.0])


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "words"),
    [
        ("/score", {"prompts": ["a"], "images": []}, "application/json", 400, "one image for each prompt"),
        ("/score", {"prompts": ["a", "b"], "images": ["4", "8"]}, "application/json", 400, "4x4, 8x8 pixels"),
        ("/score", {"prompts": ["a"], "images": ["no image"]}, "application/json", 400, "PNG in base64"),
        ("/score", {"images": ["4"]}, "application/json", 400, "KeyError: 'prompts'"),
        ("/score", "no tensors", "application/octet-stream", 400, "not a request for scores"),
        ("/score", "a pickle", "application/x-pickle", 404, "allowed is /score"),
        ("/other", {}, "application/json", 404, "allowed is /score"),
    ],
)
def test_the_server_s_errors_are_one_line(serve, path, body, kind, status, words):
    if isinstance(body, dict) and "images" in body:
        body["images"] = [png(0, int(size)) if size.isdecimal() else size for size in body["images"]]
    got, said = post(serve(EntryHost(entry(name="brightness"), "cpu")) + path, json.dumps(body).encode(), kind)
    assert got == status
    assert words in said["error"]
    assert "\n" not in said["error"]


def test_invalid_servers(serve, chat_server):
    with pytest.raises(ValueError, match=r"^server 'http://127.0.0.1:9': does not answer as a reward server: "):
        Client("http://127.0.0.1:9", "brightness")
    with pytest.raises(ValueError, match="allowed is http://HOST:PORT"):
        Client("brightness.example", "brightness")
    with pytest.raises(ValueError, match="does not answer as a reward server: Unsupported method"):
        Client(chat_server.url, "brightness")
    url = serve(EntryHost(entry(name="brightness"), "cpu"))
    with pytest.raises(ValueError, match=r"runs 'brightness', not 'symmetry'"):
        Client(url, "symmetry")


def test_a_server_that_stopped(images):
    serving = server(EntryHost(entry(name="brightness"), "cpu"))
    threading.Thread(target=serving.serve_forever, args=[0.02], daemon=True).start()
    client = Client(f"http://127.0.0.1:{serving.server_port}", "brightness")
    serving.shutdown()
    serving.server_close()
    with pytest.raises(RewardError, match=r"^http://127.0.0.1:\d+ does not answer: "):
        client(write_request(images, PROMPTS, gradient=False))


def test_an_entry_names_its_server(serve, images):
    url = serve(EntryHost(entry(name="brightness"), "cpu"))
    entries = rewards.resolve([{"name": "brightness", "label": "there", "server": url, "weight": 2.0}])
    rewards.check(entries)
    mixture = rewards.build(entries)
    assert mixture.about.differentiable
    expected = rewards.build([{"name": "brightness"}])(images, PROMPTS).total
    assert torch.allclose(mixture(images, PROMPTS).parts["there"], expected)
    with pytest.raises(ValueError, match="does not answer"):
        rewards.check(rewards.resolve([{"name": "brightness", "server": "http://127.0.0.1:9"}]))


def test_a_server_may_run_an_unknown_reward():
    (resolved,) = rewards.resolve([{"name": "hpsv3", "server": "http://gpu:8000"}])
    assert resolved["label"] == "hpsv3"
    with pytest.raises(ValueError, match=r"^rewards\.0\.weights: unknown key"):
        rewards.resolve([{"name": "hpsv3", "server": "http://gpu:8000", "weights": "x"}])
    with pytest.raises(ValueError, match=r"^rewards\.0: env 'envs/x' and server 'http://gpu:8000': at most one"):
        rewards.resolve([{"name": "brightness", "server": "http://gpu:8000", "env": "envs/x"}])


def test_an_environment_needs_someone_to_run_it():
    entries = rewards.resolve([{"name": "brightness", "env": "envs/x"}])
    with pytest.raises(ValueError, match="brightness has env 'envs/x', but this program runs no scorers in environments"):
        rewards.build(entries, "rewards.train")
    asked = []

    def isolated(entry):
        asked.append(entry["env"])
        return Near(EntryHost(entry, "cpu"))

    assert rewards.build(entries, isolated=isolated).about.differentiable
    assert asked == ["envs/x"]


def test_the_answer_holds_tensors_and_nothing_else(images):
    answer = load(EntryHost(entry(name="symmetry"), "cpu").answer(write_request(images, PROMPTS, gradient=True)))
    assert {name: (list(value.shape), value.dtype) for name, value in answer.items()} == {
        "scores": ([2], torch.float32),
        "gradient": ([2, 3, 32, 32], torch.float32),
    }
