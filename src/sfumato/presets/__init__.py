"""One frozen `Preset` for each released model: its networks, its schedule, and what it prefers.

A model in one file says nothing of its configuration; the preset that its shapes match supplies it. Variants are
made with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.models.mmdit import MMDiTConfig
from sfumato.presets.base import DenoiserConfig, Preset, Task, TextConfig, VAEConfig, frozen, prediction_of
from sfumato.presets.classic import CLASSIC
from sfumato.presets.sd3 import SD3
from sfumato.presets.xl import XL

__all__ = [
    "BUILT_IN",
    "PRESETS",
    "SINGLE",
    "DenoiserConfig",
    "Preset",
    "Task",
    "TextConfig",
    "VAEConfig",
    "frozen",
    "of_folder",
    "pipelines",
]

ALIKE = ("sdxl-turbo", "sdxl-lightning", "sdxl-lcm", "sdxl-hyper", "sd35-large-turbo")
PRESETS: tuple[Preset, ...] = (*CLASSIC, *XL, *SD3)
SINGLE = tuple(preset for preset in PRESETS if preset.name not in ALIKE)
"""Those that are read from one file: what was distilled from a model looks the same and is read as that model."""
BUILT_IN = {"mini": Path(__file__).parent.parent / "assets" / "mini"}


def of_folder(
    pipeline: str,
    denoiser: DenoiserConfig,
    vae: VAEConfig,
    texts: Sequence[TextConfig | None],
    scheduler: Mapping[str, Any],
    spacing: str,
) -> Preset:
    """The preset of a model that comes with its own configurations, sizes read off them.

    pipeline: the class that its `model_index.json` names; spacing: its scheduler's. texts: of its text towers by place.
    Of models that look the same, prediction and then the scheduler's class and spacing decide: few-step models
    differ from what they were made of in nothing else. A model that is none of the released ones gets the
    preferences of the first with that class.
    Raises ValueError for a class that no preset has.
    """
    family = [p for p in PRESETS if p.pipeline == pipeline]
    if not family:
        raise ValueError(f"models of class {pipeline!r} are not supported; known: {', '.join(pipelines())}")
    known = [p for p in family if _kind(p.denoiser) == _kind(denoiser)]
    own = replace(family[0], name="custom", title="a model of its own")
    chosen = max(known, key=lambda preset: _likeness(preset, scheduler)) if known else own
    side = denoiser.sample_size[0] if isinstance(denoiser.sample_size, tuple) else denoiser.sample_size or 64
    places: tuple[TextConfig | None, ...] = (*texts, None, None, None)
    pixels = side * vae.factor
    return replace(
        chosen,
        denoiser=denoiser,
        vae=vae,
        text=places[0],
        text_2=places[1],
        text_3=places[2],
        scheduler=frozen(scheduler),
        width=pixels,
        height=pixels,
        spacing=spacing,
    )


def _kind(denoiser: DenoiserConfig) -> tuple[object, ...]:
    """What tells the networks of one pipeline class apart."""
    if isinstance(denoiser, MMDiTConfig):
        return denoiser.num_layers, denoiser.width, denoiser.dual_attention_layers, denoiser.joint_attention_dim
    return (denoiser.cross_attention_dim,)


def _likeness(preset: Preset, scheduler: Mapping[str, Any]) -> tuple[bool, bool]:
    """How much a scheduler is a preset's: whether it predicts the same, and whether it is of its class and spacing."""
    same = all(scheduler.get(k) == v for k, v in preset.scheduler.items() if k in ("_class_name", "timestep_spacing"))
    predicts = prediction_of(scheduler) == preset.prediction
    return predicts, predicts and same


def pipelines() -> list[str]:
    """The pipeline classes of all presets."""
    return sorted({p.pipeline for p in PRESETS})
