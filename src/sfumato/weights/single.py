"""A model in one file: the layout of the original checkpoints, and of most that people share.

model.diffusion_model.*   the U-Net
first_stage_model.*       the autoencoder
cond_stage_model.*        the text tower
depth_model.*             the depth estimator, in depth models
model_ema.*               averages of the U-Net, in training checkpoints

Such a file has no configuration; `detect.identify` finds the preset that its shapes match. Files that this package
writes carry their configuration in the metadata, under a name that other programs pass over.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.models.dpt import DPTConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.presets import SINGLE, Preset, TextConfig, of_folder
from sfumato.text.bert import BertTokenizer
from sfumato.text.standard import bert_tokenizer, clip_tokenizer
from sfumato.text.t5 import T5Tokenizer
from sfumato.text.tokenizer import END, ClipTokenizer
from sfumato.weights import compvis
from sfumato.weights.detect import (
    DEPTH,
    DIALECTS,
    PARTS,
    TEXT,
    UNET,
    VAE,
    Found,
    Place,
    config_of,
    identify,
    spells,
)
from sfumato.weights.keymap import LazyTensors, listed
from sfumato.weights.parts import HasComponents, Tokenizer, network, preset_of
from sfumato.weights.safe import fill, write_tensors
from sfumato.weights.source import Weights, open_weights

NOTE = "sfumato.model"  # the entry of a file's metadata that holds the configurations, as JSON
OPENCLIP_PAD = "!"  # id 0, with which the texts of Stable Diffusion 2's tower are filled up
SHORT_PREDICTIONS = {"v_prediction": "v"}  # as the model specification of file metadata spells it
CONFIGS: Mapping[str, type] = {
    "UNet2DConditionModel": UNetConfig,
    "UNet2DModel": UNetConfig,
    "AutoencoderKL": AutoencoderConfig,
    "VQModel": VQConfig,
    "CLIPTextModel": CLIPTextConfig,
    "LDMBertModel": LDMBertConfig,
    "ClassEmbedder": ClassEmbedderConfig,
    "DPTForDepthEstimation": DPTConfig,
}


@dataclass(frozen=True)
class Single:
    """What was read from one file: its preset, and the networks that it holds by component name."""

    path: Path
    preset: Preset
    networks: Mapping[str, nn.Module]
    tokenizer: Tokenizer | None
    scheduler: Scheduler
    low_res_scheduler: Scheduler | None

    @property
    def missing(self) -> list[str]:
        """The components that the model needs and the file lacks."""
        needed = [UNET, VAE] if self.preset.text is None else [UNET, VAE, TEXT]
        return [part for part in needed if part not in self.networks]


def load_single(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prediction: str | None = None,
    ema: bool | None = None,
    only: Sequence[str] = PARTS,
    presets: Sequence[Preset] = SINGLE,
) -> Single:
    """Read a model file: safetensors, a pickled checkpoint or GGUF, told by content.

    dtype:      of the networks; None leaves every tensor as the file has it.
    prediction: overrides what the file or its family says.
    ema:        take the averaged U-Net where the file has both; None does as the model was published.
    only:       the components to read.
    Raises FileNotFoundError, or ValueError for a file that is unsafe, damaged, or no known model.
    """
    weights = open_weights(path)
    found = recognise(weights, prediction, presets)
    preset = found.preset
    if preset is None:
        raise ValueError(f"{path}: {unknown(found)}")
    if ema and not found.ema:
        raise ValueError(f"{path} holds no averaged weights ({compvis.EMA}*); leave out the wish for them")
    check_rest(weights, found)
    averaged = found.ema and (preset.ema if ema is None else ema)
    placed = weights.to(dtype, device)
    networks = {
        part: read_part(placed, found.places, part, config_of(preset, part), averaged and part == UNET)
        for part in found.places
        if part in only
    }
    if isinstance(depth := networks.get(DEPTH), DepthEstimator):
        depth.processor = read_processor(weights)
    return Single(
        Path(path),
        preset,
        networks,
        read_tokenizer(weights, preset.text),
        Scheduler.from_config(preset.scheduler),
        None if preset.low_res_scheduler is None else Scheduler.from_config(preset.low_res_scheduler),
    )


def save_single(parts: HasComponents, path: Path | str, dtype: torch.dtype | None = None, note: bool = True) -> None:
    """Write a model as one safetensors file in the original layout, which other programs open as well.

    dtype: what floating-point weights are converted to.
    note:  add the configurations to the metadata; without them a reader goes by names and shapes, as with files of
           other programs, and finds released models only.
    """
    preset = preset_of(parts)
    given = {UNET: parts.denoiser, VAE: parts.vae, TEXT: parts.text_encoder, DEPTH: depth_of(parts)}
    tensors: dict[str, Callable[[], Tensor]] = {}
    for part, module in given.items():
        if module is None:
            continue
        dialect = next(d for d in DIALECTS if d.part == part and spells(d, module.config))
        saving = dialect.table(module.config).prefixed(dialect.prefixes[0]).saving(module.state_dict(), part)
        tensors |= {name: partial(saving.__getitem__, name) for name in saving}  # made one by one when written
    metadata = {"modelspec.prediction_type": SHORT_PREDICTIONS.get(preset.prediction, preset.prediction)}
    if note:
        metadata[NOTE] = json.dumps(describe(parts))
    write_tensors(path, LazyTensors(tensors), dtype, metadata)


def recognise(weights: Weights, prediction: str | None = None, presets: Sequence[Preset] = SINGLE) -> Found:
    """What a file holds, with the configurations of its own note where it has one.

    Raises ValueError when the note cannot be read or does not belong to the weights.
    """
    note = weights.metadata.get(NOTE)
    if note is None:
        return identify(weights, prediction, presets)
    try:
        preset = noted(json.loads(note))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{weights.path}: its note {NOTE!r} is damaged ({error}); write the file again") from None
    if prediction is not None:
        preset = preset.predicting(get_prediction(prediction).name)
    found = identify(weights, preset.prediction, (preset,))
    if found.preset is None:
        raise ValueError(f"{weights.path}: its note {NOTE!r} describes another model than its weights; write it again")
    return replace(found, evidence=found.evidence if prediction is not None else "the file's own configuration")


def describe(parts: HasComponents) -> dict[str, Any]:
    """The configurations of a model as JSON, with the tokeniser's files where it is not one of the public ones."""
    low_res, depth = parts.low_res_scheduler, depth_of(parts)
    return {
        "pipeline": parts.pipeline,
        "unet": parts.denoiser.config.to_dict(),
        "vae": parts.vae.config.to_dict(),
        "text": None if parts.text_encoder is None else parts.text_encoder.config.to_dict(),
        "scheduler": dict(parts.scheduler.config),
        "low_res_scheduler": None if low_res is None else dict(low_res.config),
        "tokenizer": tokenizer_files(parts.tokenizer),
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


def noted(raw: Mapping[str, Any]) -> Preset:
    """The preset that `describe` wrote."""
    text = None if raw["text"] is None else read_configuration(raw["text"])
    spacing = Scheduler.from_config(raw["scheduler"]).spacing
    unet, vae = read_configuration(raw["unet"]), read_configuration(raw["vae"])
    preset = of_folder(raw["pipeline"], unet, vae, (text,), raw["scheduler"], spacing)
    depth = None if raw.get("depth_estimator") is None else read_configuration(raw["depth_estimator"])
    return replace(preset, low_res_scheduler=raw["low_res_scheduler"], depth=depth)


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, str] | None:
    """The files of a tokeniser's folder by name; None for none and for the public vocabularies."""
    if tokenizer is None or isinstance(tokenizer, T5Tokenizer):
        return None
    public = clip_tokenizer() if isinstance(tokenizer, ClipTokenizer) else bert_tokenizer()
    if tokenizer.vocabulary == public.vocabulary:
        return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def read_tokenizer(weights: Weights, text: TextConfig | None) -> Tokenizer | None:
    """The tokeniser of a file: its own where the note has one, else the public one of such a text tower."""
    files = json.loads(weights.metadata.get(NOTE, "{}")).get("tokenizer")
    kind = BertTokenizer if isinstance(text, LDMBertConfig) else ClipTokenizer
    if files:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_text(content, encoding="utf-8")
            return kind.from_folder(Path(folder))
    if isinstance(text, CLIPTextConfig):
        return clip_tokenizer(OPENCLIP_PAD if text.hidden_act == "gelu" else END)
    return bert_tokenizer() if isinstance(text, LDMBertConfig) else None


