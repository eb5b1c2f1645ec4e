"""A recipe: one YAML file from icons to a model folder, carried out stage by stage.

    text -> autoencoder -> cache of latents and text states -> U-Net or transformer -> model folder

Each stage leaves its result in the run's folder. A run that is started again skips what is finished and resumes
what is not, down to the optimiser's state, so a long training may be stopped at any time. A recipe may take text tower
and autoencoder from another model instead of making them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from torch import nn

from sfumato.data.icons import IconSet
from sfumato.data.scenes import Composer, other_concepts
from sfumato.diffusion.path import FlowPath, VPPath
from sfumato.diffusion.scheduler import Scheduler
from sfumato.files import read_json, write_json
from sfumato.images import grid, save
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.unet import UNetConfig
from sfumato.pipelines.pipeline import Pipeline
from sfumato.presets import DenoiserConfig
from sfumato.runtime import choose
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.text.towers import Towers
from sfumato.train import parallel
from sfumato.train.cache import LatentCache, build_cache
from sfumato.train.distill import DistillConfig, distill
from sfumato.train.latent import DenoiserLoss, train_latent
from sfumato.train.loop import LoopConfig, Progress
from sfumato.train.vae import VAELoss, train_vae
from sfumato.weights.folder import Components, save_folder
from sfumato.weights.model import load_model
from sfumato.weights.parts import NETWORKS, Denoiser
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
    """How scenes are drawn: layout -> share, the share of scenes in a named style, the share of things beyond the
    model's own list of concepts, and how far places and sizes vary."""

    layouts: dict[str, float] = {"single": 0.72, "corner": 0.06, "beside": 0.1, "above": 0.05, "copies": 0.07}
    styled: float = 0.6
    beyond: float = 0.0
    wander: float = 1.0

    def composer(self, icons: IconSet, nouns: Mapping[str, str] | None = None) -> Composer:
        """What draws them; nouns: code point -> noun in the place of the model's own list."""
        others = other_concepts(icons) if self.beyond and nouns is None else None
        return Composer(
            icons, nouns, weights=self.layouts, styled=self.styled, others=others, beyond=self.beyond,
            wander=self.wander,
        )  # fmt: skip


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


class DenoiserPart(Part):
    """The denoiser: its `config.json`, optimisation and objective, and the share of steps at half the side."""

    config: dict[str, Any]
    loop: LoopConfig
    loss: DenoiserLoss = DenoiserLoss()
    half: float = 0.0


class Recipe(Part):
    """A whole training: the run's folder, the icon set's, and one section a stage.

    base: a model that supplies text tower and autoencoder in the place of `text` and `vae`.
    """

    out: Path
    icons: Path
    base: str | None = None
    text: dict[str, Any] | None = None
    vae: VAEPart | None = None
    cache: CachePart
    unet: DenoiserPart | None = None
    transformer: DenoiserPart | None = None
    scheduler: dict[str, Any]

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if (self.unet is None) == (self.transformer is None):
            raise ValueError("give one denoiser, unet or transformer")
        if (self.base is None) == (self.text is None) or (self.text is None) != (self.vae is None):
            raise ValueError("give base, or text and vae")
        return self

    @property
    def denoiser(self) -> tuple[DenoiserPart, DenoiserConfig]:
        """The section of the denoiser, and its configuration."""
        if self.unet is not None:
            return self.unet, UNetConfig.from_dict(self.unet.config)
        assert self.transformer is not None
        return self.transformer, MMDiTConfig.from_dict(self.transformer.config)


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
            towers, vae = make_parts(recipe, icons, folder, progress)
            make_cache(recipe, icons, folder / "cache", vae, towers, device, progress)
        parallel.wait()
        net = make_denoiser(recipe, icons, folder, device, progress)
        if parallel.rank() == 0:
            towers, vae = make_parts(recipe, icons, folder, progress)
            save_folder(joined(recipe, net, vae, towers), folder / "model", torch.float16)
    return folder / "model"


def make_parts(recipe: Recipe, icons: IconSet, folder: Path, progress: Progress | None) -> tuple[Towers, AutoencoderKL]:
    """Text tower and autoencoder: those of the recipe's base, or its own, made unless the folder has them."""
    if recipe.base is not None:
        parts = load_model(recipe.base)
        tower, tokenizer, vae = parts.text_encoder, parts.tokenizer, parts.vae
        if not (
            isinstance(tower, CLIPTextModel) and isinstance(tokenizer, ClipTokenizer) and isinstance(vae, AutoencoderKL)
        ):
            raise ValueError(
                f"base: {recipe.base} has no CLIP text encoder or no AutoencoderKL; name a model with both"
            )
    else:
        assert recipe.vae is not None
        tower, tokenizer = make_text(recipe, folder / "text", progress)
        vae = make_vae(recipe.vae, icons, folder / "vae", progress)
    if recipe.transformer is None:
        return Towers((tower,), (tokenizer,)), vae
    return Towers((projecting(tower),), (tokenizer,), joint=tower.config.hidden_size), vae


