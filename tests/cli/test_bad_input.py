"""What people get wrong: one line that names the value, what is allowed and the mend; code 2, nothing written."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def white(width: int, height: int, path: str) -> None:
    """A true PNG, one bit a pixel, whose rows are all zero: small on disk however large."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


FILES: dict[str, Callable[[], object]] = {
    "in.png": lambda: Image.effect_noise((32, 32), 90).save("in.png"),
    "other.png": lambda: Image.new("L", (16, 24), 255).save("other.png"),
    "black.png": lambda: Image.new("L", (32, 32), 0).save("black.png"),
    "thin.png": lambda: Image.new("RGB", (3, 900)).save("thin.png"),
    "empty.png": lambda: Path("empty.png").touch(),
    "words.png": lambda: Path("words.png").write_text("no picture"),
    "huge.png": lambda: white(12_000, 12_000, "huge.png"),
    "bomb.png": lambda: Path("bomb.png").write_bytes(claimed(60_000, 60_000)),
    "noise.png": lambda: Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        "noise.png"
    ),
    "cut.png": lambda: (FILES["noise.png"](), Path("cut.png").write_bytes(Path("noise.png").read_bytes()[:5000])),
    "bent.png": lambda: (
        FILES["noise.png"](),
        Path("bent.png").write_bytes(Path("noise.png").read_bytes().replace(b"IDAT", b"IDAX")),
    ),
}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("a --sampler dpm2m", ["unknown sampler 'dpm2m'", "did you mean", "known: euler"]),
        ("a --spacing karas", ["unknown spacing 'karas'", "did you mean 'karras'", "known: "]),
        ("a --width 35", ["width = 35", "multiple of 4", "nearest that is: 36"]),
        ("a --width 4", ["width = '4'", "greater than or equal to 8"]),
        ("a --height 100000", ["height = '100000'", "less than or equal to 4096"]),
        ("a --steps -3", ["num_inference_steps = '-3'", "greater than or equal to 1"]),
        ("a --steps 0.5", ["num_inference_steps = '0.5'", "integer"]),
        ("a --cfg nan", ["guidance_scale = 'nan'", "less than or equal to 100"]),
        ("a --seed -1", ["seed = '-1'", "greater than or equal to 0"]),
        ("a -i in.png --strength 1.5", ["strength = '1.5'", "less than or equal to 1"]),
        ("a -i in.png --strength -0.1", ["strength = '-0.1'", "greater than or equal to 0"]),
        ("a -i in.png --strength 0", ["strength = 0", "give at least"]),
        ("a --strength 0.5", ["strength = 0.5", "give an image"]),
        ("inpaint a -i in.png", ["inpaint needs --mask"]),
        ("inpaint a --mask in.png", ["inpaint needs --image"]),
        ("img2img a", ["img2img needs --image"]),
        ("depth2img a -i in.png", ["depth2img needs a model", "--model"]),
        ("a -i in.png --mask other.png", ["mask", "16x24", "32x32"]),
        ("a -i in.png --mask black.png", ["mask"]),
        ("a -i gone.png", ["image: no picture gone.png"]),
        ("a -i empty.png", ["image: empty.png is empty", "give a picture"]),
        ("a -i words.png", ["image: words.png is not a picture"]),
        ("a -i cut.png", ["image: cut.png cannot be read"]),
        ("a -i bent.png", ["image: bent.png is not a picture"]),
        ("a -i huge.png", ["12000x12000", "8192", "smaller"]),
        ("a -i bomb.png", ["bomb.png"]),
        ("a -i thin.png", ["3x900", "width"]),
        ("a --model nowhere", ["no model 'nowhere'", "built-in model (mini)", "hub id (owner/name)"]),
        ("a -m mimi", ["no model 'mimi'", "did you mean 'mini'"]),
        ("a --preview in.png", ["in.png exists, is no preview"]),
        ("a -n 0", ["num_images = '0'", "greater than or equal to 1"]),
    ],
)
def test_one_line(
    tiny_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: str,
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = args.split()
    for name in FILES:
        if name in line:
            FILES[name]()
    before = sorted(tmp_path.rglob("*"))
    model = [] if "-m" in line or "--model" in line else ["-m", str(tiny_folder)]
    code = main([*line, *model])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("sfumato: ") and err.count("\n") == 1 and len(err) < 600, err
    for words in said:
        assert words in err, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prompt", ["word " * 10_000, "w" * 50_000, " ", ""])
def test_prompts(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["txt2img", prompt, "-m", str(tiny_folder)])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "") and "prompt" in err and err.count("\n") == 1 and len(err) < 400, err
    assert list(tmp_path.iterdir()) == []
