"""How quickly and how leanly a full-size Stable Diffusion 1.5 is loaded, beside diffusers on the same files.

    python benchmarks/loading.py                 # writes benchmarks/results/loading.json and loading.md

Each load is a process of its own; libraries are imported before the clock starts. The contenders take turns on each
file, after a round that does not count, so that the files are in the system's cache; medians count. "Ready" is when the
call returns. As weights may be mapped files that nobody has read yet, "touched" goes on until a number of every page of
every weight was read, and "used" until a small picture is made in one step, since more may be put off until then.
Memory is the process's: peak of all resident pages, and of those that belong to no file.
Then one process switches between two models, with the memory after each load. Needs 20 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from full_size import BY_NAME, machine, make, quiet, status
from torch import nn

import sfumato

RESULTS = Path(__file__).parent / "results"
PEAK, DRIFT = 1.25, 0.05  # the bounds: peak by bytes of the weights; memory after a switch
FILES = {
    "folder, float32": "a/folder",
    "one file, float32": "a/single.safetensors",
    "one file, float16 -> float32": "a/half.safetensors",
}
LIBRARIES = ("sfumato", "diffusers")
PEAKS = ("peak", "anonymous", "used_peak", "used_anonymous")
GB = 1e9


@dataclass(frozen=True)
class Load:
    """One load in a fresh process: seconds, and bytes of memory.

    cpu:          seconds of processor time until the weights were touched, which other programs change little.
    imports:      seconds of importing the library before.
    peak, anonymous: most resident memory until the weights were touched, whole and without pages of files.
    used_peak, used_anonymous: the same until the first picture was made.
    before:       resident memory before the load; weights: bytes of the weights in float32.
    """

    ready: float
    touched: float
    used: float
    cpu: float
    imports: float
    peak: int
    anonymous: int
    used_peak: int
    used_anonymous: int
    before: int
    weights: int


class Watch:
    """The peak of anonymous memory, sampled by a thread."""

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        """Bytes, until now."""
        self._peak = max(self._peak, status("RssAnon"))
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self._peak = max(self._peak, status("RssAnon"))


def touch(networks: Sequence[nn.Module]) -> int:
    """Read a number of every page of every weight; the bytes of all weights."""
    total = 0
    for network in networks:
        for p in network.parameters():
            storage = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), p.storage_offset(), (p.numel(),))
            storage[:: 4096 // p.element_size()].sum()
            total += p.numel() * p.element_size()
    return total


def by_sfumato(path: Path, folder: Path) -> Any:
    return sfumato.load(path, precision="float32", device="cpu")


def by_diffusers(path: Path, folder: Path) -> Any:
    import diffusers

    kind = diffusers.StableDiffusionPipeline
    if path.is_dir():
        return kind.from_pretrained(
            path, torch_dtype=torch.float32, use_safetensors=True, safety_checker=None, local_files_only=True
        )
    return kind.from_single_file(
        str(path), config=str(folder), torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )


def paint(library: str, pipe: Any) -> None:
    """A small picture in one step of DDIM, without guidance."""
    both = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0}
    if library == "sfumato":
        pipe("a horse", seed=0, sampler="ddim", **both)
        return
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe("a horse", generator=torch.Generator().manual_seed(0), **both)


LOADERS: Mapping[str, Callable[[Path, Path], Any]] = {"sfumato": by_sfumato, "diffusers": by_diffusers}


def worker(library: str, path: Path, folder: Path) -> Load:
    """Load once in this process and measure."""
    since = time.perf_counter()
    if library == "diffusers":
        quiet()
        from diffusers import StableDiffusionPipeline  # noqa: F401
    else:
        import sfumato.pipelines.pipeline  # noqa: F401
    imports = time.perf_counter() - since
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    with Watch() as watch:
        since, used_up = time.perf_counter(), time.process_time()
        pipe = LOADERS[library](path, folder)
        ready = time.perf_counter() - since
        weights = touch([pipe.unet, pipe.vae, pipe.text_encoder])
        touched, cpu = time.perf_counter() - since, time.process_time() - used_up
        peak, anonymous = status("VmHWM"), watch.peak
        paint(library, pipe)
        used = time.perf_counter() - since
        return Load(ready, touched, used, cpu, imports, peak, anonymous, status("VmHWM"), watch.peak, before, weights)


def switch(first: Path, second: Path, times: int) -> list[dict[str, int]]:
    """Resident memory after the first load and after each of `times` switches, the model before dropped."""
    found = []
    for i in range(times + 1):
        pipe = sfumato.load((first, second)[i % 2], precision="float32", device="cpu")
        touch([pipe.unet, pipe.vae, pipe.text_encoder])
        found.append({"resident": status("VmRSS"), "anonymous": status("RssAnon")})
        del pipe
    return found


def spawn(*words: str) -> Any:
    """Another process of this script; its answer."""
    line = [sys.executable, str(Path(__file__).resolve()), *words]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def prepare(work: Path) -> None:
    """Two models of different weights, one in all layouts; what is there stays."""
    from sfumato.weights.model import load_model
    from sfumato.weights.single import save_single

    quiet()
    for seed, name in enumerate("ab"):
        place = work / name
        if not (place / "folder" / "model_index.json").exists():
            make(BY_NAME["sd15"], place / "folder", seed)
        for file, dtype in (("single", None), ("half", torch.float16)):
            if not (place / f"{file}.safetensors").exists():
                save_single(load_model(place / "folder"), place / f"{file}.safetensors", dtype)
    for path in (work / "b" / "folder").rglob("*.safetensors"):
        path.unlink()  # not measured


def loads(work: Path, rounds: int) -> dict[str, dict[str, list[Load]]]:
    """For each file and library, the loads of all counted rounds."""
    found: dict[str, dict[str, list[Load]]] = {}
    for title, file in FILES.items():
        rows: dict[str, list[Load]] = {library: [] for library in LIBRARIES}
        for turn in range(rounds + 1):
            for library in LIBRARIES if turn % 2 else reversed(LIBRARIES):
                load = Load(**spawn("--worker", library, str(work / file), str(work / "a/folder")))
                if turn:
                    rows[library].append(load)
                    print(f"{title:30} {library:10} ready {load.ready:6.2f} s, touched {load.touched:6.2f} s, "
                          f"processor {load.cpu:5.2f} s, "
                          f"used {load.used:6.2f} s, peak {load.peak / load.weights:.2f}, "
                          f"used {load.used_peak / load.weights:.2f}", flush=True)  # fmt: skip
        found[title] = rows
    return found


def markdown(found: Mapping[str, Any], drift: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The tables: loads, then switches."""
    head = (
        "file | by | ready s | touched s | from-to | processor s | used s | imports s | peak | anonymous | used: peak |"
    )
    lines = ["Peaks are in parts of the bytes of the weights.", ""]
    lines += [f"| {head} anonymous |", "|---|---" + "|---:" * 10 + "|"]
    for title, rows in found.items():
        for library, some in rows.items():
            middle = {name: statistics.median(getattr(x, name) for x in some) for name in Load.__dataclass_fields__}
            most = {name: max(getattr(x, name) / x.weights for x in some) for name in PEAKS}
            touched = [x.touched for x in some]
            span = f"{min(touched):.2f}-{max(touched):.2f}"
            figures = [f"{middle['ready']:.2f}", f"{middle['touched']:.2f}", span]
            figures += [f"{middle[name]:.2f}" for name in ("cpu", "used", "imports")]
            figures += [f"{most[name]:.2f}" for name in PEAKS]
            lines.append(f"| {title} | {library} | {' | '.join(figures)} |")
    head = "| switching between two files of | switches | resident at first | largest change from it |"
    lines += ["", head, "|---|---:|---:|---:|"]
    for name, change in drift.items():
        first = change["steps"][0]["resident"] / GB
        lines.append(f"| {name} | {change['switches']} | {first:.2f} GB | {change['drift']:+.2%} |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in about.items()), ""])


def verdict(found: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    """What misses a bound, in words."""
    missed = []
    for title, rows in found.items():
        ours, theirs = (statistics.median(x.touched for x in rows[library]) for library in LIBRARIES)
        if ours > theirs:
            missed.append(f"{title}: {ours:.2f} s, diffusers {theirs:.2f} s")
        worst = max(x.peak / x.weights for x in rows["sfumato"])
        if worst >= PEAK:
            missed.append(f"{title}: memory peaks at {worst:.2f} times the weights (bound {PEAK})")
    for name, change in drift.items():
        if abs(change["drift"]) > DRIFT:
            missed.append(f"switching, {name}: memory changes by {change['drift']:+.1%} (bound {DRIFT:.0%})")
    return missed


def measure(work: Path, asked: argparse.Namespace) -> int:
    """Everything, with the results written."""
    prepare(work)
    found = loads(work, asked.rounds)
    drift = {}
    for title, name in (("float32", "single"), ("float16 -> float32", "half")) if asked.switches else ():
        files = [str(work / place / f"{name}.safetensors") for place in "ab"]
        steps = spawn("--switch", *files, str(asked.switches))
        first = steps[0]["resident"]
        worst = max(((s["resident"] - first) / first for s in steps[1:]), key=abs)
        drift[title] = {"switches": asked.switches, "drift": worst, "steps": steps}
        print(f"{asked.switches} switches, {title}: {first / GB:.2f} GB, largest change {worst:+.2%}", flush=True)
    missed, about = verdict(found, drift), machine()
    asked.out.mkdir(parents=True, exist_ok=True)
    raw = {title: {name: [asdict(x) for x in some] for name, some in rows.items()} for title, rows in found.items()}
    text = markdown(found, drift, about)
    everything = {"machine": about, "loads": raw, "switches": drift}
    (asked.out / "loading.json").write_text(json.dumps(everything, indent=1) + "\n")
    (asked.out / "loading.md").write_text(text)
    print(text, *(f"missed: {line}" for line in missed), sep="\n")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Time loading a full-size model beside diffusers.")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each file by each library")
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--work", type=Path, default=None, help="where the models stay [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of loading.json and loading.md")
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--switch", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        library, path, folder = asked.worker
        print(json.dumps(asdict(worker(library, Path(path), Path(folder)))))
        return 0
    if asked.switch:
        first, second, times = asked.switch
        print(json.dumps(switch(Path(first), Path(second), int(times))))
        return 0
    if asked.work:
        return measure(asked.work, asked)
    with tempfile.TemporaryDirectory(prefix="sfumato-loading-") as work:
        return measure(Path(work), asked)


if __name__ == "__main__":
    sys.exit(main())