def projecting(tower: CLIPTextModel) -> CLIPTextModel:
    """A text tower with a projection, which a transformer reads; of one that has none, its vector as it is."""
    if tower.config.projected:
        return tower
    wide = tower.config.hidden_size
    other = CLIPTextModel(replace(tower.config, projected=True, projection_dim=wide))
    other.load_state_dict({**tower.state_dict(), "text_projection.weight": torch.eye(wide)})
    return other.eval()


def joined(recipe: Recipe, net: Denoiser, vae: AutoencoderKL, towers: Towers) -> Components:
    """The parts of the model that a recipe makes."""
    kind = "StableDiffusionPipeline" if recipe.transformer is None else "StableDiffusion3Pipeline"
    scheduler = Scheduler.from_config(recipe.scheduler)
    return Components(net, vae, towers.encoders[0], towers.tokenizers[0], scheduler, pipeline=kind)


def make_text(recipe: Recipe, folder: Path, progress: Progress | None) -> tuple[CLIPTextModel, ClipTokenizer]:
    """The text tower and its tokenizer, taught unless the folder has them."""
    assert recipe.text is not None
    if not (folder / "text_encoder" / "model.safetensors").exists():
        report = (lambda step, steps, numbers: progress("text", step, steps, dict(numbers))) if progress else None
        distill(DistillConfig.from_dict(recipe.text), folder, report)
    tower = open_part(folder / "text_encoder", CLIPTextConfig.from_dict, CLIPTextModel)
    return tower, ClipTokenizer.from_folder(folder / "tokenizer")


def make_vae(part: VAEPart, icons: IconSet, folder: Path, progress: Progress | None) -> AutoencoderKL:
    """The autoencoder, trained on the whole icon set unless the folder has it."""
    if not (folder / "model.safetensors").exists():
        labels = {code: next(iter(row.values())).label for code, row in icons.by_code().items() if len(row) > 2}
        composer = part.scenes.composer(icons, labels)
        config = AutoencoderConfig.from_dict(part.config)
        keep_part(folder, train_vae(config, composer, part.loop, folder, part.loss, part.crop, part.pool, progress))
    return open_part(folder, AutoencoderConfig.from_dict, AutoencoderKL)


def make_cache(
    recipe: Recipe, icons: IconSet, folder: Path, vae: AutoencoderKL, towers: Towers, device: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    """The shards of latents and text states that the folder lacks."""
    part, half = recipe.cache, recipe.denoiser[0].half > 0
    for tower in towers.present:
        tower.to(device)
    composer = part.scenes.composer(icons)
    vae = vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    build_cache(folder, composer, vae, towers, part.shards, part.per_shard, progress=progress, half=half)


def make_denoiser(recipe: Recipe, icons: IconSet, folder: Path, device: str, progress: Progress | None) -> Denoiser:
    """The denoiser, trained unless the folder has it; sample sheets go to `samples/` along the way."""
    (part, config), place = recipe.denoiser, folder / ("unet" if recipe.transformer is None else "transformer")
    finished = (place / "model.safetensors").exists()
    parallel.wait()  # every process has looked before the first may write it
    if not finished:
        towers, vae = make_parts(recipe, icons, folder, progress)
        path = Scheduler.from_config(recipe.scheduler).path
        if not isinstance(path, VPPath | FlowPath):
            name = recipe.scheduler.get("_class_name")
            raise ValueError(
                f"scheduler: {name} has neither betas nor a flow; use DDIMScheduler or FlowMatchEulerDiscreteScheduler"
            )

        def sheet(step: int, net: nn.Module) -> None:
            parts = joined(recipe, cast(Denoiser, net), vae, towers)
            pipe = Pipeline(parts, choose(device, "float32"), batch=8)
            drawn = pipe(list(SAMPLE_PROMPTS), seed=0, num_inference_steps=12).images
            save(grid(drawn), folder / "samples" / f"{step:06d}.png")  # type: ignore[arg-type]

        shards = sorted((folder / "cache").glob("latents-*.safetensors"))[: recipe.cache.shards]
        net = train_latent(
            config, LatentCache(shards), towers.captions([""]), path, part.loop,
            place, part.loss, progress, sheet, device, part.half,
        )  # fmt: skip
        if parallel.rank() == 0:
            keep_part(place, net)
        parallel.wait()
    build = cast(Callable[[Any], Denoiser], NETWORKS[type(config)])
    return open_part(place, type(config).from_dict, build)


def keep_part(folder: Path, module: Any) -> None:
    """Write a finished network beside its training state: config.json, then model.safetensors in float32."""
    write_json(folder / "config.json", module.config.to_dict())
    write_tensors(folder / "model.safetensors", module.state_dict(), torch.float32)


def open_part(folder: Path, parse: Callable[[dict[str, Any]], Any], build: Callable[[Any], Module]) -> Module:
    """Read a network that `keep_part` wrote."""
    config = parse(read_json(folder / "config.json"))
    return load_module(lambda: build(config), folder / "model.safetensors")
