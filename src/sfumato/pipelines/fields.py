"""What a field of `Request` is made of: its limits, its flag on the command line, and how what people type is read.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from PIL.Image import Image
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationInfo, WithJsonSchema

MAX_SEED = 2**63 - 1  # what a torch generator takes and an int64 in JSON holds
MAX_SIDE = 4096
MAX_TOLD = 16_384  # pixels of a picture as a model is told of it
MAX_NOISE_LEVEL = 350  # the upscaler saw no more in training
MAX_WORDS, MAX_LETTERS = 1500, 20_000  # of a prompt: twenty chunks of 75 tokens
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "masked_content": ("original", "fill", "noise", "nothing"),
        "hires_upscaler": ("latent", "lanczos"),
        "t5": ("off", "cpu", "keep"),
    }
)
MEMORY = "<picture in memory, "  # how the recipe's stand-in for a picture without a file begins


@dataclass(frozen=True)
class Flag:
    """The command-line names of a field, of which `--field-name` is always one, and the word for its value."""

    names: tuple[str, ...] = ()
    value: str | None = None


def stand_in(image: Image) -> str:
    """What a recipe says of a picture that was given in memory: enough to recognise it by."""
    digest = hashlib.sha256(image.tobytes()).hexdigest()[:12]
    return f"{MEMORY}{image.width}x{image.height} {image.mode}, sha256 {digest}>"


def _path_or_image(given: object) -> object:
    if isinstance(given, str | os.PathLike) and os.fspath(given):
        return str(given)
    if given is None or isinstance(given, Image):
        return given
    raise ValueError(f"{given!r} is no picture; give a file's path or a PIL image")


def _in_json(given: str | Image) -> str:
    return stand_in(given) if isinstance(given, Image) else given


def _listed(given: object) -> object:
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(",") if name.strip())
    return given


def _numbers(given: object, info: ValidationInfo) -> object:
    if isinstance(given, str):
        try:
            return tuple(float(part) for part in given.split(","))
        except ValueError:
            raise ValueError(f"{info.field_name} = {given!r}; give a number, or several parted by commas") from None
    return (given,) if isinstance(given, int | float) and not isinstance(given, bool) else given


def typed(numbers: tuple[float, ...]) -> str:
    """Numbers as a person writes them."""
    return ",".join(f"{number:g}" for number in numbers)


def _rising_shares(shares: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
    if shares is not None and not (len(shares) == 2 and 0 <= shares[0] < shares[1] <= 1):
        raise ValueError(f"{info.field_name} = {typed(shares)}; give two rising shares of the steps between 0 and 1")
    return shares


def _known_apg(given: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if given is not None:
        share, norm, momentum = (*given, 0.0, 0.0)[:3] if 1 <= len(given) <= 3 else (-1.0, 0.0, 0.0)
        if not (0 <= share <= 1 and 0 <= norm < math.inf and -1 < momentum < 1):
            raise ValueError(
                f"apg = {typed(given)}; give a share from 0 to 1, then if wanted a norm from 0 (no limit) up, "
                "then a momentum between -1 and 1, as in 0,7.5,-0.75"
            )
    return given


def _known_threshold(given: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if given is not None and not (
        len(given) in (1, 2) and 0.5 <= given[0] <= 1 and all(0 < r < math.inf for r in given[1:])
    ):
        raise ValueError(
            f"dynamic_threshold = {typed(given)}; give a quantile from 0.5 to 1, then if wanted a range above 0, "
            "as in 0.995,4"
        )
    return given


def _pair(given: object) -> object:
    try:
        return tuple(int(part) for part in given.split(",")) if isinstance(given, str) else given
    except ValueError:
        return ()  # refused below


def _two_numbers(given: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
    if given is not None and not (len(given) == 2 and all(0 <= number <= MAX_TOLD for number in given)):
        raise ValueError(
            f"{info.field_name} = {typed(given) or 'no numbers'}; give two numbers of pixels from 0 to {MAX_TOLD}, "
            "height (or top) first, as in 1024,768"
        )
    return given


def _whole_numbers(given: object) -> object:
    if isinstance(given, str):
        try:
            given = tuple(int(part) for part in given.split(","))
        except ValueError:
            raise ValueError(f"outpaint = {given!r}; give one number of pixels, or four parted by commas") from None
    return (given,) * 4 if isinstance(given, int) and not isinstance(given, bool) else given


Picture = Annotated[
    str | Image, PlainSerializer(_in_json, return_type=str, when_used="json"), WithJsonSchema({"type": "string"})
]
Given = BeforeValidator(_path_or_image)
Listed = BeforeValidator(_listed)
Numbers = BeforeValidator(_numbers)
WholeNumbers = BeforeValidator(_whole_numbers)
RisingShares = AfterValidator(_rising_shares)
KnownAPG = AfterValidator(_known_apg)
KnownThreshold = AfterValidator(_known_threshold)
Told = Annotated[tuple[int, ...] | None, BeforeValidator(_pair), AfterValidator(_two_numbers)]
"""Two numbers of pixels that a model is told."""
DeepCache = Annotated[
    int | None,
    Field(
        ge=1,
        le=20,
        description="Compute the deep part of a U-Net in one step of so many, e.g. 2; changes the picture (default: 1, "
        "in all).",
    ),
    Flag(value="STEPS"),
]
BlockCache = Annotated[
    float | None,
    Field(
        ge=0,
        le=1,
        description="Use a transformer's later blocks again while the first one's change differs by less than this "
        "share, e.g. 0.1; changes the picture (default: 0, which is off).",
    ),
    Flag(value="SHARE"),
]
