"""Where and how the networks run: device, number format, layout, threads, allocator; chosen once, with reasons."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sfumato.allocator import policy
from sfumato.machine import Machine, examine

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Numbers in the latents of all pictures that a CPU advances together: 8 of 16x16, 2 of 32x32, 1 of 64x64.
SMALL = 8 * 16 * 16
MOST = 8
# What `torch.compile` is given of a denoiser, see `compiling`: nothing, its repeated blocks, or all of it for replay.
COMPILE = ("off", "blocks", "graphs")
BFLOAT16_FROM = (8, 0)  # capability of NVIDIA's GPUs that multiply bfloat16, from the A100 and RTX 30 on


@dataclass(frozen=True)
class Runtime:
    """A device, the dtype of the networks on it, and the memory layout of their pictures.

    reason:  one line that says why.
    compile: one of `COMPILE`.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    reason: str
    compile: str = "off"

    @property
    def precision(self) -> str:
        """The dtype's name as `--precision` takes it."""
        return dtype_name(self.dtype)

    def together(self, height: int, width: int) -> int:
        """How many pictures with latents of this size are advanced together unless told otherwise.

        On a CPU as many as hide what each call of the network costs besides its products: large pictures gain
        nothing from company and only take memory.
        """
        if self.device.type != "cpu":
            return MOST
        return max(1, min(MOST, SMALL // (height * width)))


@dataclass(frozen=True)
class Choice:
    """One thing that was decided: its name, the value, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Card:
    """A GPU as PyTorch describes it: its name and NVIDIA's number for what it can do."""

    name: str
    capability: tuple[int, int]


def choose(device: str | None = None, precision: str | None = None, compile: str | None = None) -> Runtime:
    """The runtime for this machine, or for the named device and precision.

    NVIDIA's GPUs that multiply bfloat16 and CPUs with units for it run in bfloat16, older GPUs in float16, everything
    else in float32; all channels-last. PyTorch's settings for float32 products (TF32) stay as they are.
    compile: one of `COMPILE`; None compiles nothing.
    Raises ValueError for an unknown precision, a device that this PyTorch cannot use, or what cannot be compiled here.
    """
    place = _device(device)
    how = compile or "off"
    check_compile(how, place.type)
    if precision is not None:
        dtype = _dtype(precision)
        runtime = Runtime(place, dtype, True, f"{place} in {dtype_name(dtype)}, as asked, channels last")
    elif place.type == "cuda":
        runtime = on_card(place, card(place))
    elif place.type == "cpu" and cpu_has_bfloat16():
        runtime = Runtime(place, torch.bfloat16, True, "CPU with bfloat16 units: bfloat16, channels last")
    else:
        why = f"{place.type.upper()} without bfloat16 units: float32, channels last"
        runtime = Runtime(place, torch.float32, True, why)
    return replace(runtime, compile=how)


def card(place: torch.device) -> Card:
    """The GPU at a place."""
    return Card(torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))


def on_card(place: torch.device, found: Card) -> Runtime:
    """The runtime for a GPU: bfloat16, whose range holds what float16's overflows, where it multiplies that."""
    dtype = torch.bfloat16 if found.capability >= BFLOAT16_FROM else torch.float16
    return Runtime(place, dtype, True, f"{found.name} in {dtype_name(dtype)}, channels last")


def check_compile(how: str, kind: str, has: Callable[[str], object] = importlib.util.find_spec) -> None:
    """ValueError for an unknown way to compile, or one that a kind of device does not have.

    has: whether a Python package is there; compilers of C++ are left to PyTorch, which knows several.
    """
    if how not in COMPILE:
        raise ValueError(f"unknown way to compile {how!r}; known: {', '.join(COMPILE)}")
    if how == "graphs" and kind != "cuda":
        raise ValueError(
            f"compile = 'graphs' is for CUDA devices, and this one is {kind}; use 'blocks' or leave it out"
        )
    if how != "off" and kind == "cuda" and not has("triton"):
        raise ValueError(f"compile = {how!r} needs triton on a GPU; pip install triton, or leave compile out")


def as_it_is(weight: torch.Tensor) -> Runtime:
    """The runtime of a network that is ready to run, read off one of its weights."""
    name = dtype_name(weight.dtype)
    return Runtime(weight.device, weight.dtype, False, f"{weight.device} in {name}, as it came")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX tiles or AVX512-bf16), and oneDNN may use that."""
    # torch.cpu.get_capabilities() says the same in public, but only in recent versions.
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(units) and torch.backends.mkldnn.is_available() and not isa_limited()


def cpu_has_tiles() -> bool:
    """Whether this CPU has AMX tiles that oneDNN may use: weights are then best laid out for them beforehand."""
    return bool(torch.cpu._is_amx_tile_supported()) and not isa_limited()


def isa_limited() -> str:
    """What holds oneDNN to instruction sets without bfloat16, as `ONEDNN_MAX_CPU_ISA=AVX2`; "" where nothing does."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        value = os.environ.get(name, "")
        if value and "AMX" not in value.upper() and not value.upper().endswith(("BF16", "DEFAULT", "ALL")):
            return f"{name}={value}"
    return ""


