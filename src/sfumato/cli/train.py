"""`sfumato train`: a recipe in, a model folder out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run (default: the recipe's).")] = None,
) -> None:
    """Train a model and print its folder; a run that was interrupted continues where it stopped."""
    if not recipe.is_file():
        raise FileNotFoundError(f"no recipe {recipe}")
    from sfumato import train as training
    from sfumato.cli.line import Line

    folder = training.run(recipe, out, Line().show)
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, the first
        print(folder)
