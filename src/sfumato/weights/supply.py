"""Where the parts come from that a model's file lacks: another model, or files of single text encoders.

| a source                                   | what is taken from it                                     |
|--------------------------------------------|-----------------------------------------------------------|
| a model: folder, file or hub id            | each part that is missing                                 |
| a file of text encoders or an autoencoder  | those in it, told by their names and shapes               |
| a text encoder's folder with `config.json` | that one, and T5's tokenizer where it lies beside         |
| `tokenizer.json`, `spiece.model`           | T5's tokenizer                                            |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sfumato.models.mmdit import MMDiTConfig
from sfumato.presets import Preset
from sfumato.text.t5 import JSON_FILE, MODEL_FILE, T5Tokenizer
from sfumato.weights.detect import (
    DENOISER,
    DEPTH,
    TEXT,
    TEXT_2,
    TEXT_3,
    TOWERS,
    VAE,
    config_of,
    places,
    spells,
    text_of,
)
from sfumato.weights.folder import CONFIG, INDEX, load_part
from sfumato.weights.hub import find_model, models_folder
from sfumato.weights.layouts import TEXTS
from sfumato.weights.note import read_tokenizer
from sfumato.weights.parts import Components, Tokenizer, preset_of, towers_of
from sfumato.weights.signatures import signature_of
from sfumato.weights.single import Single, needed, read_part
from sfumato.weights.source import open_weights

Sources = Path | str | Sequence[Path | str] | None
Opener = Callable[[Path], Components]


@dataclass
class Supply:
    """Networks and tokenizers by the name of the component, and where T5's tokenizer may lie."""

    networks: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: dict[str, Tokenizer | None] = field(default_factory=dict)
    near: list[Path] = field(default_factory=list)

    def add(self, other: Supply) -> None:
        """Take from another what is not here yet."""
        fresh = [part for part in other.networks if part not in self.networks]
        self.networks |= {part: other.networks[part] for part in fresh}
        given = other.tokenizers.items()
        self.tokenizers |= {p: one for p, one in given if one and (p in fresh or not self.tokenizers.get(p))}
        self.near += other.near


def sources(base: Sources) -> list[Path | str]:
    """The places that `base` names: one, several, or a text of several parted by commas."""
    if base is None:
        return []
    if isinstance(base, str):
        whole = Path(base).expanduser().exists() or "," not in base
        return [base] if whole else [name.strip() for name in base.split(",") if name.strip()]
    return [base] if isinstance(base, Path) else list(base)


def completed(
    single: Single,
    own: Supply,
    base: Sources,
    dtype: torch.dtype | None,
    device: torch.device | str,
    opener: Opener,
    packed: bool = False,
    stored: Sequence[str] = (),
) -> Supply:
    """All parts of the model in a file: `own` first, which may have replaced some, then the file's, then the base's.

    opener: opens a whole model; packed: see `safe.fill`; stored: see `load_single`.
    Raises ValueError when a part is missing, a source has none that goes with the model, or T5 has no tokenizer.
    """
    preset = single.preset
    own.add(Supply(dict(single.networks), dict(zip(TOWERS, single.tokenizers, strict=True)), [single.path.parent]))
    if not missing(preset, own, optional=True):
        base = None  # it would be read in vain
    for source in sources(base):
        own.add(supplied(source, preset, dtype, device, opener, packed, stored))
    lacking = missing(preset, own)
    if lacking:
        denoiser = "transformer" if isinstance(preset.denoiser, MMDiTConfig) else "U-Net"
        names = {DENOISER: denoiser, VAE: "autoencoder", TEXT: "text encoder", TEXT_2: "second text encoder"}
        wanted = " and no ".join(names[part] for part in lacking)
        files = " or the files of the text encoders, parted by commas" if len(preset.texts) > 1 else ""
        raise ValueError(
            f"{single.path} has no {wanted}; name a model of its family ({preset.title}) that has, with base "
            f"(--base FILE_OR_FOLDER){files}"
        )
    if TEXT_3 in own.networks and own.tokenizers.get(TEXT_3) is None:
        own.tokenizers[TEXT_3] = t5_tokenizer([*own.near, models_folder() / "t5"], single.path)
    return own


def missing(preset: Preset, supply: Supply, optional: bool = False) -> list[str]:
    """The parts of a model that are not there, with those that may be had but need not, or without."""
    more = [part for part in (TEXT_3, DEPTH) if optional and _reads(preset, part)]
    return [part for part in (*needed(preset), *more) if part not in supply.networks]


