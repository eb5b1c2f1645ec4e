"""Adapter files (LoRA, LoCon, LoHa, LoKr, full differences, DoRA) to changes by module.

Which program wrote a file is seen from its names alone. Strengths that are kept beside the tensors, PEFT's
`adapter_config.json` and the metadata that diffusers writes, are read as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.files import read_json
from sfumato.weights.adapters.deltas import (
    Change,
    Delta,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Taken,
    shape_text,
)
from sfumato.weights.adapters.names import TEXTS, UNET, split_name
from sfumato.weights.keymap import listed
from sfumato.weights.source import open_weights

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' entry in a safetensors file's metadata
# What an adapter's folder is searched for.
FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
# Sets of parts that make a difference to a weight; the other parts may stand beside any of them.
EXTRAS = {"alpha", "scalar", "dora_scale", "magnitude", "diff_b", "up_bias"}


# What a module's difference is multiplied by according to settings beside the tensors, by the rank of its tensors.
Outer = Callable[[int | None], float] | None


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one file does to a model, not yet fitted to any: changes by module as the file spells it."""

    name: str
    path: Path
    changes: Mapping[str, Change]


@dataclass(frozen=True)
class Settings:
    """Ranks and alphas that PEFT keeps beside the tensors, for the modules below `prefix`.

    ranks, alphas: exceptions by the last part of a module's name. rslora: alpha is divided by the root of the rank.
    """

    prefix: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool = False

    def scale(self, module: str, rank: int | None) -> float:
        """What the difference of `module` is multiplied by; `rank` as its tensors have it, if they have one."""
        rank = _exception(self.ranks, module, self.rank) if rank is None else rank
        alpha = _exception(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(path: Path | str, name: str | None = None) -> Adapter:
    """Read an adapter file, or the folder that PEFT or diffusers keeps one in.

    name: what it is called in messages and in `AdapterHost.applied`; the file's name without ending by default.
    Raises FileNotFoundError when there is no file, ValueError when it is damaged, is no adapter or is of a kind
    that is not implemented.
    """
    path = _file(Path(path))
    tensors, metadata = _open(path)
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = split_name(key)
        if found is None:
            unknown.append(key)
            continue
        module, part = found
        if part in groups.setdefault(module, {}):
            raise ValueError(f"{path}: {module} has its part {part!r} twice, the second time as {key}")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path}: {key} holds infinite numbers or NaN; the file is damaged, fetch it again")
        groups[module][part] = tensor
    if unknown or not groups:
        raise ValueError(
            f"{path} is not an adapter that this version reads: of {len(tensors)} tensors "
            f"{listed('have unknown names', sorted(unknown)) or 'none is a part of one'}; "
            "known are LoRA, LoHa, LoKr, full differences and DoRA of kohya, LyCORIS, PEFT and diffusers"
        )
    settings = _settings(path, metadata)
    changes = {}
    for module, parts in groups.items():
        try:
            changes[module] = _change(parts, _outer(settings, module))
        except ValueError as error:
            raise ValueError(f"{path}: {module}: {error}") from None
    return Adapter(path.stem if name is None else name, path, changes)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"the folder {path} has no adapter in it; looked for: {', '.join(FOLDER_FILES)}")


