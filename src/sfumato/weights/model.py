"""One way to open any model: built-in, a folder, a file in any layout, or a hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from sfumato.models.tiny import TinyConfig
from sfumato.presets import BUILT_IN, PRESETS, VAEConfig
from sfumato.weights import parts
from sfumato.weights.detect import DENOISER, DEPTH, PARTS, TEXT, TEXT_2, TEXT_3, VAE, places, spells
from sfumato.weights.folder import load_folder, load_vae_folder, save_folder
from sfumato.weights.hub import find_model
from sfumato.weights.parts import Components, HasComponents
from sfumato.weights.signatures import signature_of
from sfumato.weights.single import Single, load_single, read_part, save_single
from sfumato.weights.source import open_weights
from sfumato.weights.supply import Sources, Supply, completed

T5_FOLDERS = ("text_encoder_3", "tokenizer_3")
UNWRITTEN = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")


def load_model(
    source: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    vae: Path | str | None = None,
    base: Sources = None,
    prediction: str | None = None,
    ema: bool | None = None,
    packed: bool = False,
    t5: str | None = None,
    preset: str | None = None,
) -> Components:
    """Open a model, its networks in `dtype` on `device`.

    source:     a built-in model's name, a folder in the diffusers layout, a file (safetensors, checkpoint, GGUF), the
                name of one of these in the models folder, or a hub id "owner/name", the only one that may use the
                network.
    dtype:      None leaves every tensor as it is stored.
    vae:        where to take the autoencoder from instead: a file, a `vae` folder, or a model folder.
    base:       what supplies the parts that a file lacks: a model of the same family, also of its estimator of depth,
                or files of text encoders, also of T5's tokenizer; several may be named, see `supply`.
    prediction: overrides what the source says, see `sfumato.diffusion.prediction`.
    ema:        take the averaged U-Net where a file has both kinds; None does as the model was published.
    packed:     leave in a file what it has in fewer bits than a tensor can, see `safe.fill`; for dtype = None.
    preset:     the name of its preset, where it looks like several (see `presets.alike`); None goes by names and files.
    t5:         "off" leaves out T5 where the model may lack it; "cpu" leaves it as it is stored, on the CPU.
    Raises FileNotFoundError or ValueError in one line.
    """
    path = locate(source, dtype)
    if path.is_dir():
        if ema:
            raise ValueError(f"{path} is a folder, which holds one kind of weights; leave out the wish for averages")
        without, stored = (T5_FOLDERS if t5 == how else () for how in ("off", "cpu"))
        loaded = load_folder(path, dtype, device, prediction, without=without, stored=stored, kind=preset)
        return loaded if vae is None else replace(loaded, vae=load_vae(vae, dtype, device, loaded.vae.config))
    wanted = [p for p in PARTS if not (p == VAE and vae is not None) and not (p == TEXT_3 and t5 == "off")]
    as_stored = (TEXT_3,) if t5 == "cpu" else ()
    single = load_single(path, dtype, device, prediction, ema, wanted, packed=packed, kind=preset, stored=as_stored)
    own = None if vae is None else load_vae(vae, dtype, device, single.preset.vae)
    whole = complete(single, own, base, dtype, device, packed, t5)
    return whole if t5 != "off" else replace(whole, text_encoder_3=None, tokenizer_3=None)


def save_model(parts: HasComponents, path: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a model as one file when `path` ends in .safetensors, else as a folder in the diffusers layout.

    dtype: what floating-point weights are converted to; None leaves each as it is.
    Raises ValueError for the ending of a format that is not written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        save_single(parts, path, dtype)
    elif path.suffix.lower() in UNWRITTEN:
        raise ValueError(f"{path}: {path.suffix} files are not written; end the name in .safetensors, or name a folder")
    else:
        save_folder(parts, path, dtype)


def locate(source: Path | str, dtype: torch.dtype | None = None) -> Path:
    """The file or folder of a model: a path as it is, a built-in model's name, else what `hub.find_model` finds.

    dtype: the precision that it is wanted in, where several are on offer.
    Raises FileNotFoundError saying what to do when there is none.
    """
    if Path(source).exists():
        return Path(source)
    built_in = BUILT_IN.get(str(source))
    if built_in is None:
        return find_model(str(source), dtype=dtype)
    if not built_in.is_dir():
        raise FileNotFoundError(
            f"the built-in model {str(source)!r} is not in this installation ({built_in}): "
            "reinstall the package, train it with `sfumato train recipes/mini.yaml`, or name a model folder"
        )
    return built_in


def complete(
    single: Single,
    vae: parts.VAE | None,
    base: Sources,
    dtype: torch.dtype | None,
    device: torch.device | str,
    packed: bool = False,
    t5: str | None = None,
) -> Components:
    """A whole model of what a file holds, a separate autoencoder if there is one, and `base` for the rest.

    Raises ValueError when parts are missing and no base is given, or the base is of another family.
    """

    def whole(path: Path) -> Components:
        return load_model(path, dtype, device, packed=packed, t5=t5)

    own = Supply() if vae is None else Supply({VAE: vae})
    found = completed(single, own, base, dtype, device, whole, packed, (TEXT_3,) if t5 == "cpu" else ())
    networks, tokenizers = found.networks, found.tokenizers
    second, third = (tokenizers.get(part) if part in networks else None for part in (TEXT_2, TEXT_3))
    return Components(
        denoiser=cast("parts.Denoiser", networks[DENOISER]),
        vae=cast("parts.VAE", networks[VAE]),
        text_encoder=cast("parts.TextEncoder | None", networks.get(TEXT)),
        tokenizer=tokenizers.get(TEXT),
        scheduler=single.scheduler,
        low_res_scheduler=single.low_res_scheduler,
        pipeline=single.preset.pipeline,
        depth_estimator=cast("parts.DepthEstimator | None", networks.get(DEPTH)),
        text_encoder_2=cast("parts.TextEncoder | None", networks.get(TEXT_2)),
        tokenizer_2=second,
        text_encoder_3=cast("parts.TextEncoder | None", networks.get(TEXT_3)),
        tokenizer_3=third,
        force_zeros_for_empty_prompt=single.preset.force_zeros_for_empty_prompt,
        kind=single.kind,
    )


def load_vae(source: Path | str, dtype: torch.dtype | None, device: torch.device | str, like: VAEConfig) -> parts.VAE:
    """An autoencoder alone: from a file in any layout, a `vae` folder, or a model's folder or file.

    like: configuration of the autoencoder that it takes the place of.
    Raises FileNotFoundError, or ValueError when there is none or its latents are of another kind.
    """
    path = find_model(str(source), "vae", dtype)
    if path.is_dir():
        loaded = load_vae_folder(path, dtype, device)
    else:
        weights = open_weights(path)
        there = places(weights.infos)
        place = there.get(VAE)
        tiny = TinyConfig(latent_channels=like.latent_channels)
        known: list[VAEConfig] = [like, tiny, *(preset.vae for preset in PRESETS)]
        fitting = [c for c in known if place and spells(place.dialect, c) and signature_of(c) == place.signature]
        if place is None or not fitting:
            what = "no autoencoder" if place is None else f"an autoencoder of no known kind {place.signature}"
            raise ValueError(f"{path} holds {what}; give the file or folder of one, such as vae-ft-mse-840000")
        loaded = cast("parts.VAE", read_part(weights.to(dtype, device), there, VAE, fitting[0]))
    config = loaded.config
    if (config.latent_channels, config.factor) != (like.latent_channels, like.factor):
        raise ValueError(
            f"{source} has latents of {config.latent_channels} channels, {config.factor} times smaller; "
            f"the model's have {like.latent_channels} and are {like.factor} times smaller: give another autoencoder"
        )
    return loaded
