"""How fast sfumato is on this machine beside its peers, with the same sizes, threads and steps, in one run.

    python benchmarks/bench.py                   # writes benchmarks/results/bench.json, bench.md and bench.png
    python benchmarks/bench.py --only sd15 --parts unet --sizes 256 --work /tmp/models

builtin: the built-in model, warm and cold, as `sfumato bench` measures it.
sd15:    Stable Diffusion 1.5 at its true size with random weights: one call of the U-Net with the pair of guidance, the
         autoencoder, the text tower, warm; opening the model and whole pictures, each in a process of its own, with the
         most memory that was resident and minor page faults.
growth:  the same U-Net at several sizes, and at the smallest of them with several pictures; growth.png shows both.

Contenders take turns (A B C A B C...) after a round that does not count; `peers.py` says what each is told. Those that
are not installed are named with what would add them. Tasks that were measured earlier stay in the files of --out, so
parts may be measured at different times; a task's rows are always of one run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from full_size import BY_NAME, make, quiet, random_weights
from peers import (
    COMPILED,
    CONTENDERS,
    CPP,
    LAST,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_INT8,
    OURS_COMPILED,
    PEERS,
    PLAIN,
    THEIRS,
    Cpp,
    absent,
    opened,
    painter,
    versions,
)
from torch import Tensor, nn

import sfumato
from sfumato.compiling import compiled
from sfumato.cond import Cond
from sfumato.evaluate import bench
from sfumato.evaluate.bench import OURS, PROMPT, Work, started
from sfumato.evaluate.chart import curves
from sfumato.evaluate.timing import Timing, counted, interleaved, measured_ceiling, peak_line, spawned
from sfumato.files import replacing
from sfumato.prepare import prepare
from sfumato.runtime import choose, use_threads
from sfumato.weights.model import load_model, save_model
from sfumato.weights.parts import NETWORKS

RESULTS = Path(__file__).parent / "results"
BUILT_IN = Path(sfumato.__file__).parent / "assets" / "mini"
PARTS = ("unet", "decode", "encode", "text", "load", "picture")
GROUPS = ("builtin", "sd15", "growth")
GROWN = {"sizes": (256, 512, 768, 1024), "batches": (1, 2, 4, 8)}
VINO = (OPENVINO, OPENVINO_BF16, OPENVINO_INT8)
NAMES = {"unet": "unet", "decode": "decoder", "encode": "encoder"}  # of the converted networks
Asked = argparse.Namespace
There = Mapping[str, bool]


class Places:
    """What peers need on disk, made when it is first asked for: 4 GB, and as much again for OpenVINO."""

    def __init__(self, work: Path, there: There) -> None:
        self.work, self.there = work, there

    @property
    def folder(self) -> Path:
        """The model's folder."""
        folder = self.work / "sd15"
        if not (folder / "model_index.json").exists():
            make(BY_NAME["sd15"], folder)
        return folder

    @property
    def file(self) -> Path:
        """The model as one file in float16, for stable-diffusion.cpp."""
        file = self.work / "sd15.safetensors"
        if not file.exists():
            save_model(load_model(self.folder), file, torch.float16)
        return file

    @property
    def converted(self) -> Path:
        """OpenVINO's networks; converted in a process of its own, which gives the memory back."""
        place = self.work / "openvino"
        compressed = self.there[OPENVINO_INT8]
        if not (place / ("unet-int8.xml" if compressed else "encoder.xml")).exists():
            spawned(
                [sys.executable, __file__, "--worker", "convert", str(self.folder), str(place), str(+compressed), "0"]
            )
        return place

    def of(self, name: str) -> list[str]:
        """What a process of a contender is told of files."""
        if name == CPP:
            return [str(self.file), ""]
        return [str(self.folder), str(self.converted) if name in VINO else ""]


def builtin(asked: Asked, there: There) -> list[Timing]:
    """The built-in model."""
    work = Work(rounds=asked.rounds, cold=asked.cold, counts=tuple(asked.counts))
    names = [name for name in (THEIRS, LAST, COMPILED) if there[name]]
    others = {name: painter(opened(name, BUILT_IN), work) for name in names}
    program = [sys.executable, __file__, "--worker", THEIRS, str(BUILT_IN), "", "128", "0"]
    return list(bench.measured(work, others, {THEIRS: program} if there[THEIRS] else {}).timings)


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


def variants(config: Any, part: str, there: There) -> dict[str, Any]:
    """A network of each contender that PyTorch runs; they share what weights they can."""
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
    if there[OURS_COMPILED] and part == "unet":
        net = found[OURS_COMPILED] = filled(lambda: own(config), last)
        compiled(net, "blocks")
    if there[THEIRS]:
        found[THEIRS] = filled(lambda: peer(config), weights)
    if there[LAST]:
        found[LAST] = filled(lambda: peer(config), last)
    if there[COMPILED]:
        net = found[COMPILED] = filled(lambda: peer(config), last)
        method = "forward" if part == "unet" else part
        setattr(net, method, torch.compile(getattr(net, method)))
    return found


