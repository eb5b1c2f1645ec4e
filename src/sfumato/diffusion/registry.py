"""Look-up by name with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def find(table: Mapping[str, T], name: str, kind: str) -> T:
    """table[name]; ValueError naming the near misses and everything known when there is no such row."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    raise ValueError(f"unknown {kind} {name!r}{hint} known: {', '.join(table)}")
