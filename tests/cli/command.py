"""Running the command line in the tests' own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli import main


def sfumato(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def pixels(path: str | Path) -> bytes:
    """The bytes of a picture's pixels."""
    with Image.open(path) as image:
        return image.tobytes()
