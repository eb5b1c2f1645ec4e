"""What a request may ask of a model: which fields each task takes, its defaults, sizes, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.pipelines.inputs import open_picture
from sfumato.pipelines.request import MAX_SIDE, Request
from sfumato.presets import Preset, Task

PICTURES = ("image", "mask", "depth")
STRENGTH = 0.8  # of image to image, in diffusers' pipelines


@dataclass(frozen=True)
class Uses:
    """What a task takes besides what all take.

    needs: pictures that must be given. may: those that can be. takes: other fields, with their defaults.
    """

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    takes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> list[str]:
        """All of them by name."""
        return [*self.needs, *self.may, *self.takes]


PLAIN = Uses(may=("image",), takes={"strength": STRENGTH})
USES: Mapping[Task, Uses] = MappingProxyType(
    {
        "text": PLAIN,
        "class": PLAIN,
        "unconditional": PLAIN,
        "inpaint": Uses(needs=("image", "mask"), takes={"strength": 1.0}),
        "depth": Uses(needs=("image", "depth"), takes={"strength": STRENGTH}),
        "instruct": Uses(needs=("image",), takes={"image_guidance_scale": 1.5}),
        "upscale": Uses(needs=("image",), takes={"noise_level": 20}),
    }
)
OWN = sorted({name for uses in USES.values() for name in uses.fields})
# What a request may say about the prompt, by what reads it.
TEXTS: Mapping[type, Mapping[str, Any]] = MappingProxyType(
    {
        CLIPTextConfig: {"prompt": "", "negative_prompt": "", "prompt_rule": "a1111", "clip_skip": 0, "embeddings": ()},
        LDMBertConfig: {"prompt": "", "negative_prompt": ""},
        ClassEmbedderConfig: {"prompt": "", "negative_prompt": ""},
        type(None): {},
    }
)


def settled(request: Request, preset: Preset) -> Request:
    """The request with everything filled in that it left open: by the task, its image's size, the model, chance.

    Raises ValueError for a field that the model has no use for and for a picture that is missing.
    """
    uses, texts = USES[preset.task], TEXTS[type(preset.text)]
    for name in (n for n in (*OWN, *TEXTS[CLIPTextConfig]) if given(request, n)):
        if name not in (*uses.fields, *texts):
            takes = ", ".join([*texts, *uses.fields])
            raise ValueError(f"{preset.title} ({preset.pipeline}) has no use for {name}; of its kind it takes: {takes}")
    if texts and not request.prompt.strip():
        what = "the class as a number" if isinstance(preset.text, ClassEmbedderConfig) else "what the picture shows"
        raise ValueError(f"no prompt was given, or the prompt is blank; say {what}")
    if not texts and request.guidance_scale not in (None, 1):
        raise ValueError(f"guidance_scale = {request.guidance_scale:g}, but {preset.title} has no prompt; leave it out")
    missing = [name for name in uses.needs if not given(request, name)]
    if missing:
        estimated = "; depth is not estimated from the image" if missing[-1] == "depth" else ""
        raise ValueError(f"{preset.title} ({preset.pipeline}) needs {' and '.join(missing)}{estimated}; give a picture")
    if given(request, "strength") and not given(request, "image"):
        raise ValueError(f"strength = {request.strength:g} says how far to leave an image; give an image as well")
    fill = {**uses.takes, **texts}
    if request.image is None:
        fill.pop("strength", None)
    opened = {name: value for name, value in fill.items() if getattr(request, name) is None}
    return request.model_copy(update={**opened, **size(request, preset)}).resolved(preset)


def given(request: Request, name: str) -> bool:
    """Whether a request says something about a field."""
    value = getattr(request, name)
    return value is not None and not (isinstance(value, str | tuple) and len(value) == 0)


def size(request: Request, preset: Preset) -> dict[str, int]:
    """Width and height where a request with an image leaves them open: the image's, cut to what the model can make.

    With one of the two given, the other follows the image's proportions. An upscaler enlarges by its factor.
    Raises FileNotFoundError or ValueError for pictures that cannot be opened, an image that is too large, and a mask
    of another size.
    """
    pictures = {name: open_picture(getattr(request, name), name) for name in PICTURES if given(request, name)}
    if "image" not in pictures:
        return {}
    image = pictures["image"]
    mask = pictures.get("mask", image)
    if mask.size != image.size:
        raise ValueError(
            f"the mask has {mask.width}x{mask.height} pixels and the image {image.width}x{image.height}; "
            "give a mask of the image's size"
        )
    factor = preset.vae.factor
    width, height = (float(side * factor if preset.task == "upscale" else side) for side in image.size)
    if request.width is not None:
        height *= request.width / width
    elif request.height is not None:
        width *= request.height / height
    found = {name: int(side) // factor * factor for name, side in (("width", width), ("height", height))}
    found = {name: side for name, side in found.items() if getattr(request, name) is None}
    for name, side in found.items():
        if not 8 <= side <= MAX_SIDE:
            raise ValueError(
                f"the image of {image.width}x{image.height} pixels makes a {name} of {side}, "
                f"which is to be 8 to {MAX_SIDE}; give width and height"
            )
    return found


def check(request: Request, preset: Preset, config: Mapping[str, object]) -> None:
    """ValueError where a settled request does not fit the model; config: the scheduler's options."""
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(
                f"the scheduler's {option} = true is for pixel models and is not applied to latents here; "
                f"set it to false in scheduler_config.json, or use the scheduler's own step()"
            )
    for name in ("width", "height"):
        side, f = getattr(request, name), preset.vae.factor
        if side % f:
            nearest = max(f, round(side / f) * f)
            raise ValueError(f"{name} = {side} is not a multiple of {f}; the nearest that is: {nearest}")
    if request.eta is not None:
        # The coroutine's own keywords are the one list of a sampler's options.
        able = [name for name, e in SAMPLERS.items() if "eta" in inspect.signature(e.run).parameters]
        if request.sampler not in able:
            raise ValueError(f"sampler {request.sampler!r} takes no eta; these do: {', '.join(able)}")
    levels = preset.unet.num_class_embeds
    if request.noise_level is not None and levels is not None and request.noise_level >= levels:
        raise ValueError(f"noise_level = {request.noise_level}; this model knows 0 to {levels - 1}")
