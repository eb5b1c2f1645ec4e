"""How much memory a full-size model takes with --memory fast, balanced and low, and what it costs in time.

    python benchmarks/memory.py                  # writes benchmarks/results/memory.json and memory.md

Weights are random, in true sizes and layout, and stored in halves. Each row is a process of its own: the most memory
that was ever resident (VmHWM), interpreter, PyTorch and touched pages of files included; what the program foresaw, with
what the process had before it; seconds from the open model to the picture, and of processor time, which other programs
change little, also in parts of the first row's. The picture is compared with the first row's, in levels of 255: with
SFUMATO_PREPARE=off they are equal, else that of fast is rounded otherwise. sd15-float32 is the model as diffusers
writes it, beside diffusers in float32 without its safety checker, for a picture of the same size and steps. SD 1.5
needs 2 GB of disk, in float32 4 GB, Stable Diffusion 3 medium 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import BY_NAME, machine, quiet, status
from full_size import ours as random_model
from PIL import Image

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
WAYS = ("fast", "balanced", "low")
PEER = "diffusers"
SHARE = 0.75  # of the peer's peak that `fast` may take for a picture of 512x512 pixels
LEVELS = 2  # of 255 by which pictures may differ


@dataclass(frozen=True)
class Case:
    """A model to measure. bound: GiB that `low` may take for a picture of 512x512 pixels; ways: may name the peer.

    precision: float32 also where a GPU or a newer processor would compute in bfloat16, as on the machine of the
               published figures; what lies between the layers is half as large then.
    """

    preset: str
    stored: torch.dtype
    precision: str
    ways: tuple[str, ...]
    bound: float


CASES: Mapping[str, Case] = {
    "sd15": Case("sd15", torch.float16, "float32", WAYS, 2.5),
    "sd15-float32": Case("sd15", torch.float32, "float32", ("fast", PEER), 2.5),
    "sd3-medium": Case("sd3-medium", torch.bfloat16, "float32", ("low",), 6.0),
}


@dataclass(frozen=True)
class Picture:
    """One picture in a fresh process. Bytes, seconds, and the picture's file."""

    peak: int
    before: int
    estimate: int
    opened: float
    seconds: float
    processor: float
    pixels: str


def worker(folder: Path, way: str, precision: str, size: int, steps: int) -> Picture:
    """Make one picture in this process and measure."""
    from sfumato.pipelines.fit import estimate
    from sfumato.pipelines.pipeline import load
    from sfumato.pipelines.request import Request

    request = Request(prompt="a horse", seed=0, width=size, height=size, num_inference_steps=steps, sampler="ddim")
    before, since = status("VmRSS"), time.perf_counter()
    pipe = load(folder, precision, "cpu", memory=way, request=request)
    opened = time.perf_counter() - since
    foreseen = estimate(pipe, request, pipe.memory, pipe.runtime.dtype)
    since, used = time.perf_counter(), time.process_time()
    image = pipe.generate(request).images[0]
    seconds, processor = time.perf_counter() - since, time.process_time() - used
    peak, path = status("VmHWM"), folder.parent / f"{folder.name}-{way}.png"
    image.save(path)
    return Picture(peak, before, foreseen, opened, seconds, processor, str(path))


def peer(folder: Path, size: int, steps: int) -> Picture:
    """The same by diffusers in this process; what it needed was not foreseen."""
    quiet()
    import diffusers

    before, since = status("VmRSS"), time.perf_counter()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    opened = time.perf_counter() - since
    since, used = time.perf_counter(), time.process_time()
    image = pipe("a horse", width=size, height=size, num_inference_steps=steps).images[0]
    seconds, processor = time.perf_counter() - since, time.process_time() - used
    peak, path = status("VmHWM"), folder.parent / f"{folder.name}-{PEER}.png"
    image.save(path)
    return Picture(peak, before, 0, opened, seconds, processor, str(path))


def spawn(*words: str) -> Any:
    """Another process of this script; its answer."""
    line = [sys.executable, str(Path(__file__).resolve()), *words]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def prepare(case: Case, folder: Path) -> None:
    """Write a random model; one that is there stays."""
    from sfumato.weights.folder import save_folder

    if not (folder / "model_index.json").exists():
        save_folder(random_model(BY_NAME[case.preset], 0, case.stored), folder)


