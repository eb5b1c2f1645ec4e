"""How fast sfumato is on this machine beside diffusers, with the same weights, sizes, threads and steps, in one run.

    python benchmarks/bench.py                   # writes benchmarks/results/bench.json, bench.md and bench.png
    python benchmarks/bench.py --only sd15 --parts unet --sizes 256 --work /tmp/models

builtin: the built-in model, warm and cold, as `sfumato bench` measures it.
sd15:    Stable Diffusion 1.5 at its true size with random weights: one call of the U-Net with the pair of guidance, the
         autoencoder, the text tower, warm; opening the model and whole pictures, each in a process of its own, with the
         most memory that was resident and minor page faults.

Contenders take turns (A B C A B C...) after a round that does not count. sfumato comes as it is and plain, without
prepared networks and kernels; diffusers as people run it, in float32; at its best, channels last in bfloat16 where the
CPU has units for it; the same with large buffers kept by the environment of its process; with --compile compiled, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from full_size import BY_NAME, make, quiet, random_weights
from torch import Tensor, nn

import sfumato
from sfumato.cond import Cond
from sfumato.evaluate import bench
from sfumato.evaluate.bench import OURS, PROMPT, Paint, Work, started
from sfumato.evaluate.timing import Timing, counted, interleaved, measured_ceiling, peak_line
from sfumato.prepare import prepare
from sfumato.runtime import choose, use_threads
from sfumato.weights.parts import NETWORKS

RESULTS = Path(__file__).parent / "results"
BUILT_IN = Path(sfumato.__file__).parent / "assets" / "mini"
PLAIN, THEIRS, LAST, KEPT, COMPILED = (
    f"{OURS}, plain",
    "diffusers",
    "diffusers, channels last",
    "diffusers, last, kept",
    "diffusers, compiled",
)
PARTS = ("unet", "decode", "encode", "text", "load", "picture")
GROUPS = ("builtin", "sd15")
UNPREPARED = {"SFUMATO_PREPARE": "off", "SFUMATO_KERNELS": "off"}
LARGE_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
# Contender -> the library that a process uses, and its environment.
PROCESSES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    OURS: (OURS, {}),
    PLAIN: (OURS, UNPREPARED),
    THEIRS: (THEIRS, {}),
    LAST: (LAST, {}),
    KEPT: (LAST, LARGE_BUFFERS),
}


def absent() -> dict[str, str]:
    """Peers that are not installed, and what to do about it."""
    return {
        name: f"it is not installed; pip install {name}" for name in (THEIRS,) if not importlib.util.find_spec(name)
    }


def opened(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers as a contender has it."""
    import diffusers

    kind = torch.float32 if name == THEIRS else dtype
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=kind, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    if name != THEIRS:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if name == COMPILED:
        pipe.unet = torch.compile(pipe.unet)
    return pipe


def painter(pipe: Any, work: Work) -> Paint:
    """Pictures by diffusers."""

    def paint(count: int) -> None:
        pipe(PROMPT, num_inference_steps=work.steps, guidance_scale=work.scale, num_images_per_prompt=count,
             generator=torch.Generator().manual_seed(0))  # fmt: skip

    return paint


def builtin(asked: argparse.Namespace, there: Mapping[str, bool]) -> tuple[Timing, ...]:
    """The built-in model."""
    work = Work(rounds=asked.rounds, cold=asked.cold, counts=tuple(asked.counts))
    dtype = choose("cpu").dtype
    names = [name for name in (THEIRS, LAST, COMPILED) if there[name]]
    others = {name: painter(opened(name, BUILT_IN, dtype), work) for name in names}
    program = [sys.executable, __file__, "--worker", THEIRS, str(BUILT_IN), "128", "0"]
    return bench.measured(work, others, {THEIRS: program} if there[THEIRS] else {}).timings


