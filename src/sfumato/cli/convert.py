"""`sfumato convert`: a model from any layout to one file or a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[str, typer.Argument(help="A file of weights, a model folder, or a name as --model takes it.")],
    out: Annotated[str, typer.Argument(help="FILE.safetensors for one file, anything else for a folder.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16 or bf16 (default: each weight as it is).")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option("--prediction", help="eps or v: what the file's network predicts, if it does not say.")
    ] = None,
    vae: Annotated[str | None, typer.Option("--vae", help="Take the autoencoder from there.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Where to take what the file lacks: a model, or files parted by commas."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Which it is of the models that look alike, if no name says.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged U-Net of a training checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a model in another layout: one safetensors file, or a folder that diffusers opens."""
    target = Path(out)
    if target.exists() and not force and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} exists; name another place, or replace it with --force")
    from sfumato.runtime import choose
    from sfumato.weights.model import load_model, save_model

    averages = True if ema else None
    parts = load_model(model, None, vae=vae, base=base, prediction=prediction, ema=averages, preset=preset)
    save_model(parts, target, None if dtype is None else choose("cpu", dtype).dtype)
    print(target)
    print(f"wrote {parts.pipeline} as {'one file' if target.is_file() else 'a folder'}", file=sys.stderr)
