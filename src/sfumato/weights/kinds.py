"""What files and folders are called, which tells models that look alike, see `presets.alike`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.files import read_json
from sfumato.presets import PRESETS, Kind, Preset, look_alikes
from sfumato.presets.alike import dressed, kind_of
from sfumato.presets.base import DenoiserConfig
from sfumato.weights.detect import Found, fitting
from sfumato.weights.source import Weights

TITLES = ("modelspec.title", "modelspec.architecture", "general.name")
MADE_FROM = "_name_or_path"
HUB = "models--"  # in front of owner--name, in the hub's cache
NOTED = "_sfumato_preset"  # the entry of a folder's index; other programs pass over what begins so


def file_kind(weights: Weights, found: Found, presets: Sequence[Preset], asked: str | None) -> Found:
    """What a file holds, where it may be one of several models that look alike; asked: the name of its preset.

    A name that settles it settles what the network predicts as well, where nothing else in the file does.
    Raises ValueError for a name of another model.
    """
    if found.preset is None:
        return found
    fits = [found.preset, *(p for p in fitting(found.places, presets) if p.name != found.preset.name)]
    among = [*fits, *(dressed(base, p) for base in fits for p in PRESETS if p.like == base.name)]
    kind = kind_of(among, file_names(weights), asked=asked)
    if kind is None:
        return found
    chosen = next(p for p in among if p.name == kind.name)
    preset = dressed(chosen, chosen, kind.steps)
    if found.guessed:
        return replace(found, preset=preset, kind=kind, evidence=f"the family; see {kind.evidence or 'its scheduler'}")
    predicts = found.preset.prediction
    return replace(found, preset=preset if preset.prediction == predicts else preset.predicting(predicts), kind=kind)


def folder_kind(
    path: Path,
    index: Mapping[str, Any],
    pipeline: str,
    denoiser: tuple[str, DenoiserConfig],
    scheduler: Mapping[str, Any],
    asked: str | None = None,
) -> Kind | None:
    """Which of the models that look alike a folder has; denoiser: its sub-folder and configuration.

    Raises ValueError for a name of another model, and a note that is damaged.
    """
    name, config = denoiser
    made_from = read_json(path / name / "config.json").get(MADE_FROM)
    texts = {f"what its {name} was made from": made_from, **names(path, "folder"), "its index": index.get(MADE_FROM)}
    told = {where: text for where, text in texts.items() if isinstance(text, str)}
    try:
        noted = Kind.noted(index.get(NOTED))
        return kind_of(look_alikes(pipeline, config, scheduler), told, scheduler, asked, noted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def file_names(weights: Weights) -> dict[str, str]:
    """What a file is called, in its name and in its metadata."""
    titles = {f"the file's {title}": weights.metadata[title] for title in TITLES if title in weights.metadata}
    return {**names(weights.path, "file"), **titles}


def names(path: Path, what: str) -> dict[str, str]:
    """What a file or folder is called, and its repository where it lies in the hub's cache."""
    name = path.stem if what == "file" else path.absolute().name
    cached = [part.removeprefix(HUB) for part in path.absolute().parts if part.startswith(HUB)]
    return {f"the {what}'s name": name, **({"its name on the hub": cached[-1]} if cached else {})}
