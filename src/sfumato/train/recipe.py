"""A recipe: one YAML file from icons to a model folder, carried out stage by stage.

    text -> autoencoder -> cache of latents and text states -> U-Net -> model folder

Each stage leaves its result in the run's folder. A run that is started again skips what is finished and resumes
what is not, down to the optimiser's state, so a long training may be stopped at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import nn

from sfumato.data.icons import IconSet
from sfumato.data.scenes import Composer
from sfumato.diffusion.path import VPPath
from sfumato.diffusion.scheduler import Scheduler
from sfumato.files import read_json, write_json
from sfumato.images import grid, save
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipelines.pipeline import Pipeline
from sfumato.runtime import choose
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.train import parallel
from sfumato.train.cache import LatentCache, build_cache
from sfumato.train.distill import DistillConfig, distill
from sfumato.train.latent import DenoiserLoss, train_latent
from sfumato.train.loop import LoopConfig, Progress
from sfumato.train.vae import VAELoss, train_vae
from sfumato.weights.folder import Components, save_folder
from sfumato.weights.safe import load_module, write_tensors

Module = TypeVar("Module", bound=nn.Module)

#: Drawn after each checkpoint, so that one sees the network learn.
SAMPLE_PROMPTS = (
    "a dog", "a red apple on a yellow background", "a cat left of a bus", "a penguin, flat style",
    "a hamburger", "two green frogs", "a rocket on a black background", "a small fish in the top left corner",
)  # fmt: skip


class Part(BaseModel):
    """A section of a recipe; names that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scenes(Part):
    """How scenes are drawn: layout -> share, and the share of scenes in a named style."""

    layouts: dict[str, float] = {"single": 0.72, "corner": 0.06, "beside": 0.1, "above": 0.05, "copies": 0.07}
    styled: float = 0.6


class VAEPart(Part):
    """The autoencoder: `vae/config.json`, optimisation, loss, crop sides by step, and the scenes it learns from."""

    config: dict[str, Any]
    loop: LoopConfig
    loss: VAELoss = VAELoss()
    crop: dict[int, int] = {0: 32}
    pool: int = 3000
    scenes: Scenes = Scenes()


class CachePart(Part):
    """How many scenes the denoiser sees: shards of per_shard each."""

    shards: int
    per_shard: int = 4000
    scenes: Scenes = Scenes()


class UNetPart(Part):
    """The denoiser: `unet/config.json`, optimisation and objective."""

    config: dict[str, Any]
    loop: LoopConfig
    loss: DenoiserLoss = DenoiserLoss()


class Recipe(Part):
    """A whole training: the run's folder, the icon set's, and one section a stage."""

    out: Path
    icons: Path
    text: dict[str, Any]
    vae: VAEPart
    cache: CachePart
    unet: UNetPart
    scheduler: dict[str, Any]


