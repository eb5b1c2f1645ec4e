"""The Stable Diffusion model folder: `model_index.json` and a sub-folder for each component.

model_index.json
unet/          config.json, diffusion_pytorch_model.safetensors
vae/           config.json, diffusion_pytorch_model.safetensors
text_encoder/  config.json, model.safetensors
tokenizer/     vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json
scheduler/     scheduler_config.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sfumato.diffusion.scheduler import Scheduler
from sfumato.files import read_json, write_json
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.unet import UNet, UNetConfig
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.safe import Module, load_module, write_tensors

INDEX = "model_index.json"
FAMILY = "StableDiffusionPipeline"
DIFFUSION_FILE = "diffusion_pytorch_model"
TRANSFORMERS_FILE = "model"
# Text towers saved by old versions of transformers carry their position numbers, which are 0, 1, 2...
OLD_TEXT_KEYS = ("text_model.embeddings.position_ids",)
# The library and the class that diffusers looks up for each sub-folder; the scheduler's class is its own.
INDEX_ROWS: Mapping[str, tuple[str | None, str | None]] = {
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
    "safety_checker": (None, None),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


@dataclass(frozen=True)
class Components:
    """The five parts of a text-to-image model of the Stable Diffusion 1 and 2 kind."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: ClipTokenizer
    scheduler: Scheduler


class HasComponents(Protocol):
    """Whatever carries the five parts as attributes: `Components`, a pipeline, a trainer's state."""

    @property
    def unet(self) -> UNet: ...
    @property
    def vae(self) -> AutoencoderKL: ...
    @property
    def text_encoder(self) -> CLIPTextModel: ...
    @property
    def tokenizer(self) -> ClipTokenizer: ...
    @property
    def scheduler(self) -> Scheduler: ...


def load_folder(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Components:
    """Read a model folder, its networks converted to `dtype` and placed on `device`.

    Raises FileNotFoundError when a part is missing, ValueError when it is of another family or does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder {path}")
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it has no {INDEX}")
    family = read_json(path / INDEX).get("_class_name")
    if family != FAMILY:
        raise ValueError(f"{path / INDEX} describes a {family!r}; this version opens: {FAMILY!r}")

    def module(
        name: str,
        parse: Callable[[Mapping[str, Any]], Any],
        build: Callable[[Any], Module],
        ignored: tuple[str, ...] = (),
    ) -> Module:
        config = parse(read_json(path / name / "config.json"))
        return load_module(lambda: build(config), weights_file(path / name), dtype, device, ignored)

    return Components(
        unet=module("unet", UNetConfig.from_dict, UNet),
        vae=module("vae", AutoencoderConfig.from_dict, AutoencoderKL),
        text_encoder=module("text_encoder", CLIPTextConfig.from_dict, CLIPTextModel, OLD_TEXT_KEYS),
        tokenizer=ClipTokenizer.from_folder(path / "tokenizer"),
        scheduler=Scheduler.from_pretrained(path / "scheduler"),
    )


def save_folder(parts: HasComponents, path: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a model folder that this package and diffusers open; weights in `dtype` when given.

    Each file is replaced in one step, and `model_index.json` comes last: a folder without it is not complete.
    """
    path = Path(path)
    for name, file, module in (
        ("unet", DIFFUSION_FILE, parts.unet),
        ("vae", DIFFUSION_FILE, parts.vae),
        ("text_encoder", TRANSFORMERS_FILE, parts.text_encoder),
    ):
        write_tensors(path / name / f"{file}.safetensors", module.state_dict(), dtype)
        write_json(path / name / "config.json", module.config.to_dict())
    parts.tokenizer.save(path / "tokenizer")
    parts.scheduler.save_pretrained(path / "scheduler")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")["_class_name"]
    rows: dict[str, Any] = {name: list(row) for name, row in INDEX_ROWS.items()}
    rows["scheduler"] = ["diffusers", scheduler]
    head = {"_class_name": FAMILY, "_diffusers_version": "0.30.0", "requires_safety_checker": False}
    write_json(path / INDEX, head | dict(sorted(rows.items())))


def weights_file(folder: Path) -> Path:
    """The safetensors file of one component: the plain one, else the half-precision variant.

    Raises FileNotFoundError naming what was looked for and what lies there instead.
    """
    stems = (DIFFUSION_FILE, TRANSFORMERS_FILE)
    names = [f"{stem}{variant}.safetensors" for variant in ("", ".fp16") for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    pickled = any(name.endswith(".bin") for name in present)
    hint = "; pickled .bin weights are not opened, save them as safetensors" if pickled else ""
    held = ", ".join(present) or "nothing"
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}; it holds: {held}{hint}")
