"""The judge: its training on a toy set, its file, and the one in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sfumato.data.icons import IconSet
from sfumato.data.scenes import Composer, concepts
from sfumato.evaluate.judge import WEIGHTS, Judge, Lessons, accuracy, lesson, load_judge, save_judge, train_judge
from sfumato.evaluate.measure import crop_object

from .drawn import SHAPES


def test_file_keeps_classes_and_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge(("cat", "dog")).eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    crops = [np.full((64, 64, 3), level, np.uint8) for level in (0, 99, 255)]
    worst = np.abs(again.log_probs(crops) - judge.log_probs(crops)).max()
    print(worst)
    assert again.classes == ("cat", "dog")
    assert worst < 2e-3  # half precision
    assert np.allclose(np.exp(again.log_probs(crops)).sum(1), 1, atol=1e-5)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m sfumato\.evaluate\.judge"):
        load_judge(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="knows no 'cow'; it knows 2: cat, dog"):
        Judge(("cat", "dog")).index("cow")


def test_lessons_are_pictures_and_repeat(shape_set: IconSet) -> None:
    lessons = Lessons.read(Composer(shape_set), tuple(SHAPES))
    assert [len(icons) for icons in lessons.groups] == [2, 2, 2, 2]
    assert len(lessons.groups[0][0]) == 9  # as drawn, and in eight hues
    x, labels = lessons.batch(9, np.random.default_rng(1))
    one, two = (lesson(x, np.random.default_rng(2)) for _ in range(2))
    assert one.shape == (9, 3, 64, 64) and labels.shape == (9,)
    assert torch.equal(one, two) and one.min() >= -1 and one.max() <= 1
    assert one.std() > 0.2


def test_training_tells_shapes_apart_and_resumes(shape_set: IconSet, tmp_path: Path) -> None:
    out = tmp_path / "judge.safetensors"
    train_judge(shape_set, out, tmp_path / "run", steps=30, batch_size=12)
    judge = load_judge(out)
    assert judge.classes == tuple(noun for noun in concepts().values() if noun in SHAPES)
    found = accuracy(judge, shape_set, count=40)
    print(found)
    assert found.top1 > 0.6 and found.top5 == 1
    again = train_judge(shape_set, tmp_path / "again.safetensors", tmp_path / "run", steps=30, batch_size=12)
    worst = max((a - b).abs().max().item() for a, b in zip(again.parameters(), judge.parameters(), strict=True))
    print(worst)
    assert worst < 2e-3


def test_shipped_judge_knows_all_concepts_and_is_small() -> None:
    assert load_judge().classes == tuple(concepts().values())
    assert WEIGHTS.stat().st_size <= 2.5e6


def test_shipped_judge_reads_simple_drawings() -> None:
    """Drawings of our own, which it was not trained on."""
    star, ball, heart = (Image.new("RGB", (128, 128), "white") for _ in range(3))
    turn = np.radians(np.arange(10) * 36 - 90)
    reach = np.where(np.arange(10) % 2, 24, 56)
    ImageDraw.Draw(star).polygon(
        list(zip(64 + reach * np.cos(turn), 64 + reach * np.sin(turn), strict=True)), fill=(250, 190, 40)
    )
    pen = ImageDraw.Draw(ball)
    pen.ellipse((12, 12, 116, 116), fill=(240, 130, 50))
    for line in ([(12, 64), (116, 64)], [(64, 12), (64, 116)]):
        pen.line(line, fill=(60, 40, 30), width=5)
    pen.arc((-40, 20, 40, 108), -90, 90, fill=(60, 40, 30), width=5)
    pen.arc((88, 20, 168, 108), 90, 270, fill=(60, 40, 30), width=5)
    angle = np.linspace(0, 2 * np.pi, 60)
    curve = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    ImageDraw.Draw(heart).polygon(
        list(zip(64 + 48 * np.sin(angle) ** 3, 60 - 3 * curve, strict=True)), fill=(225, 40, 60)
    )
    judge = load_judge()
    scores = judge.log_probs([crop_object(np.asarray(picture)) for picture in (star, ball, heart)])
    for noun, row in zip(("star", "basketball", "heart"), scores, strict=True):
        best = [judge.classes[i] for i in row.argsort()[::-1][:5]]
        print(noun, best)
        assert noun in best
