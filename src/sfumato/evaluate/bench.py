"""How fast the built-in model, or another, makes pictures here, beside what the machine can do at most.

Warm: pictures with guidance, one and several in one go. Cold: the command from the shell to the file, and a program
that opens the model, a new process each time. Contenders take turns; see `timing`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato import __version__
from sfumato.evaluate.chart import Bar, bars
from sfumato.evaluate.timing import Ceiling, Timing, Usage, counted, interleaved, measured_ceiling, spawned
from sfumato.files import read_json, replacing, write_json
from sfumato.machine import examine

if TYPE_CHECKING:
    from sfumato.pipelines.pipeline import Pipeline

PROMPT = "a red apple on a blue background"
OURS = "sfumato"
HEAD = ("task", "contender", "turns", "median s", "fastest", "slowest", "processor s", "times", "of the ceiling",
        "peak GiB", "page faults", "load")  # fmt: skip
GIB = 2**30
# Makes some pictures, one prompt.
Paint = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """What is measured: the model, steps and guidance, how many pictures in one go, rounds, cold starts (0: none)."""

    model: str = "mini"
    steps: int = 20
    scale: float = 5.0
    counts: tuple[int, ...] = (1, 8)
    rounds: int = 5
    cold: int = 3
    precision: str | None = None


@dataclass(frozen=True)
class Bench:
    """What was measured, in one run or in several.

    missing:  contenders that did not take part in the last one, and why.
    settings: what each contender was told, in words.
    """

    about: Mapping[str, Any]
    ceiling: Ceiling
    timings: tuple[Timing, ...]
    missing: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows in words; `times` compares with the first contender of the task."""
        firsts: dict[str, Timing] = {}
        return [cells(t, firsts.setdefault(t.task, t).median) for t in self.timings]

    def markdown(self) -> str:
        """The table, the contenders, the ceiling, who is missing, and what the figures depend on."""
        head = [f"| {' | '.join(HEAD)} |", "|---|---" + "|---:" * (len(HEAD) - 2) + "|"]
        rows = [f"| {' | '.join(row)} |" for row in self.cells()]
        told = [f"* {name}: {words}" for name, words in self.settings.items()]
        best = ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {name}" for name, rate in self.ceiling.products.items())
        ceiling = f"Ceiling: matrix products of {best}; copying moves {self.ceiling.bandwidth / 1e9:.1f} GB/s."
        absent = [f"Without {name}: {reason}." for name, reason in self.missing.items()]
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        parts = ["\n".join([*head, *rows]), *(["\n".join(told)] if told else []), ceiling, *absent, about]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """As a JSON file."""
        ceiling = {"flops": dict(self.ceiling.products), "bandwidth": self.ceiling.bandwidth}
        timings = [t.to_dict() for t in self.timings]
        return {"machine": dict(self.about), "ceiling": ceiling, "settings": dict(self.settings),
                "timings": timings, "missing": dict(self.missing)}  # fmt: skip

    def after(self, earlier: Path) -> Bench:
        """This, and of an earlier run's JSON file the tasks that were not measured again, in the earlier order.

        A task's rows stay together, as only contenders that took turns can be compared. Raises FileNotFoundError or
        ValueError for what is no such file.
        """
        entries = read_json(earlier)
        try:
            before = [Timing.from_dict(row) for row in entries["timings"]]
        except (KeyError, TypeError):
            raise ValueError(f"{earlier} is no benchmark's file; remove it, or write to another folder") from None
        now: dict[str, list[Timing]] = {}
        for timing in self.timings:
            now.setdefault(timing.task, []).append(timing)
        tasks: dict[str, list[Timing]] = {}
        for timing in before:
            if timing.task not in now:
                tasks.setdefault(timing.task, []).append(timing)
            else:
                tasks[timing.task] = now[timing.task]
        timings = tuple(t for some in {**tasks, **now}.values() for t in some)
        named = {t.contender for t in timings}
        settings = {**entries.get("settings", {}), **self.settings}
        return replace(self, timings=timings, settings={k: v for k, v in settings.items() if k in named})

    def write(self, folder: Path, name: str = "bench") -> list[Path]:
        """Write the table, the figures and the plot; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.{suffix}" for suffix in ("md", "json", "png")]
        with replacing(paths[0]) as place:
            place.write_text(self.markdown(), encoding="utf-8")
        write_json(paths[1], self.to_dict())
        with replacing(paths[2]) as place:
            bars([Bar(t.task, t.contender, t.median, t.spread) for t in self.timings]).save(place, "PNG")
        return paths


def cells(t: Timing, first: float) -> tuple[str, ...]:
    """A row of the table; first: seconds that its own are compared with."""
    low, high = t.spread
    figures = [str(len(t.turns)), *(f"{x:.3g}" for x in (t.median, low, high, t.processor))]
    share = "" if t.share is None else f"{t.share:.0%}"
    peak = max(turn.peak for turn in t.turns)
    faults = sorted(turn.faults for turn in t.turns)[len(t.turns) // 2]
    resident = f"{peak / GIB:.2f}" if peak else ""
    load = f"{t.facts['load']:.1f}" if "load" in t.facts else ""
    return t.task, t.contender, *figures, f"{t.median / first:.2f}", share, resident, str(faults), load


def warm(pipe: Pipeline, work: Work, others: Mapping[str, Paint]) -> list[Timing]:
    """Pictures of an open model, beside what others make of the same work."""
    pictures: dict[str, Paint] = {OURS: ours(pipe, work), **others}
    each = picture_flops(pipe, work)
    found = []
    for count in work.counts:
        task = f"{count} picture{'s' * (count > 1)}, {work.steps} steps"
        able = {name: bound(paint, count) for name, paint in pictures.items()}
        found += interleaved(task, able, work.rounds, count * each, dtype=pipe.runtime.dtype)
    return found


def ours(pipe: Pipeline, work: Work) -> Paint:
    """Pictures by this package."""

    def paint(count: int) -> None:
        pipe(PROMPT, seed=0, num_inference_steps=work.steps, guidance_scale=work.scale, num_images_per_prompt=count)

    return paint


def bound(paint: Paint, count: int) -> Callable[[], None]:
    """So many pictures, as a function to time."""
    return lambda: paint(count)


def cold(work: Work, others: Mapping[str, Sequence[str]]) -> list[Timing]:
    """New processes: the command to the file, and programs that open the model; others: their lines."""
    if not work.cold:
        return []
    model = [] if work.model == "mini" else ["--model", work.model]
    opening = f"import sfumato; sfumato.load({work.model!r}).lay_out()"
    programs = {OURS: [sys.executable, "-c", opening], **others}
    with tempfile.TemporaryDirectory() as place:
        line = [sys.executable, "-m", "sfumato", "a red apple", *model, "--steps", str(work.steps), "-o", f"{place}/"]
        command = {OURS: started(line)}
        found = interleaved(f'sfumato "a red apple" --steps {work.steps}, cold', command, work.cold, warm=0, dtype=None)
    opened = {name: started(line) for name, line in programs.items()}
    return found + interleaved("model open, cold", opened, work.cold, warm=0, dtype=None)


def started(line: Sequence[str], more: Mapping[str, str] | None = None) -> Callable[[], Usage]:
    """A process, as a function to time."""
    return lambda: spawned(line, more)


def picture_flops(pipe: Pipeline, work: Work) -> float:
    """Floating-point operations of one picture with guidance, its text and decoding included; 0 for other kinds."""
    from sfumato.models.autoencoder import AutoencoderConfig
    from sfumato.models.clip import CLIPTextConfig
    from sfumato.models.unet import UNetConfig

    net, vae = pipe.denoiser.config, pipe.vae.config
    text = None if pipe.text_encoder is None else pipe.text_encoder.config
    if not (isinstance(net, UNetConfig) and isinstance(vae, AutoencoderConfig) and isinstance(text, CLIPTextConfig)):
        return 0.0
    h, w = pipe.preset.height // pipe.factor, pipe.preset.width // pipe.factor
    tokens = text.max_position_embeddings
    rows = 1 if work.scale == 1 else 2
    step = counted(net, (rows, net.in_channels, h, w), (rows, tokens, text.hidden_size))
    decoded = counted(vae, (1, vae.latent_channels, h, w), method="decode")
    return work.steps * step + decoded + counted(text, (rows, tokens))


def measured(
    work: Work,
    others: Mapping[str, Paint] | None = None,
    programs: Mapping[str, Sequence[str]] | None = None,
    missing: Mapping[str, str] | None = None,
) -> Bench:
    """Everything in one run; others: further painters of the same work, programs: of those that open the model."""
    from sfumato.pipelines.pipeline import load

    pipe = load(work.model, work.precision, "cpu")
    ceiling = measured_ceiling()
    timings = (*warm(pipe, work, others or {}), *cold(work, programs or {}))
    return Bench(about(pipe.runtime.precision), ceiling, timings, missing or {})


def about(precision: str) -> dict[str, Any]:
    """What the figures depend on."""
    from sfumato import kernels

    machine = examine()
    return {
        "cpu": machine.cpu,
        "cores": machine.cores,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "kernels": kernels.available() or "PyTorch's",
        "sfumato": __version__,
        "torch": torch.__version__,
        "python": machine.python,
    }