def laid_out(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in a dtype, those of convolutions channels last; all others that need no conversion are shared."""
    return {
        name: w.to(dtype, memory_format=torch.channels_last) if w.ndim == 4 else w.to(dtype)
        for name, w in weights.items()
    }


def filled(make_it: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> Any:
    """A network with these weights."""
    with torch.device("meta"):
        net = make_it()
    net.load_state_dict(dict(weights), assign=True)
    return net.eval().requires_grad_(False)


def variants(config: Any, there: Mapping[str, bool]) -> dict[str, Any]:
    """A network of each contender; they share what weights they can."""
    dtype = choose("cpu").dtype
    own = NETWORKS[type(config)]
    with torch.device("meta"):
        empty = own(config)
    weights = random_weights(empty, 0)
    last = laid_out(weights, dtype)
    if not there[THEIRS]:
        weights.clear()
    found = {OURS: filled(lambda: own(config), last)}
    prepare(found[OURS])
    if there[PLAIN]:
        found[PLAIN] = filled(lambda: own(config), last)
    if there[THEIRS]:
        found[THEIRS] = filled(lambda: peer(config), weights)
    if there[LAST]:
        found[LAST] = filled(lambda: peer(config), last)
    if there[COMPILED]:
        found[COMPILED] = torch.compile(filled(lambda: peer(config), last))
    return found


def peer(config: Any) -> Any:
    """Diffusers' network of a configuration."""
    import diffusers

    entries = config.to_dict()
    return getattr(diffusers, entries["_class_name"]).from_config(entries)


def called(name: str, net: Any, part: str, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """One call of a network, as a function to time."""
    x, *others = (t.to(torch.float32 if name == THEIRS else choose("cpu").dtype) for t in inputs)
    t = torch.full((len(x),), 500.0)
    context = others[0] if others else None
    calls: Mapping[str, Callable[[], Any]] = {
        "unet": (lambda: net(x, t, Cond(context)))
        if name in (OURS, PLAIN)
        else (lambda: net(x, t, encoder_hidden_states=context)),
        "decode": lambda: net.decode(x),
        "encode": lambda: net.encode(x),
    }

    def run() -> None:
        with torch.no_grad():
            calls[part]()

    return run


def networks(part: str, asked: argparse.Namespace, there: Mapping[str, bool]) -> list[Timing]:
    """The U-Net or a half of the autoencoder, at all sizes and batches."""
    preset = BY_NAME["sd15"]
    config: Any = preset.denoiser if part == "unet" else preset.vae
    nets, found = variants(config, there), []
    for size in asked.sizes:
        for batch in asked.batches:
            side, rows = size // 8, 2 * batch if part == "unet" else batch
            shape: list[tuple[int, ...]] = [(rows, 3, size, size) if part == "encode" else (rows, 4, side, side)]
            shape += [(rows, 77, 768)] if part == "unet" else []
            inputs = tuple(torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in shape)
            work = counted(config, *shape, method="" if part == "unet" else part)
            able = {name: called(name, net, part, inputs) for name, net in nets.items()}
            task = f"SD 1.5 {part}, {size}x{size}, batch {rows}"
            found += interleaved(task, able, asked.rounds, work, dtype=choose("cpu").dtype)
    return found


def text(asked: argparse.Namespace, there: Mapping[str, bool], folder: Path) -> list[Timing]:
    """The text tower on a pair of prompts."""
    ours, dtype = sfumato.load(folder, device="cpu").text_encoder, choose("cpu").dtype
    ids = torch.randint(0, 40000, (2, 77), generator=torch.Generator().manual_seed(0))
    towers = {OURS: ours, **{name: opened(name, folder, dtype).text_encoder for name in (THEIRS,) if there[name]}}

    def reading(tower: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                tower(ids)

        return run

    work = counted(BY_NAME["sd15"].text, (2, 77))
    able = {name: reading(tower) for name, tower in towers.items()}
    return interleaved("SD 1.5 text, batch 2", able, asked.rounds, work, dtype=dtype)


def processes(part: str, asked: argparse.Namespace, there: Mapping[str, bool], folder: Path) -> list[Timing]:
    """Opening the model, or a whole picture, each in a process of its own."""
    found = []
    for size in asked.sizes if part == "picture" else asked.sizes[:1]:
        steps = asked.steps if part == "picture" else 0
        task = f"SD 1.5 picture, {size}x{size}, {steps} steps, cold" if steps else "SD 1.5 open, cold"
        able = {
            name: started([sys.executable, __file__, "--worker", library, str(folder), str(size), str(steps)], more)
            for name, (library, more) in PROCESSES.items()
            if there[name] and (steps or not more)
        }
        found += interleaved(task, able, asked.cold, warm=0, dtype=None)
    return found


def worker(library: str, folder: str, size: int, steps: int) -> None:
    """Open a model ready to denoise and make a picture of so many steps, in this process; says its peak."""
    use_threads()
    if library == OURS:
        pipe = sfumato.load(folder, device="cpu")
        pipe.lay_out()
        if steps:
            pipe(PROMPT, seed=0, height=size, width=size, num_inference_steps=steps)
    else:
        quiet()
        theirs = opened(library, Path(folder), choose("cpu").dtype)
        if steps:
            theirs(PROMPT, height=size, width=size, num_inference_steps=steps)
    print(peak_line())


def sd15(asked: argparse.Namespace, there: Mapping[str, bool], work: Path) -> list[Timing]:
    """Stable Diffusion 1.5 with random weights."""
    folder, found = work / "sd15", []
    if {"text", "load", "picture"} & set(asked.parts) and not (folder / "model_index.json").exists():
        make(BY_NAME["sd15"], folder)
    for part in asked.parts:
        if part == "text":
            found += text(asked, there, folder)
        elif part in ("load", "picture"):
            found += processes(part, asked, there, folder)
        else:
            found += networks(part, asked, there)
    return found


def measured(asked: argparse.Namespace, work: Path) -> Iterator[bench.Bench]:
    """All groups that were asked for; given out after each, with what was measured before."""
    missing = absent()
    there = {OURS: True, PLAIN: True, **{name: THEIRS not in missing for name in (THEIRS, LAST, KEPT)}}
    there[COMPILED] = asked.compile and not missing
    for name, reason in missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    about, ceiling = bench.about(choose("cpu").precision), measured_ceiling()
    if not missing:
        about[THEIRS] = importlib.metadata.version(THEIRS)
    timings: list[Timing] = []
    groups = {
        "builtin": lambda: builtin(asked, there),
        "sd15": lambda: sd15(asked, {**there, **dict.fromkeys(asked.without, False)}, work),
    }
    for name in asked.only:
        timings += groups[name]()
        yield bench.Bench(about, ceiling, tuple(timings), missing)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sfumato beside diffusers on this machine's CPU.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of sd15")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512], help="pixels of a side, of sd15")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="pictures in a call, of sd15")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8], help="pictures in one go, of builtin")
    parser.add_argument("--steps", type=int, default=20, help="of sd15's whole picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", type=int, default=3, help="rounds of new processes")
    parser.add_argument(
        "--without", nargs="+", choices=(PLAIN, THEIRS, LAST, KEPT), default=[], metavar="CONTENDER", help="of sd15"
    )
    parser.add_argument("--compile", action="store_true", help="diffusers compiled as well; takes minutes")
    parser.add_argument("--threads", type=int, default=None, help="for all contenders [default: a core each]")
    parser.add_argument("--work", type=Path, default=None, help="where sd15 (4 GB) stays [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of bench.json, bench.md and bench.png")
    parser.add_argument("--worker", nargs=4, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        library, folder, size, steps = asked.worker
        worker(library, folder, int(size), int(steps))
        return
    use_threads(asked.threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for the processes
    if not absent():
        quiet()
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as place:
        for found in measured(asked, asked.work or Path(place)):
            found.write(asked.out)
    print(found.markdown())


if __name__ == "__main__":
    main()
