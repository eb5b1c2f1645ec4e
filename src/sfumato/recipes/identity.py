"""Which weights made a picture: the first ten digits of a file's sha256, as A1111 shows them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from sfumato.files import read_json, write_json

DIGITS = 10
LARGE = 2**28  # bytes from which on a hash is worth remembering
BLOCK = 2**22
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".gguf")


def remembered() -> Path:
    """The file of hashes that were computed before, among the user's cached files."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sfumato" / "hashes.json"


def fingerprint(path: Path) -> str:
    """Ten hexadecimal digits of a file's sha256; of a folder, those of the list of its weight files' sha256.

    Large files' are kept in the user's cache, by path, size and time of the last change.
    """
    if path.is_file():
        return _sha256(path)[:DIGITS]
    files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS and file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:DIGITS]


class Fingerprint:
    """A fingerprint that is computed while other work goes on (hashing lets go of Python's lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: str | None = None
        self._thread = threading.Thread(target=self._find, daemon=True)
        self._thread.start()

    def get(self) -> str | None:
        """The fingerprint, waiting for it if need be; None where the file cannot be read any more."""
        self._thread.join()
        return self._found

    def _find(self) -> None:
        try:
            self._found = fingerprint(self.path)
        except OSError:
            self._found = None


def _sha256(path: Path) -> str:
    state = path.stat()
    key = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    known = _known() if state.st_size >= LARGE else {}
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if state.st_size >= LARGE:
        with contextlib.suppress(OSError):  # a home that cannot be written to only costs time
            write_json(remembered(), {**_known(), key: found})
    return found


def _known() -> dict[str, str]:
    try:
        return read_json(remembered())
    except (OSError, ValueError):
        return {}
