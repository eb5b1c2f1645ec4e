"""Memory that large buffers leave behind, kept for the next ones instead of going back to the system.

A buffer fresh from the system is a page fault every 4 KiB, and of full-size networks these cost more than many of the
products that fill it. glibc gives each buffer above a threshold back as soon as it is free; `kept` raises the
thresholds for as long as pictures are made. Elsewhere, and with SFUMATO_ALLOCATOR=system, everything stays as it is.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLE = "SFUMATO_ALLOCATOR"
POLICIES = ("keep", "system")
# Whoever sets one of these has decided.
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
# Parameters of mallopt(3), and values. The restored ones are what glibc's own rule arrives at after large buffers;
# its first ones cannot be had back, as any call of mallopt ends that rule.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER, LARGEST = -1, 2**31 - 1
GROWN = 32 * 2**20


def policy(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """What is done in this process, "keep" or "system", and one line that says why; ValueError for another wish."""
    asked = environment.get(VARIABLE, "")
    if asked and asked not in POLICIES:
        raise ValueError(f"{VARIABLE} = {asked!r}; use one of {', '.join(POLICIES)}, or leave it unset")
    if asked == "system":
        return "system", f"left alone by {VARIABLE}=system"
    own = [name for name in OWN_SETTINGS if environment.get(name)]
    if own:
        return "system", f"left alone, as {own[0]} is set"
    other = [name for name in OTHERS if name in environment.get("LD_PRELOAD", "")]
    if other:
        return "system", f"{other[0]} is preloaded and left alone"
    if not _glibc():
        return "system", "left alone: only glibc's is known"
    return "keep", "glibc; large buffers are kept while pictures are made"


class Keeper:
    """Raises the process's thresholds when the first one enters and restores them when the last one leaves."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def enter(self) -> None:
        """Keep large buffers from now on."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                libc = ctypes.CDLL(None)
                # Older versions of glibc take no threshold above half a heap, 32 MiB.
                if not libc.mallopt(MMAP_THRESHOLD, LARGEST):
                    libc.mallopt(MMAP_THRESHOLD, GROWN)
                libc.mallopt(TRIM_THRESHOLD, NEVER)

    def leave(self) -> None:
        """Give them back, those that are free now as well."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                libc = ctypes.CDLL(None)
                libc.mallopt(MMAP_THRESHOLD, GROWN)
                libc.mallopt(TRIM_THRESHOLD, 2 * GROWN)
                libc.malloc_trim(0)


KEEPER = Keeper()  # one, as it counts the users of one process's allocator


@contextmanager
def kept() -> Iterator[None]:
    """Keep large buffers while inside, where the policy is "keep"; may be nested and entered by several threads."""
    if policy()[0] == "system":
        yield
        return
    KEEPER.enter()
    try:
        yield
    finally:
        KEEPER.leave()


def trim() -> None:
    """Give back what is free now, also while large buffers are kept; does nothing where the policy is "system"."""
    if policy()[0] == "keep":
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # not a system with glibc
        return False
