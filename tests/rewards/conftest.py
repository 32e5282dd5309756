"""Small networks with random weights in the layouts of the real ones: a CLIPModel's folder, checkpoints of HPS v2, the head of
the aesthetic predictor. And a server of chat completions."""

import base64
import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.parts.compat import ensure_torchvision

ensure_torchvision()  # before transformers and diffusers, which fail at import beside a torchvision that does not fit

from transformers import CLIPImageProcessorPil, CLIPTokenizer  # noqa: E402

from generators.glyphs import networks  # noqa: E402
from rewards.parts.open_clip import Sizes, shapes  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose up to 200 times their own time to threads that wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Weights larger than transformers' initial ones, so that images and captions matter."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = networks.new_clip(networks.write_tokenizer(folder))
    for parameter in clip.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.8 * parameter.shape[1] ** -0.5)
    clip.save_pretrained(folder)
    side = networks.IMAGE_SIZE
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def random_tensors(wanted, seed: int = 0) -> dict[str, torch.Tensor]:
    """{key: shape} -> weights large enough for every input to matter."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in wanted.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
        tensors[key] = torch.randn(shape, generator=rng) * 0.8 * fan_in**-0.5
        if key.endswith("weight") and len(shape) == 1:  # of a norm
            tensors[key] += 1
    return tensors


HPS_SIZES = Sizes(
    embed=48,
    image=32,
    patch=8,
    vision_width=128,
    vision_layers=2,
    vision_hidden=192,
    text_width=64,
    text_layers=3,
    text_hidden=128,
    context=networks.MAX_TOKENS,
    words=0,
)


@pytest.fixture(scope="session")
def hps_folder(tmp_path_factory, clip_folder) -> Path:
    """Checkpoints of both versions under their real names, for the glyph world's tokenizer."""
    folder = tmp_path_factory.mktemp("hps")
    words = len(CLIPTokenizer.from_pretrained(clip_folder))
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        wanted = shapes(dataclasses.replace(HPS_SIZES, words=words))
        torch.save({"state_dict": random_tensors(wanted, seed)}, folder / name)
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory) -> Path:
    """The aesthetic predictor's head with small widths, for the features of `clip_folder`, under the original's keys."""
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for place, (wide, out) in zip((0, 2, 4, 6, 7), pairwise((64, 32, 16, 8, 4, 1)), strict=True):
        tensors[f"layers.{place}.weight"] = 2 * torch.randn(out, wide, generator=rng) * wide**-0.5
        tensors[f"layers.{place}.bias"] = torch.randn(out, generator=rng)
    file = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(tensors, file)
    return file


@dataclasses.dataclass
class Asked:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    text: str
    image: np.ndarray
    """[H, W, 3] uint8"""


@dataclasses.dataclass
class Reply:
    status: int
    body: Any
    """What is sent as JSON, or bytes, which are sent as they are."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def says(answer: str) -> Reply:
    return Reply(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]})


def brightness(asked: Asked) -> Reply:
    """The image's mean, from 0 to 10."""
    return says(f"Score: {asked.image.mean() / 25.5:.6f}")


class ChatServer:
    """A fake server of OpenAI's chat completions. Its reply can be set, and its requests are recorded."""

    Reply = Reply
    says = staticmethod(says)

    def __init__(self) -> None:
        self.reply: Callable[[Asked], Reply] = brightness
        self.asked: list[Asked] = []
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text, image = body["messages"][0]["content"]
                head, data = image["image_url"]["url"].split(",")
                assert head == "data:image/png;base64"
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
                chat.asked.append(asked := Asked(self.path, dict(self.headers), body, text["text"], pixels))
                reply = chat.reply(asked)
                sent = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # of a client that has given up
                    self.wfile.write(sent)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.reply, self.asked = brightness, []


@pytest.fixture(scope="session")
def chat_server():
    chat = ChatServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield chat
    chat.server.shutdown()
    chat.server.server_close()


@pytest.fixture(scope="session")
def random_tensors_of():
    return random_tensors


def image_reward_shapes(*, image: int, patch: int, vision: int, blocks: int, layers: int, hidden: int, words: int):
    """{tensor of ImageReward.pt: shape}"""

    def linear(name, to, of):
        return {f"{name}.weight": (to, of), f"{name}.bias": (to,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    tower, text = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{tower}.cls_token": (1, 1, vision),
        f"{tower}.pos_embed": (1, (image // patch) ** 2 + 1, vision),
        f"{tower}.patch_embed.proj.weight": (vision, 3, patch, patch),
        f"{tower}.patch_embed.proj.bias": (vision,),
        **norm(f"{tower}.norm", vision),
        f"{text}.embeddings.position_ids": (1, 512),
        f"{text}.embeddings.word_embeddings.weight": (words, 768),
        f"{text}.embeddings.position_embeddings.weight": (512, 768),
        **norm(f"{text}.embeddings.LayerNorm", 768),
        **linear("blip.vision_proj", 256, vision),
        **linear("blip.text_proj", 256, 768),
    }
    for i in range(blocks):
        block = f"{tower}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", vision) | linear(f"{block}.attn.qkv", 3 * vision, vision)
        shapes |= linear(f"{block}.attn.proj", vision, vision) | norm(f"{block}.norm2", vision)
        shapes |= linear(f"{block}.mlp.fc1", 4 * vision, vision) | linear(f"{block}.mlp.fc2", vision, 4 * vision)
    for i in range(layers):
        layer = f"{text}.encoder.layer.{i}"
        for attention, seen in (("attention", 768), ("crossattention", vision)):
            shapes |= linear(f"{layer}.{attention}.self.query", 768, 768) | linear(f"{layer}.{attention}.self.key", 768, seen)
            shapes |= linear(f"{layer}.{attention}.self.value", 768, seen)
            shapes |= linear(f"{layer}.{attention}.output.dense", 768, 768) | norm(f"{layer}.{attention}.output.LayerNorm", 768)
        shapes |= linear(f"{layer}.intermediate.dense", hidden, 768) | linear(f"{layer}.output.dense", 768, hidden)
        shapes |= norm(f"{layer}.output.LayerNorm", 768)
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for i, (to, of) in widths.items():
        shapes |= linear(f"mlp.layers.{i}", to, of)
    return shapes


@pytest.fixture(scope="session")
def image_reward_folder(tmp_path_factory) -> Path:
    """ImageReward.pt, med_config.json, and the vocabulary of a BERT that knows the glyph world's words."""
    folder = tmp_path_factory.mktemp("image_reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *networks.WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    known = len(words) + 2
    wanted = image_reward_shapes(image=32, patch=8, vision=128, blocks=2, layers=2, hidden=64, words=known)
    tensors = random_tensors(wanted)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(tensors, folder / "ImageReward.pt")
    config = {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": known,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def image_reward_shapes_of():
    return image_reward_shapes