def read_processor(weights: Weights) -> DPTProcessorConfig:
    """How pictures are prepared for a file's depth estimator: as its note says, else as is usual."""
    return DPTProcessorConfig.from_dict(json.loads(weights.metadata.get(NOTE, "{}")).get("depth_processor") or {})


def read_part(
    weights: Weights, there: Mapping[str, Place], part: str, config: Any, averaged: bool = False
) -> nn.Module:
    """One component of a file, filled with its tensors as they come and ready to be used.

    there:    the components of the file, as `detect.places` finds them.
    averaged: read the moving averages in place of the weights.
    Raises ValueError when names or shapes do not fit the configuration.
    """
    place, source = there[part], f"{weights.path}: {part}"
    table = place.dialect.table(config).prefixed(place.prefix)
    names = below(weights, there, part)
    if averaged:
        table = table.renamed(compvis.ema_name)
        names = [name for name in table.theirs if name in weights.infos]
    lazily = LazyTensors({name: partial(weights.__getitem__, name) for name in names})
    module = network(config)
    fill(module, table.loading(lazily, source), source, check=weights.converts)
    return module.eval()


def below(weights: Weights, there: Mapping[str, Place], part: str) -> list[str]:
    """The names that belong to one component."""
    prefix = there[part].prefix
    others = tuple(p.prefix for p in there.values() if len(p.prefix) > len(prefix))
    return [
        name
        for name in weights.infos
        if name.startswith(prefix) and not (others and name.startswith(others)) and not compvis.is_file_extra(name)
    ]


def check_rest(weights: Weights, found: Found) -> None:
    """ValueError when there are names that belong to no component and that whole checkpoints do not carry."""
    rest = leftovers(weights, found)
    if rest:
        model = found.preset.title if found.preset else "known model"
        raise ValueError(f"{weights.path}: {listed('unknown', rest)}; they belong to no part of {model}")


def leftovers(weights: Weights, found: Found) -> list[str]:
    """Names that belong to no component and that whole checkpoints do not carry."""
    prefixes = tuple(place.prefix for place in found.places.values())
    return sorted(n for n in weights.infos if not n.startswith(prefixes) and not compvis.is_file_extra(n))


def unknown(found: Found) -> str:
    """Why a file is no known model, in words."""
    if not found.places:
        return "no U-Net, autoencoder or text tower was found in it; is it an adapter (`<lora:FILE:1>` in a prompt)?"
    sizes = "; ".join(f"{part} ({place.dialect.name}) {place.signature}" for part, place in found.places.items())
    return f"no known model has these parts together: {sizes}; known: {', '.join(p.name for p in SINGLE)}"
