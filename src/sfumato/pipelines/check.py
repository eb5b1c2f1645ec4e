"""What a request may ask of a model: which fields each task takes, its defaults, sizes, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from PIL import Image

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.tiny import TinyConfig
from sfumato.models.unet import UNetConfig
from sfumato.pipelines import sizes
from sfumato.pipelines.fields import MAX_SIDE, stand_in
from sfumato.pipelines.hasten import hastened
from sfumato.pipelines.inputs import check_same_size, open_picture
from sfumato.pipelines.request import Request
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


REPAINT: Mapping[str, Any] = MappingProxyType(
    {
        "outpaint": None,
        "soft_mask": False,
        "mask_blur": 4.0,
        "masked_content": "original",
        "only_masked": False,
        "mask_padding": 32,
        "paste": True,
    }
)
HIRES: Mapping[str, Any] = MappingProxyType({"hires_scale": None, "hires_upscaler": "lanczos", "hires_strength": None})
HIRES_STRENGTHS: Mapping[str | None, float] = MappingProxyType({"latent": 0.7, "lanczos": 0.4})
REFINED: Mapping[str, Any] = MappingProxyType({"refiner": None, "refiner_start": 0.8})
PLAIN = Uses(may=("image", "mask"), takes={"strength": STRENGTH, **REPAINT, **HIRES})
USES: Mapping[Task, Uses] = MappingProxyType(
    {
        "text": Uses(may=PLAIN.may, takes={**PLAIN.takes, **REFINED}),
        "class": PLAIN,
        "unconditional": PLAIN,
        "inpaint": Uses(needs=("image", "mask"), takes={"strength": 1.0, **REPAINT}),
        "depth": Uses(needs=("image",), may=("depth",), takes={"strength": STRENGTH}),
        "instruct": Uses(needs=("image",), takes={"image_guidance_scale": 1.5}),
        "upscale": Uses(needs=("image",), takes={"noise_level": 20}),
    }
)
# Fields that mean something only beside one of others.
BESIDE: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "strength": (("image",), "says how far to leave an image; give an image as well"),
        "mask": (("image",), "says where to repaint an image; give an image as well"),
        "outpaint": (("image",), "says how far an image grows; give an image as well"),
        **dict.fromkeys(
            ("soft_mask", "mask_blur", "masked_content", "only_masked", "paste"),
            (("mask", "outpaint"), "is about repainting a part of an image; give mask or outpaint as well"),
        ),
        "mask_padding": (("only_masked",), "is about cutting the masked part out; give only_masked as well"),
        "hires_upscaler": (("hires_scale",), "is about enlarging; give hires_scale as well"),
        "hires_strength": (("hires_scale",), "is about enlarging; give hires_scale as well"),
        "refiner_start": (("refiner",), "is about a refiner; give refiner as well"),
        "variation_seed": (("variation_strength",), "is the seed of a variation; give variation_strength as well"),
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


def settled(request: Request, preset: Preset, estimates_depth: bool = False) -> Request:
    """The request with everything filled in that it left open: by the task, its image's size, the model, chance.

    estimates_depth: the model makes depth of an image itself.
    Raises ValueError for a field that the model has no use for and for a picture that is missing.
    """
    request = hastened(request, preset)
    told = sizes.fields(preset)
    uses, texts = USES[preset.task], TEXTS[type(next(iter(preset.texts), None))]
    for name in (n for n in (*OWN, *sizes.SAID, *TEXTS[CLIPTextConfig]) if given(request, n)):
        if name not in (*uses.fields, *told, *texts):
            takes = ", ".join([*texts, *uses.fields, *told])
            raise ValueError(f"{preset.title} ({preset.pipeline}) has no use for {name}; of its kind it takes: {takes}")
    if texts and not request.prompt.strip():
        what = "the class as a number" if isinstance(preset.text, ClassEmbedderConfig) else "what the picture shows"
        raise ValueError(f"no prompt was given, or the prompt is blank; say {what}")
    if not texts and request.guidance_scale not in (None, 1):
        raise ValueError(f"guidance_scale = {request.guidance_scale:g}, but {preset.title} has no prompt; leave it out")
    missing = [name for name in uses.needs if not given(request, name) and not (name == "mask" and request.outpaint)]
    if missing:
        raise ValueError(f"{preset.title} ({preset.pipeline}) needs {' and '.join(missing)}; give a picture")
    if preset.task == "depth" and request.depth is None and not estimates_depth:
        raise ValueError(
            f"{preset.title} ({preset.pipeline}) needs depth, as it came without an estimator of it; give a picture"
        )
    for name, (others, why) in BESIDE.items():
        if given(request, name) and not any(wanted(request, other) for other in others):
            raise ValueError(f"{name} = {shown(getattr(request, name))} {why}")
    fill = {**uses.takes, **told, **texts}
    fill = {n: v for n, v in fill.items() if n not in BESIDE or any(wanted(request, o) for o in BESIDE[n][0])}
    if "hires_strength" in fill:
        fill["hires_strength"] = HIRES_STRENGTHS[request.hires_upscaler or fill["hires_upscaler"]]
    if request.mask is not None or request.outpaint is not None:
        fill["strength"] = 1.0
    if request.rescale_betas_zero_snr:
        fill["spacing"] = "trailing"  # the one that begins at the last training step (Lin et al. 2023, section 3.3)
    opened = {name: value for name, value in fill.items() if getattr(request, name) is None}
    return request.model_copy(update={**opened, **size(request, preset)}).resolved(preset)


def given(request: Request, name: str) -> bool:
    """Whether a request says something about a field."""
    value = getattr(request, name)
    return value is not None and not (isinstance(value, str | tuple) and len(value) == 0)


def wanted(request: Request, name: str) -> bool:
    """Whether a request asks for something."""
    return getattr(request, name) is not False and given(request, name)


def shown(value: object) -> str:
    """A value as a person wrote it."""
    if isinstance(value, Image.Image):
        return stand_in(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def size(request: Request, preset: Preset) -> dict[str, int]:
    """Width and height where a request with an image leaves them open: the image's, cut to what the model can make.

    With one of the two given, the other follows the image's proportions. An upscaler enlarges by its factor. What is
    cut out with its mask takes the model's own size.
    Raises FileNotFoundError or ValueError for pictures that cannot be opened, an image that is too large, and a mask
    of another size.
    """
    pictures = {name: open_picture(getattr(request, name), name) for name in PICTURES if given(request, name)}
    if "image" not in pictures:
        return {}
    image = pictures["image"]
    mask = pictures.get("mask", image)
    check_same_size(mask, image)
    if request.only_masked:
        return {}
    factor = preset.grain
    left, right, top, bottom = request.outpaint or (0, 0, 0, 0)
    sides = image.width + left + right, image.height + top + bottom
    width, height = (float(side * preset.vae.factor if preset.task == "upscale" else side) for side in sides)
    if request.width is not None:
        height *= request.width / width
    elif request.height is not None:
        width *= request.height / height
    found = {name: int(side) // factor * factor for name, side in (("width", width), ("height", height))}
    found = {name: side for name, side in found.items() if getattr(request, name) is None}
    for name, side in found.items():
        if not 8 <= side <= MAX_SIDE:
            raise ValueError(
                f"the image of {sides[0]}x{sides[1]} pixels makes a {name} of {side}, "
                f"which is to be 8 to {MAX_SIDE}; give width and height"
            )
    return found


def check(request: Request, preset: Preset) -> None:
    """ValueError where a settled request does not fit the model."""
    if preset.task == "instruct" and isinstance(preset.vae, TinyConfig):
        raise ValueError(
            f"{preset.title} is shown what its own autoencoder says of an image, before scaling, which a tiny one does "
            "not know; leave out vae"
        )
    for name in ("width", "height"):
        side, f = getattr(request, name), preset.grain
        if side % f:
            nearest = max(f, round(side / f) * f)
            raise ValueError(f"{name} = {side} is not a multiple of {f}; the nearest that is: {nearest}")
    if request.hires_scale is not None:
        if request.mask is not None or request.outpaint is not None:
            part = "mask" if request.mask is not None else "outpaint"
            raise ValueError(f"hires_scale enlarges the whole picture, {part} repaints a part; leave one of them out")
        for name in ("width", "height"):
            side = round(getattr(request, name) * request.hires_scale)
            if side > MAX_SIDE:
                raise ValueError(
                    f"hires_scale = {request.hires_scale:g} makes a {name} of {side}, at most {MAX_SIDE} are made; "
                    f"give at most {MAX_SIDE / getattr(request, name):.4g}"
                )
    if request.refiner is not None:
        other = next((n for n in ("mask", "outpaint", "hires_scale") if getattr(request, n) is not None), None)
        if other is not None:
            raise ValueError(f"refiner makes the last steps of a whole picture, without {other}; leave one of them out")
    if request.tile is not None and (request.tile % preset.vae.factor or request.tile < 8 * preset.vae.factor):
        f = preset.vae.factor
        nearest = max(8 * f, round(request.tile / f) * f)
        raise ValueError(f"tile = {request.tile}; give a multiple of {f} from {8 * f} on; the nearest is {nearest}")
    if request.eta is not None:
        # The coroutine's own keywords are the one list of a sampler's options.
        able = [name for name, e in SAMPLERS.items() if "eta" in inspect.signature(e.run).parameters]
        if request.sampler not in able:
            raise ValueError(f"sampler {request.sampler!r} takes no eta; these do: {', '.join(able)}")
    levels = preset.denoiser.num_class_embeds if isinstance(preset.denoiser, UNetConfig) else None
    if request.noise_level is not None and levels is not None and request.noise_level >= levels:
        raise ValueError(f"noise_level = {request.noise_level}; this model knows 0 to {levels - 1}")
