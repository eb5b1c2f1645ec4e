"""`sfumato bench`: how fast this machine makes pictures, and how near that is to what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="Built-in name, file, folder or hub id.")] = "mini",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps a picture.")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns that count; medians are given.")] = 5,
    count: Annotated[
        list[int] | None, typer.Option("--count", min=1, help="Pictures in one go; may be repeated (default: 1, 8).")
    ] = None,
    cold: Annotated[int, typer.Option("--cold", min=0, help="Cold starts of the command; 0 leaves them out.")] = 3,
    precision: Annotated[
        str | None, typer.Option("--precision", help="float32, bfloat16 or float16 (default: this machine's best).")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for bench.md, bench.json and bench.png.")
    ] = None,
) -> None:
    """Time pictures on this machine's CPU, and say how much of it they use; prints a table."""
    import os

    from sfumato.evaluate.bench import Work, measured
    from sfumato.runtime import use_threads

    use_threads(threads)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the cold starts
    work = Work(model, steps, counts=tuple(count or (1, 8)), rounds=rounds, cold=cold, precision=precision)
    found = measured(work)
    print(found.markdown(), end="")
    for path in found.write(out) if out is not None else []:
        print(path)
