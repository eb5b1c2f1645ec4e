"""`sfumato eval mini` on scenes with known answers and on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.icons import IconSet
from sfumato.data.scenes import HUES, Composer, Scene, concepts
from sfumato.evaluate import mini
from sfumato.evaluate.judge import Judge
from sfumato.evaluate.prompts import NEVER, OWN, Prompt, read_prompts
from sfumato.evaluate.report import Report, Row
from sfumato.evaluate.sheet import contact_sheet
from sfumato.pipelines.pipeline import Pipeline

from .drawn import SHAPES


def ask(text: str, things: str, **fields: object) -> Prompt:
    """A prompt about things, parted by commas."""
    nouns = tuple((noun,) for noun in things.split(","))
    defaults: dict[str, object] = {"group": "concept", "kind": OWN, "colours": ("",) * len(nouns)}
    return Prompt(text, things=nouns, **{**defaults, **fields})  # type: ignore[arg-type]


ASKED = (
    ask("an apple", "apple"),
    ask("a car on a yellow background", "car", ground="yellow"),
    ask("a purple cat", "cat", colours=("purple",), kind=NEVER, group="purple cat"),
    ask("a cat left of an apple", "cat,apple", layout="beside"),
    ask("a dog above a cat on a pink background", "dog,cat", layout="above", ground="pink"),
    ask("three cats", "cat", layout="copies", count=3),
    ask("a small dog in the top right corner", "dog", layout="corner", place="top right"),
)


class ShapeJudge(Judge):
    """Knows the four shapes by their outlines, without any weights."""

    def __init__(self) -> None:
        super().__init__(concepts().values())

    def log_probs(self, crops: object, batch: int = 64) -> np.ndarray:
        """-10 for everything but the nearest shape."""
        from sfumato.evaluate.measure import foreground

        from .drawn import shape

        known = {noun: np.asarray(shape(noun).crop((5, 5, 123, 123)).resize((64, 64)))[..., 3] > 99 for noun in SHAPES}
        scores = np.full((len(crops), len(self.classes)), -10.0)  # type: ignore[arg-type]
        for row, crop in zip(scores, crops, strict=True):  # type: ignore[call-overload]
            mask = foreground(crop)
            row[self.index(max(known, key=lambda noun: (known[noun] == mask).mean()))] = 0.0
        return scores


def test_drawn_scenes_get_every_mark(shape_set: IconSet) -> None:
    pictures = mini.draw_prompts(ASKED, shape_set)
    for prompt, found in zip(ASKED, mini.marks(ASKED, pictures, ShapeJudge()), strict=True):
        assert all(found.values()), (prompt.text, found)


def test_pictures_of_other_prompts_lose_marks(shape_set: IconSet) -> None:
    wrong = (
        ask("a car", "car"),
        ask("a car", "car", ground="green"),
        ask("a green dog", "dog", colours=("green",)),
        ask("an apple left of a cat", "apple,cat", layout="beside"),
        ask("a cat above a dog", "cat,dog", layout="above", ground="pink"),
        ask("two cats", "cat", layout="copies", count=2),
        ask("a small dog in the bottom right corner", "dog", layout="corner", place="bottom right"),
    )
    found = mini.marks(ASKED, mini.draw_prompts(wrong, shape_set), ShapeJudge())
    lost = [{name for name, right in marks.items() if not right} - {"everything asked"} for marks in found]
    assert lost[0] >= {"concept top-1"}
    assert lost[1] == {"background colour"}
    assert lost[2] >= {"object colour", "concept top-1"}
    assert "order" in lost[3] and "order" in lost[4]
    assert lost[5] == {"count"}
    assert lost[6] == {"corner"}
    assert not any(marks["everything asked"] for marks in found[1:])


def test_report_has_a_row_for_each_measure_with_its_count(
    shape_set: IconSet, tiny_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = mini.held_out_scenes(shape_set, count=4)
    monkeypatch.setattr(mini, "held_out_scenes", lambda icons: few)
    pictures = [np.full((128, 128, 3), 255, np.uint8)] * len(ASKED)
    report = mini.make_report(ASKED, pictures, ShapeJudge(), {"model": "blank"}, shape_set, tiny_pipe.vae)
    assert report[OWN, "concept top-1"].n == 4 and report[OWN, "concept top-1"].ceiling == 1
    assert report[OWN, "background colour"] == Row(OWN, "background colour", 2, 0.0, 1.0)
    assert report[OWN, "white background"].value == 1
    assert report[NEVER, "object colour"].n == report[OWN, "left/right"].n == report[OWN, "above/below"].n == 1
    assert report[OWN, "count"].value == report[OWN, "corner"].value == 0
    psnr = report["held-out icons", "VAE PSNR"]
    assert psnr.n == 4 and psnr.value is not None and 0 < psnr.value < 30 and psnr.unit == "dB"
    with pytest.raises(KeyError, match="no row"):
        report[OWN, "beauty"]


def test_psnr_of_a_known_error() -> None:
    class Darker:
        """Adds 0.2 of the range of 2 to every pixel: an error of 0.1, 20 dB."""

        def parameters(self) -> object:
            import torch

            return iter([torch.zeros(1)])

        def encode(self, x: object) -> Darker:
            self.latent_dist, self.x = self, x
            return self

        def mode(self) -> object:
            return self.x

        def decode(self, z: object) -> Darker:
            self.sample = z - 0.2  # type: ignore[operator]
            return self

    pictures = np.full((3, 16, 16, 3), 200, np.uint8)
    assert mini.reconstruction_psnr(Darker(), pictures) == pytest.approx(20, abs=1e-4)  # type: ignore[arg-type]


def test_held_out_scenes_show_no_concept(shape_set: IconSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: set[str] = set()
    draw = Composer.draw

    def watched(self: Composer, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        shown.update(thing.icon.code for thing in scene.things)
        return draw(self, scene, rng)

    monkeypatch.setattr(Composer, "draw", watched)
    scenes = mini.held_out_scenes(shape_set, count=4)
    assert shown and not shown & set(concepts())
    assert scenes.shape == (4, 128, 128, 3) and scenes.dtype == np.uint8
    assert np.array_equal(scenes, mini.held_out_scenes(shape_set, count=4))


def test_missing_icon_is_named(shape_set: IconSet) -> None:
    with pytest.raises(ValueError, match="no 'frog' in the 3d style, which 'a frog' needs"):
        mini.draw_prompts([ask("a frog", "frog")], shape_set)


def test_run_writes_report_pictures_and_sheet(tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = mini.run(tiny_folder, tmp_path / "out", 6, lambda done, total: seen.append((done, total)), steps=1,
                      grid=tmp_path / "new" / "sheet.png")  # fmt: skip
    assert seen == [(i, 6) for i in range(1, 7)]
    assert report.about["prompts"] == 6 and report.about["steps"] == 1
    assert report["held-out icons", "VAE PSNR"].note == "not measured: no icon set"
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert "not measured: no icon set" in (tmp_path / "out/report.md").read_text()
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 6
    assert Image.open(tmp_path / "new" / "sheet.png").width > 6 * 32


def test_a_sheet_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown picture suffix '\.docx'"):
        mini.run(tmp_path, grid=tmp_path / "sheet.docx")  # a folder without a model, which would be complained of next


def test_picture_depends_on_its_prompt_alone(tiny_pipe: Pipeline) -> None:
    prompts = read_prompts()[:3]
    together, alone = mini.paint(tiny_pipe, prompts, steps=1), mini.paint(tiny_pipe, prompts[2:], steps=1)
    worst = np.abs(together[2].astype(int) - alone[0]).max()
    print(worst)
    assert worst <= 1


def test_tables() -> None:
    rows = (Row(OWN, "count", 24, 0.5, 1.0), Row("icons", "VAE PSNR", 0, None, unit="dB", note="none"))
    report = Report({"model": "mini", "steps": 20}, rows)
    assert "| own list | count | 24 | 50.0% | 100.0% |" in report.markdown()
    assert "| icons | VAE PSNR | - | none | - |" in report.markdown()
    assert "model mini, steps 20" in report.markdown()
    assert report.table().row_count == 2


def test_contact_sheet_counts_its_labels() -> None:
    pictures = [np.zeros((128, 128, 3), np.uint8)] * 3
    sheet = contact_sheet(pictures, ["a red apple on a light gray background", "b", "c"], columns=2)
    assert sheet.size == (2 * 134 + 6, 2 * 170 + 6)
    with pytest.raises(ValueError, match="3 pictures and 1 labels"):
        contact_sheet(pictures, ["a"])


def test_colours_of_the_list_are_those_of_the_composer() -> None:
    assert {c for prompt in read_prompts() for c in prompt.colours if c} == set(HUES)