def peer(config: Any) -> Any:
    """Diffusers' network of a configuration."""
    import diffusers

    entries = config.to_dict()
    return getattr(diffusers, entries["_class_name"]).from_config(entries)


def called(name: str, net: Any, part: str, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """One call of a network, as a function to time."""
    wide = name == THEIRS or name in VINO
    x, *others = (t.to(torch.float32 if wide else choose("cpu").dtype) for t in inputs)
    t = torch.full((len(x),), 500.0)
    context = others[0] if others else None
    calls: Mapping[str, Callable[[], Any]] = {
        "unet": (lambda: net(x, t, Cond(context)))
        if name.startswith(OURS)
        else (lambda: net(x, t, encoder_hidden_states=context)),
        "decode": lambda: net.decode(x),
        "encode": lambda: net.encode(x),
    }

    def run() -> None:
        with torch.no_grad():
            if name in VINO:
                net(*((x, t, context) if context is not None else (x,)))
            else:
                calls[part]()

    return run


def networks(part: str, asked: Asked, there: There, places: Places, work: list[tuple[int, int]]) -> list[Timing]:
    """The U-Net or a half of the autoencoder, for some sizes and numbers of pictures."""
    preset = BY_NAME["sd15"]
    config: Any = preset.denoiser if part == "unet" else preset.vae
    nets, found = variants(config, part, there), []
    if any(there[name] for name in VINO):
        from peers_openvino import Compiled

        same = VINO if part == "unet" else VINO[:2]
        nets |= {name: Compiled(name, places.converted, NAMES[part]) for name in same if there[name]}
    cpp = Cpp(places.file) if there[CPP] and part != "encode" and any(batch == 1 for _, batch in work) else None
    for size, batch in work:
        side, rows = size // 8, 2 * batch if part == "unet" else batch
        shape: list[tuple[int, ...]] = [(rows, 3, size, size) if part == "encode" else (rows, 4, side, side)]
        shape += [(rows, 77, 768)] if part == "unet" else []
        inputs = tuple(torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in shape)
        operations = counted(config, *shape, method="" if part == "unet" else part)
        able: dict[str, Callable[[], Any]] = {name: called(name, net, part, inputs) for name, net in nets.items()}
        if cpp is not None and batch == 1:
            able[CPP] = cpp.timed(part, size)
        task = f"SD 1.5 {part}, {size}x{size}, batch {rows}"
        found += interleaved(task, able, asked.rounds, operations, dtype=choose("cpu").dtype)
    return found


def text(asked: Asked, there: There, folder: Path) -> list[Timing]:
    """The text tower on a pair of prompts."""
    ours, dtype = sfumato.load(folder, device="cpu").text_encoder, choose("cpu").dtype
    ids = torch.randint(0, 40000, (2, 77), generator=torch.Generator().manual_seed(0))
    towers = {OURS: ours, **{name: opened(name, folder).text_encoder for name in (THEIRS,) if there[name]}}

    def reading(tower: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                tower(ids)

        return run

    work = counted(BY_NAME["sd15"].text, (2, 77))
    able = {name: reading(tower) for name, tower in towers.items()}
    return interleaved("SD 1.5 text, batch 2", able, asked.rounds, work, dtype=dtype)


def processes(part: str, asked: Asked, there: There, places: Places, size: int) -> list[Timing]:
    """Opening the model, or a whole picture, each in a process of its own."""
    steps = asked.steps if part == "picture" else 0
    task = f"SD 1.5 picture, {size}x{size}, {steps} steps, cold" if steps else "SD 1.5 open, cold"
    able = {}
    for name, one in CONTENDERS.items():
        if there[name] and (steps or not (one.environment or one.compiled)):
            line = [sys.executable, __file__, "--worker", name, *places.of(name), str(size), str(steps)]
            if one.compiled:  # what it keeps for later processes is there beforehand
                spawned([*line[:-1], "1"], one.environment)
            able[name] = started(line, one.environment)
    work = picture_operations(size, steps) if steps else 0.0
    return interleaved(task, able, asked.cold, work, warm=0, dtype=choose("cpu").dtype if steps else None)


def picture_operations(size: int, steps: int) -> float:
    """Floating-point operations of a whole picture."""
    preset, side = BY_NAME["sd15"], size // 8
    step = counted(preset.denoiser, (2, 4, side, side), (2, 77, 768))
    return steps * step + counted(preset.vae, (1, 4, side, side), method="decode") + counted(preset.text, (2, 77))


def worker(name: str, source: str, converted: str, size: int, steps: int) -> None:
    """Open a model ready to denoise and make a picture of so many steps, in this process; says its peak."""
    use_threads()
    if name == "convert":
        from peers_openvino import convert

        convert(Path(source), Path(converted), bool(size))
        return
    if name.startswith(OURS):
        pipe = sfumato.load(source, device="cpu", compile="blocks" if name == OURS_COMPILED else None)
        pipe.lay_out()
        if steps:
            pipe(PROMPT, seed=0, height=size, width=size, num_inference_steps=steps)
    elif name == CPP:
        model = Cpp(Path(source))
        if steps:
            model.picture(size, steps)
    else:
        quiet()
        if name in VINO:
            from peers_openvino import pipeline

            theirs = pipeline(name, Path(source), Path(converted), size)
        else:
            theirs = opened(name, Path(source))
        if steps:
            theirs(PROMPT, height=size, width=size, num_inference_steps=steps)
    print(peak_line())


def sd15(asked: Asked, there: There, places: Places) -> list[Timing]:
    """Stable Diffusion 1.5 with random weights."""
    sizes, found = asked.sizes or [512], []
    for part in asked.parts:
        if part == "text":
            found += text(asked, there, places.folder)
        elif part in ("load", "picture"):
            for size in sizes if part == "picture" else sizes[:1]:
                found += processes(part, asked, there, places, size)
        else:
            work = [(size, batch) for size in sizes for batch in asked.batches or [1]]
            found += networks(part, asked, there, places, work)
    return found


def growth(asked: Asked, there: There, places: Places) -> list[Timing]:
    """How the cost of the U-Net grows with the picture, and with their number."""
    sizes = asked.sizes or GROWN["sizes"]
    work = [(size, 1) for size in sizes]
    work += [(min(sizes), batch) for batch in asked.batches or GROWN["batches"] if batch > 1]
    return networks("unet", asked, there, places, work)


def grown(timings: tuple[Timing, ...]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves of the U-Net's seconds a contender: over the side of a picture, and over their number at each size."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    matches = [(re.fullmatch(r"SD 1.5 unet, (\d+)x\d+, batch (\d+)", t.task), t) for t in timings]
    calls = [(int(match[1]), int(match[2]) // 2, t) for match, t in matches if match]
    for size, batch, t in sorted(calls, key=lambda call: call[:2]):
        titles = {f"U-Net, seconds over pictures of {size}x{size}": batch}
        if batch == 1:
            titles["U-Net, seconds over pixels of a side"] = size
        for title, at in titles.items():
            found.setdefault(title, {}).setdefault(t.contender, []).append((at, t.median))
    return {title: lines for title, lines in found.items() if max(map(len, lines.values())) > 1}


def measured(asked: Asked, work: Path) -> Iterator[bench.Bench]:
    """All groups that were asked for; given out after each, with what was measured before."""
    missing = absent(asked.compile, asked.without)
    there = {name: name not in missing and name not in asked.without for name in CONTENDERS}
    for name, reason in missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    about, ceiling = bench.about(choose("cpu").precision), measured_ceiling()
    places = Places(work, there)
    timings: list[Timing] = []
    groups = {
        "builtin": lambda: builtin(asked, there),
        "sd15": lambda: sd15(asked, there, places),
        "growth": lambda: growth(asked, there, places),
    }
    own = {"sfumato": about["sfumato"], "torch": about["torch"]}
    for group in asked.only:
        for t in groups[group]():
            timings.append(replace(t, facts={**t.facts, "versions": {**own, **versions(t.contender)}}))
        settings = {name: one.settings for name, one in CONTENDERS.items() if there[name]}
        yield bench.Bench(about, ceiling, tuple(timings), missing, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sfumato beside its peers on this machine's CPU.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS[:2]))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of sd15")
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels of a side [512; of growth 256 to 1024]")
    parser.add_argument("--batches", nargs="+", type=int, help="pictures in a call [1; of growth 1 to 8]")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8], help="pictures in one go, of builtin")
    parser.add_argument("--steps", type=int, default=20, help="of sd15's whole picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", type=int, default=3, help="rounds of new processes")
    parser.add_argument(
        "--without",
        nargs="+",
        choices=(PLAIN, *PEERS),
        default=[],
        metavar="CONTENDER",
        help=f"{PLAIN}; {'; '.join(PEERS)}",
    )
    parser.add_argument("--compile", action="store_true", help="compiled contenders as well; takes minutes")
    parser.add_argument("--threads", type=int, default=None, help="for all contenders [default: a core each]")
    parser.add_argument(
        "--work", type=Path, default=None, help="where the models stay (4 to 12 GB) [a temporary folder]"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of bench.json, bench.md and bench.png")
    parser.add_argument("--afresh", action="store_true", help="forget the tasks that --out has from earlier runs")
    parser.add_argument("--worker", nargs=5, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        name, source, converted, size, steps = asked.worker
        worker(name, source, converted, int(size), int(steps))
        return
    use_threads(asked.threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for the processes
    if THEIRS not in absent():
        quiet()
    earlier = asked.out / "bench.json"
    kept = earlier.exists() and not asked.afresh
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as place:
        for found in measured(asked, asked.work or Path(place)):
            found = found.after(earlier) if kept else found
            found.write(asked.out)
            lines = grown(found.timings)
            if lines:
                with replacing(asked.out / "growth.png") as file:
                    curves(lines).save(file, "PNG")
    print(found.markdown())


if __name__ == "__main__":
    main()
