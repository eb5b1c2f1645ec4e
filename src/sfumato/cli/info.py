"""`sfumato samplers` and `sfumato spacings`: what the names mean; `sfumato info`: what a file or folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sfumato.weights.report import Report

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NAMES = 12  # names listed before "and n more"


def info(
    model: Annotated[str, typer.Argument(help="A file of weights, a model folder, or a name as --model takes it.")],
    check: Annotated[bool, typer.Option("--check", help="Read every number and look for NaN and infinity.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a file or folder holds: family, prediction, parts, types, names that do not fit."""
    from sfumato.weights.model import locate
    from sfumato.weights.report import bad_numbers, report

    if model.lower().endswith(PICTURES) and Path(model).is_file():
        raise ValueError(f"{model} is a picture; `sfumato recipe {model}` says what it was made from")
    path = locate(model)
    found = report(path)
    bad = bad_numbers(path) if check else None
    if as_json:
        print(json.dumps(found.to_dict() | ({} if bad is None else {"not_finite": bad}), indent=2))
    else:
        print_report(found, bad)


def samplers() -> None:
    """List the samplers."""
    from sfumato.diffusion.samplers import SAMPLERS

    _print_table({name: entry.run for name, entry in SAMPLERS.items()})


def spacings() -> None:
    """List the spacings: how steps are spread over the noise levels."""
    from sfumato.diffusion.grid import SPACINGS

    _print_table(SPACINGS)


def _print_table(rows: Mapping[str, Callable[..., object]]) -> None:
    width = max(map(len, rows))
    for name, function in rows.items():
        print(f"{name:<{width}}  {(function.__doc__ or '').strip().splitlines()[0]}")


def print_report(found: Report, bad: list[str] | None) -> None:
    """The report as a table of lines."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, soft_wrap=True)
    preset = found.preset
    lines = {
        "file": f"{found.path} ({found.size / 1e9:.2f} GB, {found.layout})",
        "holds": found.kind if preset is None else f"{preset.title} ({preset.name}): {found.kind}",
        "taken so": found.alike,
        "prediction": "" if preset is None else f"{preset.prediction} (from {found.evidence})",
        "size": "" if preset is None else f"{preset.width}x{preset.height} pixels",
        "averages": "an averaged U-Net (EMA) as well" if found.ema else "",
        "lacks": ", ".join(found.absent),
        "missing": named(found.missing),
        "unknown": named(found.unknown),
        "numbers": "" if bad is None else named(bad) + " not finite" if bad else "all finite",
    }
    for name, text in lines.items():
        if text:
            out.print(f"{name:<11}{text}", markup=False)
    for name, text in found.metadata.items():
        out.print(f"{'note':<11}{name} = {text}", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("part", "names", "parameters", "types"):
        table.add_column(title, justify="right" if title == "parameters" else "left")
    for part in found.parts:
        types = ", ".join(f"{dtype} {count / part.parameters:.0%}" for dtype, count in part.dtypes.items())
        table.add_row(part.name, part.spelling, f"{part.parameters:,}", types if len(part.dtypes) > 1 else types[:-5])
    out.print(table)


def named(names: tuple[str, ...] | list[str]) -> str:
    """'2: a, b', cut after some names."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{len(names)}: {', '.join(names[:NAMES])}{more}" if names else ""
