from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli.places import Places
from sfumato.cli.watch import rate
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import parse

from .command import sfumato


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_events_for_programs(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("-m", tiny_folder, "--steps", 3, "--seed", 7, "--batch", 1, "--json")
    code, out, err = sfumato(capsys, "a cat", *flags, "-n", 2, "--preview", "now.png", "--preview-every", 3)
    events = [json.loads(line) for line in out]
    assert (code, err) == (0, "")
    one = ["step", "preview", "step", "step", "preview", "picture"]
    assert [e["event"] for e in events] == ["start", *one, *one, "end"]
    assert events[0]["pictures"] == 2 and events[0]["request"]["seed"] == 7
    assert [(e["path"], e["seed"]) for e in events if e["event"] == "picture"] == [
        ("outputs/00000.png", 7),
        ("outputs/00001.png", 8),
    ]
    steps = [e for e in events if e["event"] == "step"]
    assert [(e["picture"], e["step"], e["steps"]) for e in steps] == [(p, s, 3) for p in (0, 1) for s in (1, 2, 3)]
    assert steps[-1]["seconds_left"] == 0 and steps[0]["per_second"] > 0
    code, out, err = sfumato(capsys, "a cat", *flags, "--width", 35)
    assert code == 2 and json.loads(out[-1]) == {"event": "error", "message": err.strip().removeprefix("sfumato: ")}


def test_previews(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("-m", tiny_folder, "--steps", 3, "--seed", 7, "-q")
    sfumato(capsys, "a cat", *flags, "-o", "a.png", "--preview", "seen")
    assert sorted(p.name for p in Path("seen").iterdir()) == [f"seed-7-step-00{i}.png" for i in (1, 2, 3)]
    with Image.open("seen/seed-7-step-003.png") as last, Image.open("a.png") as made:
        assert last.tobytes() == made.tobytes()  # an unknown autoencoder is asked itself, and x0 of the last step is it
    for place, message in (("a.png", "is no preview and is not overwritten"), ("b.jpg", "previews are PNG")):
        code, _, err = sfumato(capsys, "a cat", *flags, "--preview", place)
        assert code == 2 and message in err and err.count("\n") == 1, err
    for _ in range(2):  # a preview may take the place of a preview
        assert sfumato(capsys, "a cat", *flags, "--preview", "now.png")[0] == 0


def test_an_interruption_within_a_picture(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, calls = Pipeline.net, []

    def interrupted(self: Pipeline, *args: object) -> object:
        calls.append(1)
        if len(calls) == 5:  # two steps a picture: the third picture's first
            raise KeyboardInterrupt
        return net(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "net", interrupted)
    flags = ("-m", tiny_folder, "--steps", 2, "--seed", 7, "--cfg", 1, "-n", 4, "--batch", 1, "--json")
    code, out, err = sfumato(capsys, "a cat", *flags)
    assert (code, err) == (130, "interrupted: 2 of 4 pictures finished; not made: seeds 9, 10\n")
    assert json.loads(out[-1])["finished"] == ["outputs/00000.png", "outputs/00001.png"]
    assert sorted(p.name for p in Path("outputs").iterdir()) == ["00000.png", "00001.png"]


def test_the_bar_on_a_terminal(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = sfumato(capsys, "a cat", "-m", tiny_folder, "--steps", 3, "-n", 2)
    # The paths stay on stdout, and the bar's words on stderr.
    assert (code, out) == (0, ["outputs/00000.png", "outputs/00001.png"])
    assert "2 pictures in" in err and "it/s" in err


def test_nothing_is_overwritten(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_text("mine")
    Path("b-1.png").write_text("mine")
    for out, count, named in (("a.png", 1, "a.png"), ("b.png", 2, "b-1.png")):
        code, _, err = sfumato(capsys, "a cat", "-m", tiny_folder, "-o", out, "-n", count)
        assert code == 2 and f"{named} exists and is not overwritten" in err and err.count("\n") == 1, err
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "b-1.png"]


@pytest.mark.parametrize("links", [True, False])
def test_names_taken_meanwhile_cost_no_picture(monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    one, folder = Places("a.png", 1), Places("pictures/", 2)
    Path("a.png").write_text("mine")
    picture, request = Image.new("RGB", (8, 8)), parse(prompt="a cat")
    assert [one.picture(0, picture, request, {}) for _ in range(2)] == [Path("a-1.png"), Path("a-2.png")]
    Path("pictures").mkdir()
    Path("pictures/00003.png").write_text("mine")
    assert folder.picture(0, picture, request, {}) == Path("pictures/00004.png")
    assert Path("a.png").read_text() == "mine" == Path("pictures/00003.png").read_text()
    assert sorted(p.name for p in Path().rglob("*.png")) == ["00003.png", "00004.png", "a-1.png", "a-2.png", "a.png"]


def test_speeds() -> None:
    assert (rate(12.34), rate(0.25), rate(0)) == ("12.3 it/s", "4.0 s/it", "0.0 it/s")
