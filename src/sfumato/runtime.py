"""Where and how the networks run: device, number format, layout, threads, allocator; chosen once, with reasons."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sfumato.allocator import policy
from sfumato.machine import Machine, examine

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Numbers in the latents of all pictures that a CPU advances together: 8 of 16x16, 2 of 32x32, 1 of 64x64.
SMALL = 8 * 16 * 16
MOST = 8


@dataclass(frozen=True)
class Runtime:
    """A device, the dtype of the networks on it, and the memory layout of their pictures.

    reason: one line that says why.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    reason: str

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


def choose(device: str | None = None, precision: str | None = None) -> Runtime:
    """The runtime for this machine, or for the named device and precision.

    CUDA runs in float16, CPUs with bfloat16 units in bfloat16, everything else in float32; all channels-last.
    Raises ValueError for an unknown precision or a device that this PyTorch cannot use.
    """
    place = _device(device)
    if precision is not None:
        dtype = _dtype(precision)
        return Runtime(place, dtype, True, f"{place} in {dtype_name(dtype)}, as asked, channels last")
    if place.type == "cuda":
        return Runtime(place, torch.float16, True, f"{torch.cuda.get_device_name(place)} in float16, channels last")
    if place.type == "cpu" and cpu_has_bfloat16():
        return Runtime(place, torch.bfloat16, True, "CPU with bfloat16 units: bfloat16, channels last")
    return Runtime(place, torch.float32, True, f"{place.type.upper()} without bfloat16 units: float32, channels last")


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


def choices(device: str | None = None, precision: str | None = None) -> list[Choice]:
    """All that is decided for this machine, each with its reason."""
    runtime, machine = choose(device, precision), examine()
    place = runtime.device
    found = "the first GPU that PyTorch sees" if place.type == "cuda" else "no GPU that PyTorch can use"
    one, large = runtime.together(16, 16), runtime.together(64, 64)
    memory = policy()
    return [
        Choice("device", _named(place, machine), found if device is None else "as asked"),
        Choice("precision", runtime.precision, _why(runtime, precision)),
        Choice("memory layout", "channels last", "convolutions and attention then share pictures without copies"),
        threads(machine),
        Choice("allocator", memory[0], memory[1]),
        Choice(
            "pictures together",
            f"{one} of 128x128, {large} of 512x512",
            "small pictures cost little more in company" if place.type == "cpu" else "as a GPU has room for",
        ),
    ]


def _why(runtime: Runtime, precision: str | None) -> str:
    if precision is not None:
        return "as asked"
    if runtime.device.type == "cuda":
        return "half the memory and twice the speed or more of float32"
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