def _open(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with open_weights(path) as weights:
        return dict(weights), weights.metadata


def _change(parts: Mapping[str, Tensor], outer: Outer) -> Change:
    """The change that the parts of one module make; `outer` is the scale that was kept beside the tensors."""
    kinds = parts.keys() - EXTRAS
    build = next((build for names, build in KINDS if kinds and kinds <= names), None)
    bias = parts.get("diff_b")
    if kinds and build is None:
        raise ValueError(f"parts {', '.join(sorted(kinds))} do not belong together")
    delta = None if build is None else build(parts, outer)
    if "up_bias" in parts:
        bias = parts["up_bias"].float() * (1.0 if delta is None or isinstance(delta, Full | Taken) else delta.scale)
    magnitude = None
    if "magnitude" in parts:
        magnitude = Magnitude(parts["magnitude"].flatten(), inside=True)
    elif "dora_scale" in parts:
        lengths = parts["dora_scale"]
        # (O, 1, ...) holds the lengths of rows, (1, I, ...) of columns
        on_input = lengths.ndim > 1 and lengths.shape[0] == 1 and lengths.shape[1] > 1
        magnitude = Magnitude(lengths.flatten(), on_input)
    if delta is None and bias is None:
        raise ValueError(f"{', '.join(sorted(parts))} alone make no adapter")
    return Change(delta, magnitude, bias)


def _low_rank(parts: Mapping[str, Tensor], outer: Outer) -> Delta:
    down, up = _need(parts, "down", 2), _need(parts, "up", 2)
    mid = _need(parts, "mid", 3) if "mid" in parts else None
    rank = down.shape[0]
    if mid is None:
        _agree("down and up", rank, up[0].numel())
    else:
        _agree("down and mid", rank, mid.shape[1])
        _agree("up and mid", up[0].numel(), mid.shape[0])
    return LowRank(down, up, mid, _scale(parts, rank, outer))


def _hadamard(parts: Mapping[str, Tensor], outer: Outer) -> Delta:
    left, right = ((_matrix(parts, f"hada_w{i}_a"), _matrix(parts, f"hada_w{i}_b")) for i in (1, 2))
    cores = None
    if "hada_t1" in parts or "hada_t2" in parts:
        cores = _need(parts, "hada_t1", 3), _need(parts, "hada_t2", 3)
    for i, (a, b) in enumerate((left, right)):
        if cores is None:
            _agree(f"hada_w{i + 1}_a and hada_w{i + 1}_b", a.shape[1], b.shape[0])
        else:
            _agree(f"hada_w{i + 1}_a and hada_t{i + 1}", a.shape[0], cores[i].shape[0])
            _agree(f"hada_w{i + 1}_b and hada_t{i + 1}", b.shape[0], cores[i].shape[1])
    delta = Hadamard(left, right, cores, _scale(parts, left[1].shape[0], outer))
    other = Hadamard(right, left, None if cores is None else (cores[1], cores[0]))
    if delta.size != other.size:
        raise ValueError(f"its two matrices are {shape_text(delta.size)} and {shape_text(other.size)}")
    return delta


def _kronecker(parts: Mapping[str, Tensor], outer: Outer) -> Delta:
    left = _whole_or_factors(parts, "lokr_w1")
    right = _whole_or_factors(parts, "lokr_w2")
    core = _need(parts, "lokr_t2", 3) if "lokr_t2" in parts else None
    if core is not None and len(right) == 1:
        raise ValueError("lokr_t2 needs lokr_w2_a and lokr_w2_b")
    if len(left) == 2:
        _agree("lokr_w1_a and lokr_w1_b", left[0].shape[1], left[1].shape[0])
    if core is not None:
        _agree("lokr_w2_a and lokr_t2", right[0].shape[0], core.shape[0])
        _agree("lokr_w2_b and lokr_t2", right[1].shape[0], core.shape[1])
    elif len(right) == 2:
        _agree("lokr_w2_a and lokr_w2_b", right[0].shape[1], right[1].shape[0])
    ranks = [factors[1].shape[0] for factors in (right, left) if len(factors) == 2]
    if ranks:
        return Kronecker(left, right, core, _scale(parts, ranks[0], outer))
    # Without factors there is no rank, and LyCORIS passes over alpha.
    return Kronecker(left, right, None, _scale({k: v for k, v in parts.items() if k != "alpha"}, None, outer))


def _full(parts: Mapping[str, Tensor], outer: Outer) -> Delta:
    return Full(_need(parts, "diff", 1))


# The sets of parts that belong together, and what is made of them.
KINDS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Tensor], Outer], Delta]], ...] = (
    (frozenset({"down", "up", "mid"}), _low_rank),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}), _hadamard),
    (
        frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
        _kronecker,
    ),
    (frozenset({"diff"}), _full),
)


