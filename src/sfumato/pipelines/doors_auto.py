"""The front doors that choose a door by the model: the one that it was made for, or one for a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.pipelines import doors_sd3, doors_xl
from sfumato.pipelines.door import Door
from sfumato.pipelines.doors import (
    Maker,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from sfumato.pipelines.opening import found
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.folder import read_index
from sfumato.weights.single import recognise
from sfumato.weights.source import open_weights

CLASSIC = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
TASKS: Mapping[str, Sequence[type[Maker]]] = {
    family: list(doors.values()) for doors in (doors_xl.DOORS, doors_sd3.DOORS) for family in doors
}
"""The doors for text to image, image to image and inpainting by a model's class; others have Stable Diffusion's."""
FETCHING = ("variant", "revision", "cache_dir", "local_files_only")


def place_of(source: str | Path, arguments: Mapping[str, Any]) -> Path:
    """The file or folder of a model, found once; arguments: of `Door.from_pretrained`."""
    variant, revision, cache, local = (arguments.get(name) for name in FETCHING)
    return found(source, arguments.get("torch_dtype") or torch.float32, variant, revision, cache, bool(local))


def family_of(place: Path) -> str:
    """The class of pipeline that a folder names, or that a file is of."""
    if place.is_dir():
        return read_index(place)[1]
    with open_weights(place) as weights:
        preset = recognise(weights).preset
    return StableDiffusionPipeline.families[0] if preset is None else preset.pipeline


def opened(door: type[Maker], place: Path, arguments: Mapping[str, Any]) -> Maker:
    """A model's door, of what has been found."""
    return door.from_pretrained(place, **{k: v for k, v in arguments.items() if k not in ("revision", "cache_dir")})


class DiffusionPipeline:
    """The door that a model was made for, whichever that is."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **arguments: Any) -> Maker:
        """Open a model as its folder says it is, or for text to image; arguments: see `Door.from_pretrained`."""
        place = place_of(source, arguments)
        family = family_of(place)
        known: Mapping[str, type[Maker]] = {**doors_xl.DOORS, **doors_sd3.DOORS}
        if place.is_dir():
            named = str(read_index(place)[0].get("_class_name"))
            family = named if named in known else family
        doors = (door for door in Maker.__subclasses__() if family in door.families.values())
        return opened(known[family] if family in known else next(doors, StableDiffusionPipeline), place, arguments)


class AutoPipeline:
    """A door for a task, whichever model of whichever family it is for."""

    place: ClassVar[int]

    @classmethod
    def from_pretrained(cls, source: str | Path, **arguments: Any) -> Maker:
        """Open a model for this task; arguments: see `Door.from_pretrained`."""
        place = place_of(source, arguments)
        return opened(cls.door(family_of(place)), place, arguments)

    @classmethod
    def from_pipe(cls, pipeline: Door | Pipeline, **given: Any) -> Maker:
        """A door for this task to the same parts as another door's or pipeline's; given: parts to take instead."""
        pipe = pipeline._pipe if isinstance(pipeline, Door) else pipeline
        return cls.door(pipe.pipeline).from_pipe(pipeline, **given)

    @classmethod
    def door(cls, family: str) -> type[Maker]:
        """The door for this task of a family, which refuses a model that is for other tasks."""
        return TASKS.get(family, CLASSIC)[cls.place]


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image."""

    place = 0


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image."""

    place = 1


class AutoPipelineForInpainting(AutoPipeline):
    """Repainting in a mask."""

    place = 2
