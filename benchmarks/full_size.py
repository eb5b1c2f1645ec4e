"""Random models at the full size of the released ones, for measurements: no published weights are needed.

A model is made of diffusers' own classes with the configurations of a preset and written by diffusers, wherever it has
a pipeline for it. Weights are scaled so that activations stay of order 1 and pictures are neither grey nor clipped.
"""

from __future__ import annotations

import datetime
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfumato
from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.mmdit import MMDiTConfig, positions
from sfumato.presets import PRESETS, Preset
from sfumato.text.standard import bert_tokenizer, clip_tokenizer
from sfumato.weights.folder import LAYOUTS, save_folder
from sfumato.weights.parts import NETWORKS, Components
from sfumato.weights.source import open_weights

BY_NAME: Mapping[str, Preset] = {preset.name: preset for preset in PRESETS if preset.name != "mini"}


@dataclass(frozen=True)
class Peer:
    """Diffusers' and transformers' networks for a model; pipe and tokenizer None where they have none."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    pipe: Any

    @property
    def networks(self) -> dict[str, Any]:
        """Those that there are, by name."""
        found = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: module for name, module in found.items() if module is not None}


def quiet() -> None:
    """No hub, no progress bars, no advice."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def scaled(name: str, shape: torch.Size) -> tuple[float, float]:
    """Deviation and mean of a parameter's random values.

    Matrices and filters keep the variance of what they are applied to; norms and biases are random, too.
    """
    shrunk = 0.35 if name.startswith("decoder.conv_out") else 1.0  # or most pixels would be clipped
    if len(shape) == 1:
        return 0.05 * shrunk, shrunk * name.endswith("weight")  # 1 is a norm's
    if name.startswith(("class_embedding", "quantize")):
        return 0.5, 0.0
    if name.startswith("shared."):
        return 1.0, 0.0
    t5 = 1 / 8 if name.endswith("SelfAttention.q.weight") else 1.0  # it does not scale its scores
    return shape[1:].numel() ** -0.5 * shrunk * t5, 0.0


def random_weights(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values for all parameters of a module, which may be on `meta`; see `scaled`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        spread, mean = scaled(name, p.shape)
        tensors[name] = torch.randn(p.shape, generator=generator).mul_(spread).add_(mean).to(dtype)
    return tensors


def has_pipeline(preset: Preset) -> bool:
    """Whether diffusers opens a folder of this model as a whole."""
    return preset.pipeline.startswith("StableDiffusion")


def make(preset: Preset, folder: Path, seed: int = 0) -> None:
    """Write a random model folder: by diffusers where it has such a pipeline, else by us."""
    if not has_pipeline(preset):
        save_folder(ours(preset, seed), folder)
        return
    import diffusers

    kinds = _kinds(preset)
    parts: dict[str, Any] = {}
    for i, (name, (kind, config)) in enumerate(kinds.items()):
        with torch.device("meta"):
            module = _from_config(kind, config)
        module.load_state_dict(random_weights(module, seed + i), assign=True)
        parts[name] = module
    vocabulary = folder / "vocabulary"
    _tokenizer(preset, preset.text).save(vocabulary)
    parts["tokenizer"] = _peer_tokenizer(vocabulary)
    parts["scheduler"] = _peer_scheduler(preset.scheduler)
    if preset.low_res_scheduler is not None:
        parts["low_res_scheduler"] = _peer_scheduler(preset.low_res_scheduler)
    absent: dict[str, Any] = dict.fromkeys(LAYOUTS[preset.pipeline].absent)
    if "safety_checker" in absent and "low_res_scheduler" not in parts:
        absent["requires_safety_checker"] = False
    getattr(diffusers, preset.pipeline)(**parts, **absent).save_pretrained(folder)
    for file in sorted(vocabulary.iterdir()):
        file.unlink()
    vocabulary.rmdir()


def open_peer(preset: Preset, folder: Path) -> Peer:
    """Diffusers' view of a folder, in float32."""
    import diffusers

    if has_pipeline(preset):
        absent: dict[str, Any] = dict.fromkeys(LAYOUTS[preset.pipeline].absent)
        pipe = getattr(diffusers, preset.pipeline).from_pretrained(folder, local_files_only=True, **absent)
        pipe.set_progress_bar_config(disable=True)
        return Peer(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe)
    layout = LAYOUTS[preset.pipeline]
    places = {"unet": "unet", "vae": layout.vae, "text_encoder": layout.text_encoder}
    found: dict[str, Any] = {"text_encoder": None}
    for name, (kind, config) in _kinds(preset).items():
        with torch.device("meta"):
            module = _from_config(kind, config)
        file = next((folder / str(places[name])).glob("*.safetensors"))
        module.load_state_dict(dict(open_weights(file)), assign=True)
        found[name] = module.eval()
    return Peer(tokenizer=None, pipe=None, **found)


def _kinds(preset: Preset) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The peers' classes and configurations by component; a class that they do not have is left out."""
    import diffusers
    import transformers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    known = {
        **{name: getattr(diffusers, name) for name in ("UNet2DConditionModel", "UNet2DModel", "AutoencoderKL")},
        "VQModel": diffusers.VQModel,
        "CLIPTextModel": (transformers.CLIPTextModel, transformers.CLIPTextConfig),
        "LDMBertModel": (LDMBertModel, LDMBertConfig),
    }
    configs = {"unet": preset.denoiser, "vae": preset.vae, "text_encoder": preset.text}
    raw = {name: config.to_dict() for name, config in configs.items() if config is not None}
    named = {name: entries.get("_class_name") or entries["architectures"][0] for name, entries in raw.items()}
    return {name: (known[kind], raw[name]) for name, kind in named.items() if kind in known}


def _from_config(kind: Any, config: dict[str, Any]) -> Any:
    if isinstance(kind, tuple):
        model, parse = kind
        return model(parse(**{k: v for k, v in config.items() if k not in ("architectures", "_class_name")}))
    return kind.from_config(config)


def ours(preset: Preset, seed: int, dtype: torch.dtype = torch.float32) -> Components:
    """Random parts of our own classes, without a third text tower, which may be absent."""

    def network(config: Any, offset: int) -> Any:
        with torch.device("meta"):
            module = NETWORKS[type(config)](config)
        tensors = random_weights(module, seed + offset, dtype)
        if isinstance(config, MMDiTConfig):
            tensors["pos_embed.pos_embed"] = positions(config).to(dtype)  # which is not drawn
        module.load_state_dict(tensors, assign=True)
        return module.eval()

    def tower(config: Any, offset: int) -> tuple[Any, Any]:
        return (None, None) if config is None else (network(config, offset), _tokenizer(preset, config))

    first, second = tower(preset.text, 2), tower(preset.text_2, 3)
    return Components(
        denoiser=network(preset.denoiser, 0),
        vae=network(preset.vae, 1),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        scheduler=Scheduler.from_config(preset.scheduler),
        pipeline=preset.pipeline,
    )


def _tokenizer(preset: Preset, text: Any) -> Any:
    if isinstance(text, CLIPTextConfig):
        return clip_tokenizer("!") if text.hidden_act == "gelu" else clip_tokenizer()
    return bert_tokenizer() if preset.name == "ldm-text" else None


def _peer_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _peer_scheduler(config: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def status(name: str) -> int:
    """Bytes of a row of /proc/self/status."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:"))


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import diffusers
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "sfumato": sfumato.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
