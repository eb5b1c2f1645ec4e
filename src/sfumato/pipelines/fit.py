"""How much memory a picture takes, how much there is, and which of three ways of keeping the weights fits.

| memory   | weights                                                                               |
|----------|---------------------------------------------------------------------------------------|
| fast     | all there all the time                                                                |
| balanced | of a text encoder, the denoiser, the autoencoder: there while it is at work           |
| low      | of a layer: there while it is called; pictures beyond 512 pixels are decoded in tiles |

All make the same pictures, but for tiles and, on a CPU, for the rounding of what computes fast with weights that
stay (`prepare`). H W picture height and width, h w latent height and width.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from sfumato.machine import available
from sfumato.models.autoencoder import Coder
from sfumato.models.unet import UNet
from sfumato.pipelines.check import size
from sfumato.pipelines.request import Request
from sfumato.prepare import VARIABLE
from sfumato.runtime import Runtime, cpu_has_tiles
from sfumato.weights.model import load_model, locate
from sfumato.weights.parts import Components, HasComponents, preset_of
from sfumato.weights.streaming import SMALL, Residence, own_tensors
from sfumato.weights.supply import sources

Memory = Literal["fast", "balanced", "low"]
MEMORY: tuple[Memory, ...] = get_args(Memory)
# Components by the names that carriers of parts have for them. What denoises together stays together.
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("denoiser", "unet", "controlnet")
OTHERS = ("vae", "depth_estimator")
TILE = 512  # pixels
# Bytes of what lies between the layers, over bytes of one tensor, as measured at full size (benchmarks/memory.py):
CODER_MAPS = 4.0  # of a picture of the autoencoder's second width at full height and width
UNET_MAPS = 16.0  # of a row's latent picture of the U-Net's first width
TOKEN_MAPS = 24.0  # of a row's tokens, text and picture, of the transformer's width
# Of the U-Net's weights: copies in quicker forms (`prepare`) of some, for AMX tiles of most; buffers that are kept.
PREPARED, PREPARED_FOR_TILES = 0.1, 0.75
TEXT_TOKENS = 77 + 256
REST = 100 * 2**20  # what an open model takes besides: modules, vocabulary, small tensors
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """A network's part in the peak: bytes of all its weights when ready, and of the largest module's."""

    weights: int
    largest: int


def networks(parts: Any) -> dict[str, list[nn.Module]]:
    """The networks of some parts, by the stage of the work that needs them."""
    found: dict[str, list[nn.Module]] = {}
    seen: set[int] = set()
    for stage, names in (*((name, (name,)) for name in (*TEXTS, *OTHERS)), ("denoiser", DENOISERS)):
        for name in names:
            network = getattr(parts, name, None)
            if isinstance(network, nn.Module) and id(network) not in seen:
                seen.add(id(network))
                found.setdefault(stage, []).append(network)
    return found


def opened(
    source: Path | str,
    runtime: Runtime,
    memory: str | None,
    request: Request | None,
    batch: int | None,
    *,
    vae: Path | str | None,
    base: Path | str | None,
    prediction: str | None,
    preset: str | None = None,
) -> tuple[Components, Memory]:
    """A model and how its weights are to be kept; for ways other than "fast" they are as they are stored, on the CPU.

    The request's `t5` decides about T5.

    memory: the way, or None for the fastest that fits; request: what it is opened for, or None for a picture of the
    model's own size. Raises what `load_model` and `chosen` raise, before any weights are read.
    """
    check_memory(memory)
    asked = cast("Memory | None", memory)
    t5 = None if request is None else request.t5
    place = locate(source, runtime.dtype)
    others = [Path(other) for other in (vae, *sources(base)) if other is not None]
    kept: Memory = "fast"
    if asked not in (None, "fast") or not roomy([place, *others], runtime):
        parts = load_model(
            place, None, "cpu", vae=vae, base=base, prediction=prediction, packed=True, t5=t5, preset=preset
        )
        kept = chosen(parts, request or Request(), runtime, asked, batch)
        if kept != "fast":
            return parts, kept
        del parts
    parts = load_model(
        place, runtime.dtype, runtime.device, vae=vae, base=base, prediction=prediction, t5=t5, preset=preset
    )
    return parts, kept


def resident(
    parts: HasComponents, runtime: Runtime, memory: Memory, smallest: int = SMALL, apart: Collection[str] = ()
) -> Residence | None:
    """Have the weights of some parts come and go; None for "fast". apart: stages that are left alone.

    Raises ValueError for a word that is no way of keeping them, and where they come and go already.
    """
    check_memory(memory)
    if memory == "fast":
        return None
    stages = {stage: some for stage, some in networks(parts).items() if stage not in apart}
    laid_out = [*stages["denoiser"], *stages["vae"]] if runtime.channels_last else []
    dtypes = wider(parts, runtime.dtype)
    residence = Residence(stages, runtime.device, runtime.dtype, memory == "low", laid_out, smallest, dtypes)
    if memory == "low" and isinstance(parts.vae, Coder) and parts.vae.tile is None:
        parts.vae.enable_tiling(TILE)
    return residence


def wider(parts: HasComponents, dtype: torch.dtype) -> dict[nn.Module, torch.dtype]:
    """The networks for which a dtype is too narrow (`force_upcast`), and theirs."""
    narrow = dtype == torch.float16 and getattr(parts.vae.config, "force_upcast", False)
    return {parts.vae: torch.float32} if narrow else {}


def closed(parts: HasComponents, residence: Residence) -> None:
    """Undo what `resident` did."""
    residence.close()
    if residence.stream and isinstance(parts.vae, Coder) and parts.vae.tile == TILE:
        parts.vae.disable_tiling()


def check_memory(memory: str | None) -> None:
    """ValueError for a word that is no way of keeping weights."""
    if memory is not None and memory not in MEMORY:
        raise ValueError(f"unknown memory {memory!r}; known: {', '.join(MEMORY)}")


def estimate(
    parts: HasComponents,
    request: Request,
    memory: Memory,
    dtype: torch.dtype,
    batch: int = 1,
    prepared: bool | None = None,
) -> int:
    """Bytes that making the pictures of a request adds to a process at its peak, without PyTorch itself.

    parts:    their shapes count, so they may be on `meta` or in their files; dtype: what is computed in.
    request:  complete or not; batch: most pictures advanced together.
    prepared: whether weights that stay are prepared for a CPU; None: unless the environment says otherwise.
    """
    bytes_each = dtype.itemsize
    stages = {stage: [load(network, bytes_each) for network in some] for stage, some in networks(parts).items()}
    work = workings(parts, complete(parts, request), memory, bytes_each, batch)
    apart = stages.pop(TEXTS[2], []) if request.t5 in ("cpu", "keep") else []
    rest = REST + sum(one.weights if request.t5 == "keep" else one.largest for one in apart)
    if memory == "fast":
        prepared = os.environ.get(VARIABLE) != "off" if prepared is None else prepared
        share = PREPARED_FOR_TILES if cpu_has_tiles() else PREPARED
        more = share * sum(one.weights for one in stages["denoiser"]) if prepared and is_unet(parts) else 0
        weights = sum(one.weights for some in stages.values() for one in some)
        return rest + weights + round(more) + max(work.values())
    peaks = []
    for stage, some in stages.items():
        kept = max(one.largest for one in some) if memory == "low" else sum(one.weights for one in some)
        peaks.append(kept + work.get(stage, 0))
    return rest + max(peaks)


def is_unet(parts: HasComponents) -> bool:
    """Whether the denoiser is a U-Net, not a transformer."""
    return isinstance(parts.denoiser, UNet)


def load(network: nn.Module, bytes_each: int) -> Load:
    """What a network weighs with so many bytes a number."""
    own = [[tensor.numel() for _, tensor in own_tensors(module)] for module in network.modules()]
    return Load(sum(map(sum, own)) * bytes_each, max(map(sum, own), default=0) * bytes_each)


def workings(parts: HasComponents, request: Request, memory: Memory, bytes_each: int, batch: int) -> dict[str, int]:
    """Bytes of what lies between the layers, by stage."""
    factor = request.hires_scale or 1.0
    height, width = (cast(int, side) * factor for side in (request.height, request.width))
    tiled = memory == "low" or request.tile is not None
    pixels = min(height, TILE) * min(width, TILE) if tiled else height * width
    vae: Any = parts.vae.config
    widths = vae.block_out_channels
    coder = CODER_MAPS * pixels * widths[min(1, len(widths) - 1)] * bytes_each
    if request.tile is not None:
        height, width = min(height, request.tile), min(width, request.tile)
    area = (height / vae.factor) * (width / vae.factor)
    guided = request.guidance_scale not in (None, 1) or request.cfg_pp is not None
    rows = (3 if request.image_guidance_scale is not None else 2 if guided else 1) * min(batch, request.num_images)
    config: Any = networks(parts)["denoiser"][0].config
    if is_unet(parts):
        denoiser = UNET_MAPS * rows * area * config.block_out_channels[0] * bytes_each
    else:
        tokens = area / config.patch_size**2 + TEXT_TOKENS
        denoiser = TOKEN_MAPS * rows * tokens * config.width * bytes_each
    return {"vae": round(coder), "denoiser": round(denoiser)}


def complete(parts: HasComponents, request: Request) -> Request:
    """The request with its size and guidance filled in; raises what opening its pictures does."""
    preset = preset_of(parts)
    return request.model_copy(update=size(request, preset)).resolved(preset)


def chosen(
    parts: HasComponents, request: Request, runtime: Runtime, asked: Memory | None, batch: int | None = None
) -> Memory:
    """The way that was asked for, or the fastest that fits; batch: pictures advanced together, None for the usual.

    Raises ValueError where it does not fit into the memory that is free, saying which would.
    """
    free = free_memory(runtime.device)
    if free is None:
        return asked or "fast"
    wanted, factor = complete(parts, request), parts.vae.config.factor
    if batch is None:
        batch = runtime.together(*(cast(int, side) // factor for side in (wanted.height, wanted.width)))
    prepared = None if runtime.device.type == "cpu" else False
    needs = {memory: estimate(parts, request, memory, runtime.dtype, batch, prepared) for memory in MEMORY}
    fitting = [memory for memory in MEMORY if needs[memory] <= free]
    if asked in fitting:
        return asked
    if asked is None and fitting:
        return fitting[0]
    raise ValueError(shortage(wanted, needs, free, asked, fitting))


def shortage(
    request: Request, needs: Mapping[Memory, int], free: int, asked: Memory | None, fitting: list[Memory]
) -> str:
    """What to say where memory does not suffice."""
    least = asked or "low"
    text = f"a picture of {request.width}x{request.height} needs {gib(needs[least])} of memory"
    text += f" with --memory {least}, and {gib(free)} are free"
    if fitting:
        return f"{text}; --memory {fitting[0]} would need {gib(needs[fitting[0]])}"
    if least != "low":
        text += f"; --memory low would need {gib(needs['low'])}"
    return f"{text}; ask for a smaller picture, or close other programs"


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.1f} GiB"


def roomy(files: list[Path], runtime: Runtime) -> bool:
    """Whether there is so much memory that nothing has to be counted, whatever the files hold."""
    free = free_memory(runtime.device)
    found = [file for path in files for file in ([path] if path.is_file() else path.glob("*/*.*"))]
    # Two numbers a byte, as in the most tightly packed files; and as much again to work with, and 4 GiB.
    return free is None or 4 * runtime.dtype.itemsize * sum(f.stat().st_size for f in found) + 4 * GIB < free


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that are free on a device, or on this machine and within the limits of this process; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return available(root)
