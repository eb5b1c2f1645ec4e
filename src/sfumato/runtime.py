"""Where and in which number format the networks run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX tiles or AVX512-bf16)."""
    # torch.cpu.get_capabilities() says the same in public, but only in recent versions.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


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
