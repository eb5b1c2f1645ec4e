"""`sfumato data`: building training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build training data.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Build training data."""


@app.command()
def icons(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures and their index.")],
    packages: Annotated[
        Path | None, typer.Option(help="A node_modules folder that holds the packages already (default: npm fetches).")
    ] = None,
) -> None:
    """Render the icon data set (about 12,000 pictures of 128x128 in 9 styles) from open icon packages."""
    from sfumato.cli.line import Line
    from sfumato.data import icons as builder

    line = Line(every=0)
    print(builder.build(out, packages, lambda done, total, style: line.show(f"styles {style}", done, total)))