def read_recipe(path: Path | str) -> Recipe:
    """Parse a recipe; ValueError naming the first entry that is wrong."""
    try:
        return TypeAdapter(Recipe).validate_python(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {place}: {first['msg']} (got {first['input']!r})") from None


def run(path: Path | str, out: Path | str | None = None, progress: Progress | None = None) -> Path:
    """Carry out the recipe at `path` and return the model folder.

    out: the run's folder instead of the recipe's. progress(stage, step, steps, numbers) is called as it goes.
    Under torchrun the U-Net is trained by all processes, the rest is made by the first.
    Raises ValueError for a bad recipe, FileNotFoundError when the icon set is missing.
    """
    recipe = read_recipe(path)
    folder = Path(out) if out else recipe.out
    icons = IconSet(recipe.icons)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with parallel.group(device):
        if parallel.rank() == 0:
            tower, tokenizer = make_text(recipe, folder / "text", progress)
            vae = make_vae(recipe.vae, icons, folder / "vae", progress)
            make_cache(recipe.cache, icons, folder / "cache", vae, tower, tokenizer, device, progress)
        parallel.wait()
        unet = make_unet(recipe, folder, device, progress)
        if parallel.rank() == 0:
            tower, tokenizer = make_text(recipe, folder / "text", progress)
            vae = open_part(folder / "vae", AutoencoderConfig.from_dict, AutoencoderKL)
            parts = Components(unet, vae, tower, tokenizer, Scheduler.from_config(recipe.scheduler))
            save_folder(parts, folder / "model", torch.float16)
    return folder / "model"


def make_text(recipe: Recipe, folder: Path, progress: Progress | None) -> tuple[CLIPTextModel, ClipTokenizer]:
    """The text tower and its tokenizer, taught unless the folder has them."""
    if not (folder / "text_encoder" / "model.safetensors").exists():
        report = (lambda step, steps, numbers: progress("text", step, steps, dict(numbers))) if progress else None
        distill(DistillConfig.from_dict(recipe.text), folder, report)
    tower = open_part(folder / "text_encoder", CLIPTextConfig.from_dict, CLIPTextModel)
    return tower, ClipTokenizer.from_folder(folder / "tokenizer")


def make_vae(part: VAEPart, icons: IconSet, folder: Path, progress: Progress | None) -> AutoencoderKL:
    """The autoencoder, trained on the whole icon set unless the folder has it."""
    if not (folder / "model.safetensors").exists():
        labels = {code: next(iter(row.values())).label for code, row in icons.by_code().items() if len(row) > 2}
        composer = Composer(icons, labels, weights=part.scenes.layouts, styled=part.scenes.styled)
        config = AutoencoderConfig.from_dict(part.config)
        keep_part(folder, train_vae(config, composer, part.loop, folder, part.loss, part.crop, part.pool, progress))
    return open_part(folder, AutoencoderConfig.from_dict, AutoencoderKL)


def make_cache(
    part: CachePart, icons: IconSet, folder: Path, vae: AutoencoderKL, tower: CLIPTextModel,
    tokenizer: ClipTokenizer, device: str, progress: Progress | None,
) -> None:  # fmt: skip
    """The shards of latents and text states that the folder lacks."""
    composer = Composer(icons, weights=part.scenes.layouts, styled=part.scenes.styled)
    vae = vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    build_cache(folder, composer, vae, tower.to(device), tokenizer, part.shards, part.per_shard, progress=progress)


def make_unet(recipe: Recipe, folder: Path, device: str, progress: Progress | None) -> UNet:
    """The denoiser, trained unless the folder has it; sample sheets go to `samples/` along the way."""
    part, place = recipe.unet, folder / "unet"
    finished = (place / "model.safetensors").exists()
    parallel.wait()  # every process has looked before the first may write it
    if not finished:
        tower, tokenizer = make_text(recipe, folder / "text", progress)
        vae = open_part(folder / "vae", AutoencoderConfig.from_dict, AutoencoderKL)
        scheduler = Scheduler.from_config(recipe.scheduler)
        if not isinstance(scheduler.path, VPPath):
            name = recipe.scheduler.get("_class_name")
            raise ValueError(f"scheduler: {name} has no betas; use one that has, such as DDIMScheduler")
        empty = encode_prompts(tokenizer, tower, [""]).context
        assert empty is not None

        def sheet(step: int, net: nn.Module) -> None:
            parts = Components(net, vae, tower, tokenizer, scheduler)  # type: ignore[arg-type]
            pipe = Pipeline(parts, choose(device, "float32"), batch=8)
            drawn = pipe(list(SAMPLE_PROMPTS), seed=0, num_inference_steps=12).images
            save(grid(drawn), folder / "samples" / f"{step:06d}.png")  # type: ignore[arg-type]

        shards = sorted((folder / "cache").glob("latents-*.safetensors"))[: recipe.cache.shards]
        unet = train_latent(
            UNetConfig.from_dict(part.config), LatentCache(shards), empty, scheduler.path, part.loop,
            place, part.loss, progress, sheet, device,
        )  # fmt: skip
        if parallel.rank() == 0:
            keep_part(place, unet)
        parallel.wait()
    return open_part(place, UNetConfig.from_dict, UNet)


def keep_part(folder: Path, module: Any) -> None:
    """Write a finished network beside its training state: config.json, then model.safetensors in float32."""
    write_json(folder / "config.json", module.config.to_dict())
    write_tensors(folder / "model.safetensors", module.state_dict(), torch.float32)


def open_part(folder: Path, parse: Callable[[dict[str, Any]], Any], build: Callable[[Any], Module]) -> Module:
    """Read a network that `keep_part` wrote."""
    config = parse(read_json(folder / "config.json"))
    return load_module(lambda: build(config), folder / "model.safetensors")
