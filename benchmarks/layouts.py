"""One model through every file layout, compared bit for bit."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from full_size import Peer, has_pipeline
from torch import Tensor

from sfumato.presets import Preset
from sfumato.weights.folder import LAYOUTS, load_folder, save_folder
from sfumato.weights.model import load_model
from sfumato.weights.parts import Components, preset_of
from sfumato.weights.single import save_single
from sfumato.weights.source import open_weights

BLOCK = 1 << 24  # bytes compared at a time
Add = Callable[[str, str, float, Callable[[], tuple[float, str]]], None]


def networks(parts: Components) -> dict[str, Any]:
    """The networks that there are, by name."""
    found = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
    return {name: module for name, module in found.items() if module is not None}


def differing(a: Mapping[str, Any], b: Mapping[str, Any], half: bool = False) -> tuple[float, str]:
    """How many tensors of two models are not the same bit for bit; half: those of `a` rounded to float16 first."""
    wrong, count = 0, 0
    if a.keys() != b.keys():
        raise ValueError(f"parts differ: {sorted(a)} and {sorted(b)}")
    for part in a:
        left, right = spelled_alike(a[part].state_dict()), spelled_alike(b[part].state_dict())
        wrong += len(left.keys() ^ right.keys())
        for name in left.keys() & right.keys():
            value = left[name].half().float() if half else left[name]
            wrong += not same(value, right[name])
            count += 1
    return wrong, f"{count} tensors"


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every number."""
    return a.dtype == b.dtype and torch.equal(a, b)


def spelled_alike(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text towers without the prefix that some versions of transformers leave out."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def same_bytes(a: Path, b: Path) -> tuple[float, str]:
    """1 if two safetensors files differ in a name, an order, a type, a place or a byte of data; notes may differ."""
    headers = []
    with open(a, "rb") as left, open(b, "rb") as right:
        for file in (left, right):
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__")
            headers.append(list(header.items()))
        same = headers[0] == headers[1]
        while same and (block := left.read(BLOCK)):
            same = block == right.read(BLOCK)
    return float(not same), f"{a.stat().st_size:,} bytes"


def remove(*paths: Path) -> None:
    """Delete files and folders of files."""
    gc.collect()
    for path in paths:
        for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir() if path.is_dir() else path.unlink()


def tensors_through_layouts(add: Add, preset: Preset, model: Path, peer: Peer, work: Path) -> None:
    """Folder, single file, checkpoint and half precision, all against the folder that diffusers wrote."""
    first = load_folder(model)
    own = networks(first)
    add("folder: tensors as diffusers has them", "differ", 0, lambda: differing(peer.networks, _common(own, peer)))
    single, folder, again = work / "single.safetensors", work / "folder", work / "again.safetensors"
    save_single(first, single)
    add("single file", "differ", 0, lambda: differing(own, networks(load_model(single))))
    save_folder(load_model(single), folder)
    add("single file -> folder", "differ", 0, lambda: differing(own, networks(load_folder(folder))))
    save_single(load_folder(folder), again)
    add("single file -> folder -> single file", "differ", 0, lambda: same_bytes(single, again))
    remove(again)
    if has_pipeline(preset):
        add("our folder in diffusers", "differ", 0, lambda: _opened_there(preset, folder, peer))
    remove(folder)
    add("checkpoint (.ckpt)", "differ", 0, lambda: _checkpoint(preset, single, own, work / "model.ckpt"))
    remove(work / "model.ckpt")
    half = work / "half.safetensors"
    save_single(first, half, torch.float16)
    add("single file in fp16 -> float32", "differ", 0, lambda: differing(own, networks(load_model(half)), half=True))
    remove(half)
    if has_pipeline(preset):
        add("fp16 variant written by diffusers", "differ", 0, lambda: _variant(peer, own, work / "variant"))
        remove(work / "variant")


def _common(own: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
    return {name: module for name, module in own.items() if name in peer.networks}


def _opened_there(preset: Preset, folder: Path, peer: Peer) -> tuple[float, str]:
    from full_size import open_peer

    return differing(peer.networks, open_peer(preset, folder).networks)


def _checkpoint(preset: Preset, single: Path, own: Mapping[str, Any], path: Path) -> tuple[float, str]:
    """As training saved them: a pickle with a step count and without any configuration."""
    steps = 875000 if preset.name == "sd21-base" else 470000  # what tells it from the model for 768 pixels
    torch.save({"epoch": 0, "global_step": steps, "state_dict": dict(open_weights(single))}, path)
    loaded = load_model(path)
    wrong, note = differing(own, networks(loaded))
    found = preset_of(loaded)
    if (found.name, found.prediction) != (preset.name, preset.prediction):
        return wrong + 1, f"{note}, taken for {found.name}"
    return wrong, f"{note}, found to be {found.name}"


def _variant(peer: Peer, own: Mapping[str, Any], folder: Path) -> tuple[float, str]:
    pipe = peer.pipe
    halves = {name: _halved(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")}
    originals = {name: getattr(pipe, name) for name in halves}
    for name, module in halves.items():
        setattr(pipe, name, module)
    pipe.save_pretrained(folder, variant="fp16")
    for name, module in originals.items():
        setattr(pipe, name, module)
    return differing(own, networks(load_folder(folder, torch.float32, variant="fp16")), half=True)


def _halved(module: Any) -> Any:
    """A copy in float16 that takes no memory but that of its weights."""
    with torch.device("meta"):
        direct = hasattr(module.config, "to_dict")  # a model of transformers
        copy = type(module)(module.config) if direct else type(module).from_config(module.config)
    copy.load_state_dict({name: tensor.half() for name, tensor in module.state_dict().items()}, assign=True)
    return copy


def single_file_in_peer(add: Add, preset: Preset, model: Path, peer: Peer, work: Path) -> None:
    """Our single file in diffusers' reader, with the folder's configurations."""
    single = work / "single.safetensors"
    if has_pipeline(preset):
        add("our single file in diffusers", "differ", 0, lambda: _single_there(preset, single, model, peer))
    remove(single)


def _single_there(preset: Preset, single: Path, model: Path, peer: Peer) -> tuple[float, str]:
    import diffusers

    kind = getattr(diffusers, preset.pipeline)
    how = preset.pipeline
    if not hasattr(kind, "from_single_file"):
        kind, how = diffusers.StableDiffusionPipeline, "StableDiffusionPipeline"
    absent: dict[str, Any] = {"safety_checker": None} if "safety_checker" in LAYOUTS[preset.pipeline].absent else {}
    pipe = kind.from_single_file(str(single), config=str(model), local_files_only=True, **absent)
    found = {name: getattr(pipe, name) for name in peer.networks}
    wrong, note = differing(peer.networks, found)
    return wrong, f"{note}, {how}"
