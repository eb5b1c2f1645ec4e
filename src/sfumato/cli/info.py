"""`sfumato samplers` and `sfumato spacings`: what the names mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping


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
