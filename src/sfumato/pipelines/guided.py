"""A request's guidance: what is made of prompt and negative prompt, and what stands around it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import cast

from sfumato.approximate import able, why_not
from sfumato.cond import Cond
from sfumato.diffusion.around import PAG, Limited, Rescale, Within, levels_inside, levels_of, skipping, thresholded
from sfumato.diffusion.guidance import APG, CFG, CFGPP, Guidance, InstructCFG, Plain, Turns
from sfumato.diffusion.named import DDIMScheduler
from sfumato.diffusion.named_flow import FlowMatchEulerDiscreteScheduler
from sfumato.diffusion.path import Point
from sfumato.diffusion.recall import Recalling
from sfumato.diffusion.samplers import get_sampler
from sfumato.diffusion.scheduler import Scheduler
from sfumato.diffusion.table import ZERO_SNR, TableScheduler
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.mmdit import MMDiT
from sfumato.models.perturb import IDENTITY, blocks, self_attentions
from sfumato.models.tiny import TinyConfig
from sfumato.models.vq import VQConfig
from sfumato.pipelines.fields import typed
from sfumato.pipelines.request import Request
from sfumato.presets import Preset
from sfumato.weights.parts import Denoiser

# Pipelines in which diffusers takes clip_sample for a slip in old folders: latents are larger than 1.
CLIPS_BY_MISTAKE = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
Sides = Plain | CFG | CFGPP | APG | InstructCFG
log = logging.getLogger(__name__)


def sides(request: Request, cond: Cond | Turns, uncond: Cond | Turns) -> Sides:
    """What is made of the answers to the prompt and to the negative prompt."""
    scale = cast(float, request.guidance_scale)
    if request.cfg_pp is not None:
        return CFGPP(cond, uncond, request.cfg_pp)
    if request.apg is not None:
        return APG(cond, uncond, scale, *request.apg)
    return CFG(cond, uncond, scale)


def surrounded(inner: Sides, request: Request, scheduler: Scheduler, preset: Preset, grid: Sequence[Point]) -> Guidance:
    """The guidance with all that a request and the model's scheduler put around it; grid: the points of the run."""
    guidance: Guidance = inner
    if request.pag_scale:
        guidance = PAG(guidance, inner.cond, request.pag_scale, f"{IDENTITY}:{','.join(request.pag_layers)}")
    if request.slg_scale:
        layers = numbered(request.slg_layers)
        guidance = skipping(guidance, inner.cond, request.slg_scale, layers, request.slg_interval, grid)
    if request.guidance_rescale:
        guidance = Rescale(guidance, request.guidance_rescale, scheduler.rule)
    if request.guidance_interval is not None and not isinstance(guidance, Plain):
        guidance = Within(guidance, Plain(inner.cond), levels_of(grid, request.guidance_interval))
    keeps_eps = get_sampler(cast(str, request.sampler)).name == "ddim"  # as its scheduler does
    if request.dynamic_threshold is not None:
        quantile, limit = (*request.dynamic_threshold, 1.0)[:2]
        guidance = Limited(guidance, partial(thresholded, quantile=quantile, limit=limit), keeps_eps)
    elif (bounded := limiting(scheduler, preset)) is not None:
        guidance = Limited(guidance, bounded.limit, keeps_eps)
    every, limit = request.deep_cache or 1, request.block_cache or 0.0
    return Recalling(guidance, grid, every, limit) if every > 1 or limit > 0 else guidance


def limiting(scheduler: Scheduler, preset: Preset) -> Scheduler | None:
    """The scheduler that says how clean pictures are limited; None where it does not limit them."""
    clips, thresholds = (bool(getattr(scheduler, name, False)) for name in ("clip_sample", "thresholding"))
    if clips and not thresholds and preset.pipeline in CLIPS_BY_MISTAKE:
        log.warning("clip_sample = true in the scheduler is for pixels and is not applied to this model's latents")
        return None
    return scheduler if clips or thresholds else None