def _whole_or_factors(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    if name in parts:
        return (_need(parts, name, 2),)
    return _matrix(parts, f"{name}_a"), _matrix(parts, f"{name}_b")


def _matrix(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor as a matrix; programs differ in whether they keep a kernel's axes apart."""
    return _need(parts, name, 2).flatten(1)


def _need(parts: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    """A part with at least so many axes, none of length 0."""
    if name not in parts:
        raise ValueError(f"has {', '.join(sorted(parts))}, but no {name}")
    tensor = parts[name]
    if tensor.ndim < axes or tensor.numel() == 0:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; expected {axes} axes or more, none empty")
    return tensor


def _number(parts: Mapping[str, Tensor], name: str) -> float:
    if parts[name].numel() != 1:
        raise ValueError(f"{name} has the shape {tuple(parts[name].shape)}; expected one number")
    return float(parts[name])


def _agree(what: str, a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"{what} have different ranks, {a} and {b}")


def _scale(parts: Mapping[str, Tensor], rank: int | None, outer: Outer) -> float:
    """alpha / rank where the file has an alpha, else what is kept beside the tensors, else 1.

    An alpha of 0 stands for the rank, as in kohya's and LyCORIS' programs.
    """
    factor = _number(parts, "scalar") if "scalar" in parts else 1.0
    if "alpha" in parts and rank is not None:
        return factor * (_number(parts, "alpha") / rank or 1.0)
    return factor * (1.0 if outer is None else outer(rank))


def _settings(path: Path, metadata: Mapping[str, str]) -> tuple[Settings, ...]:
    """What is kept beside the tensors: in diffusers' metadata, or in PEFT's file beside an `adapter_model`."""
    if METADATA in metadata:
        try:
            raw = json.loads(metadata[METADATA])
        except ValueError as error:
            raise ValueError(f"{path}: its metadata {METADATA!r} are not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: its metadata {METADATA!r} are damaged: a {type(raw).__name__}, not a table")
        found = [(f"{tower}.", _below(raw, f"{tower}.")) for tower in (UNET, "transformer", *TEXTS)]
    elif path.stem == "adapter_model" and (path.parent / PEFT_CONFIG).is_file():
        found = [("", read_json(path.parent / PEFT_CONFIG))]
    else:
        found = []
    try:
        return tuple(_read_settings(prefix, raw) for prefix, raw in found if raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: the settings kept beside the tensors are damaged: {error}") from None


def _below(raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in raw.items() if key.startswith(prefix)}


def _read_settings(prefix: str, raw: Mapping[str, Any]) -> Settings:
    rank = int(raw.get("r", 8))  # PEFT leaves nothing out; 8 is its default
    alpha = float(raw.get("lora_alpha", raw.get("alpha", 8)))
    settings = Settings(
        prefix,
        rank,
        alpha,
        {key: int(value) for key, value in (raw.get("rank_pattern") or {}).items()},
        {key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
        bool(raw.get("use_rslora", False)),
    )
    if rank <= 0 or any(r <= 0 for r in settings.ranks.values()) or not math.isfinite(alpha):
        raise ValueError(f"r = {rank}, alpha = {alpha}; ranks are positive")
    for key in (*settings.ranks, *settings.alphas):
        if re.search(r"[^\w.-]", key):
            raise ValueError(f"the pattern {key!r} is a regular expression; only the ends of names are read")
    return settings


def _outer(settings: tuple[Settings, ...], module: str) -> Outer:
    module = module.removeprefix("base_model.model.")
    for one in settings:
        if module.startswith(one.prefix):
            return partial(one.scale, module[len(one.prefix) :])
    return None


def _exception(table: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in table.items() if module == key or module.endswith("." + key)), default)
