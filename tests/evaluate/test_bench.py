"""The table, the plot and the command of `sfumato bench`; how contenders take turns."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.app import main
from sfumato.evaluate.bench import HEAD, Bench, Work
from sfumato.evaluate.chart import NAMES, WIDTH, Bar, bars, curves
from sfumato.evaluate.timing import Ceiling, Timing, Usage, counted, interleaved, spawned, timed
from sfumato.models.autoencoder import AutoencoderConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def timing(contender: str, *seconds: float, work: float = 0.0, peak: int = 0) -> Timing:
    return Timing(
        "a task", contender, tuple(Usage(s, 2 * s, 7, peak) for s in seconds), work, 100.0, {"load": 0.5, "threads": 2}
    )


def made() -> Bench:
    ceiling = Ceiling({"float32": 5e10}, 1e10)
    timings = timing("one", 3, 1, 2, work=50), timing("two", 4, 9, 5, peak=3 << 29)
    return Bench({"cpu": "a cpu"}, ceiling, timings, {"three": "not installed"}, {"one": "as it comes"})


def test_the_table_adds_up() -> None:
    first, second = (dict(zip(HEAD, row, strict=True)) for row in made().cells())
    assert [first[name] for name in HEAD[2:9]] == ["3", "2", "1", "3", "4", "1.00", "25%"]
    assert [second[name] for name in HEAD[2:]] == ["3", "5", "4", "9", "10", "2.50", "", "1.50", "7", "0.5"]
    text = made().markdown()
    assert "50 GFLOP/s in float32" in text and "Without three: not installed." in text and "cpu a cpu" in text
    assert "* one: as it comes" in text


def test_the_files(tmp_path: Path) -> None:
    table, figures, plot = made().write(tmp_path / "results")
    read = json.loads(figures.read_text())
    assert [t["median"] for t in read["timings"]] == [2, 5] and read["missing"] == {"three": "not installed"}
    assert table.read_text() == made().markdown()
    with Image.open(plot) as image:
        assert image.size[0] == 900


def test_parts_that_were_measured_at_different_times_share_a_file(tmp_path: Path) -> None:
    """A task that is measured again replaces all its rows; the others stay, in their order."""
    first = made()
    other = Timing("another", "three", (Usage(1, 1, 1),), facts={"load": 2.0})
    first = replace(first, timings=(*first.timings, other), settings={**first.settings, "three": "patient"})
    first.write(tmp_path)
    again = replace(made(), timings=(timing("one", 8.0), replace(other, task="a third")), settings={"one": "hurried"})
    both = again.after(tmp_path / "bench.json")
    assert [(t.task, t.contender, t.median) for t in both.timings] == [
        ("a task", "one", 8.0), ("another", "three", 1), ("a third", "three", 1)]  # fmt: skip
    assert both.settings == {"one": "hurried", "three": "patient"} and both.timings[1] == other
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bench.json is no benchmark's file"):
        again.after(tmp_path / "bench.json")


def test_curves_grow_with_the_seconds() -> None:
    line = [(256.0, 1.0), (512.0, 4.0), (1024.0, 16.0)]
    image = curves({"over size": {"one": line, "two": [(x, 2 * y) for x, y in line]}, "alone": {"one": [(1, 1)]}})
    assert image.size[0] == WIDTH
    pixels = np.asarray(image)
    rows = [np.nonzero((pixels[:330] == colour).all(-1).any(1))[0].min() for colour in ((47, 111, 159), (200, 120, 47))]
    assert rows[1] < rows[0]  # more seconds are higher up
    with pytest.raises(ValueError, match="no curves"):
        curves({"none": {}})


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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of benchmarks/bench.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "bench.py"), run_name="bench")


def test_a_peer_that_is_not_installed_is_named_with_the_reason(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = script["absent"]
    assert "diffusers" not in absent() and "it takes minutes" in absent()["diffusers, compiled"]
    assert "diffusers, compiled" not in absent(compiled=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = absent(without=("diffusers, channels last",))
    assert found["diffusers"] == "it is not installed; pip install diffusers"
    assert found["OpenVINO, int8"] == "it is not installed; pip install openvino diffusers nncf"
    assert found["stable-diffusion.cpp"].startswith("it is not installed; pip install stable-diffusion-cpp-python")
    assert "sfumato" not in found and "diffusers, channels last" not in found


def test_growth_is_drawn_over_size_and_number(script: dict[str, Any]) -> None:
    def call(size: int, rows: int, seconds: float) -> Timing:
        return Timing(f"SD 1.5 unet, {size}x{size}, batch {rows}", "one", (Usage(seconds, 1, 1),))

    found = script["grown"]((call(512, 2, 9), call(256, 2, 2), call(256, 8, 7), timing("one", 1)))
    assert found == {
        "U-Net, seconds over pictures of 256x256": {"one": [(1, 2), (4, 7)]},
        "U-Net, seconds over pixels of a side": {"one": [(256, 2), (512, 9)]},
    }
    assert script["grown"]((timing("one", 1),)) == {}


def test_a_worker_says_its_peak(script: dict[str, Any], tiny_folder: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(script["worker"].__globals__, "use_threads", lambda asked=None: None)
    script["worker"]("sfumato", str(tiny_folder), "", 32, 1)
    assert int(capsys.readouterr().out.splitlines()[-1].removeprefix("peak ")) > 1 << 26
