"""The icon set's builder, on packages made here in the shape of the real ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.data import icons
from sfumato.data.icons import IconSet, build, plain_code, read_emoji, squash

APPLE = "1F34E"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder in which every set draws one apple, half of each picture red."""
    root = tmp_path_factory.mktemp("node_modules")
    names = {"soft": "red-apple", "minimal": "redapple", "outline": "red-apple-2"}
    for style, spec in icons.STYLES.items():
        folder = root / spec.rsplit("@", 1)[0]
        folder.mkdir(parents=True)
        if style == "3d":
            (folder / "assets").mkdir()
            square = Image.new("RGBA", (256, 256))
            square.paste((255, 0, 0, 255), (0, 0, 128, 256))
            square.save(folder / "assets" / f"{APPLE.lower()}.webp", lossless=True)
            continue
        body = '<path fill="#f00" d="M0 0h16v32H0z"/>'
        drawn = {names.get(style, "red-apple"): {"body": body}, "no-such-thing": {"body": body}}
        content = {"prefix": spec.split("/")[-1].split("@")[0], "width": 32, "height": 32, "icons": drawn}
        (folder / "icons.json").write_text(json.dumps(content))
    (root / "emojibase-data/en").mkdir(parents=True)
    entry = {"label": "red apple", "hexcode": APPLE, "emoji": "🍎", "tags": ["fruit"]}
    (root / "emojibase-data/en/data.json").write_text(json.dumps([entry]))
    (root / "emojilib/dist").mkdir(parents=True)
    (root / "emojilib/dist/emoji-en-US.json").write_text(json.dumps({"🍎": ["fruit", "healthy_food"]}))
    return root


def test_every_style_is_joined_by_code_point(packages: Path, tmp_path: Path) -> None:
    told: list[str] = []
    build(tmp_path / "set", packages, lambda done, total, style: told.append(style))
    found = IconSet(tmp_path / "set")
    assert told == list(icons.STYLES)
    assert {icon.style for icon in found.icons} == set(icons.STYLES)
    assert {icon.code for icon in found.icons} == {APPLE}
    assert found.icons[0].tags == ("fruit", "healthy food")
    for icon in found.icons:
        picture = icon.rgba()
        wanted = np.zeros((128, 128, 4))
        wanted[:, :64] = (255, 0, 0, 255)
        inside = np.abs(picture[:, 8:56].astype(float) - wanted[:, 8:56]).max()
        outside = picture[:, 72:120, 3].max()
        print(f"{icon.style}: largest difference {inside:.0f}, alpha outside {outside}")
        assert picture.shape == (128, 128, 4) and inside <= 2 and outside <= 2


def test_packages_that_are_not_there_are_named(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "emojilib").symlink_to(packages / "emojilib")
    with pytest.raises(FileNotFoundError, match=r"lacks the packages @lobehub/fluent-emoji-3d@1\.1\.0, ") as told:
        build(tmp_path / "set", tmp_path / "node_modules")
    assert "emojilib" not in str(told.value) and not (tmp_path / "set").exists()


def test_the_command_takes_packages_that_are_there(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icons.shutil, "which", lambda name: None)  # no npm
    code = main(["data", "icons", "--out", str(tmp_path / "set"), "--packages", str(packages)])
    out, err = capsys.readouterr()
    assert code == 0 and out == f"{tmp_path / 'set' / 'icons.json'}\n", err
    assert err.endswith("9/9\n")


def test_what_npm_complained_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\nnpm error errno 1\nnpm error A log of this"
    monkeypatch.setattr(icons.shutil, "which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", complaint)
    monkeypatch.setattr(icons.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"failed: npm error code ENOTFOUND npm error syscall getaddrinfo"):
        icons.install_packages(tmp_path)


def test_missing_set_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sfumato data icons --out"):
        IconSet(tmp_path)


def test_names_and_codes_are_normalised(packages: Path) -> None:
    assert squash("Red-Apple-2") == "redapple" and squash("t-shirt") == "tshirt"
    assert plain_code("2764-fe0f") == "2764" and plain_code("0023-fe0f-20e3") == "23-20E3"
    assert read_emoji(packages)[APPLE].label == "red apple"


def test_without_npm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"install Node\.js, or give a node_modules folder"):
        icons.install_packages(tmp_path)
