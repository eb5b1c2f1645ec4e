"""One frozen `Preset` for each released model: its networks, its schedule, and what it prefers.

A model in one file says nothing of its configuration; the preset that its shapes match supplies it. Variants are
made with `dataclasses.replace`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.models.mmdit import MMDiTConfig
from sfumato.presets.alike import Kind, kind_of
from sfumato.presets.base import DenoiserConfig, Preset, Task, TextConfig, VAEConfig, frozen, prediction_of
from sfumato.presets.classic import CLASSIC
from sfumato.presets.sd3 import SD3
from sfumato.presets.xl import XL

__all__ = [
    "BUILT_IN",
    "PRESETS",
    "SINGLE",
    "DenoiserConfig",
    "Kind",
    "Preset",
    "Task",
    "TextConfig",
    "VAEConfig",
    "check_name",
    "frozen",
    "look_alikes",
    "of_folder",
    "pipelines",
]

PRESETS: tuple[Preset, ...] = (*CLASSIC, *XL, *SD3)
SINGLE = tuple(preset for preset in PRESETS if preset.like is None)
"""Those that differ in their shapes or in what they predict; others look like one of these, see `alike`."""
CUSTOM = "custom"
BUILT_IN = {"mini": Path(__file__).parent.parent / "assets" / "mini"}


def of_folder(
    pipeline: str,
    denoiser: DenoiserConfig,
    vae: VAEConfig,
    texts: Sequence[TextConfig | None],
    scheduler: Mapping[str, Any],
    spacing: str,
    kind: Kind | None = None,
) -> Preset:
    """The preset of a model that comes with its own configurations, sizes read off them.

    pipeline: the class that its `model_index.json` names; spacing: its scheduler's. texts: of its text towers by place.
    kind:     which it is of the models that look the same; None goes by the scheduler alone, see `alike`.
    A model that is none of the released ones gets the preferences of the first with that class.
    Raises ValueError for a class that no preset has.
    """
    among = look_alikes(pipeline, denoiser, scheduler)
    kind = kind or kind_of(among, {}, scheduler)
    chosen = among[0] if kind is None else next((p for p in among if p.name == kind.name), among[0])
    if among[0].name == CUSTOM:
        chosen = replace(chosen, name=CUSTOM, title=among[0].title)
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
        spacing=str(chosen.scheduler.get("timestep_spacing", spacing)) if chosen.like else spacing,
        num_inference_steps=(kind and kind.steps) or chosen.num_inference_steps,
    )


def look_alikes(pipeline: str, denoiser: DenoiserConfig, scheduler: Mapping[str, Any]) -> list[Preset]:
    """The models that one may be by its network and what it predicts: the usual one, then what was made of it.

    Of a network of no released model the first is called "custom".
    Raises ValueError for a class that no preset has.
    """
    family = [p for p in PRESETS if p.pipeline == pipeline]
    if not family:
        raise ValueError(f"models of class {pipeline!r} are not supported; known: {', '.join(pipelines())}")
    known = [p for p in family if _kind(p.denoiser) == _kind(denoiser)]
    own = replace(family[0], name=CUSTOM, title="a model of its own")
    found = known or [own, *(p for p in family if p.like)]
    alike = [p for p in found if p.prediction == prediction_of(scheduler)] or found[:1]
    return alike


def _kind(denoiser: DenoiserConfig) -> tuple[object, ...]:
    """What tells the networks of one pipeline class apart."""
    if isinstance(denoiser, MMDiTConfig):
        return denoiser.num_layers, denoiser.width, denoiser.dual_attention_layers, denoiser.joint_attention_dim
    return (denoiser.cross_attention_dim,)


def check_name(name: str) -> None:
    """ValueError for a name that no preset has."""
    known = [preset.name for preset in PRESETS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown preset {name!r}{hint} known: {', '.join(known)}")


def pipelines() -> list[str]:
    """The pipeline classes of all presets."""
    return sorted({p.pipeline for p in PRESETS})
