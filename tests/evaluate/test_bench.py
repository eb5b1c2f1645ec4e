"""The table, the plot and the command of `sfumato bench`; how contenders take turns."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.app import main
from sfumato.evaluate.bench import HEAD, Bench, Work
from sfumato.evaluate.chart import NAMES, Bar, bars
from sfumato.evaluate.timing import Ceiling, Timing, Usage, counted, interleaved, spawned, timed
from sfumato.models.autoencoder import AutoencoderConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def timing(contender: str, *seconds: float, work: float = 0.0, peak: int = 0) -> Timing:
    return Timing("a task", contender, tuple(Usage(s, 2 * s, 7, peak) for s in seconds), work, 100.0)


def made() -> Bench:
    ceiling = Ceiling({"float32": 5e10}, 1e10)
    timings = timing("one", 3, 1, 2, work=50), timing("two", 4, 9, 5, peak=3 << 29)
    return Bench({"cpu": "a cpu"}, ceiling, timings, {"three": "not installed"})


def test_the_table_adds_up() -> None:
    first, second = (dict(zip(HEAD, row, strict=True)) for row in made().cells())
    assert [first[name] for name in HEAD[2:9]] == ["3", "2", "1", "3", "4", "1.00", "25%"]
    assert [second[name] for name in HEAD[2:]] == ["3", "5", "4", "9", "10", "2.50", "", "1.50", "7"]
    text = made().markdown()
    assert "50 GFLOP/s in float32" in text and "Without three: not installed." in text and "cpu a cpu" in text


def test_the_files(tmp_path: Path) -> None:
    table, figures, plot = made().write(tmp_path / "results")
    read = json.loads(figures.read_text())
    assert [t["median"] for t in read["timings"]] == [2, 5] and read["missing"] == {"three": "not installed"}
    assert table.read_text() == made().markdown()
    with Image.open(plot) as image:
        assert image.size[0] == 900


def test_bars_are_as_long_as_their_medians() -> None:
    image = bars([Bar("a", "one", 1.0, (1.0, 1.0)), Bar("a", "two", 4.0, (4.0, 4.0)), Bar("b", "one", 2.0, (2, 2))])
    pixels = np.asarray(image)[:, NAMES:]
    lengths = [int((pixels == colour).all(-1).sum(1).max()) for colour in ((47, 111, 159), (200, 120, 47))]
    assert abs(lengths[0] - lengths[1]) <= 4  # the first one's longest bar is alone in its group
    assert bars([Bar("a", "one", 1.0, (1.0, 1.0))]).height < image.height
    with pytest.raises(ValueError, match="no bars"):
        bars([])


def test_contenders_take_turns() -> None:
    order: list[str] = []
    used = Usage(1.5, 2.5, 3, 4)

    def one() -> Usage:
        order.append("one")
        return used

    found = interleaved("t", {"one": one, "two": lambda: order.append("two")}, 2, work=8.0, dtype=None)
    assert order == ["one", "two"] * 3
    assert found[0].turns == (used, used) and found[0].share is None
    found = interleaved("t", {"one": one}, 1, work=8.0)
    assert found[0].ceiling > 1e8 and found[0].share == pytest.approx(8 / 1.5 / found[0].ceiling)
    assert timed(lambda: None).seconds < 1


def test_processes() -> None:
    used = spawned([sys.executable, "-S", "-c", "print('words'); print('peak 12')"])
    assert used.peak == 12 and used.processor > 0 and used.faults > 100
    with pytest.raises(RuntimeError, match=r"ended with 1: .*Error: no"):
        spawned([sys.executable, "-S", "-c", "raise ValueError('no')"])


def test_operations_are_counted() -> None:
    config = AutoencoderConfig(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",),
                               up_block_types=("UpDecoderBlock2D",), latent_channels=4)  # fmt: skip
    one, two = (counted(config, (1, 4, side, side), method="decode", device="cpu") for side in (8, 16))
    conv_out = 2 * 8**2 * 32 * 3 * 9
    assert one > conv_out and two > 4 * one  # attention grows with the square


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("sfumato.evaluate.bench.measured_ceiling", lambda: Ceiling({"float32": 5e10}, 1e10))
    monkeypatch.setattr("sfumato.evaluate.bench.picture_flops", lambda pipe, work: 1e6)
    words = ["--model", str(tiny_folder), "--steps", "1", "--rounds", "1", "--count", "2", "--cold", "0"]
    assert main(["bench", *words, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| 2 pictures, 1 steps | sfumato |" in out and "bench.png" in out
    assert main(["bench", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert Work().counts == (1, 8)


def test_a_peer_that_is_not_installed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    absent = runpy.run_path(str(BENCHMARKS / "bench.py"), run_name="bench")["absent"]
    assert absent() == {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert absent() == {"diffusers": "it is not installed; pip install diffusers"}


def test_a_worker_says_its_peak(tiny_folder: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sfumato.runtime.use_threads", lambda asked=None: None)
    worker = runpy.run_path(str(BENCHMARKS / "bench.py"), run_name="bench")["worker"]
    worker("sfumato", str(tiny_folder), 32, 1)
    assert int(capsys.readouterr().out.splitlines()[-1].removeprefix("peak ")) > 1 << 26
