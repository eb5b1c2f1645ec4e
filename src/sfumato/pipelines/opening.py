"""Models and their parts opened with the arguments that notebooks give."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.autoencoder import AutoencoderKL as KL
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.clip import CLIPTextModel as TextModel
from sfumato.models.unet import UNet, UNetConfig
from sfumato.presets import BUILT_IN
from sfumato.presets.classic import SD_VAE
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.folder import load_folder, load_part, load_vae_folder
from sfumato.weights.hub import cached, fetch, parse_id, ready
from sfumato.weights.layouts import TEXTS, UNETS
from sfumato.weights.model import load_model, load_vae, locate
from sfumato.weights.parts import Components

# Arguments of diffusers that change nothing here: how to fetch, how to spread memory, what is done anyway.
PASSED_OVER = frozenset(
    {
        *("use_safetensors", "low_cpu_mem_usage", "force_download", "resume_download", "proxies", "token", "mirror"),
        *("use_auth_token", "offload_folder", "offload_state_dict", "max_memory", "disable_mmap", "trust_remote_code"),
        *("add_watermarker", "config", "original_config", "original_config_file", "num_in_channels", "image_size"),
        *("scheduler_type", "load_safety_checker", "upcast_attention", "device_map", "custom_revision"),
        *("safe_serialization", "max_shard_size", "safety_checker", "requires_safety_checker", "feature_extractor"),
        *("image_encoder", "watermarker", "max_noise_level"),
    }
)
# Parts by the names that notebooks have for them; MORE are those that most models lack.
MAIN = ("vae", "text_encoder", "tokenizer", "scheduler")
MORE = (
    *("low_res_scheduler", "depth_estimator"),
    *("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
)
DENOISERS = ("unet", "transformer")
PARTS = (*MAIN, *DENOISERS, *MORE)
T5 = ("text_encoder_3", "tokenizer_3")  # left out where one of them is given as None
PAGE = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)(?:\?.*)?")

log = logging.getLogger(__name__)


def passed_over(others: Mapping[str, Any], where: str, known: Collection[str] = PASSED_OVER) -> None:
    """Log the arguments that change nothing; ValueError for others that ask for something, TypeError for strangers."""
    for name, value in others.items():
        if name in known:
            log.info("%s: %s is passed over", where, name)
        elif value not in (None, False):
            raise ValueError(f"{where}: {name} = {value!r} is not supported; leave it out")


def opened(
    source: str | Path,
    dtype: torch.dtype,
    variant: str | None = None,
    revision: str | None = None,
    cache: str | Path | None = None,
    local: bool = False,
    without: Collection[str] = (),
) -> Components:
    """A model by folder, file, built-in name or hub id, on the CPU; FileNotFoundError or ValueError in one line.

    without: nothing, or the parts of T5, which are left out.
    """
    place = found(source, dtype, variant, revision, cache, local)
    if place.is_dir():
        return load_folder(place, dtype, variant=variant, without=without)
    return load_model(place, dtype, t5="off" if without else None)


def found(
    source: str | Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache: str | Path | None = None,
    local: bool = False,
) -> Path:
    """The file or folder of a model; local: nothing is fetched."""
    page = PAGE.fullmatch(str(source))
    if page is not None:
        source, revision = f"{page[1]}/{page[3]}", revision or page[2]
        revision = None if revision == "main" else revision
    name = str(source) if revision is None else f"{source}@{revision}"
    special = page is not None or variant or revision or cache or local
    if Path(source).exists() or str(source) in BUILT_IN or not special or parse_id(name) is None:
        return locate(source, dtype)
    if not local:
        return fetch(name, variant=variant, dtype=dtype, cache=cache)
    wanted = parse_id(name)
    assert wanted is not None
    folder = cached(wanted, cache)
    place = None if folder is None else ready(folder, wanted, variant, dtype)
    if place is None:
        raise FileNotFoundError(f"{name} is not whole in the hub's cache; leave out local_files_only to fetch it")
    return place


def single(path: str | Path, dtype: torch.dtype, prediction: str | None) -> Components:
    """A model in one file: a path, or the address of a file on the hub."""
    place = Path(path) if Path(path).exists() else found(path, dtype)
    return load_model(place, dtype, prediction=prediction)


def part(
    where: str,
    source: str | Path,
    subfolder: str | None,
    revision: str | None,
    cache: str | Path | None,
    others: Mapping[str, Any],
) -> Path:
    """The folder of a part: of its own, or below a model's; others: what else was given to `where`."""
    passed_over({name: value for name, value in others.items() if name != "local_files_only"}, where)
    local = bool(others.get("local_files_only"))
    place = Path(source) if Path(source).is_dir() else found(source, None, None, revision, cache, local)
    return place / subfolder if subfolder else place


