"""The parts of a model, whatever layout they came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.bert import LDMBertConfig, LDMBertModel
from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.depth import DepthEstimator
from sfumato.models.dpt import DPTConfig
from sfumato.models.mmdit import MMDiT, MMDiTConfig
from sfumato.models.t5 import T5Config, T5EncoderModel
from sfumato.models.tiny import AutoencoderTiny, TinyConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.vq import VQConfig, VQModel
from sfumato.presets import Kind, Preset, of_folder
from sfumato.text.towers import TextEncoder, Tokenizer, Towers
from sfumato.weights.meta import on_meta

Denoiser = UNet | MMDiT
VAE = AutoencoderKL | VQModel | AutoencoderTiny

NETWORKS: Mapping[type, Callable[[Any], nn.Module]] = {
    UNetConfig: UNet,
    MMDiTConfig: MMDiT,
    AutoencoderConfig: AutoencoderKL,
    VQConfig: VQModel,
    TinyConfig: AutoencoderTiny,
    CLIPTextConfig: CLIPTextModel,
    LDMBertConfig: LDMBertModel,
    T5Config: T5EncoderModel,
    ClassEmbedderConfig: ClassEmbedder,
    DPTConfig: DepthEstimator,
}
"""The network of each kind of configuration."""


def network(config: Any) -> nn.Module:
    """The network of a configuration, without memory: for its names, or to be filled."""
    return on_meta(lambda: NETWORKS[type(config)](config))


@dataclass(frozen=True)
class Components:
    """The parts of a model.

    denoiser:                the network that denoises, also under the name that its kind has: `unet`, `transformer`.
    text_encoder, tokenizer: None where the model has no condition; the tokenizer also for class labels. Stable
                             Diffusion XL has a second pair; the refiner has that one alone. Stable Diffusion 3 has
                             a third, T5, which may be missing.
    low_res_scheduler:       the noise that an upscaler adds to its small picture; None for other models.
    pipeline:                the class that `model_index.json` names for such a model.
    depth_estimator:         what a depth model makes its depth with; None where it came without, and for others.
    force_zeros_for_empty_prompt: an empty negative prompt is zeros to the network, see `Towers`.
    kind:                    which it is of the models that look the same; None where nothing but the scheduler says.
    """

    denoiser: Denoiser
    vae: VAE
    text_encoder: TextEncoder | None
    tokenizer: Tokenizer | None
    scheduler: Scheduler
    low_res_scheduler: Scheduler | None = None
    pipeline: str = "StableDiffusionPipeline"
    depth_estimator: DepthEstimator | None = None
    text_encoder_2: TextEncoder | None = None
    tokenizer_2: Tokenizer | None = None
    text_encoder_3: TextEncoder | None = None
    tokenizer_3: Tokenizer | None = None
    force_zeros_for_empty_prompt: bool = False
    kind: Kind | None = None

    @property
    def unet(self) -> UNet:
        """The denoiser where it is a U-Net; AttributeError where it is not."""
        return as_unet(self.denoiser)

    @property
    def transformer(self) -> MMDiT:
        """The denoiser where it is a transformer; AttributeError where it is not."""
        return as_transformer(self.denoiser)

    @property
    def towers(self) -> Towers:
        """The text encoders with their tokenizers."""
        return towers_of(self)


class HasComponents(Protocol):
    """Whatever carries the parts as attributes: `Components`, a pipeline, a trainer's state."""

    @property
    def denoiser(self) -> Denoiser: ...
    @property
    def vae(self) -> VAE: ...
    @property
    def text_encoder(self) -> TextEncoder | None: ...
    @property
    def text_encoder_2(self) -> TextEncoder | None: ...
    @property
    def text_encoder_3(self) -> TextEncoder | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def tokenizer_2(self) -> Tokenizer | None: ...
    @property
    def tokenizer_3(self) -> Tokenizer | None: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def low_res_scheduler(self) -> Scheduler | None: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def depth_estimator(self) -> DepthEstimator | None: ...
    @property
    def force_zeros_for_empty_prompt(self) -> bool: ...
    @property
    def kind(self) -> Kind | None: ...


def collected(parts: HasComponents) -> Components:
    """The parts of whatever carries them, by themselves."""
    return Components(**{name: getattr(parts, name) for name in Components.__dataclass_fields__})


def as_unet(denoiser: Denoiser) -> UNet:
    """The denoiser as a U-Net; AttributeError where it is another network."""
    if not isinstance(denoiser, UNet):
        raise AttributeError(f"this model denoises with a {type(denoiser).__name__}, not with a U-Net; see `denoiser`")
    return denoiser


def as_transformer(denoiser: Denoiser) -> MMDiT:
    """The denoiser as a transformer; AttributeError where it is another network."""
    if not isinstance(denoiser, MMDiT):
        raise AttributeError(f"this model denoises with a {type(denoiser).__name__}, not a transformer; see `denoiser`")
    return denoiser


def towers_of(parts: HasComponents) -> Towers:
    """The text encoders of some parts with their tokenizers, in their order."""
    return Towers(
        (parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3),
        (parts.tokenizer, parts.tokenizer_2, parts.tokenizer_3),
        parts.force_zeros_for_empty_prompt,
        parts.denoiser.config.joint_attention_dim if isinstance(parts.denoiser, MMDiT) else None,
    )


def networks_of(parts: HasComponents) -> dict[str, nn.Module]:
    """The networks that make a picture by the names that people know, the denoiser first."""
    towers = towers_of(parts).present
    texts = {f"text encoder {i}" if len(towers) > 1 else "text encoder": tower for i, tower in enumerate(towers, 1)}
    name = "U-Net" if isinstance(parts.denoiser, UNet) else "transformer"
    return {name: parts.denoiser, **texts, "autoencoder": parts.vae}


def preset_of(parts: HasComponents) -> Preset:
    """The preset of some parts: what kind of model they make, at their own sizes."""
    preset = of_folder(
        parts.pipeline,
        parts.denoiser.config,
        parts.vae.config,
        tuple(None if encoder is None else encoder.config for encoder in towers_of(parts).encoders),
        parts.scheduler.config,
        parts.scheduler.spacing,
        parts.kind,
    )
    return replace(preset, depth=None if parts.depth_estimator is None else parts.depth_estimator.config)
