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
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Model folder (default: the built-in).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report and all pictures.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, max=500, help="How many of the 500 prompts.")] = None,
    icons: Annotated[
        Path | None, typer.Option(help="Folder of the icon data set, for the ceiling and the autoencoder.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps a picture.")] = 20,
    grid: Annotated[Path | None, typer.Option(help="File for a labelled sheet of 64 pictures.")] = None,
) -> None:
    """Draw the fixed prompts and measure concepts, colours, places and counts; prints a table."""
    from rich.console import Console

    from sfumato.cli.line import Line
    from sfumato.evaluate import mini as measure

    line = Line()
    report = measure.run(
        model, out, prompts, lambda done, total: line.show("pictures", done, total), icons, steps, grid
    )
    Console().print(report.table())
