"""The contenders of `bench.py`: what each needs and is told, and diffusers and stable-diffusion.cpp opened that way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import resource
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfumato.evaluate.bench import OURS, PROMPT, Paint, Work
from sfumato.evaluate.timing import Usage
from sfumato.runtime import choose, cpu_has_bfloat16

PLAIN, OURS_COMPILED = f"{OURS}, plain", f"{OURS}, compiled"
THEIRS, LAST, KEPT, COMPILED = (
    "diffusers",
    "diffusers, channels last",
    "diffusers, last, kept",
    "diffusers, compiled",
)
OPENVINO, OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO", "OpenVINO, bf16", "OpenVINO, int8"
CPP = "stable-diffusion.cpp"
UNPREPARED = {"SFUMATO_PREPARE": "off", "SFUMATO_KERNELS": "off"}
LARGE_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class Contender:
    """What a contender is told, in words; the packages that it needs, by the names that pip and Python have for them.

    environment: of its processes. bfloat16: only for CPUs that multiply it; compiled: only when asked for.
    """

    settings: str
    needs: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    bfloat16: bool = False
    compiled: bool = False

    def missing(self, compiled: bool) -> str:
        """Why it cannot take part and what to do about it; "" where it can."""
        absent = [package for package, module in self.needs.items() if not importlib.util.find_spec(module)]
        if absent:
            return f"it is not installed; pip install {' '.join(absent)}"
        if self.bfloat16 and not cpu_has_bfloat16():
            return "this CPU does not multiply bfloat16 matrices"
        return "it takes minutes to compile; add it with --compile" if self.compiled and not compiled else ""


DIFFUSERS = {"diffusers": "diffusers"}
VINO = {"openvino": "openvino", **DIFFUSERS}
COMPRESSED = {**VINO, "nncf": "nncf"}
NATIVE = {"stable-diffusion-cpp-python": "stable_diffusion_cpp", **DIFFUSERS}
CONTENDERS: Mapping[str, Contender] = {
    OURS: Contender("as it comes"),
    PLAIN: Contender("without prepared networks and kernels", environment=UNPREPARED),
    OURS_COMPILED: Contender("load(compile='blocks'), code of an earlier process at hand", compiled=True),
    THEIRS: Contender("as people run it, float32", DIFFUSERS),
    LAST: Contender("channels last; bfloat16 where the CPU multiplies it", DIFFUSERS),
    KEPT: Contender("the same with large buffers kept by MALLOC_ variables", DIFFUSERS, LARGE_BUFFERS),
    COMPILED: Contender("channels last, torch.compile of the networks", DIFFUSERS, compiled=True),
    OPENVINO: Contender("converted U-Net and autoencoder, fixed shapes, LATENCY, f32", VINO),
    OPENVINO_BF16: Contender("the same with INFERENCE_PRECISION_HINT bf16", VINO, bfloat16=True),
    OPENVINO_INT8: Contender("the same with the U-Net's weights in int8 (nncf); not exact", COMPRESSED),
    CPP: Contender("float16 file, flash attention; a step is two calls, timed by its callback", NATIVE),
}
PEERS = tuple(name for name in CONTENDERS if not name.startswith(OURS))


def absent(compiled: bool = False, without: Collection[str] = ()) -> dict[str, str]:
    """Contenders that do not take part, and why; not those that nobody wants."""
    reasons = {name: one.missing(compiled) for name, one in CONTENDERS.items() if name not in without}
    return {name: reason for name, reason in reasons.items() if reason}


def versions(name: str) -> dict[str, str]:
    """Of the packages that a contender needs."""
    return {package: importlib.metadata.version(package) for package in CONTENDERS[name].needs}


def opened(name: str, folder: Path) -> Any:
    """A pipeline of diffusers as a contender has it."""
    import diffusers

    kind = torch.float32 if name == THEIRS else choose("cpu").dtype
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
    """Pictures by a pipeline of diffusers."""

    def paint(count: int) -> None:
        pipe(PROMPT, num_inference_steps=work.steps, guidance_scale=work.scale, num_images_per_prompt=count,
             generator=torch.Generator().manual_seed(0))  # fmt: skip

    return paint


class Cpp:
    """stable-diffusion.cpp on a model file."""

    def __init__(self, file: Path) -> None:
        from stable_diffusion_cpp import StableDiffusion

        self.model = StableDiffusion(
            model_path=str(file),
            n_threads=torch.get_num_threads(),
            flash_attn=True,
            diffusion_flash_attn=True,
            verbose=False,
        )

    def picture(self, size: int, steps: int, told: Callable[[int, int, float], None] | None = None) -> None:
        """A picture with guidance; told: of each step (its number, of how many, seconds)."""
        self.model.generate_image(
            PROMPT, width=size, height=size, sample_steps=steps, cfg_scale=7.5, sample_method="euler",
            seed=0, progress_callback=told,
        )  # fmt: skip

    def timed(self, part: str, size: int) -> Callable[[], Usage]:
        """A step ("unet"), or what follows the last ("decode"), of a picture of two steps, as a function to time."""

        def run() -> Usage:
            marks: list[Usage] = []
            self.picture(size, 2, lambda step, steps, _: marks.append(moment()) if steps == 2 else None)
            since, until = (marks[-1], moment()) if part == "decode" else marks[-2:]
            return Usage(until.seconds - since.seconds, until.processor - since.processor, until.faults - since.faults)

        return run


def moment() -> Usage:
    """The clocks of this process as they stand."""
    return Usage(time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
