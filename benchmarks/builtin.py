"""How fast the built-in model is, beside diffusers' StableDiffusionPipeline on the same folder.

    python benchmarks/builtin.py                 # writes benchmarks/results/builtin.json and builtin.md

Warm: 20 steps with guidance at the model's size, one picture and eight at a time, float32. The contenders take turns
(A B C A B C...), so that whatever else the machine does falls on all of them alike; medians count. Cold: the command
`sfumato "a red apple"` from the shell to the file, a new process each time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import sfumato

PROMPT = "a red apple on a blue background"
RESULTS = Path(__file__).parent / "results"
OURS = "sfumato"


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of a contender; `ratio` is its median over ours."""

    contender: str
    task: str
    seconds: tuple[float, ...]
    ratio: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contenders(folder: Path, steps: int, scale: float) -> dict[str, Callable[[int], None]]:
    """Name -> a function that makes some pictures of one prompt."""
    import diffusers

    pipe = sfumato.load(folder, precision="float32", device="cpu")

    def ours(count: int) -> None:
        pipe(PROMPT, seed=0, num_inference_steps=steps, guidance_scale=scale, num_images_per_prompt=count)

    found: dict[str, Callable[[int], None]] = {OURS: ours}
    for name, layout in (("diffusers", torch.contiguous_format), ("diffusers, channels last", torch.channels_last)):
        other = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        other.set_progress_bar_config(disable=True)
        other.unet.to(memory_format=layout)
        other.vae.to(memory_format=layout)

        def theirs(count: int, other: diffusers.StableDiffusionPipeline = other) -> None:
            generator = torch.Generator().manual_seed(0)
            other(PROMPT, num_inference_steps=steps, guidance_scale=scale, num_images_per_prompt=count,
                  generator=generator)  # fmt: skip

        found[name] = theirs
    return found


def warm(folder: Path, steps: int, scale: float, rounds: int, counts: tuple[int, ...]) -> list[Timing]:
    """Interleaved rounds of every contender, after one round that does not count."""
    able = contenders(folder, steps, scale)
    found = []
    for count in counts:
        seconds: dict[str, list[float]] = {name: [] for name in able}
        for turn in range(rounds + 1):
            for name, paint in able.items():
                since = time.perf_counter()
                paint(count)
                if turn:
                    seconds[name].append(time.perf_counter() - since)
        own = statistics.median(seconds[OURS])
        task = f"{count} picture{'s' * (count > 1)}, {steps} steps, warm"
        found += [Timing(name, task, tuple(all_), statistics.median(all_) / own) for name, all_ in seconds.items()]
    return found


def cold(folder: Path | None, runs: int) -> Timing:
    """The command from the shell to the file, a new process each time."""
    command = shutil.which("sfumato", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        raise FileNotFoundError("the command `sfumato` is not installed; pip install -e . first")
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        for i in range(runs):
            line = [command, "a red apple", "-o", f"{place}/{i}.png", *(["--model", str(folder)] if folder else [])]
            since = time.perf_counter()
            subprocess.run(line, check=True, capture_output=True)
            seconds.append(time.perf_counter() - since)
            if not Path(f"{place}/{i}.png").is_file():
                raise RuntimeError(f"{' '.join(line)} wrote no picture")
    return Timing('sfumato "a red apple"', "cold start from the shell", tuple(seconds))


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import diffusers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "sfumato": sfumato.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def markdown(timings: list[Timing], about: dict[str, str | int]) -> str:
    """The table: median, fastest and slowest round, ratio."""
    lines = [
        "| task | contender | median s | fastest | slowest | rounds | times sfumato's |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for t in timings:
        ratio = "-" if t.ratio is None else f"{t.ratio:.2f}"
        figures = f"{t.median:.2f} | {min(t.seconds):.2f} | {max(t.seconds):.2f} | {len(t.seconds)} | {ratio}"
        lines.append(f"| {t.task} | {t.contender} | {figures} |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in about.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the built-in model beside diffusers on the same folder.")
    parser.add_argument("--model", type=Path, default=None, help="model folder [default: the built-in one]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8], help="pictures at a time")
    parser.add_argument("--cold", type=int, default=3, help="cold starts; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=None, help="of torch, for all contenders [default: torch's own]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of builtin.json and builtin.md")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # for the cold starts
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = asked.model or Path(sfumato.__file__).parent / "assets" / "mini"
    timings = warm(folder, asked.steps, asked.scale, asked.rounds, tuple(asked.counts))
    if asked.cold:
        timings.append(cold(asked.model, asked.cold))
    about = machine()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(t), "median": t.median} for t in timings]
    (asked.out / "builtin.json").write_text(json.dumps({"machine": about, "timings": rows}, indent=2) + "\n")
    (asked.out / "builtin.md").write_text(markdown(timings, about))
    print(markdown(timings, about))


if __name__ == "__main__":
    main()
