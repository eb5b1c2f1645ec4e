from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli.replay import company_of, differing
from sfumato.images import read_made_with, read_recipe
from sfumato.recipes.embed import png

from .command import pixels, sfumato

PROMPT = "a red apple on a blue background"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_replay_has_the_same_pixels(tiny_folder: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    flags = ("--steps", 2, "--sampler", "DPM++ SDE Karras", "--threads", 1, "--negative", "blur", "-q")
    code, _, err = sfumato(capsys, PROMPT, *flags, "-m", tiny_folder, "-o", f"a{suffix}")
    assert code == 0, err
    code, out, err = sfumato(capsys, "replay", f"a{suffix}")
    assert (code, out) == (0, [f"outputs/00000{suffix}"])
    assert err.endswith(f"outputs/00000{suffix} has the same pixels as a{suffix}\n"), err
    assert pixels(f"outputs/00000{suffix}") == pixels(f"a{suffix}")
    assert read_recipe(f"outputs/00000{suffix}") == read_recipe(f"a{suffix}")
    assert len(read_made_with(f"a{suffix}")["model_files_hash"]) == 10


def test_a_picture_among_others_is_replayed_among_copies(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sfumato(capsys, PROMPT, "--steps", 3, "-n", 3, "-m", tiny_folder, "-o", "a.png", "-q")
    assert read_made_with("a-1.png")["company"] == [1, 3]
    code, _, err = sfumato(capsys, "replay", "a-1.png", "-o", "b.png")
    assert code == 0 and "b.png has the same pixels as a-1.png" in err, err
    assert pixels("b.png") == pixels("a-1.png") and read_made_with("b.png") == read_made_with("a-1.png")


@pytest.mark.parametrize(
    ("said", "read"),
    [([1, 3], (1, 3)), ([3, 3], None), ([0, 10**9], None), ([-1, 2], None), (["a", 2], None), (5, None), (None, None)],
)
def test_company_is_read_with_care(said: object, read: tuple[int, int] | None) -> None:
    assert company_of({"company": said}) == read


def test_a_sheet_is_replayed_whole(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--steps", 1, "-m", tiny_folder, "-o", "a.png", "--grid", "-q")
    sfumato(capsys, "a cat|red", "--prompt-matrix", *flags)
    code, out, err = sfumato(capsys, "replay", "a.png", "-o", "b.png")
    assert (code, out) == (0, ["b-0.png", "b-1.png", "b.png"]) and "b.png has the same pixels as a.png" in err, err


def test_pictures_beside_the_recipe_are_found_and_differences_told(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.effect_noise((32, 32), 90).save("in.png")
    sfumato(capsys, "img2img", PROMPT, "-i", "in.png", "--steps", 2, "-m", tiny_folder, "-o", "a.png", "-q")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = sfumato(capsys, "replay", "../a.png", "--json")
    events = [json.loads(line) for line in out]
    assert code == 0 and events[-1]["event"] == "compared" and events[-1]["same"], err
    Image.effect_noise((32, 32), 9).save(tmp_path / "in.png")
    code, out, err = sfumato(capsys, "replay", "../a.png")
    assert code == 0 and "differs from ../a.png in" in err and "dB" in err, err
    assert differing({"torch": "1", "device": "cpu"}, {"torch": "2", "device": "cpu"}) == ["PyTorch was 1, is 2"]


def test_pictures_of_a1111(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        f"a cat\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 32x32, Model: {tiny_folder}, Version: v1.8.0"
    )
    Image.new("RGB", (32, 32)).save("theirs.png", pnginfo=png({"parameters": text}))
    code, out, err = sfumato(capsys, "recipe", "theirs.png")
    rows = dict(line.split(maxsplit=1) for line in out)
    assert (code, rows["program"], rows["sampler"], rows["seed"]) == (0, "A1111", "euler_a", "5")
    assert err.startswith("note: noise was drawn by another generator")
    assert sfumato(capsys, "recipe", "--text", "theirs.png")[1] == text.split("\n")
    assert json.loads("".join(sfumato(capsys, "recipe", "--json", "theirs.png")[1]))["request"]["spacing"] == "linspace"
    code, out, err = sfumato(capsys, "replay", "theirs.png", "-o", "ours.png")
    assert (code, out) == (0, ["ours.png"]) and "ours.png differs from theirs.png" in err, err
    code, out, err = sfumato(capsys, "--recipe", "theirs.png", "--seed", 6, "-o", "other.png", "-q")
    assert (code, err) == (0, "") and read_recipe("other.png").seed == 6


def test_pictures_of_comfyui(capsys: pytest.CaptureFixture[str]) -> None:
    graph = {"1": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 3, "cfg": 2, "sampler_name": "euler"}}}
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=png({"prompt": json.dumps(graph)}))
    code, out, err = sfumato(capsys, "recipe", "a.png")
    assert code == 0 and out[0].split() == ["program", "ComfyUI"] and "the model could not be found" in err
    code, _, err = sfumato(capsys, "replay", "a.png")
    assert code == 2 and err.endswith("sfumato: a.png does not name its model; name one with --model\n")


def test_info_on_a_picture_says_what_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    code, _, err = sfumato(capsys, "info", "a.png")
    assert code == 2 and "`sfumato recipe a.png`" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("command", ["replay", "recipe"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no picture a.png"),
        (b"", "a.png is not a picture"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a.png"),
        ("plain", "a.png carries no recipe: neither of this program nor of A1111 or ComfyUI"),
        ("broken", "a.png: its recipe is not valid JSON"),
        ("graph", "a.png: the graph has no sampler"),
    ],
)
def test_bad_files(capsys: pytest.CaptureFixture[str], command: str, content: bytes | str | None, message: str) -> None:
    entries = {"plain": {}, "broken": {"sfumato": "{"}, "graph": {"prompt": "{}"}}
    if isinstance(content, str):
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=png(entries[content]))
    elif content is not None:
        Path("a.png").write_bytes(content)
    code, out, err = sfumato(capsys, command, "a.png")
    assert (code, out) == (2, []) and message in err and err.count("\n") == 1, err
