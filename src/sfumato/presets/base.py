"""What a `Preset` is: a model's networks, its schedule, and what it prefers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.dpt import DPTConfig
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.models.tiny import TinyConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig

Task = Literal["text", "inpaint", "depth", "instruct", "upscale", "class", "unconditional"]
DenoiserConfig = UNetConfig | MMDiTConfig
VAEConfig = AutoencoderConfig | VQConfig | TinyConfig
TextConfig = CLIPTextConfig | LDMBertConfig | ClassEmbedderConfig | T5Config


@dataclass(frozen=True)
class Preset:
    """A model: what it is built from, and the defaults of a request to it.

    pipeline:     the class that `model_index.json` names for such a folder.
    task:         what the network is given besides the noisy latent and the text, see `pipelines/start.py`.
    text:         the text tower's configuration; None for a model without a condition. text_2, text_3: likewise, of
                  further towers; text may then be None.
    scheduler:    the entries of `scheduler_config.json`; low_res_scheduler: likewise, of the noise that the
                  upscaler's picture is given.
    ema:          whether sampling was published with the averaged weights, where a file holds both kinds.
    width, height in pixels; spacing None stands for the scheduler's own.
    """

    name: str
    title: str
    pipeline: str
    task: Task
    denoiser: DenoiserConfig
    vae: VAEConfig
    text: TextConfig | None
    scheduler: Mapping[str, Any]
    width: int
    height: int
    low_res_scheduler: Mapping[str, Any] | None = None
    depth: DPTConfig | None = None
    ema: bool = False
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "dpmpp_2m"
    spacing: str | None = None
    text_2: TextConfig | None = None
    text_3: TextConfig | None = None
    force_zeros_for_empty_prompt: bool = False
    like: str | None = None

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The configurations of the text towers that there are; the first says how prompts are read."""
        return tuple(text for text in (self.text, self.text_2, self.text_3) if text is not None)

    def defaults(self) -> dict[str, int | float | str | None]:
        """The preferences by the names of Request's fields."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "spacing": self.spacing,
        }

    @property
    def prediction(self) -> str:
        """What the network predicts, by the name that configs use."""
        return prediction_of(self.scheduler)

    @property
    def grain(self) -> int:
        """What the sides of a picture must be multiples of, in pixels: what the autoencoder joins, in whole patches."""
        return self.vae.factor * (self.denoiser.patch_size if isinstance(self.denoiser, MMDiTConfig) else 1)

    def predicting(self, prediction: str) -> Preset:
        """The same model with another prediction type."""
        return replace(self, scheduler=frozen(self.scheduler, prediction_type=prediction))


def prediction_of(scheduler: Mapping[str, Any]) -> str:
    """What a network predicts, by the entries of its `scheduler_config.json`."""
    flows = str(scheduler.get("_class_name")).startswith("FlowMatch")
    return str(scheduler.get("prediction_type", "flow_prediction" if flows else "epsilon"))


def frozen(entries: Mapping[str, Any], **changes: Any) -> Mapping[str, Any]:
    """A read-only copy of some entries with changes."""
    return MappingProxyType({**entries, **changes})
