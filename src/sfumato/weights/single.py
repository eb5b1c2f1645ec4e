"""A model in one file: the layout of the original checkpoints, and of most that people share.

model.diffusion_model.*   the U-Net, in Stable Diffusion 3 the transformer
first_stage_model.*       the autoencoder
cond_stage_model.*        the text tower; the towers of Stable Diffusion XL are conditioner.embedders.*, those of
                          Stable Diffusion 3 text_encoders.*
depth_model.*             the depth estimator, in depth models
model_ema.*               averages of the U-Net, in training checkpoints

Such a file has no configuration; `detect.identify` finds the preset that its shapes match. Files that this package
writes carry their configuration in the metadata, under a name that other programs pass over, see `note`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.depth import DepthEstimator
from sfumato.presets import SINGLE, Kind, Preset, look_alikes
from sfumato.presets.alike import kind_of
from sfumato.weights import compvis
from sfumato.weights.detect import (
    DENOISER,
    DEPTH,
    PARTS,
    TEXT_3,
    TOWERS,
    VAE,
    Found,
    Place,
    config_of,
    home_of,
    identify,
    label,
    text_of,
)
from sfumato.weights.keymap import LazyTensors, listed
from sfumato.weights.kinds import file_kind, file_names
from sfumato.weights.note import KIND, NOTE, depth_of, describe, noted, read_processor, read_tokenizer
from sfumato.weights.parts import HasComponents, Tokenizer, network, preset_of, towers_of
from sfumato.weights.safe import fill, write_tensors
from sfumato.weights.source import Weights, open_weights

SHORT_PREDICTIONS = {"v_prediction": "v"}  # as the model specification of file metadata spells it
PROJECTION = "text_projection.weight"


@dataclass(frozen=True)
class Single:
    """What was read from one file: its preset, the networks that it holds by component name, tokenizers by place.

    kind: see `Found`.
    """

    path: Path
    preset: Preset
    networks: Mapping[str, nn.Module]
    tokenizers: tuple[Tokenizer | None, ...]
    scheduler: Scheduler
    low_res_scheduler: Scheduler | None
    kind: Kind | None = None

    @property
    def missing(self) -> list[str]:
        """The components that the model needs and the file lacks."""
        return [part for part in needed(self.preset) if part not in self.networks]


def needed(preset: Preset) -> list[str]:
    """The components that pictures cannot be made without; T5 is none of them."""
    return [DENOISER, VAE, *(part for part in TOWERS if part != TEXT_3 and config_of(preset, part) is not None)]


def load_single(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prediction: str | None = None,
    ema: bool | None = None,
    only: Sequence[str] = PARTS,
    presets: Sequence[Preset] = SINGLE,
    packed: bool = False,
    kind: str | None = None,
    stored: Sequence[str] = (),
) -> Single:
    """Read a model file: safetensors, a pickled checkpoint or GGUF, told by content.

    dtype:      of the networks; None leaves every tensor as the file has it.
    prediction: overrides what the file or its family says.
    ema:        take the averaged U-Net where the file has both; None does as the model was published.
    only:       the components to read.
    packed:     leave what is no view of the file in it, see `safe.fill`.
    kind:       the name of its preset, where it looks like several.
    stored:     components that are left as the file has them, on the CPU.
    Raises FileNotFoundError, or ValueError for a file that is unsafe, damaged, or no known model.
    """
    weights = open_weights(path)
    found = recognise(weights, prediction, presets, kind)
    preset = found.preset
    if preset is None:
        raise ValueError(f"{path}: {unknown(found)}")
    if ema and not found.ema:
        raise ValueError(f"{path} holds no averaged weights ({compvis.EMA}*); leave out the wish for them")
    check_rest(weights, found)
    averaged = found.ema and (preset.ema if ema is None else ema)
    placed = weights.to(dtype, device)

    def read(part: str) -> nn.Module:
        here, form = (weights.to(None, "cpu"), True) if part in stored else (placed, packed)
        return read_part(here, found.places, part, config_of(preset, part), averaged and part == DENOISER, form)

    networks = {part: read(part) for part in found.places if part in only}
    if isinstance(depth := networks.get(DEPTH), DepthEstimator):
        depth.processor = read_processor(weights)
    return Single(
        Path(path),
        preset,
        networks,
        tuple(read_tokenizer(weights, text_of(preset, part), i) for i, part in enumerate(TOWERS)),
        Scheduler.from_config(preset.scheduler),
        None if preset.low_res_scheduler is None else Scheduler.from_config(preset.low_res_scheduler),
        found.kind,
    )


def save_single(parts: HasComponents, path: Path | str, dtype: torch.dtype | None = None, note: bool = True) -> None:
    """Write a model as one safetensors file in the original layout, which other programs open as well.

    dtype: what floating-point weights are converted to.
    note:  add the configurations to the metadata; without them a reader goes by names and shapes, as with files of
           other programs, and finds released models only.
    """
    preset = preset_of(parts)
    towers = dict(zip(TOWERS, towers_of(parts).encoders, strict=True))
    given = {DENOISER: parts.denoiser, VAE: parts.vae, **towers, DEPTH: depth_of(parts)}
    tensors: dict[str, Callable[[], Tensor]] = {}
    for part, module in given.items():
        if module is None:
            continue
        dialect, prefix = home_of(preset, part, module.config)
        saving = dialect.table(module.config).prefixed(prefix).saving(module.state_dict(), part)
        tensors |= {name: partial(saving.__getitem__, name) for name in saving}  # made one by one when written
    metadata = {"modelspec.prediction_type": SHORT_PREDICTIONS.get(preset.prediction, preset.prediction)}
    if note:
        metadata[NOTE] = json.dumps(describe(parts))
    write_tensors(path, LazyTensors(tensors), dtype, metadata)


def recognise(
    weights: Weights, prediction: str | None = None, presets: Sequence[Preset] = SINGLE, kind: str | None = None
) -> Found:
    """What a file holds, with the configurations of its own note where it has one; kind: see `load_single`.

    Raises ValueError when the note cannot be read or does not belong to the weights, and for another model's kind.
    """
    note = weights.metadata.get(NOTE)
    if note is None:
        return file_kind(weights, identify(weights, prediction, presets), presets, kind)
    try:
        raw = json.loads(note)
        preset, own = noted(raw), Kind.noted(raw.get(KIND))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{weights.path}: its note {NOTE!r} is damaged ({error}); write the file again") from None
    among = look_alikes(preset.pipeline, preset.denoiser, preset.scheduler)
    settled = kind_of(among, file_names(weights), preset.scheduler, kind, own)
    preset = noted(raw, settled)
    if prediction is not None:
        preset = preset.predicting(get_prediction(prediction).name)
    found = identify(weights, preset.prediction, (preset,))
    if found.preset is None:
        raise ValueError(f"{weights.path}: its note {NOTE!r} describes another model than its weights; write it again")
    evidence = found.evidence if prediction is not None else "the file's own configuration"
    return replace(found, evidence=evidence, kind=settled)


def read_part(
    weights: Weights,
    there: Mapping[str, Place],
    part: str,
    config: Any,
    averaged: bool = False,
    packed: bool = False,
) -> nn.Module:
    """One component of a file, filled with its tensors as they come and ready to be used.

    there:    the components of the file, as `detect.places` finds them.
    averaged: read the moving averages in place of the weights.
    packed:   leave what is no view of the file in it, see `safe.fill`.
    Raises ValueError when names or shapes do not fit the configuration.
    """
    place, source = there[part], f"{weights.path}: {part}"
    table = place.dialect.table(config).prefixed(place.prefix)
    names = below(weights, there, part)
    if averaged:
        table = table.renamed(compvis.ema_name)
        names = [name for name in table.theirs if name in weights.infos]
    fetch: dict[str, Callable[[], Tensor]] = {name: partial(weights.__getitem__, name) for name in names}
    if unprojected(config) and NOTE not in weights.metadata:
        fetch[place.prefix + PROJECTION] = partial(identity_like, weights, place)
    lazily = LazyTensors(fetch)
    module = network(config)
    fill(module, table.loading(lazily, source), source, check=weights.converts, packed=packed)
    return module.eval()


def unprojected(config: Any) -> bool:
    """Whether this is OpenAI's tower as Stable Diffusion 3 reads it: its vector is taken as it is.

    Folders have a projection, which is the identity; files have none, or one that the published code does not read.
    """
    return isinstance(config, CLIPTextConfig) and config.projected and config.hidden_act == "quick_gelu"


def identity_like(weights: Weights, place: Place) -> Tensor:
    """The identity at a text tower's width, in the type and place of its table of embeddings."""
    table = weights[place.prefix + place.dialect.anchor]
    return torch.eye(table.shape[1], dtype=table.dtype, device=table.device)


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
        what = "no U-Net, transformer, autoencoder or text tower was found in it"
        return f"{what}; is it an adapter (`<lora:FILE:1>` in a prompt)?"
    sizes = "; ".join(f"{label(place)} ({place.dialect.name}) {place.signature}" for place in found.places.values())
    return f"no known model has these parts together: {sizes}; known: {', '.join(p.name for p in SINGLE)}"