def markdown(found: Mapping[str, Mapping[str, Picture]], size: int, steps: int, about: Mapping[str, Any]) -> str:
    """A row for each model and way."""
    head = "model | memory | peak GiB | foreseen GiB | open s | picture s | processor s | times | differs by |"
    lines = [f"Pictures of {size}x{size} pixels, {steps} step(s) with guidance, decoded.", ""]
    lines += [f"| {head}", "|---|---" + "|---:" * 7 + "|"]
    for name, rows in found.items():
        case, first = CASES[name], next(iter(rows.values()))
        for way, row in rows.items():
            stored = f"{name}, {str(case.stored).removeprefix('torch.')} file in {case.precision}"
            levels: int | str = "" if way == PEER else difference(first.pixels, row.pixels)
            foreseen = "" if way == PEER else f"{(row.before + row.estimate) / GIB:.2f}"
            figures = row.opened, row.seconds, row.processor, row.processor / first.processor
            text = " | ".join([f"{row.peak / GIB:.2f}", foreseen, *(f"{figure:.2f}" for figure in figures)])
            lines.append(f"| {stored} | {way} | {text} | {levels} |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in about.items()), ""])


def difference(one: str, other: str) -> int:
    """The largest difference of two pictures in files, in levels of 255."""
    a, b = (np.asarray(Image.open(path), dtype=np.int16) for path in (one, other))
    return int(np.abs(a - b).max())


def verdict(found: Mapping[str, Mapping[str, Picture]], size: int) -> list[str]:
    """What misses its bound, in words."""
    missed = []
    for name, rows in found.items():
        bound, ours = CASES[name].bound, [row for way, row in rows.items() if way != PEER]
        if size == 512 and "low" in rows and rows["low"].peak / GIB > bound:
            missed.append(f"{name}: low takes {rows['low'].peak / GIB:.2f} GiB (bound {bound})")
        if size == 512 and PEER in rows and rows["fast"].peak > SHARE * rows[PEER].peak:
            share = rows["fast"].peak / rows[PEER].peak
            missed.append(f"{name}: fast takes {share:.2f} of what {PEER} does (bound {SHARE})")
        levels = max(difference(one.pixels, other.pixels) for one in ours for other in ours)
        if levels > LEVELS:
            missed.append(f"{name}: the pictures differ by {levels} of 255 levels (bound {LEVELS})")
    return missed


def measure(work: Path, asked: argparse.Namespace) -> int:
    """Everything, with the results written."""
    found: dict[str, dict[str, Picture]] = {}
    for name in asked.models or [name for name in CASES if CASES[name].preset in BY_NAME]:
        case, folder = CASES[name], work / name
        prepare(case, folder)
        found[name] = {}
        for way in case.ways:
            words = ("--worker", str(folder), way, case.precision, str(asked.size), str(asked.steps))
            found[name][way] = row = Picture(**spawn(*words))
            print(f"{name:12} {way:9} peak {row.peak / GIB:.2f} GiB, foreseen "
                  f"{(row.before + row.estimate) / GIB:.2f}, {row.seconds:.1f} s", flush=True)  # fmt: skip
    missed, about = verdict(found, asked.size), machine()
    text = markdown(found, asked.size, asked.steps, about)
    raw = {
        name: {way: {**asdict(row), "pixels": Path(row.pixels).name} for way, row in rows.items()}
        for name, rows in found.items()
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    everything = {"machine": about, "size": asked.size, "steps": asked.steps, "pictures": raw}
    (asked.out / "memory.json").write_text(json.dumps(everything, indent=1) + "\n")
    (asked.out / "memory.md").write_text(text)
    print(text, *(f"missed: {line}" for line in missed), sep="\n")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure memory of a full-size model in three ways of keeping weights."
    )
    parser.add_argument("--models", nargs="*", choices=list(CASES), help="[default: all that this version has]")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="where the models stay [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of memory.json and memory.md")
    parser.add_argument("--worker", nargs=5, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        folder, way, precision, size, steps = asked.worker
        place, form = Path(folder), (int(size), int(steps))
        print(json.dumps(asdict(peer(place, *form) if way == PEER else worker(place, way, precision, *form))))
        return 0
    if asked.work:
        return measure(asked.work, asked)
    with tempfile.TemporaryDirectory(prefix="sfumato-memory-") as work:
        return measure(Path(work), asked)


if __name__ == "__main__":
    sys.exit(main())
