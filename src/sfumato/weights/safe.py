"""Safetensors files: memory-mapped reading, strict filling of modules, writing in one step.

A module is built on the `meta` device, where it takes no memory, and its parameters are then replaced by the
file's tensors, so that loading costs one read of the file and no copy (one copy when the dtype changes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.files import replacing

Module = TypeVar("Module", bound=nn.Module)
ROWS = 8  # names listed in an error before "and n more"


def read_tensors(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory where neither dtype nor device change.

    dtype: what floating-point tensors are converted to; integers stay as they are.
    Raises FileNotFoundError, or ValueError when the file is cut short or its header is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}; fetch or save it again"
        ) from None
    return {name: _placed(tensor, dtype, device) for name, tensor in tensors.items()}


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file in one step; `dtype` converts the floating-point ones.

    The metadata say {"format": "pt"}, without which transformers refuses a file.
    """
    ready = {name: _placed(t.detach(), dtype, "cpu").contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt"})


def load_module(
    build: Callable[[], Module],
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignored: Sequence[str] = (),
) -> Module:
    """Build a module without memory and fill it from a safetensors file; it comes back in evaluation mode.

    ignored: names that old files carry and no module needs.
    Raises what `read_tensors` and `fill` raise.
    """
    with torch.device("meta"):
        module = build()
    tensors = read_tensors(path, dtype, device)
    for name in ignored:
        tensors.pop(name, None)
    fill(module, tensors, str(path))
    return module.eval()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str = "the given tensors") -> None:
    """Replace the parameters and buffers of `module` by `tensors` of the same names and shapes.

    Raises ValueError listing the names that are missing or unknown and the shapes that differ.
    """
    wanted = module.state_dict()
    problems = [
        _listed("missing", sorted(wanted.keys() - tensors.keys())),
        _listed("unknown", sorted(tensors.keys() - wanted.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
                for name in sorted(wanted.keys() & tensors.keys())
                if tensors[name].shape != wanted[name].shape
            ],
        ),
    ]
    if any(problems):
        kind = type(module).__name__
        raise ValueError(
            f"{source} does not fit {kind} as its config describes it; "
            + "; ".join(p for p in problems if p)
            + "; check that the config and the weights belong together"
        )
    module.load_state_dict(dict(tensors), assign=True)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{type(module).__name__}: {name} is kept in no file, so it cannot be loaded")


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device, dtype=wanted)


def _listed(what: str, rows: Sequence[str]) -> str:
    if not rows:
        return ""
    more = f" and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
    return f"{len(rows)} {what}: {', '.join(rows[:ROWS])}{more}"
