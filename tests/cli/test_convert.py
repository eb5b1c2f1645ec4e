"""`sfumato convert` and `sfumato info`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .command import sfumato

Capture = pytest.CaptureFixture[str]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{f.parent.name}.{name}": t for f in files for name, t in load_file(f).items()}


def test_folder_to_file_and_back(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    file, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    assert sfumato(capsys, "convert", tiny_folder, file)[:2] == (0, [str(file)])
    assert sfumato(capsys, "convert", file, folder)[:2] == (0, [str(folder)])
    before, after = weights(tiny_folder), weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("vocab.json", "merges.txt"):
        assert (folder / "tokenizer" / name).read_text() == (tiny_folder / "tokenizer" / name).read_text()


def test_a_checkpoint_becomes_safetensors_in_half_precision(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    whole = tmp_path / "whole.safetensors"
    assert sfumato(capsys, "convert", tiny_folder, whole, "--dtype", "fp16")[0] == 0
    assert {t.dtype for t in load_file(whole).values()} == {torch.float16}
    code, out, _ = sfumato(capsys, "info", whole, "--json", "--check")
    found = json.loads("\n".join(out))
    assert code == 0 and found["prediction"] == "v_prediction" and found["not_finite"] == []
    assert [part["name"] for part in found["parts"]] == ["unet", "vae", "text_encoder"]
    assert all(part["dtypes"] == {"float16": part["parameters"]} for part in found["parts"])


def test_nothing_is_replaced_unasked(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"precious")
    code, _, err = sfumato(capsys, "convert", tiny_folder, there)
    assert code == 2 and "--force" in err and there.read_bytes() == b"precious"
    assert sfumato(capsys, "convert", tiny_folder, there, "--force")[0] == 0
    assert there.stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("convert", "{folder}", "out.ckpt"), ".ckpt files are not written"),
        (("convert", "nowhere", "out.safetensors"), "nowhere"),
        (("convert", "{folder}", "out.safetensors", "--dtype", "fp8"), "fp8"),
        (("convert", "{folder}", "out.safetensors", "--prediction", "w"), "known"),
        (("info", "{text}"), "no weights file"),
        (("info", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_line(
    args: tuple[str, ...],
    words: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello, this is a text and no weights")
    code, out, err = sfumato(capsys, *(a.format(folder=tiny_folder, text=tmp_path / "text.txt") for a in args))
    assert (code, out) == (2, []) and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("out*"))


def test_info_in_words(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = sfumato(capsys, "info", tiny_folder)
    text = "\n".join(out)
    assert code == 0 and "v_prediction" in text and "unet" in text and "float32" in text
    save_file(
        {"a.lora_down.weight": torch.zeros(4, 8), "a.lora_up.weight": torch.zeros(8, 4)}, tmp_path / "l.safetensors"
    )
    code, out, _ = sfumato(capsys, "info", tmp_path / "l.safetensors")
    assert code == 0 and any(line.startswith("holds") and "adapter" in line for line in out)
