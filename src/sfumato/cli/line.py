"""A progress line on stderr for long work: rewritten on a terminal, now and then a new one in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping


class Line:
    """Shows what was done last; every: seconds between two lines where stderr is no terminal."""

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self.last = -every
        self.terminal = sys.stderr.isatty()

    def show(self, what: str, done: int, total: int, numbers: Mapping[str, float] | None = None) -> None:
        """`what done/total name=number ...`; the end of each thing is always shown."""
        now = time.monotonic()
        if not self.terminal and done < total and now - self.last < self.every:
            return
        self.last = now
        values = " ".join(f"{name}={value:.4g}" for name, value in (numbers or {}).items())
        text = f"{what} {done}/{total} {values}".rstrip()
        if self.terminal:
            # Clear to the end of the line, so that nothing of a longer one stays.
            print(f"\r{text}\033[K", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
