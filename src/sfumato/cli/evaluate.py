"""`sfumato eval`: how good a model is, as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure a model.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure a model."""


@app.command()
def mini(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the table to this file.")] = None,
) -> None:
    """Measure the built-in model on its fixed lists of prompts."""
    from sfumato.evaluate import mini as measure

    measure.run(out)
