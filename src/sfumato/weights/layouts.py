"""How the model folders of each pipeline class are laid out, and which classes their parts may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
from sfumato.text.bert import BertTokenizer
from sfumato.text.t5 import T5Tokenizer
from sfumato.text.tokenizer import ClipTokenizer

LOW_RES = "low_res_scheduler"
ZEROS = "force_zeros_for_empty_prompt"
DEPTH = "depth_estimator"
PROCESSOR = "feature_extractor"


@dataclass(frozen=True)
class Layout:
    """How the folders of one pipeline class are laid out.

    denoiser, vae: the sub-folders.
    text_encoders, tokenizers: likewise, by the place of the part among its kind.
    low_res:  whether there is a second scheduler, of the noise on an upscaler's small picture.
    optional: sub-folders that are read where the model has them.
    absent:   parts that diffusers looks up in the index and that are not needed to make pictures.
    entries:  further entries of the index.
    defaults: of entries that the autoencoder's configuration may lack, where they are not its own.
    """

    denoiser: str = "unet"
    vae: str = "vae"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    low_res: bool = False
    optional: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    entries: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> list[str]:
        """The sub-folders that must be there."""
        more = [LOW_RES] if self.low_res else []
        names = [self.denoiser, self.vae, *self.text_encoders, *self.tokenizers, "scheduler", *more]
        return [name for name in names if name not in self.optional]

    @property
    def networks(self) -> list[str]:
        """Those that hold weights."""
        return [self.denoiser, self.vae, *self.text_encoders]

    @property
    def known(self) -> list[str]:
        """All that are read."""
        return [*self.folders, *self.optional]


CHECKED = Layout(
    absent=("feature_extractor", "image_encoder", "safety_checker"), entries={"requires_safety_checker": False}
)
# The refiner has the second tower alone.
XL = Layout(
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    optional=("text_encoder", "tokenizer"),
    absent=("feature_extractor", "image_encoder"),
)
# Without T5 zeros stand for what it says; the smallest has one tower.
SD3 = Layout(
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    absent=("feature_extractor", "image_encoder"),
)
LAYOUTS: Mapping[str, Layout] = {
    "StableDiffusionPipeline": CHECKED,
    "StableDiffusionInpaintPipeline": CHECKED,
    "StableDiffusionInstructPix2PixPipeline": CHECKED,
    "StableDiffusionDepth2ImgPipeline": Layout(optional=(DEPTH, PROCESSOR), absent=(DEPTH, PROCESSOR)),
    "StableDiffusionUpscalePipeline": Layout(
        low_res=True,
        absent=("feature_extractor", "safety_checker", "watermarker"),
        defaults={"scaling_factor": 0.08333},  # the published folder does not say
    ),
    "LDMTextToImagePipeline": Layout(vae="vqvae", text_encoders=("bert",)),
    "LDMClassToImagePipeline": Layout(tokenizers=()),
    "LDMPipeline": Layout(vae="vqvae", text_encoders=(), tokenizers=()),
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "StableDiffusion3Pipeline": SD3,
}
# Classes with the parts of another one: what is made of these is decided by the request.
ALIASES: Mapping[str, str] = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionPipelineSafe": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipelineLegacy": "StableDiffusionPipeline",
    "StableDiffusionPAGInpaintPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3PAGPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3PAGImg2ImgPipeline": "StableDiffusion3Pipeline",
}
# The class of the same parts when nothing but text and noise goes in.
PLAIN: Mapping[str, str] = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
UNETS: Mapping[str, type] = {"UNet2DConditionModel": UNetConfig, "UNet2DModel": UNetConfig}
TRANSFORMERS: Mapping[str, type] = {"SD3Transformer2DModel": MMDiTConfig}
DENOISERS: Mapping[str, type] = {**UNETS, **TRANSFORMERS}
VAES: Mapping[str, type] = {
    "AutoencoderKL": AutoencoderConfig,
    "VQModel": VQConfig,
    "AutoencoderTiny": TinyConfig,
}
TEXTS: Mapping[str, type] = {
    "CLIPTextModel": CLIPTextConfig,
    "CLIPTextModelWithProjection": CLIPTextConfig,
    "T5EncoderModel": T5Config,
    "LDMBertModel": LDMBertConfig,
    "ClassEmbedder": ClassEmbedderConfig,
}
DEPTHS: Mapping[str, type] = {"DPTForDepthEstimation": DPTConfig}
TOKENIZERS: Mapping[str, type[ClipTokenizer] | type[BertTokenizer] | type[T5Tokenizer]] = {
    "CLIPTokenizer": ClipTokenizer,
    "CLIPTokenizerFast": ClipTokenizer,
    "T5Tokenizer": T5Tokenizer,
    "T5TokenizerFast": T5Tokenizer,
    "BertTokenizer": BertTokenizer,
    "BertTokenizerFast": BertTokenizer,
}
# The class that the index names for a tokenizer of ours.
WRITTEN: Mapping[type, str] = {
    ClipTokenizer: "CLIPTokenizer",
    BertTokenizer: "BertTokenizer",
    T5Tokenizer: "T5TokenizerFast",
}
# The library that the index names for a class, diffusers where none is listed.
LIBRARIES: Mapping[str, str] = {
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "CLIPTokenizer": "transformers",
    "BertTokenizer": "transformers",
    "T5EncoderModel": "transformers",
    "T5TokenizerFast": "transformers",
    "DPTForDepthEstimation": "transformers",
    "DPTImageProcessor": "transformers",
    "LDMBertModel": "latent_diffusion",
    "ClassEmbedder": "sfumato",
}
