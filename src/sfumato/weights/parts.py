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
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.vq import VQConfig, VQModel
from sfumato.presets import Preset, of_folder
from sfumato.text.bert import BertTokenizer
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.meta import on_meta

VAE = AutoencoderKL | VQModel
TextEncoder = CLIPTextModel | LDMBertModel | ClassEmbedder
Tokenizer = ClipTokenizer | BertTokenizer

NETWORKS: Mapping[type, Callable[[Any], nn.Module]] = {
    UNetConfig: UNet,
    AutoencoderConfig: AutoencoderKL,
    VQConfig: VQModel,
    CLIPTextConfig: CLIPTextModel,
    LDMBertConfig: LDMBertModel,
    ClassEmbedderConfig: ClassEmbedder,
    DPTConfig: DepthEstimator,
}
"""The network of each kind of configuration."""


def network(config: Any) -> nn.Module:
    """The network of a configuration, without memory: for its names, or to be filled."""
    return on_meta(lambda: NETWORKS[type(config)](config))


@dataclass(frozen=True)
class Components:
    """The parts of a model of the Stable Diffusion 1 and 2 kind, or of its ancestors.

    text_encoder, tokenizer: None where the model has no condition; the tokenizer also for class labels.
    low_res_scheduler:       the noise that an upscaler adds to its small picture; None for other models.
    pipeline:                the class that `model_index.json` names for such a model.
    depth_estimator:         what a depth model makes its depth with; None where it came without, and for others.
    """

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder | None
    tokenizer: Tokenizer | None
    scheduler: Scheduler
    low_res_scheduler: Scheduler | None = None
    pipeline: str = "StableDiffusionPipeline"
    depth_estimator: DepthEstimator | None = None


class HasComponents(Protocol):
    """Whatever carries the parts as attributes: `Components`, a pipeline, a trainer's state."""

    @property
    def unet(self) -> UNet: ...
    @property
    def vae(self) -> VAE: ...
    @property
    def text_encoder(self) -> TextEncoder | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def low_res_scheduler(self) -> Scheduler | None: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def depth_estimator(self) -> DepthEstimator | None: ...


def preset_of(parts: HasComponents) -> Preset:
    """The preset of some parts: what kind of model they make, at their own sizes."""
    preset = of_folder(
        parts.pipeline,
        parts.unet.config,
        parts.vae.config,
        None if parts.text_encoder is None else parts.text_encoder.config,
        parts.scheduler.config,
        parts.scheduler.spacing,
    )
    return replace(preset, depth=None if parts.depth_estimator is None else parts.depth_estimator.config)
