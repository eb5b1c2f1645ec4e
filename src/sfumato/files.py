"""Writing files so that a reader, or an interruption, never meets half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the place of `path` when the block ends without an error.

    Missing folders are made. On any error, an interruption included, `path` stays as it was and nothing is
    left over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers such as PIL choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: Path | str) -> Iterator[Path]:
    """Like `replacing`, but FileExistsError where `path` is there already, even since the block began.

    FileExistsError means just that; NotADirectoryError a file in the place of a folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path.parent} is no folder, so {path.name} cannot be written into it") from None
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise FileExistsError(f"{path} exists and is not overwritten; name another place") from None
        except OSError:  # a file system without links: claim the name, then fill it
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                raise FileExistsError(f"{path} exists and is not overwritten; name another place") from None
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


def write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