def supplied(
    source: Path | str,
    preset: Preset,
    dtype: torch.dtype | None,
    device: torch.device | str,
    opener: Opener,
    packed: bool = False,
    stored: Sequence[str] = (),
) -> Supply:
    """What a source has for a model; ValueError when that is nothing."""
    path = Path(source).expanduser()
    if path.name == JSON_FILE or path.suffix == Path(MODEL_FILE).suffix:
        return Supply(tokenizers={TEXT_3: T5Tokenizer.from_file(path)})
    path = find_model(str(source), dtype=dtype)
    if path.is_dir() and (path / CONFIG).is_file() and not (path / INDEX).is_file():
        tower = load_part(path, TEXTS, dtype, device)
        part = _place_of(preset, lambda config: type(config) is type(tower.config), signature_of(tower.config))
        if part is None:
            raise ValueError(f"{path} is no text encoder of {preset.title}; name one of a model of its family")
        return Supply({part: tower}, near=[path, *(path.parent / name for name in ("tokenizer_3", "tokenizer"))])
    if path.is_dir():
        return _of_model(path, preset, opener(path))
    weights = open_weights(path)
    there = places(weights.infos)
    if DENOISER in there:
        return _of_model(path, preset, opener(path))
    placed, found = weights.to(dtype, device), Supply(near=[path.parent])
    for name, place in there.items():
        part = _place_of(preset, partial(spells, place.dialect), place.signature)
        if part is not None:
            config = config_of(preset, part)
            here, form = (weights.to(None, "cpu"), True) if part in stored else (placed, packed)
            found.networks[part] = read_part(here, there, name, config, packed=form)
            if part in TOWERS:
                found.tokenizers[part] = read_tokenizer(weights, text_of(preset, part), TOWERS.index(part))
    if not found.networks:
        raise ValueError(f"{path} holds no part that goes with {preset.title}; name one of a model of its family")
    return found


def t5_tokenizer(folders: Sequence[Path], file: Path) -> T5Tokenizer:
    """T5's tokenizer from the first of some folders that has it; ValueError saying where to put it."""
    for folder in folders:
        if any((folder / name).is_file() and _is_t5(folder / name) for name in (JSON_FILE, MODEL_FILE)):
            return T5Tokenizer.from_folder(folder)
    raise ValueError(
        f"{file} comes with T5 but without its tokenizer: put T5's {MODEL_FILE} or {JSON_FILE} (from tokenizer_3 of "
        f"Stable Diffusion 3) into {folders[-1]} or beside the file, or name it with base (--base {MODEL_FILE})"
    )


def _is_t5(path: Path) -> bool:
    """Whether a file's beginning looks like T5's; a `tokenizer.json` may belong to any other model."""
    return path.suffix == ".model" or "<extra_id_0>" in path.read_text(encoding="utf-8")


def _of_model(path: Path, preset: Preset, parts: Components) -> Supply:
    theirs = preset_of(parts)
    if not _go_together(preset, theirs):
        raise ValueError(
            f"{path} is {theirs.title}, whose parts do not go with {preset.title}; name a base of the same family"
        )
    towers = towers_of(parts)
    networks: dict[str, nn.Module | None] = {VAE: parts.vae, DENOISER: parts.denoiser, DEPTH: parts.depth_estimator}
    networks |= dict(zip(TOWERS, towers.encoders, strict=True))
    known = {part: network for part, network in networks.items() if network is not None and _reads(preset, part)}
    return Supply(known, dict(zip(TOWERS, towers.tokenizers, strict=True)))


def _reads(preset: Preset, part: str) -> bool:
    """Whether such a model has this part; a depth model may come without what estimates depth."""
    return preset.task == "depth" if part == DEPTH else config_of(preset, part) is not None


def _go_together(one: Preset, other: Preset) -> bool:
    """Whether two models share what parts must share: the latents, and the text towers that both have."""
    latents = [(p.vae.latent_channels, p.vae.factor, p.vae.scaling_factor) for p in (one, other)]
    pairs = [(config_of(one, part), config_of(other, part)) for part in TOWERS]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    same = latents[0] == latents[1] and all(signature_of(a) == signature_of(b) for a, b in both)
    return same and (bool(both) or not (one.texts or other.texts))


def _place_of(preset: Preset, fits: Callable[[object], bool], signature: tuple[object, ...]) -> str | None:
    """Which part of a model has this signature and fits; None when it is none."""
    for part in (*TOWERS, VAE):
        config = config_of(preset, part)
        if config is not None and fits(config) and signature_of(config) == signature:
            return part
    return None
