"""Make the notebooks from the scripts: `python examples/make_notebooks.py`.

A script is cut into cells at its lines `# %%`, and its cells are run, so that the notebooks come with their pictures.
A picture is the value of a cell's last expression; it is kept small, as a JPEG.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
QUALITY = 85  # of JPEGs
Output = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cell's kind, "markdown" or "code", and its text."""

    kind: str
    text: str


def scripts() -> list[Path]:
    """The examples, in their order."""
    return sorted(HERE.glob("[0-9]*.py"))


def cells(script: str) -> list[Cell]:
    """The cells of a script in the percent format; ValueError for text before the first."""
    before, *parts = ("\n" + script).split("\n# %%")
    if before.strip():
        raise ValueError(f"{before.strip().splitlines()[0]!r} stands before the first cell; put '# %%' above it")
    found = []
    for part in parts:
        head, _, text = part.partition("\n")
        if head.strip() == "[markdown]":
            found.append(Cell("markdown", "\n".join(line[2:] for line in text.strip().splitlines())))
        else:
            found.append(Cell("code", text.strip()))
    return found


def run(code: Sequence[str]) -> Iterator[list[Output]]:
    """What some cells put out, one after the other."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for text in code:
        *statements, last = ast.parse(text).body
        shown = isinstance(last, ast.Expr)
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(statements if shown else [*statements, last], []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        outputs: list[Output] = []
        if printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
        if isinstance(value, Image.Image):
            outputs.append({"data": {"image/jpeg": jpeg(value)}, "metadata": {}, "output_type": "display_data"})
        yield outputs


def jpeg(image: Image.Image) -> str:
    """A picture as JPEG in base64."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def lines(text: str) -> list[str]:
    """A text as notebooks hold it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def notebook(script: str, outputs: Sequence[list[Output]] = ()) -> dict[str, Any]:
    """A script as a notebook (format 4.5). outputs: those of its cells of code, or none."""
    given = iter(outputs)
    made = []
    for i, cell in enumerate(cells(script)):
        row: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{i}", "metadata": {}, "source": lines(cell.text)}
        if cell.kind == "code":
            row |= {"execution_count": None, "outputs": next(given, [])}
        made.append(dict(sorted(row.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def written(book: dict[str, Any]) -> str:
    """A notebook as its file's text."""
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Run the scripts and write the notebooks beside them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    home = Path.cwd()
    for path in scripts():
        script = path.read_text()
        code = [cell.text for cell in cells(script) if cell.kind == "code"]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # for the pictures that the script saves
            try:
                outputs = list(run(code))
            finally:
                os.chdir(home)
        target = path.with_suffix(".ipynb")
        target.write_text(written(notebook(script, outputs)))
        print(f"{target} {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
