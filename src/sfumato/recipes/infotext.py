"""The text that A1111 and many others keep in a picture: the prompt, the negative prompt, a line of `Key: value`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.pipelines.request import MAX_SIDE, Request

NEGATIVE = "Negative prompt:"
FEWEST = 3  # pairs that a last line needs to count as parameters
PAIR = re.compile(r'\s*(?P<key>[^:,"]+?)\s*:\s*(?P<value>"(?:[^"\\]|\\.)*"|\{[^{}]*\}|[^,]*?)\s*(?:,|$)')
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# Our field, and how its value is read.
SIMPLE: Mapping[str, tuple[str, type]] = MappingProxyType(
    {
        "Steps": ("num_inference_steps", int),
        "CFG scale": ("guidance_scale", float),
        "Image CFG scale": ("image_guidance_scale", float),
        "Seed": ("seed", int),
        "Denoising strength": ("strength", float),
        "Model": ("model", str),
        "VAE": ("vae", str),
        "Variation seed": ("variation_seed", int),
        "Variation seed strength": ("variation_strength", float),
        "Mask blur": ("mask_blur", float),
        "Masked area padding": ("mask_padding", int),
        "Hires upscale": ("hires_scale", float),
        "Hires strength": ("hires_strength", float),
        "Eta": ("eta", float),
        "Eta DDIM": ("eta", float),
    }
)
# What says nothing about the pixels, or is looked at elsewhere.
SILENT = (
    "Model hash",
    "VAE hash",
    "Version",
    "User",
    "Size-1",
    "Size-2",
    "Lora hashes",
    "TI hashes",
    "Hashes",
    "Hardware Info",
    "Time taken",
    "RNG",
    "Clip skip",
)
# What A1111 from 1.9 on means by no schedule: a sampler's own.
AUTOMATIC: Mapping[str, str] = MappingProxyType(
    {
        "dpmpp_2m": "karras",
        "dpmpp_sde": "karras",
        "dpmpp_2m_sde": "exponential",
        "dpmpp_2m_sde_heun": "exponential",
        "dpmpp_3m_sde": "exponential",
        "dpmpp_2s_a": "karras",
        "dpm2": "karras",
        "dpm2_a": "karras",
        "restart": "karras",
    }
)
CONTENT = MappingProxyType(
    {"original": "original", "fill": "fill", "noise": "latent noise", "nothing": "latent nothing"}
)
OWN_TIMES = ("ddim", "plms", "unipc", "ddpm", "lcm", "tcd")  # samplers that do not take k-diffusion's sigmas there


@dataclass(frozen=True)
class Infotext:
    """The three parts of the text; values: the last line, sizes also parted as Size-1 and Size-2."""

    prompt: str
    negative_prompt: str
    values: Mapping[str, str]


def write(request: Request, made_with: Mapping[str, Any] | None = None) -> str:
    """The text of a request in A1111's order and quoting.

    made_with: what `Pipeline.made_with` says; the hashes of model and autoencoder are taken from it, where they are
    those of single files.
    """
    from sfumato import __version__
    from sfumato.diffusion.names import SAMPLER_NAMES, SPACING_NAMES

    extra = made_with or {}
    sampler, spacing = request.sampler, request.spacing
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": SAMPLER_NAMES.get(sampler, (sampler,))[0] if sampler else None,
        "Schedule type": SPACING_NAMES.get(spacing, (spacing.capitalize(),))[0] if spacing else None,
        "CFG scale": _number(request.guidance_scale),
        "Image CFG scale": _number(request.image_guidance_scale),
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model hash": extra.get("model_hash"),
        "Model": _name(request.model),
        "VAE hash": extra.get("vae_hash"),
        "VAE": None if request.vae is None else Path(request.vae).name,
        "Variation seed": request.variation_seed if request.variation_strength else None,
        "Variation seed strength": _number(request.variation_strength or None),
        "Denoising strength": _number(request.strength if request.hires_scale is None else request.hires_strength),
        # Counted from 1 there.
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
        "Eta": _number(request.eta),
        "RNG": "CPU",
        "Hires upscale": _number(request.hires_scale),
        "Hires upscaler": request.hires_upscaler.capitalize() if request.hires_upscaler else None,
        "Mask blur": _number(request.mask_blur),
        "Masked content": CONTENT.get(request.masked_content or ""),
        "Inpaint area": "Only masked" if request.only_masked else None,
        "Masked area padding": request.mask_padding,
        "Version": f"sfumato {__version__}",
    }
    line = ", ".join(f"{key}: {quoted(str(value))}" for key, value in values.items() if value is not None)
    negative = [f"{NEGATIVE} {request.negative_prompt}"] if request.negative_prompt else []
    return "\n".join([request.prompt, *negative, line])


def quoted(value: str) -> str:
    """A value as it stands in the last line: in JSON's quotes where it would be mistaken for several."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def read(text: str) -> Infotext:
    """The parts of a text; what is no line of parameters belongs to the prompt."""
    *lines, last = text.strip().split("\n")
    pairs = list(PAIR.finditer(last))
    if len(pairs) < FEWEST:
        lines, pairs = [*lines, last], []
    values: dict[str, str] = {}
    for pair in pairs:
        key, value = pair["key"], _unquoted(pair["value"])
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size:
            values[f"{key}-1"], values[f"{key}-2"] = size.groups()
        else:
            values[key] = value
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).strip().removeprefix(NEGATIVE).strip()
    return Infotext("\n".join(lines[:at]).strip(), negative, MappingProxyType(values))


