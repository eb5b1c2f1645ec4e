"""Options as dataclass fields: reading, writing and converting `scheduler_config.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from ..files import read_json, replacing
from .registry import find

CONFIG_NAME = "scheduler_config.json"
# Options of schedulers that have no class here; configurations that were converted from these carry them along.
FOREIGN = frozenset({"s_noise"})
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
C = TypeVar("C", bound="Configured")


class Config(dict[str, object]):
    """A scheduler's options, readable as items and as attributes."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this scheduler has no option {name!r}; it has {', '.join(self)}") from None


class Configured:
    """A class whose subclasses are dataclasses of options, known by name in configuration files."""

    known: ClassVar[dict[str, type[Configured]]] = {}
    given: frozenset[str]
    extras: dict[str, object]

    def __init_subclass__(cls) -> None:
        """Make every subclass available to configurations that name it."""
        Configured.known[cls.__name__] = cls

    def __new__(cls: type[C], *args: object, **options: object) -> C:
        """Note which options were given: a conversion to another class takes the others from its defaults."""
        self = object.__new__(cls)
        self.given = frozenset([*cls.option_names()[: len(args)], *options])
        self.extras = {}
        return self

    @classmethod
    def option_names(cls) -> list[str]:
        """This class's options in the order of its constructor; none for a class that is no dataclass."""
        return [f.name for f in fields(cls)] if is_dataclass(cls) else []

    @property
    def config(self) -> Config:
        """All options with their values, those kept for other classes included."""
        options = {name: getattr(self, name) for name in self.option_names()}
        defaults = sorted(name for name in options if name not in self.given)
        about = {"_class_name": type(self).__name__, "_use_default_values": defaults}
        return Config({**self.extras, **options, **about})

    @classmethod
    def from_config(cls: type[C], config: Mapping[str, object], **options: object) -> C:
        """A scheduler from a configuration, with some options replaced.

        Called on a class of its own name or another one: options that only the configuration's class has are
        kept for conversions back, and options that it left at its defaults take this class's defaults. Called
        on `Scheduler`, the configuration's `_class_name` decides. ValueError for an unknown class, an option
        that no class has, or a value that is not supported.
        """
        if "_class_name" not in config and not cls.option_names():
            raise ValueError(f"the configuration lacks _class_name; known: {', '.join(cls.makers())}")
        name = str(config.get("_class_name", cls.__name__))
        target = cls if cls.option_names() else find(cls.makers(), name, "scheduler class")
        defaults = config.get("_use_default_values", ())
        assert isinstance(defaults, list | tuple)
        wanted = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaults} | options
        names = target.option_names()
        extras = {k: v for k, v in wanted.items() if k not in names}
        if name == target.__name__:
            everybody = FOREIGN.union(*(c.option_names() for c in cls.makers().values()))
            strange = [k for k, v in extras.items() if k not in everybody and v not in (None, False)]
            if strange:
                raise ValueError(f"{target.__name__} has no option {strange[0]!r}; it has {', '.join(names)}")
        scheduler = target(**{k: v for k, v in wanted.items() if k in names})
        scheduler.extras = extras
        if not isinstance(scheduler, cls):
            raise ValueError(f"{name} is no {cls.__name__}")
        return scheduler

    @classmethod
    def makers(cls) -> dict[str, type[Configured]]:
        """The classes that a configuration can name."""
        return {name: c for name, c in cls.known.items() if c.option_names() and not c.__subclasses__()}

    @classmethod
    def from_pretrained(
        cls: type[C],
        folder: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> C:
        """The scheduler of a model folder: reads scheduler_config.json there or in its `scheduler` folder.

        folder: a path, or a hub id "owner/name", whose file is fetched where the hub's cache has it not.
        FileNotFoundError, naming the places looked at, when there is none.
        """
        places = [Path(folder) / (subfolder or ""), Path(folder) / "scheduler"]
        for place in places:
            if (place / CONFIG_NAME).is_file():
                return cls.from_config(read_json(place / CONFIG_NAME))
        if not Path(folder).exists() and HUB_ID.fullmatch(str(folder)):
            name = f"{subfolder or 'scheduler'}/{CONFIG_NAME}"
            return cls.from_config(read_json(fetched(str(folder), name, revision, cache_dir, local_files_only)))
        raise FileNotFoundError(f"no {CONFIG_NAME} in {' or '.join(map(str, places))}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write scheduler_config.json into a folder, which is made if need be.

        ValueError for a scheduler put together from parts: no configuration names these.
        """
        if not self.option_names():
            known = ", ".join(self.makers())
            raise ValueError(f"a {type(self).__name__} made from parts has no configuration to save; these do: {known}")
        config = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        text = json.dumps(config, indent=2, sort_keys=True)
        with replacing(Path(folder) / CONFIG_NAME) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def allow(self, option: str, *allowed: object) -> None:
        """ValueError unless an option has one of the values that are supported."""
        value = getattr(self, option)
        if value not in allowed:
            values = ", ".join(map(repr, allowed))
            raise ValueError(f"{type(self).__name__} does not support {option}={value!r}; allowed: {values}")


def fetched(repo: str, name: str, revision: str | None, cache: str | os.PathLike[str] | None, local: bool) -> Path:
    """A small file of a repository on the hub, in its cache; FileNotFoundError in one line without it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError

    network: type[Exception] = HfHubHTTPError.__mro__[1]  # the base of every complaint of the HTTP library
    place = None if cache is None else os.fspath(cache)
    try:
        return Path(hf_hub_download(repo, name, revision=revision, cache_dir=place, local_files_only=local))
    except (network, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"no {name} of {repo}: {first}; give the path of a model folder instead") from None
