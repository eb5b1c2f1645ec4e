"""`sfumato restore`: one line for what cannot be, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli.app import main


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """A flat picture."""
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--degradation", "rain"], "known: auto, noise, missing, blur, lowres"),
        (["--scale", "3"], "give 2 or 4"),
        ([], "no noise to speak of"),
        (["-d", "missing"], "needs a mask"),
        (["--mask", "nowhere.png"], "nowhere.png"),
    ],
)
def test_bad_input_is_one_line(grey: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = grey.with_name("out.png")
    assert main(["restore", str(grey), "-o", str(out), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()


def test_a_file_that_exists_is_kept(grey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = grey.read_bytes()
    assert main(["restore", str(grey), "--scale", "2", "-o", str(grey)]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert grey.read_bytes() == before


def test_a_small_picture_is_enlarged(grey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grey.with_name("large.png")
    assert main(["restore", str(grey), "--scale", "2", "-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.size == (32, 32)