def scheduled(request: Request, scheduler: Scheduler, preset: Preset) -> Scheduler:
    """The model's scheduler for the request's size, with its rescale_betas_zero_snr; see Lin et al. 2023, algorithm 1.

    Raises ValueError for a network that predicts noise, which says nothing at zero SNR, and for other paths.
    """
    wanted = request.rescale_betas_zero_snr
    if wanted is None or getattr(scheduler, ZERO_SNR, False) == wanted:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return scheduler
        columns, rows = (cast(int, side) // preset.grain for side in (request.width, request.height))
        return scheduler.sized(columns * rows)
    if not isinstance(scheduler, TableScheduler):
        raise ValueError(f"{ZERO_SNR} = true is for schedulers with betas; {type(scheduler).__name__} has none")
    if wanted and scheduler.prediction == "epsilon":
        raise ValueError(
            f"{ZERO_SNR} = true, but this network predicts 'epsilon', which says nothing of a picture at zero SNR; "
            "take a model that predicts 'v_prediction', or leave it out"
        )
    kind = type(scheduler) if ZERO_SNR in scheduler.option_names() else DDIMScheduler
    return kind.from_config(scheduler.config, rescale_betas_zero_snr=wanted)


def check_guidance(request: Request, preset: Preset, denoiser: Denoiser, grid: Sequence[Point]) -> None:
    """ValueError where what a settled request says of guidance does not fit the model; grid: the points of the run."""
    task, name = preset.task, f"{preset.title} ({preset.pipeline})"
    for field in ("cfg_pp", "apg"):
        if getattr(request, field) is not None and (not preset.texts or task == "instruct"):
            why = "has no prompt" if not preset.texts else "is guided by an image as well"
            raise ValueError(f"{field} leads from the negative prompt to the prompt, but {name} {why}; leave it out")
    first_only = [field for field in ("pag_scale", "slg_scale", "guidance_rescale") if getattr(request, field)]
    if task == "instruct" and request.guidance_scale == 0 and first_only:
        raise ValueError(f"{first_only[0]} needs what the network says to the prompt; give a guidance_scale above 0")
    threshold = request.dynamic_threshold
    latent = isinstance(preset.vae, AutoencoderConfig | VQConfig | TinyConfig)
    if threshold is not None and len(threshold) == 1 and latent:
        raise ValueError(
            f"dynamic_threshold = {threshold[0]:g} is for pixels from -1 to 1, and {name} makes latents; "
            f"give their range as well, e.g. {threshold[0]:g},4"
        )
    if request.pag_scale:
        for layer in request.pag_layers:
            try:
                self_attentions(denoiser, layer)
            except ValueError as error:
                raise ValueError(f"pag_layers = {','.join(request.pag_layers)}: {error}") from None
    if request.slg_scale:
        try:
            blocks(denoiser, numbered(request.slg_layers))
        except ValueError as error:
            raise ValueError(f"slg_layers = {numbered(request.slg_layers)}: {error}") from None
        if levels_inside(grid, request.slg_interval) is None:
            raise ValueError(
                f"slg_interval = {typed(request.slg_interval)} has none of {len(grid) - 1} steps inside; "
                "give a wider one, or more steps"
            )
    if request.guidance_interval is not None:
        levels_of(grid, request.guidance_interval)
    check_reuse(request, denoiser, name)


def check_reuse(request: Request, denoiser: Denoiser, name: str) -> None:
    """ValueError where a request wants features used again in a way that is not this network's."""
    transformer = isinstance(denoiser, MMDiT)
    wrong, right = ("deep_cache", "block_cache") if transformer else ("block_cache", "deep_cache")
    if getattr(request, wrong) is not None:
        kind, own = ("U-Nets", "a transformer") if transformer else ("transformers", "a U-Net")
        raise ValueError(f"{wrong} is for {kind}, and {name} denoises with {own}; take {right}, or leave it out")
    why = able(denoiser) if getattr(request, right) else ""
    if why:
        raise ValueError(f"{right} = {getattr(request, right):g}, but {why}; leave it out")
    why = why_not(denoiser) if request.int8 else ""
    if why:
        raise ValueError(f"int8 is not for {name} here: {why}; leave it out")


def numbered(layers: Sequence[int]) -> str:
    """Numbers of layers as the network is handed them."""
    return ",".join(map(str, layers))
