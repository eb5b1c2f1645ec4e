"""`sfumato data`: building training data."""

from __future__ import annotations

import sys
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
) -> None:
    """Render the icon data set (about 9,600 pictures of 128x128 in 9 styles) from open icon packages."""
    from sfumato.data import icons as builder

    def progress(done: int, total: int, style: str) -> None:
        print(f"[{done}/{total}] {style}", file=sys.stderr)

    print(builder.build(out, progress=progress))
