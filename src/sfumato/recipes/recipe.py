"""`Recipe`: what a picture was made from, whichever program wrote it down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.pipelines.request import Request, parse
from sfumato.recipes import comfy, embed, infotext
from sfumato.recipes.restored import Restored, is_restored


@dataclass(frozen=True)
class Recipe:
    """What a picture was made from.

    program:   "sfumato", "A1111" (and all who write its text) or "ComfyUI".
    fields:    of Request, as far as they are known; of a restored picture, "task" and those of `Restored`.
    made_with: what else decides the exact pixels: versions, device, precision, fingerprints of weights.
    notes:     a line for each thing that could not be understood or taken over.
    text:      A1111's text as it stands in the file; empty when there is none.
    """

    program: str
    fields: Mapping[str, Any]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    text: str = ""

    @property
    def request_fields(self) -> Mapping[str, Any]:
        """The fields; ValueError where they are those of a restored picture."""
        if is_restored(self.fields):
            raise ValueError("the picture was restored from another one, not made from a prompt; use `sfumato replay`")
        return self.fields

    @property
    def request(self) -> Request:
        """The fields as a request; ValueError where they are out of bounds here."""
        return parse(**self.request_fields)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "program": self.program,
            "request": dict(self.fields),
            "made_with": dict(self.made_with),
            "notes": list(self.notes),
        }


def read(path: Path | str) -> Recipe:
    """The recipe in a PNG, JPEG or WebP of this package, of A1111 or of ComfyUI.

    Raises FileNotFoundError, or ValueError for what is no picture, is damaged, or says nothing of its making.
    """
    entries = embed.read(path)
    text = entries.get(embed.INFOTEXT, "")
    if embed.RECIPE in entries:
        return Recipe("sfumato", _object(path, entries[embed.RECIPE]), made_with(path, entries), text=text)
    if text:
        parts = infotext.read(text)
        fields, notes = infotext.fields(parts)
        if not parts.values:
            notes.append("the text has no line of parameters; all of it is taken for the prompt")
        elif not infotext.from_here(parts) and parts.values.get("RNG") != "CPU":
            notes.append("noise was drawn by another generator, so that a replay makes a similar picture, not this one")
        known = {"model_hash": parts.values["Model hash"]} if "Model hash" in parts.values else {}
        return Recipe("A1111", fields, known, tuple(notes), text)
    if embed.GRAPH in entries:
        try:
            fields, notes = comfy.read(entries[embed.GRAPH])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Recipe("ComfyUI", fields, {}, tuple(notes))
    raise ValueError(f"{path} carries no recipe: neither of this program nor of A1111 or ComfyUI")


def made_with(path: Path | str, entries: Mapping[str, str]) -> dict[str, Any]:
    """What the entries of a file of this package say besides the request; empty where they do not."""
    return _object(path, entries[embed.MADE_WITH]) if embed.MADE_WITH in entries else {}


def entries_of(request: Request | Restored | None, made_with: Mapping[str, Any]) -> dict[str, str]:
    """What a picture's file is to say, by the names of PNG text; A1111's text has no words for restoration."""
    entries = {}
    if isinstance(request, Restored):
        entries[embed.RECIPE] = json.dumps(request.entry())
    elif request is not None:
        entries[embed.RECIPE] = json.dumps(request.model_dump(mode="json"))
        entries[embed.INFOTEXT] = infotext.write(request, made_with)
    if made_with:
        entries[embed.MADE_WITH] = json.dumps(dict(made_with))
    return entries


def _object(path: Path | str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its recipe is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its recipe is a {type(content).__name__}; a JSON object is expected")
    return content
