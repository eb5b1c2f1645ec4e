"""The drawn loss: what is read from a log, what is averaged, where it stands in the picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sfumato.train.curve import MEAN, draw_curve, keep_curve, read_log, smooth, ticks


def test_a_log_of_a_resumed_run_is_read_once_and_cut_lines_are_left(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 10.0 - step, "rate": 1} for step in (1, 2, 3, 2, 3)]
    rows[3]["loss"] = 0.5
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert read_log(log) == [(1, 9.0), (2, 0.5), (3, 7.0)]


def test_the_running_mean_keeps_a_line_and_both_ends() -> None:
    line = [(float(i), 3.0 + 2 * i) for i in range(100)]
    difference = max(abs(a[1] - b[1]) for a, b in zip(line, smooth(line, 0.2), strict=True))
    print(f"largest difference {difference}")
    assert difference < 1e-9
    assert smooth([(0.0, 1.0), (1.0, 4.0)]) == [(0.0, 1.0), (1.0, 4.0)]


def test_round_numbers_are_between_the_ends() -> None:
    assert ticks(0.1, 1000) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    assert ticks(0.23, 0.97) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


def test_a_falling_loss_is_drawn_falling(tmp_path: Path) -> None:
    image = np.asarray(draw_curve([(i, 2.0 * 0.5 ** (i / 50)) for i in range(1, 101)], "loss"))
    colour = tuple(int(MEAN[i : i + 2], 16) for i in (1, 3, 5))
    columns, rows = np.nonzero((image == colour).all(-1).T)
    middles = [rows[columns == column].mean() for column in np.unique(columns)]
    assert len(middles) > 700
    assert all(a < b + 1.5 for a, b in zip(middles, middles[5:], strict=False))
    log, picture = tmp_path / "log.jsonl", tmp_path / "loss.png"
    log.write_text('{"step": 20, "loss": 1.0}\n')
    keep_curve(log, picture, "loss")
    assert not picture.exists()
    with pytest.raises(ValueError, match="1 points make no curve"):
        draw_curve(read_log(log), "loss")
    log.write_text(log.read_text() + '{"step": 40, "loss": 1.0}\n')
    keep_curve(log, picture, "loss")
    assert picture.exists()
