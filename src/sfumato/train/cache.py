"""The denoiser's training data, made once: latents of composed scenes and the text tower's states of their captions.

A cache is a folder of shards, `latents-0000.safetensors` and so on, each with

    latents  (N, Z, h, w) float16      diffusion latents (the posterior's mean)
    caption  (N,) int32                row of `context` that describes the picture
    context  (M, L, D) float16         text states of the shard's distinct captions

and beside them `captions-0000.json`. A shard is complete or absent, so an interrupted build goes on with the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data.scenes import Composer
from sfumato.files import write_json
from sfumato.images import to_unit
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.train.loop import Progress
from sfumato.weights.safe import read_tensors, write_tensors


@torch.inference_mode()
def text_states(tower: CLIPTextModel, tokenizer: ClipTokenizer, captions: list[str], batch: int = 256) -> Tensor:
    """Last hidden states of captions, (M, L, D) float16 on the CPU."""
    device = next(tower.parameters()).device
    rows = [tower(tokenizer(captions[i : i + batch]).to(device)).last_hidden_state.half().cpu()
            for i in range(0, len(captions), batch)]  # fmt: skip
    return torch.cat(rows)


@torch.inference_mode()
def build_cache(
    folder: Path,
    composer: Composer,
    vae: AutoencoderKL,
    tower: CLIPTextModel,
    tokenizer: ClipTokenizer,
    shards: int,
    per_shard: int = 4000,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Make the shards that are missing; returns all of them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(vae.parameters()).device
    paths = [folder / f"latents-{i:04d}.safetensors" for i in range(shards)]
    for index, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng((seed, index))
        scenes = [composer.sample(rng) for _ in range(per_shard)]
        rows = []
        for start in range(0, per_shard, 32):
            drawn = np.stack([composer.draw(scene, rng) for scene in scenes[start : start + 32]])
            z = vae.encode(to_unit(torch.from_numpy(drawn).to(device))).latent_dist.mode()
            rows.append((z * vae.config.scaling_factor).half().cpu())
            if progress and start % 512 == 0:
                progress("cache", index * per_shard + start, shards * per_shard, {})
        captions = list(dict.fromkeys(scene.caption for scene in scenes))
        row = {caption: i for i, caption in enumerate(captions)}
        write_json(folder / f"captions-{index:04d}.json", {"captions": captions})
        tensors = {
            "latents": torch.cat(rows).contiguous(),
            "caption": torch.tensor([row[scene.caption] for scene in scenes], dtype=torch.int32),
            "context": text_states(tower, tokenizer, captions),
        }
        write_tensors(path, tensors)
    return paths


class LatentCache:
    """All shards in memory; `batch` draws from them."""

    def __init__(self, paths: list[Path]):
        shards = [read_tensors(path) for path in paths]
        offsets = np.cumsum([0] + [len(s["context"]) for s in shards[:-1]])
        self.latents = torch.cat([s["latents"] for s in shards])  # (N, Z, h, w)
        self.caption = torch.cat([s["caption"].long() + int(o) for s, o in zip(shards, offsets, strict=True)])  # (N,)
        self.context = torch.cat([s["context"] for s in shards])  # (M, L, D)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents (B, Z, h, w) and their text states (B, L, D), float32."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return self.latents[rows].float(), self.context[self.caption[rows]].float()
