"""The note in the metadata of files that this package writes: a model's configurations and tokenizers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.models.dpt import DPTConfig
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.models.tiny import TinyConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.presets import Kind, Preset, TextConfig, of_folder
from sfumato.text.bert import BertTokenizer
from sfumato.text.standard import bert_tokenizer, clip_tokenizer
from sfumato.text.t5 import T5Tokenizer
from sfumato.text.tokenizer import END, ClipTokenizer
from sfumato.weights.parts import HasComponents, Tokenizer, preset_of
from sfumato.weights.source import Weights

NOTE = "sfumato.model"  # the entry of a file's metadata that holds the configurations, as JSON
OPENCLIP_PAD = "!"  # id 0, with which the texts of Stable Diffusion 2's tower and its successors are filled up
# The entries of texts and tokenizers, by their place.
TEXTS, TOKENIZERS = ("text", "text_2", "text_3"), ("tokenizer", "tokenizer_2", "tokenizer_3")
ZEROS, KIND = "force_zeros_for_empty_prompt", "preset"
KINDS: Mapping[type, type[ClipTokenizer] | type[BertTokenizer] | type[T5Tokenizer]] = {
    CLIPTextConfig: ClipTokenizer,
    LDMBertConfig: BertTokenizer,
    T5Config: T5Tokenizer,
    ClassEmbedderConfig: ClipTokenizer,
}
CONFIGS: Mapping[str, type] = {
    "UNet2DConditionModel": UNetConfig,
    "UNet2DModel": UNetConfig,
    "SD3Transformer2DModel": MMDiTConfig,
    "AutoencoderKL": AutoencoderConfig,
    "VQModel": VQConfig,
    "AutoencoderTiny": TinyConfig,
    "CLIPTextModel": CLIPTextConfig,
    "CLIPTextModelWithProjection": CLIPTextConfig,
    "T5EncoderModel": T5Config,
    "LDMBertModel": LDMBertConfig,
    "ClassEmbedder": ClassEmbedderConfig,
    "DPTForDepthEstimation": DPTConfig,
}


def describe(parts: HasComponents) -> dict[str, Any]:
    """The configurations of a model as JSON, with the files of tokenizers that are not the public ones."""
    low_res, depth = parts.low_res_scheduler, depth_of(parts)
    towers = parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3
    tokenizers = parts.tokenizer, parts.tokenizer_2, parts.tokenizer_3
    return {
        "pipeline": parts.pipeline,
        "unet": parts.denoiser.config.to_dict(),
        "vae": parts.vae.config.to_dict(),
        **{name: None if tower is None else tower.config.to_dict() for name, tower in zip(TEXTS, towers, strict=True)},
        **{name: tokenizer_files(one) for name, one in zip(TOKENIZERS, tokenizers, strict=True)},
        ZEROS: parts.force_zeros_for_empty_prompt,
        KIND: None if parts.kind is None else parts.kind.to_dict(),
        "scheduler": dict(parts.scheduler.config),
        "low_res_scheduler": None if low_res is None else dict(low_res.config),
        "depth_estimator": None if depth is None else depth.config.to_dict(),
        "depth_processor": None if depth is None else depth.processor.to_dict(),
    }


def depth_of(parts: HasComponents) -> DepthEstimator | None:
    """The estimator of a depth model; models of other tasks are written without."""
    return parts.depth_estimator if preset_of(parts).task == "depth" else None


def read_configuration(raw: Mapping[str, Any]) -> Any:
    """The configuration in a `config.json`; ValueError for a class of network that is not known."""
    name = raw.get("_class_name") or next(iter(raw.get("architectures") or ()), None)
    if name not in CONFIGS:
        raise ValueError(f"a network of class {name!r} is not supported; known: {', '.join(CONFIGS)}")
    return CONFIGS[str(name)].from_dict(raw)  # type: ignore[attr-defined]


def noted(raw: Mapping[str, Any], kind: Kind | None = None) -> Preset:
    """The preset that `describe` wrote; kind: which it is of those that look alike, None as it wrote itself."""
    pipeline = raw["pipeline"]
    texts = tuple(None if raw.get(name) is None else read_configuration(raw[name]) for name in TEXTS)
    spacing = Scheduler.from_config(raw["scheduler"]).spacing
    unet, vae = read_configuration(raw["unet"]), read_configuration(raw["vae"])
    preset = of_folder(pipeline, unet, vae, texts, raw["scheduler"], spacing, kind or Kind.noted(raw.get(KIND)))
    depth = None if raw.get("depth_estimator") is None else read_configuration(raw["depth_estimator"])
    zeros = bool(raw.get(ZEROS, False))
    return replace(preset, low_res_scheduler=raw["low_res_scheduler"], depth=depth, force_zeros_for_empty_prompt=zeros)


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, str] | None:
    """The files of a tokenizer's folder by name; None for none and for the public vocabularies."""
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, T5Tokenizer):
        public = clip_tokenizer() if isinstance(tokenizer, ClipTokenizer) else bert_tokenizer()
        if tokenizer.vocabulary == public.vocabulary:
            return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        texts = (path for path in sorted(Path(folder).iterdir()) if path.suffix != ".model")  # those are not text
        return {path.name: path.read_text(encoding="utf-8") for path in texts}


def read_tokenizer(weights: Weights, text: TextConfig | None, place: int = 0) -> Tokenizer | None:
    """The tokenizer of a file's text tower at a place: its own where the note has one, else the public one.

    None where there is no tower, and for T5, which has no public one.
    """
    files = json.loads(weights.metadata.get(NOTE, "{}")).get(TOKENIZERS[place])
    if text is None:
        return None
    if files:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_text(content, encoding="utf-8")
            return KINDS[type(text)].from_folder(Path(folder))
    if isinstance(text, CLIPTextConfig):
        return clip_tokenizer(OPENCLIP_PAD if text.hidden_act == "gelu" else END)
    return bert_tokenizer() if isinstance(text, LDMBertConfig) else None


def read_processor(weights: Weights) -> DPTProcessorConfig:
    """How pictures are prepared for a file's depth estimator: as its note says, else as is usual."""
    return DPTProcessorConfig.from_dict(json.loads(weights.metadata.get(NOTE, "{}")).get("depth_processor") or {})
