"""What models there are on this machine: in the models folder and in the hub's cache.

What a thing is, is read from its names and shapes or its configurations; no tensor is read and nothing fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato.files import read_json
from sfumato.weights.adapters.names import made_for
from sfumato.weights.detect import DENOISER, VAE, identify, label, places
from sfumato.weights.folder import ADAPTER, CONFIG, INDEX, choose
from sfumato.weights.hub import is_whole, models_folder, stored
from sfumato.weights.layouts import TEXTS, TRANSFORMERS, UNETS, VAES
from sfumato.weights.report import folder_preset, kind_of
from sfumato.weights.source import Info, open_weights

HERE, CACHE = "models folder", "hub cache"
CHECKPOINT, FOLDER, LORA, EMBEDDING, OTHER, UNREADABLE = (
    "checkpoint",
    "folder",
    "lora",
    "embedding",
    "other",
    "unreadable",
)
# Families by the width of their text states, which adapters and embeddings show.
WIDTHS: Mapping[int, str] = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Latent diffusion, text to image",
    2048: "SDXL",
}
# Names that only families have which this version does not open.
FOREIGN: Mapping[str, str] = {"double_blocks.": "FLUX"}


@dataclass(frozen=True)
class Entry:
    """One thing that was found.

    name:   as `--model` and the other flags take it.
    kind:   checkpoint, folder, vae, unet, transformer, text encoder, lora, embedding, other, or unreadable.
    family: of which models it is, or with which it goes; for what is unreadable, why.
    size:   in bytes on the disk.
    source: "models folder" or "hub cache".
    """

    name: str
    kind: str
    family: str
    size: int
    path: Path
    source: str

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self) | {"path": str(self.path)}


def listing(root: Path | None = None, cache: Path | None = None) -> list[Entry]:
    """All models, adapters and embeddings in the models folder, then those in the hub's cache, by name.

    root, cache: other places to look in than the usual ones.
    Of the cache only what is of a known kind is listed: other programs keep their models there, too.
    """
    root = models_folder() if root is None else root
    own = [entry_of(place, str(place.relative_to(root)), HERE) for place in stored(root)]
    return own + sorted(in_cache(cache), key=lambda entry: entry.name.lower())


def in_cache(cache: Path | None = None) -> Iterator[Entry]:
    """What the hub's cache holds; what is damaged there is listed as unreadable."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    where = Path(cache or constants.HF_HUB_CACHE)
    try:
        scan = scan_cache_dir(where)
    except (CacheNotFound, ValueError):
        return
    for repo in scan.repos:
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            mark = "" if len(repo.revisions) == 1 or "main" in revision.refs else "@" + _revision(revision)
            snapshot = revision.snapshot_path
            top = is_whole(os.listdir(snapshot))
            for place in [snapshot] if top else stored(snapshot):
                inside = "" if top else "/" + place.relative_to(snapshot).as_posix()
                entry = entry_of(place, f"{repo.repo_id}{inside}{mark}", CACHE)
                if entry.kind != OTHER:
                    yield entry
    for warning in scan.warnings:
        yield Entry("?", UNREADABLE, _line(warning), 0, where, CACHE)


def entry_of(place: Path, name: str, source: str) -> Entry:
    """Look at one file or folder; what cannot be read becomes an entry that says why."""
    size = 0
    try:
        size = _size(place)
        kind, family = _folder(place) if place.is_dir() else _file(place)
    except (OSError, ValueError, KeyError, TypeError) as error:  # the last two: configurations of another form
        kind, family = UNREADABLE, _line(error).removeprefix(f"{place} ").removeprefix(f"{place}: ")
    return Entry(name, kind, family, size, place, source)


def _file(path: Path) -> tuple[str, str]:
    """Kind and family of a file of tensors."""
    with open_weights(path) as weights:
        infos = weights.infos
        foreign = next((family for mark, family in FOREIGN.items() if any(mark in name for name in infos)), "")
        adapter = kind_of(infos) == "adapter"
        there = {} if adapter else places(infos)
        if DENOISER in there or (foreign and not adapter):
            preset = None if foreign else identify(weights).preset
            title = f"{foreign or 'unknown'}, not supported" if preset is None else preset.title
            return label(there[DENOISER]) if list(there) == [DENOISER] and not foreign else CHECKPOINT, title
    if VAE in there:
        kind, channels, _, levels = there[VAE].signature
        return "vae", f"{kind}, {channels} channels, 1/{2 ** (levels - 1)} size"
    if there:
        return "text encoder", ""
    if adapter:
        return LORA, made_for(infos) or _family(infos)
    if kind_of(infos) == "embedding":
        width = max((info.shape[-1] for info in infos.values() if info.shape), default=0)
        return EMBEDDING, "SDXL" if "clip_g" in infos else WIDTHS.get(width, "")
    return OTHER, ""


def _folder(path: Path) -> tuple[str, str]:
    """Kind and family of a model's folder, or of that of a part or an adapter."""
    if (path / INDEX).is_file():
        preset, _ = folder_preset(path)
        if preset is None:
            return FOLDER, f"{read_json(path / INDEX).get('_class_name')}, not supported"
        return FOLDER, preset.title
    if (path / ADAPTER).is_file():
        return LORA, ""
    class_name = str(read_json(path / CONFIG).get("_class_name"))
    kinds = (VAES, "vae"), (UNETS, "unet"), (TRANSFORMERS, "transformer"), (TEXTS, "text encoder")
    known = {name: kind for classes, kind in kinds for name in classes}
    if class_name not in known:
        return OTHER, class_name
    file = choose(os.listdir(path))
    assert file is not None
    return known[class_name], _file(path / file)[1] if class_name in VAES else class_name


def _family(infos: Mapping[str, Info]) -> str:
    """The family that an adapter goes with, by the width of the text states that its parts read; "" if none shows."""
    for name, info in infos.items():
        parts = name.replace("_", ".")
        if "attn2.to.k" in parts and len(info.shape) >= 2 and name.endswith(("down.weight", "A.weight", "w1_b")):
            return WIDTHS.get(info.shape[1], "")
    return ""


def _size(place: Path) -> int:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    if not files:
        raise FileNotFoundError("the file that this links to is not there")
    return sum(path.stat().st_size for path in files)


def _revision(revision: Any) -> str:
    return min(revision.refs, default=revision.commit_hash[:8])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
