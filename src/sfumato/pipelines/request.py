"""`Request`: the one description of a picture.

The command line's flags, the arguments of `pipe(...)` and the recipe inside each PNG are all read off its
fields, so a new option is one new field here. Importing this module does not import torch.
"""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sfumato.presets import Preset

MAX_SEED = 2**63 - 1  # what a torch generator takes and an int64 in JSON holds


@dataclass(frozen=True)
class Flag:
    """The command-line names of a field; `--field-name` is always one of them."""

    names: tuple[str, ...] = ()


class Request(BaseModel):
    """One text-to-image wish; None stands for "as the model prefers" until `resolved` fills it in.

    Raises ValueError (pydantic's) that names the field, the value and what is allowed; see `parse`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1, description="What the picture shows.")]
    negative_prompt: Annotated[str, Field(description="What guidance leads away from."), Flag(("--negative",))] = ""
    width: Annotated[int | None, Field(ge=8, le=4096, description="Width in pixels (default: the model's).")] = None
    height: Annotated[int | None, Field(ge=8, le=4096, description="Height in pixels (default: the model's).")] = None
    num_inference_steps: Annotated[
        int | None,
        Field(ge=1, le=1000, description="Denoising steps: more is slower and finer (default: the model's)."),
        Flag(("--steps",)),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, description="Weight of the prompt; 1 is no guidance (default: the model's)."),
        Flag(("--cfg",)),
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_SEED,
            description="Seed of the first picture; the next is one more (default: random).",
        ),
    ] = None
    sampler: Annotated[str | None, Field(description="Sampler, see `sfumato samplers` (default: the model's).")] = None
    spacing: Annotated[
        str | None, Field(description="How steps are spread over the noise levels (default: the model's).")
    ] = None
    eta: Annotated[
        float | None,
        Field(ge=0, le=1, description="Share of fresh noise a step, for samplers that take it (ddim)."),
    ] = None
    num_images: Annotated[
        int, Field(ge=1, le=1000, description="How many pictures, with seeds one apart (default: 1)."), Flag(("-n",))
    ] = 1
    model: Annotated[
        str, Field(min_length=1, description="Built-in model's name or a model folder (default: mini)."), Flag(("-m",))
    ] = "mini"

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is blank; say what the picture shows")
        return prompt

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str | None) -> str | None:
        if name is not None:
            from sfumato.diffusion.samplers import get_sampler

            get_sampler(name)
        return name

    @field_validator("spacing")
    @classmethod
    def _known_spacing(cls, name: str | None) -> str | None:
        if name is not None:
            from sfumato.diffusion.grid import get_spacing

            get_spacing(name)
        return name

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Request:
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"seed = {self.seed} with {self.num_images} pictures passes the largest seed, {MAX_SEED}")
        return self

    def resolved(self, preset: Preset) -> Request:
        """The same wish with the model's preferences filled in and, when no seed was given, a random one."""
        filled = {name: value for name, value in preset.defaults().items() if getattr(self, name) is None}
        if self.seed is None:
            # Short enough to be typed again.
            filled["seed"] = random.SystemRandom().randrange(2**32)
        return self.model_copy(update=filled)

    def singles(self) -> list[Request]:
        """One request a picture, each with its own seed; what is stored in the picture's PNG."""
        if self.seed is None:
            raise ValueError("the request has no seed yet; call resolved(preset) first")
        seeds = range(self.seed, self.seed + self.num_images)
        return [self.model_copy(update={"seed": seed, "num_images": 1}) for seed in seeds]


def parse(**fields: Any) -> Request:
    """Build a request; raises ValueError with one line for each thing that is wrong."""
    try:
        return Request(**fields)
    except ValidationError as error:
        raise ValueError("; ".join(_worded(e) for e in error.errors())) from None


def _worded(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # from a validator above, a whole sentence already
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Request.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return f"unknown option {field!r}{hint} known: {', '.join(Request.model_fields)}"
    return f"{field} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
