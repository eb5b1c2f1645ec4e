"""What a restored picture was made from: the damaged picture's file, and what was taken to be wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TASK = "restore"  # under this name a recipe says that it is one of these
INPUTS = ("picture", "mask")
TYPES = {"str": (str,), "float": (int, float), "int": (int,), "None": (type(None),)}


@dataclass(frozen=True)
class Restored:
    """The arguments of `restore` that made a picture; `model` is "" for the pixel model of the package."""

    picture: str
    degradation: str = "auto"
    noise: float | None = None
    mask: str | None = None
    blur: float | None = None
    scale: int | None = None
    prompt: str = ""
    model: str = ""
    guidance_scale: float = 1.0
    steps: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Restored:
        """From a recipe's fields; ValueError for one that is unknown, missing or of another type."""
        given = {name: value for name, value in recipe.items() if name != "task"}
        allowed = {field.name: field.type for field in fields(cls)}
        unknown = [name for name in given if name not in allowed]
        if unknown or "picture" not in given:
            word = f"has an unknown field {unknown[0]!r}" if unknown else "names no picture"
            raise ValueError(f"the recipe of restoration {word}; its fields are {', '.join(allowed)}")
        for name, value in given.items():
            kinds = [kind for word in str(allowed[name]).split(" | ") for kind in TYPES[word]]
            if type(value) not in kinds:
                raise ValueError(f"the recipe of restoration says {name} = {value!r}; it should be {allowed[name]}")
        return cls(**given)

    def entry(self) -> dict[str, Any]:
        """As a file keeps it: the task's name and whatever is not left at its default."""
        plain = {field.name: field.default for field in fields(self)}
        return {"task": TASK, **{name: value for name, value in asdict(self).items() if value != plain[name]}}

    def found(self, folder: Path) -> Restored:
        """With the files it names, looked for where they are said to be and else in `folder`.

        Raises FileNotFoundError for one that is in neither place, or was never a file.
        """
        places = {}
        for name in INPUTS:
            said = getattr(self, name)
            if said is None:
                continue
            if not said:
                raise FileNotFoundError(f"the {name} was in memory, not in a file; restore it from Python again")
            here = [path for path in (Path(said), folder / Path(said).name) if path.is_file()]
            if not here:
                raise FileNotFoundError(f"the {name} {said} is not there, nor beside the restored picture; put it back")
            places[name] = str(here[0])
        return Restored(**{**asdict(self), **places})


def is_restored(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe's fields are those of a restored picture."""
    return recipe.get("task") == TASK
