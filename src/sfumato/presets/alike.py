"""Models that look alike: what was distilled from a model has its shapes, and is made for few steps without guidance.

Which of them a model is, is read off, the first that says something: the caller's word; the note of a model that this
package wrote; names (of its file or folder, in its metadata, of what its network was made from); a folder's scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sfumato.presets.base import Preset

# Schedulers that say enough by themselves. Euler's with trailing steps, which Lightning models have, suits others, too.
TELLING = ("LCMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler")
WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+|\d+")
ASKED, NOTED = "the word of --preset", "its own note"
MOST_STEPS = 16  # a larger number before "steps" counts steps of training


@dataclass(frozen=True)
class Kind:
    """Which of the models that look alike a model is.

    name:     of the preset.
    steps:    that its own name says it was made for; None: those of the preset.
    evidence: where that was read.
    doubt:    the name of a preset to whose models the scheduler belongs as well; else empty.
    """

    name: str
    steps: int | None = None
    evidence: str = ""
    doubt: str = ""

    @property
    def guessed(self) -> bool:
        """Whether nobody has said so."""
        return self.evidence not in (ASKED, NOTED)

    def __str__(self) -> str:
        return f"by {self.evidence}" if self.evidence else f"{self.doubt} looks the same, --preset says which"

    def to_dict(self) -> dict[str, Any] | None:
        """What is written down of it; None for what is in doubt."""
        return None if self.doubt else {"name": self.name, "steps": self.steps}

    @classmethod
    def noted(cls, raw: Any) -> Kind | None:
        """What `to_dict` wrote, None for nothing; ValueError for something else."""
        if raw is None:
            return None
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            raise ValueError(f"the preset that it notes is {raw!r:.80}")
        steps = raw.get("steps")
        return cls(raw["name"], steps if isinstance(steps, int) and steps > 0 else None, NOTED)

    def line(self, source: str, preset: Preset) -> str:
        """One line for people: what a model is taken for, why, and how to overrule it."""
        steps = preset.num_inference_steps
        settings = (
            f"{steps} step{'s' if steps > 1 else ''} with guidance {preset.guidance_scale:g} unless told otherwise"
        )
        taken = f"{source} is taken for {preset.title}"
        if self.doubt:
            return f"{taken}, {settings}; if it is {self.doubt}, which looks the same, say --preset {self.doubt}"
        return f"{taken} by {self.evidence}, {settings}; if it is not, say --preset {preset.like or 'NAME'}"


def kind_of(
    among: Sequence[Preset],
    texts: Mapping[str, str],
    scheduler: Mapping[str, Any] | None = None,
    asked: str | None = None,
    noted: Kind | None = None,
) -> Kind | None:
    """Which of some models that look alike one is; None: the first, and nothing speaks for another.

    texts:     names by where they were read, the stronger evidence first; scheduler: the entries of a folder's.
    asked:     the caller's word; noted: the model's own.
    Raises ValueError for a word that is none of these models'.
    """
    names = [preset.name for preset in among]
    if asked is not None:
        if asked in {preset.like for preset in among}:
            return Kind(asked if asked in names else names[0], evidence=ASKED)
        if asked not in names:
            raise ValueError(f"preset {asked!r} is none of the models that this one looks like: {', '.join(names)}")
        return Kind(asked, evidence=ASKED)
    if noted is not None and noted.name in names:
        return noted
    others = [preset for preset in among[1:] if preset.like]
    for where, text in texts.items():
        words = [word.lower() for word in WORD.findall(text)]
        for preset in others:
            if _named(preset, words):
                return Kind(preset.name, _steps(words), where)
        if _named(among[0], words):
            return None
    for preset in others:
        kind = str(preset.scheduler["_class_name"])
        if not _same(preset.scheduler, among[0].scheduler if scheduler is None else scheduler):
            continue
        if kind in TELLING:
            return Kind(preset.name, evidence=f"its {kind}")
        if preset.like == names[0]:
            return Kind(names[0], doubt=preset.name)
    return None


def dressed(base: Preset, variant: Preset, steps: int | None = None) -> Preset:
    """The variant with the networks of `base`, which has its shapes."""
    return replace(
        variant,
        denoiser=base.denoiser,
        vae=base.vae,
        text=base.text,
        text_2=base.text_2,
        text_3=base.text_3,
        num_inference_steps=steps or variant.num_inference_steps,
    )


def _named(preset: Preset, words: Sequence[str]) -> bool:
    """Whether some words have the last one of a preset's name, alone or at the end of one: "turbo", "sdxlturbo"."""
    return any(word.endswith(preset.name.rsplit("-", 1)[-1]) for word in words)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two schedulers are of one class, and spread their steps alike."""
    return all(other.get(name) == value for name, value in one.items() if name in ("_class_name", "timestep_spacing"))


def _steps(words: Sequence[str]) -> int | None:
    """The number before "step" or "steps", where it may be one of sampling."""
    for number, word in pairwise(words):
        if number.isdecimal() and word in ("step", "steps") and 0 < int(number) <= MOST_STEPS:
            return int(number)
    return None