def threads(machine: Machine) -> Choice:
    """How many threads the command line lets PyTorch use: a core each, and what the environment says before that."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name):
            return Choice("threads", str(torch.get_num_threads()), f"{name} = {os.environ[name]}")
    count = machine.physical or machine.cores
    now = torch.get_num_threads()
    if count < now:
        return Choice("threads", str(count), f"one for each of the {count} cores; PyTorch alone takes {now}")
    return Choice("threads", str(now), f"PyTorch's own choice for {machine.cores} cores")


def use_threads(asked: int | None = None) -> None:
    """Set PyTorch's threads for a process that is our own: those asked for, else as `threads` says."""
    count = asked or int(threads(examine()).value)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def choices(device: str | None = None, precision: str | None = None, compile: str | None = None) -> list[Choice]:
    """All that is decided for this machine, each with its reason."""
    runtime, machine = choose(device, precision, compile), examine()
    place = runtime.device
    found = "the first GPU that PyTorch sees" if place.type == "cuda" else "no GPU that PyTorch can use"
    one, large = runtime.together(16, 16), runtime.together(64, 64)
    memory = policy()
    return [
        Choice("device", _named(place, machine), found if device is None else "as asked"),
        Choice("precision", runtime.precision, _why(runtime, precision)),
        Choice("memory layout", "channels last", "convolutions and attention then share pictures without copies"),
        Choice("compile", runtime.compile, compile_reason(runtime)),
        threads(machine),
        Choice("allocator", memory[0], memory[1]),
        Choice(
            "pictures together",
            f"{one} of 128x128, {large} of 512x512",
            "small pictures cost little more in company" if place.type == "cpu" else "as a GPU has room for",
        ),
    ]


def compile_reason(runtime: Runtime) -> str:
    """Why a denoiser is compiled or not, and what the other choice would cost."""
    if runtime.compile != "off":
        return "as asked; the first picture of a size waits for it, minutes once and seconds in later processes"
    if runtime.device.type == "cpu":
        return "prepared networks are as quick on a CPU and need no minutes before the first picture"
    return "--compile blocks (a minute or two once) or graphs (one size of picture) pays for many pictures"


def _why(runtime: Runtime, precision: str | None) -> str:
    if precision is not None:
        return "as asked"
    if runtime.device.type == "cuda":
        half = runtime.dtype == torch.float16
        return "half the memory of float32, and quicker" + (", on a GPU too old for bfloat16" if half else "")
    if runtime.dtype == torch.bfloat16:
        return f"{'AMX tiles' if cpu_has_tiles() else 'AVX512-bf16'} multiply bfloat16 matrices in hardware"
    limit = isa_limited()
    return f"held back by {limit}" if limit else "no units for bfloat16 matrices (AMX, AVX512-bf16) here"


def _named(place: torch.device, machine: Machine) -> str:
    return f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else f"{place} ({machine.cpu})"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32 and so on."""
    return str(dtype).removeprefix("torch.")


def _dtype(precision: str) -> torch.dtype:
    name = SHORT.get(precision, precision)
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join((*PRECISIONS, *SHORT))}")
    return PRECISIONS[name]


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked, but this PyTorch sees no CUDA device; use cpu")
    return place
