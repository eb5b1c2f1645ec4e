"""The compiled library, and one whose code for AVX512 and AMX is made of AVX2 instructions."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from sfumato.kernels import available, library, library_reason
from sfumato.kernels.build import build
from sfumato.kernels.library import TILES, Library, declared

needs_library = pytest.mark.skipif(available() is None, reason=library_reason())


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> Library:
    """Compiled once for each change of the sources and kept with pytest's cache."""
    out = Path(pytestconfig.cache.mkdir("kernels"), "emulated.so")  # type: ignore[union-attr]
    problem = build(out, emulated=("avx512", "amx"))
    if problem is not None:
        pytest.skip(problem)
    return Library(declared(ctypes.CDLL(str(out))), 2, None)


@pytest.fixture(scope="session")
def emulated_tiles(emulated: Library) -> Library:
    """The same, with the kernels of a processor with AMX."""
    return Library(emulated.handle, TILES, None)


@pytest.fixture(params=["real", "avx512 emulated"])
def real_and_emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test twice: on this processor's instructions, and with those of AVX512 made of AVX2's."""
    if request.param != "real":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "_open", lambda: (emulated, "emulated"))
