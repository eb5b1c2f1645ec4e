"""Reading and writing the `config.json` of a model folder as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def frozen(value: Any) -> Any:
    """JSON lists become tuples, at any depth, so that a config can be hashed and compared."""
    return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value


def thawed(value: Any) -> Any:
    """Tuples become JSON lists, at any depth."""
    return [thawed(v) for v in value] if isinstance(value, list | tuple) else value


def read_config(cls: type[T], raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> T:
    """Build the dataclass `cls` from the entries of a `config.json`.

    `fixed` lists options of other programs' configs for which only the named values are implemented.
    Keys that start with `_` are notes. A key that is nowhere known may only be switched off (None or False).
    Raises ValueError naming the key, the value and what is allowed.
    """
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    taken: dict[str, Any] = {}
    for key, value in raw.items():
        if key.startswith("_"):
            continue
        if key in known:
            taken[key] = frozen(value)
        elif key in fixed:
            check_choice(f"{cls.__name__}: {key}", frozen(value), fixed[key])
        elif value is not None and value is not False:
            near = difflib.get_close_matches(key, [*known, *fixed], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__}: unknown option {key} = {value!r}{hint} known: {sorted(known)}")
    return cls(**taken)


def write_config(config: Any, class_name: str) -> dict[str, Any]:
    """The `config.json` entries of a dataclass, with the class name that diffusers looks up."""
    fields = {f.name: thawed(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {"_class_name": class_name, **fields}


def check_choice(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{what} = {value!r} is not supported; allowed: {names}")


def per_level(what: str, value: Any, levels: int) -> tuple[Any, ...]:
    """One value for each level: a single value is repeated, a tuple must have `levels` entries."""
    if not isinstance(value, tuple):
        return (value,) * levels
    if len(value) != levels:
        raise ValueError(f"{what} = {value!r} has {len(value)} entries; give one value or {levels}")
    return value
