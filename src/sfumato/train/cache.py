"""The denoiser's training data, made once: latents of composed scenes and what the text towers say of their captions.

A cache is a folder of shards, `latents-0000.safetensors` and so on, each with

    latents  (N, Z, h, w) float16      diffusion latents (the posterior's mean)
    caption  (N,) int32                row of `context` that describes the picture
    context  (M, L, D) float16         text states of the shard's distinct captions
    pooled   (M, P) float16            their vectors, where the network reads such
    half     (N, Z, h / 2, w / 2) float16  latents of the pictures at half the side, where they are wanted

and beside them `captions-0000.json`. A shard is complete or absent, so an interrupted build goes on with the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.cond import Cond
from sfumato.data.scenes import Composer
from sfumato.files import write_json
from sfumato.images import to_unit
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.text.towers import Towers
from sfumato.train.loop import Progress
from sfumato.weights.safe import read_tensors, write_tensors


def told(towers: Towers, captions: list[str], batch: int = 256) -> dict[str, Tensor]:
    """What captions tell a network by the names of the condition's parts, float16 on the CPU."""
    rows = [towers.captions(captions[i : i + batch]) for i in range(0, len(captions), batch)]
    whole = Cond.cat(rows).to("cpu")
    parts = {"context": whole.context, "pooled": whole.pooled}
    return {name: part.half() for name, part in parts.items() if part is not None}


@torch.inference_mode()
def build_cache(
    folder: Path,
    composer: Composer,
    vae: AutoencoderKL,
    towers: Towers,
    shards: int,
    per_shard: int = 4000,
    seed: int = 0,
    progress: Progress | None = None,
    half: bool = False,
) -> list[Path]:
    """Make the shards that are missing; returns all of them in order. half: with pictures of half the side."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(vae.parameters()).device
    paths = [folder / f"latents-{i:04d}.safetensors" for i in range(shards)]
    for index, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng((seed, index))
        scenes = [composer.sample(rng) for _ in range(per_shard)]
        rows, halves = [], []
        for start in range(0, per_shard, 32):
            drawn = np.stack([composer.draw(scene, rng) for scene in scenes[start : start + 32]])
            x = to_unit(torch.from_numpy(drawn).to(device))
            rows.append(likeliest(vae, x))
            if half:
                halves.append(likeliest(vae, F.avg_pool2d(x, 2)))
            if progress and start % 512 == 0:
                progress("cache", index * per_shard + start, shards * per_shard, {})
        captions = list(dict.fromkeys(scene.caption for scene in scenes))
        row = {caption: i for i, caption in enumerate(captions)}
        write_json(folder / f"captions-{index:04d}.json", {"captions": captions})
        tensors = {
            "latents": torch.cat(rows).contiguous(),
            "caption": torch.tensor([row[scene.caption] for scene in scenes], dtype=torch.int32),
            **({"half": torch.cat(halves).contiguous()} if half else {}),
            **told(towers, captions),
        }
        write_tensors(path, tensors)
    return paths


def likeliest(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """The middle of the distribution of a picture's latents, as diffusion sees them, float16 on the CPU."""
    z = vae.encode(x).latent_dist.mode() - (vae.config.shift_factor or 0.0)
    return (z * vae.config.scaling_factor).half().cpu()


class LatentCache:
    """All shards in memory; `batch` draws from them."""

    def __init__(self, paths: list[Path]):
        shards = [read_tensors(path) for path in paths]
        offsets = np.cumsum([0] + [len(s["context"]) for s in shards[:-1]])
        self.latents = torch.cat([s["latents"] for s in shards])  # (N, Z, h, w)
        self.caption = torch.cat([s["caption"].long() + int(o) for s, o in zip(shards, offsets, strict=True)])  # (N,)
        self.context = torch.cat([s["context"] for s in shards])  # (M, L, D)
        self.pooled = torch.cat([s["pooled"] for s in shards]) if "pooled" in shards[0] else None  # (M, P)
        self.half = torch.cat([s["half"] for s in shards]) if "half" in shards[0] else None  # (N, Z, h / 2, w / 2)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, count: int, generator: torch.Generator, half: bool = False) -> tuple[Tensor, Cond]:
        """Random latents (B, Z, h, w) and what their captions tell, float32.

        half: of pictures of half the side; ValueError where the cache was made without.
        """
        latents = self.half if half else self.latents
        if latents is None:
            raise ValueError("this cache has no pictures of half the side; delete it, or set half to 0")
        rows = torch.randint(len(self), (count,), generator=generator)
        texts = self.caption[rows]
        pooled = None if self.pooled is None else self.pooled[texts].float()
        return latents[rows].float(), Cond(self.context[texts].float(), pooled)
