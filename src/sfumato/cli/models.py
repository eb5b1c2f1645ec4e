"""`sfumato models`: what is found in the models folder and in the hub's cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sfumato.weights.listing import Entry

UNITS = ("B", "kB", "MB", "GB", "TB")


def models(
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Look in this folder instead of the models folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List models, adapters and embeddings: name, kind, family, size, path."""
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; leave out --folder to look in the models folder")
    from huggingface_hub import constants

    from sfumato.weights.hub import models_folder
    from sfumato.weights.listing import listing

    root = models_folder() if folder is None else folder
    cache = Path(constants.HF_HUB_CACHE)
    found = listing(root, cache)
    if as_json:
        looked = {"models_folder": str(root), "hub_cache": str(cache)}
        print(json.dumps({**looked, "models": [entry.to_dict() for entry in found]}, indent=2))
        return
    if found:
        show(found)
    print(f"{len(found)} found; looked in {root} and {cache}", file=sys.stderr)
    if not found:
        print(
            f"put models into {root} (or name another folder in SFUMATO_MODELS), "
            "or name one of the hub: --model owner/name",
            file=sys.stderr,
        )


def show(found: Sequence[Entry]) -> None:
    """A table on stdout, a line an entry; as wide as it needs to be where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=10_000)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("name", overflow="fold", min_width=12)
    table.add_column("kind", no_wrap=True)
    table.add_column("family", overflow="fold", min_width=12)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("path", overflow="fold", style="dim")
    for entry in found:
        style = "red" if entry.kind == "unreadable" else ""
        cells = (entry.name, entry.kind, entry.family, size(entry.size), str(entry.path))
        table.add_row(*(Text(cell, style=style) for cell in cells))
    console.print(table)


def size(count: int) -> str:
    """Bytes for people: "4.27 GB", three digits."""
    value = float(count)
    for unit in UNITS[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {UNITS[-1]}"