def fields(text: Infotext) -> tuple[dict[str, Any], list[str]]:
    """What a text says in the fields of Request, and a line for each thing that could not be taken over."""
    found: dict[str, Any] = {"prompt": text.prompt, "negative_prompt": text.negative_prompt}
    notes: list[str] = []
    values: dict[str, str] = dict(text.values)
    if "Hires upscale" in values:  # the strength is the second pass's
        values["Hires strength"] = values.pop("Denoising strength", "0.7")
    for key, (name, kind) in SIMPLE.items():
        if key in values:
            try:
                found[name] = kind(values.pop(key))
            except ValueError:
                notes.append(f"{key}: {text.values[key]} is no {'whole ' if kind is int else ''}number")
    for name, key in (("width", "Size-1"), ("height", "Size-2")):
        if key in values and 8 <= int(values[key]) <= MAX_SIDE:
            found[name] = int(values[key])
    skip = values.get("Clip skip", "1")
    if skip.isdigit() and int(skip) > 1:
        found["clip_skip"] = int(skip) - 1
    found |= _way(values, notes) | _choices(values)
    if "strength" in found:
        notes.append("it was made from an image, which is not part of the text: give it again (--image)")
    if found.get("model", "").lower() in ("", "none"):
        found.pop("model", None)
    if found.get("vae", "").lower() in ("automatic", "none", ""):
        found.pop("vae", None)
    notes += [f"not taken over: {key}: {value}" for key, value in values.items() if key not in SILENT]
    if found.get("seed", 0) < 0:
        notes.append(f"Seed: {found['seed']} means a random one")
        del found["seed"]
    return found, notes


def from_here(text: Infotext) -> bool:
    """Whether this package wrote the text."""
    return text.values.get("Version", "").startswith("sfumato ")


def _way(values: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Sampler and spacing; takes what it understood out of `values`."""
    from sfumato.diffusion.names import find_sampler, find_spacing

    named, schedule = values.get("Sampler"), values.get("Schedule type", "Automatic")
    way: dict[str, str] = {}
    if named is None:
        return way
    try:
        sampler, spacing = find_sampler(named)
        if schedule != "Automatic":
            spacing = find_spacing(schedule)
    except ValueError as error:
        notes.append(str(error))
        return way
    del values["Sampler"]
    values.pop("Schedule type", None)
    way["sampler"] = sampler
    if spacing is None and sampler not in OWN_TIMES:
        version = re.match(r"v?1\.(\d+)", values.get("Version", ""))
        automatic = version is not None and int(version[1]) >= 9
        spacing = AUTOMATIC.get(sampler, "linspace") if automatic else "linspace"
    if spacing is not None:
        way["spacing"] = spacing
    return way


def _choices(values: dict[str, str]) -> dict[str, Any]:
    """Fields that are one of a few words; takes what it understood out of `values`."""
    found: dict[str, Any] = {}
    content = {theirs: ours for ours, theirs in CONTENT.items()}.get(values.get("Masked content", ""))
    if content is not None:
        found["masked_content"] = content
        del values["Masked content"]
    if values.get("Inpaint area", "").lower() == "only masked":
        found["only_masked"] = True
        del values["Inpaint area"]
    upscaler = values.get("Hires upscaler", "").lower()
    if upscaler in ("latent", "lanczos"):
        found["hires_upscaler"] = upscaler
        del values["Hires upscaler"]
    return found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _name(model: str) -> str:
    """A model as others list it: a file without folder and suffix."""
    path = Path(model)
    return path.stem if path.suffix.lower() in WEIGHTS else path.name
