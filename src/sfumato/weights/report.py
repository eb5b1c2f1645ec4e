"""What a file or folder holds, for people: read from names, shapes and configurations; no tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sfumato.diffusion.scheduler import Scheduler
from sfumato.files import read_json
from sfumato.presets import Preset, of_folder, pipelines
from sfumato.weights.detect import DENOISER, TEXT, VAE, Place, config_of, label, places
from sfumato.weights.folder import INDEX, weights_file
from sfumato.weights.kinds import folder_kind
from sfumato.weights.layouts import ALIASES, LAYOUTS
from sfumato.weights.note import NOTE, read_configuration
from sfumato.weights.single import PROJECTION, below, leftovers, needed, recognise, unprojected
from sfumato.weights.source import Info, Weights, open_weights

Kind = Literal["model", "vae", "unet", "transformer", "text encoder", "adapter", "embedding", "unknown"]
ADAPTER_ENDINGS = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".diff",
)
EMBEDDING_NAMES = ("string_to_param", "emb_params", "string_to_param.*", "clip_l", "clip_g")


@dataclass(frozen=True)
class PartReport:
    """One component: how its names are spelled, its parameters, and how many of them are of which type."""

    name: str
    spelling: str
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What there is to say of a file or folder.

    preset:   the released model that it is; None when it is none.
    evidence: where the prediction type was read.
    missing:  names that the model needs and the file lacks; unknown: names that no part of the model has.
    absent:   components that the model needs and the file does not have at all.
    alike:    of models that look alike, what speaks for this one or against it; empty for the usual one.
    """

    path: Path
    kind: Kind
    layout: str
    size: int
    preset: Preset | None = None
    evidence: str = ""
    ema: bool = False
    parts: tuple[PartReport, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    alike: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "layout": self.layout,
            "bytes": self.size,
            "model": None if self.preset is None else self.preset.name,
            "title": None if self.preset is None else self.preset.title,
            "prediction": None if self.preset is None else self.preset.prediction,
            "evidence": self.evidence,
            "alike": self.alike,
            "ema": self.ema,
            "parts": [
                {"name": p.name, "spelling": p.spelling, "parameters": p.parameters, "dtypes": dict(p.dtypes)}
                for p in self.parts
            ],
            "missing": list(self.missing),
            "unknown": list(self.unknown),
            "absent": list(self.absent),
            "metadata": dict(self.metadata),
        }


def report(path: Path | str) -> Report:
    """Look at a file of tensors or a model folder.

    Raises FileNotFoundError, or ValueError when it is neither or is damaged.
    """
    path = Path(path)
    return folder_report(path) if path.is_dir() else file_report(open_weights(path))


def file_report(weights: Weights) -> Report:
    """The report of an opened file."""
    layout = f"one file, {weights.kind}"
    size = weights.path.stat().st_size
    notes = {name: text for name, text in weights.metadata.items() if len(text) <= 200}
    there = places(weights.infos)
    if not there:
        kind = kind_of(weights.infos)
        whole = part_report(kind, "", weights.infos.values())
        return Report(weights.path, kind, layout, size, parts=(whole,), metadata=notes)
    found = recognise(weights)
    rows: list[PartReport] = []
    missing: list[str] = []
    unknown = leftovers(weights, found)
    for part, place in there.items():
        names = below(weights, there, part)
        rows.append(part_report(label(place), place.dialect.name, (weights.infos[name] for name in names)))
        if found.preset is not None:
            config = config_of(found.preset, part)
            table = place.dialect.table(config).prefixed(place.prefix)
            theirs = set(table.theirs)
            if unprojected(config) and NOTE not in weights.metadata:
                theirs.discard(place.prefix + PROJECTION)
            missing += sorted(theirs - set(names))
            unknown += [name for name in names if name not in theirs and not table.is_extra(name)]
    wanted = [DENOISER, VAE, TEXT] if found.preset is None else needed(found.preset)
    alone = DENOISER not in there and VAE not in there  # several models have such text encoders
    return Report(
        weights.path,
        kind_of_parts(there),
        layout,
        size,
        None if alone else found.preset,
        found.evidence,
        found.ema,
        tuple(rows),
        tuple(missing),
        tuple(unknown),
        tuple(part for part in wanted if part not in there) if DENOISER in there else (),
        notes,
        "" if found.kind is None else str(found.kind),
    )


def folder_report(path: Path) -> Report:
    """The report of a model folder, or of one component's folder."""
    if not (path / INDEX).is_file():
        weights = open_weights(weights_file(path))
        return file_report(weights)
    index = read_json(path / INDEX)
    rows, size = [], 0
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not (path / name / "config.json").is_file():
            continue
        try:
            weights = open_weights(weights_file(path / name))
        except FileNotFoundError:
            continue  # a folder of settings, such as a feature extractor's
        rows.append(part_report(name, "diffusers", weights.infos.values()))
        size += weights.path.stat().st_size
    preset, alike = folder_preset(path)
    return Report(path, "model", "folder", size, preset, "the folder's scheduler", parts=tuple(rows), alike=alike)


def folder_preset(path: Path) -> tuple[Preset | None, str]:
    """The preset of a model folder, and what speaks for it among those that look alike; from configurations.

    None for a class that is not known.
    """
    index = read_json(path / INDEX)
    name = str(index["_class_name"])
    family = ALIASES.get(name, name)
    if family not in LAYOUTS or family not in pipelines():
        return None, ""
    layout = LAYOUTS[family]

    def config(folder: str) -> Any:
        there = (path / folder / "config.json").is_file()
        return read_configuration(read_json(path / folder / "config.json")) if there else None

    denoiser, vae, texts = config(layout.denoiser), config(layout.vae), tuple(map(config, layout.text_encoders))
    if denoiser is None or vae is None:
        return None, ""
    scheduler = Scheduler.from_pretrained(path)
    kind = folder_kind(path, index, family, (layout.denoiser, denoiser), scheduler.config)
    preset = of_folder(family, denoiser, vae, texts, scheduler.config, scheduler.spacing, kind)
    return preset, "" if kind is None else str(kind)


def part_report(name: str, spelling: str, infos: Iterable[Info]) -> PartReport:
    """Count the parameters of some tensors."""
    dtypes: Counter[str] = Counter()
    for info in infos:
        dtypes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    return PartReport(name, spelling, sum(dtypes.values()), dict(dtypes.most_common()))


def kind_of(infos: Mapping[str, Info]) -> Kind:
    """What a file is that holds no component: an adapter, an embedding, or nothing that is known."""
    if any(name.endswith(ADAPTER_ENDINGS) for name in infos):
        return "adapter"
    vectors = all(len(info.shape) <= 2 for info in infos.values())
    if infos and vectors and (len(infos) == 1 or any(name in infos for name in EMBEDDING_NAMES)):
        return "embedding"
    return "unknown"


def kind_of_parts(there: Mapping[str, Place]) -> Kind:
    """What a file with components is for: a model when it has a denoiser and more."""
    if DENOISER in there:
        return "model" if len(there) > 1 else "unet" if label(there[DENOISER]) == "unet" else "transformer"
    return "vae" if VAE in there else "text encoder"


def bad_numbers(path: Path | str) -> list[str]:
    """Names of the tensors with NaN or infinity in them; reads everything."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        folders = [path] if not (path / INDEX).is_file() else [f for f in sorted(path.iterdir()) if f.is_dir()]
        files = [weights_file(f) for f in folders if any(f.glob("*.safetensors")) or any(f.glob("*.bin"))]
    bad = []
    for file in files:
        weights = open_weights(file).to(torch.float32)
        bad += [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    return bad
