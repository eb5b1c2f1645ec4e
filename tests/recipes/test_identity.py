from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sfumato.recipes import identity


def test_a_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    assert identity.fingerprint(file) == hashlib.sha256(b"weights").hexdigest()[:10]
    assert identity.Fingerprint(file).get() == identity.fingerprint(file)
    assert identity.Fingerprint(tmp_path / "gone").get() == hashlib.sha256(b"").hexdigest()[:10]


def test_a_folder_is_known_by_its_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"1")
    before = identity.fingerprint(tmp_path)
    (tmp_path / "note.txt").write_text("new")
    assert identity.fingerprint(tmp_path) == before
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"2")
    assert identity.fingerprint(tmp_path) != before


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "LARGE", 4)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    first = identity.fingerprint(file)
    text = identity.remembered().read_text()
    identity.remembered().write_text(text.replace(first, "f" * 10))
    assert identity.fingerprint(file) == "f" * 10  # from the cache
    file.write_bytes(b"other weights")
    assert identity.fingerprint(file) == hashlib.sha256(b"other weights").hexdigest()[:10]
