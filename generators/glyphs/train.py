"""The recipe that made the embedded teacher and CLIP, in three stages, each seeded and resumable:

    python -m generators.glyphs.train [vae|clip|teacher ...] [--work DIR] [--out DIR] [--steps N] [--scenes N] [--seed N]

vae       an autoencoder of the images: L1 + squared error + a light KL term
clip      image and text towers with InfoNCE; each caption with one attribute changed is an additional negative
teacher   two text encoders and an SD3 transformer by conditional flow matching (Lipman et al. 2210.02747) on the
          autoencoder's latents, with logit-normal times as in SD3 (2403.03206, eq. 19) and 10 % of the prompts dropped

No stage sees a held-out combination. After an interruption, the same command continues from the last checkpoint in the work
folder. Batch k of a stage depends on the seed and k alone, so the weights are reproducible on one machine with a fixed number
of threads. The EMA of the weights is saved; the VAE's decays faster, because a slow one lags behind latents that still change.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer

from generators.glyphs import networks
from inputs import nearest
from worlds.glyphs import HELDOUT_THINGS, Scene, Thing, caption, change_one, random_scene, render

HERE = Path(__file__).parent
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's image normalisation, so that code for the original CLIPs needs no special case."""


@dataclass(frozen=True)
class Schedule:
    scenes: int
    steps: int
    batch: int
    lr: float
    ema: float = 0.999
    warmup: int = 200
    checkpoint_every: int = 500

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


SCHEDULES = {
    "vae": Schedule(scenes=20_000, steps=3000, batch=32, lr=2e-3, ema=0.99),
    "clip": Schedule(scenes=40_000, steps=5000, batch=64, lr=1e-3),
    "teacher": Schedule(scenes=60_000, steps=14000, batch=64, lr=1e-3),
}