def with_parts(parts: Components, given: Mapping[str, Any]) -> Components:
    """The parts with some of them replaced."""
    if "scheduler" in given:
        given = {**given, "scheduler": scheduler_of(given["scheduler"])}
    return replace(parts, **{"denoiser" if name in DENOISERS else name: part for name, part in given.items()})


def without_t5(parts: Components) -> Components:
    """The parts without T5."""
    return replace(parts, text_encoder_3=None, tokenizer_3=None)


def absent_t5(others: Mapping[str, Any]) -> Sequence[str]:
    """The parts of T5 where a caller says that there is none."""
    return T5 if any(name in others and others[name] is None for name in T5) else ()


def scheduler_of(scheduler: Any) -> Scheduler:
    """A scheduler of this package, from itself or from another library's configuration.

    Raises ValueError for something else, and for a class or an option that is not known.
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    if not isinstance(getattr(scheduler, "config", None), Mapping):
        raise ValueError(f"{scheduler!r} is no scheduler; give one of sfumato's")
    return Scheduler.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})


class AutoencoderKL(KL):
    """The autoencoder, opened in diffusers' form; what is opened is the package's own class."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> KL:
        """Read the `vae` folder of a model, an autoencoder's own folder, or a file."""
        place = part("AutoencoderKL.from_pretrained", source, subfolder, revision, cache_dir, others)
        return cast(KL, load_vae_folder(place, torch_dtype or torch.float32, variant=variant))

    @classmethod
    def from_single_file(cls, path: str | Path, torch_dtype: torch.dtype | None = None, **others: Any) -> KL:
        """Read an autoencoder from a file in any layout."""
        passed_over(others, "AutoencoderKL.from_single_file")
        return cast(KL, load_vae(found(path), torch_dtype or torch.float32, "cpu", SD_VAE))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | AutoencoderConfig) -> KL:
        """An autoencoder with random weights."""
        return KL(config if isinstance(config, AutoencoderConfig) else AutoencoderConfig.from_dict(config))


class UNet2DConditionModel(UNet):
    """The U-Net, opened in diffusers' form; what is opened is the package's own class."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> UNet:
        """Read the `unet` folder of a model, or a U-Net's own folder."""
        place = part("UNet2DConditionModel.from_pretrained", source, subfolder, revision, cache_dir, others)
        return cast(UNet, load_part(place, UNETS, torch_dtype or torch.float32, variant=variant))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | UNetConfig) -> UNet:
        """A U-Net with random weights."""
        return UNet(config if isinstance(config, UNetConfig) else UNetConfig.from_dict(config))


class CLIPTextModel(TextModel):
    """The text tower, opened in transformers' form; what is opened is the package's own class."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> TextModel:
        """Read the `text_encoder` folder of a model, or a tower's own folder."""
        place = part("CLIPTextModel.from_pretrained", source, subfolder, revision, cache_dir, others)
        towers = {name: kind for name, kind in TEXTS.items() if kind is CLIPTextConfig}
        return cast(TextModel, load_part(place, towers, torch_dtype or torch.float32, variant=variant))


class CLIPTokenizer(ClipTokenizer):
    """The tokenizer, opened in transformers' form; what is opened is the package's own class."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> ClipTokenizer:
        """Read the `tokenizer` folder of a model, or a tokenizer's own folder."""
        return ClipTokenizer.from_folder(
            part("CLIPTokenizer.from_pretrained", source, subfolder, revision, cache_dir, others)
        )
