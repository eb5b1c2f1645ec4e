"""`sfumato restore`: one line for what cannot be, and nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_restored_picture_says_how_and_is_made_again(
    grey: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    noisy = grey.with_name("noisy.png")
    Image.fromarray(rng.integers(60, 120, (16, 16, 3), np.uint8)).save(noisy)
    out, again = (grey.with_name(f"{name}{suffix}") for name in ("out", "again"))
    assert main(["restore", str(noisy), "-o", str(out)]) == 0
    capsys.readouterr()
    assert main(["recipe", str(out), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)["request"]
    assert fields["task"] == "restore" and fields["degradation"] == "noise" and 0.05 < fields["noise"] < 0.15
    noisy.rename(grey.with_name("moved.png"))
    assert main(["replay", str(out), "-o", str(again)]) == 2
    said = capsys.readouterr().err
    assert "noisy.png is not there" in said and said.count("\n") == 1 and not again.exists()
    grey.with_name("moved.png").rename(noisy)
    assert main(["replay", str(out), "-o", str(again)]) == 0
    assert "has the same pixels" in capsys.readouterr().err


def test_a_restored_picture_is_no_request(grey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grey.with_name("large.png")
    assert main(["restore", str(grey), "--scale", "2", "-o", str(out)]) == 0
    capsys.readouterr()
    assert main(["txt2img", "--recipe", str(out)]) == 2
    assert "use `sfumato replay`" in capsys.readouterr().err
    assert main(["replay", str(out), "--device", "cpu"]) == 2
    assert "leave out device" in capsys.readouterr().err