def fit(
    name: str,
    model: Any,
    loss_of: Callable[[np.random.Generator], dict[str, Tensor]],
    schedule: Schedule,
    seed: int,
    work: Path,
    sample: Callable[[Any, int], None] = lambda ema, step: None,
) -> Any:
    """Train `model`, a module, in place on the sum of `loss_of`'s terms; returns its EMA.

    `loss_of` draws one batch with the rng it is passed. `sample` is called with the EMA at every checkpoint.
    Raises ValueError if the work folder holds a checkpoint of another schedule or seed.
    """
    checkpoint, recipe = work / f"{name}.pt", f"seed={seed} {schedule}"
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(schedule.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.99), weight_decay=0.01)
    parts: dict[str, Any] = {"model": model, "average": ema, "optimizer": optimizer}
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != recipe:
            raise ValueError(f"{checkpoint}: made with {state['recipe']}, this run has {recipe}; choose another --work folder")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first, seconds = state["step"], state["seconds"]
        print(f"{name}: continuing from step {first} of {schedule.steps}", flush=True)
    started = time.monotonic() - seconds
    history: list[dict[str, float]] = []
    for step in range(first, schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        terms = loss_of(np.random.default_rng((seed, step)))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        history.append({key: value.item() for key, value in terms.items()})
        done, seconds = step + 1, time.monotonic() - started
        if done % 100 == 0 or done == schedule.steps:
            means = " ".join(f"{key} {np.mean([h[key] for h in history]):.4f}" for key in terms)
            left = seconds / done * (schedule.steps - done) / 60
            print(f"{name} {done}/{schedule.steps}  {means}  {seconds / done:.3f} s/step  {left:.1f} min left", flush=True)
            history = []
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            state = {key: part.state_dict() for key, part in parts.items()}
            torch.save(state | {"step": done, "seconds": seconds, "recipe": recipe}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            sample(ema.module, done)
    return ema.module.eval()


def make_scenes(number: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng((seed, number))
    return [random_scene(rng) for _ in range(number)]


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """images [B, 3, H, W] in [0, 1] -> one PNG, three times as large, B a multiple of `columns`."""
    b, c, h, w = images.shape
    sheet = (
        images.clamp(0, 1).view(b // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, c)
    )
    grid = Image.fromarray((sheet * 255).round().byte().numpy())
    grid.resize((grid.width * 3, grid.height * 3), Image.Resampling.NEAREST).save(path)


def train_vae(schedule: Schedule, seed: int, work: Path, out: Path) -> None:
    images = render(make_scenes(schedule.scenes, seed), seed)
    torch.manual_seed(seed)
    vae = networks.new_vae()

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        x = images[rng.integers(len(images), size=schedule.batch)] * 2 - 1
        posterior = vae.encode(x).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        return {"l1": F.l1_loss(y, x), "mse": F.mse_loss(y, x), "kl": 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()}

    def sample(model: Any, step: int) -> None:
        with torch.no_grad():
            x = images[:32]
            y = model.decode(model.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        save_grid(torch.cat([x, y]), work / f"vae_{step:06d}.png", columns=16)

    vae = fit("vae", vae, loss_of, schedule, seed, work, sample)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.sample() for x in images[:2048].split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(out / "vae")


def canonical(scene: Scene) -> tuple[tuple[Thing, ...], str | None]:
    """Equal for captions that one image can satisfy: 'a left of b' is 'b right of a'; a single thing's place is ignored."""
    if len(scene.things) == 1:
        return scene.things, None
    opposite = {"right of": "left of", "below": "above"}
    if scene.place in opposite:
        return scene.things[::-1], opposite[scene.place]
    return scene.things, scene.place


def train_clip(schedule: Schedule, seed: int, work: Path, out: Path) -> None:
    tokenizer = networks.write_tokenizer(out)
    scenes = make_scenes(schedule.scenes, seed + 1)
    images = (render(scenes, seed + 1) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    rng = np.random.default_rng(seed)
    others = []
    for scene in scenes:
        other = change_one(scene, rng)
        while HELDOUT_THINGS.intersection(other.things):
            other = change_one(scene, rng)
        others.append(other)
    ids = tokenize(tokenizer, [caption(s) for s in scenes + others])
    keys: dict[object, int] = {}
    meaning = torch.tensor([keys.setdefault(canonical(s), len(keys)) for s in scenes + others])
    torch.manual_seed(seed)
    clip = networks.new_clip(tokenizer)

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.integers(len(scenes), size=schedule.batch))
        texts = torch.cat([rows, rows + len(scenes)])
        result = clip(pixel_values=images[rows], input_ids=ids[texts])
        # A caption with the meaning of the image's own is not a negative, except the image's own changed caption.
        same = meaning[rows][:, None] == meaning[texts][None, :]
        own = torch.arange(len(rows))
        same[own, own] = same[own, own + len(rows)] = False
        logits = result.logits_per_image.masked_fill(same, -torch.inf)
        return {"image": F.cross_entropy(logits, own), "text": F.cross_entropy(logits[:, : len(rows)].T, own)}

    clip = fit("clip", clip, loss_of, schedule, seed, work)
    clip.save_pretrained(out)
    size = {"shortest_edge": networks.IMAGE_SIZE}
    crop = {"height": networks.IMAGE_SIZE, "width": networks.IMAGE_SIZE}
    CLIPImageProcessor(size=size, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(out)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[B, 12] int64, padded to the length of the longest caption."""
    return tokenizer(
        texts, padding="max_length", max_length=networks.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


class Teacher(nn.Module):
    """The networks that the teacher stage trains together: both text encoders and the transformer."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModelWithProjection = networks.new_text_encoder(tokenizer)
        self.text_encoder_2: CLIPTextModelWithProjection = networks.new_text_encoder(tokenizer)
        self.transformer: SD3Transformer2DModel = networks.new_transformer()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x [B, 8, 8, 8], t [B] in [0, 1], ids [B, 12] -> velocity [B, 8, 8, 8]."""
        encoded = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        return self.transformer(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=torch.cat([e.hidden_states[-2] for e in encoded], dim=-1),
            pooled_projections=torch.cat([e.text_embeds for e in encoded], dim=-1),
        ).sample


def train_teacher(schedule: Schedule, seed: int, work: Path, out: Path) -> None:
    tokenizer = networks.write_tokenizer(out / "tokenizer")
    tokenizer_2 = networks.write_tokenizer(out / "tokenizer_2")
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    vae.register_to_config(_name_or_path="")  # else the saved config would contain the path of the folder
    scenes = make_scenes(schedule.scenes, seed + 2)
    latents = torch.cat(list(encode(vae, render(scenes, seed + 2))))
    ids, nothing = tokenize(tokenizer, [caption(s) for s in scenes]), tokenize(tokenizer, [""])
    torch.manual_seed(seed)
    teacher = Teacher(tokenizer)

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.integers(len(scenes), size=schedule.batch))
        x_0 = latents[rows]
        noise = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32))
        t = torch.sigmoid(torch.from_numpy(rng.standard_normal(len(rows), dtype=np.float32)))
        dropped = torch.from_numpy(rng.random(len(rows)) < 0.1)[:, None]
        s = t.view(-1, 1, 1, 1)
        velocity = teacher((1 - s) * x_0 + s * noise, t, torch.where(dropped, nothing, ids[rows]))
        return {"flow": F.mse_loss(velocity, noise - x_0)}

    def pipeline(model: Teacher) -> StableDiffusion3Pipeline:
        pipe = StableDiffusion3Pipeline(
            transformer=model.transformer,
            scheduler=networks.new_scheduler(),
            vae=vae,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=model.text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(model: Any, step: int) -> None:
        if step % 1000 and step != schedule.steps:
            return
        model.eval()
        captions = [caption(s) for s in make_scenes(64, seed + 3)]
        rngs = [torch.Generator().manual_seed(i) for i in range(64)]
        images = pipeline(model)(
            captions, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, generator=rngs, output_type="pt"
        ).images
        save_grid(images.float(), work / f"teacher_{step:06d}.png")
        (work / "teacher_captions.txt").write_text("\n".join(captions) + "\n")

    pipeline(fit("teacher", teacher, loss_of, schedule, seed, work, sample)).save_pretrained(out)


def encode(vae: AutoencoderKL, images: Tensor) -> Iterator[Tensor]:
    """Scaled latents [256, 8, 8, 8] of images [B, 3, 32, 32] in [0, 1], batch by batch."""
    with torch.no_grad():
        for x in images.split(256):
            yield (vae.encode(x * 2 - 1).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


def main() -> None:
    stages = {"vae": train_vae, "clip": train_clip, "teacher": train_teacher}
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("stages", nargs="*", default=list(stages), metavar="vae|clip|teacher")
    arguments.add_argument(
        "--work", type=Path, default=Path("runs/glyphs-train"), help="folder for checkpoints and sample images"
    )
    arguments.add_argument("--out", type=Path, default=HERE, help="folder in which pipeline/ and clip/ are written")
    arguments.add_argument("--steps", type=int, help="training steps, fewer for a quick test")
    arguments.add_argument("--scenes", type=int, help="training scenes, fewer for a quick test")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    unknown = set(options.stages) - set(stages)
    if unknown:
        arguments.error(f"stage {min(unknown)!r}: not known{nearest(min(unknown), stages)}")
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.stages:
        schedule = SCHEDULES[name]
        schedule = replace(schedule, steps=options.steps or schedule.steps, scenes=options.scenes or schedule.scenes)
        stages[name](schedule, options.seed, options.work, options.out / ("clip" if name == "clip" else "pipeline"))


if __name__ == "__main__":
    main()
