"""Strict filling of modules from files of weights, and writing safetensors in one step.

A module is built on the `meta` device, where it takes no memory, and its parameters are then replaced by the
file's tensors: views of the mapped file, which costs no memory and no copy, or tensors converted one by one, which
costs what they take in their new dtype and one tensor more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.files import replacing
from sfumato.weights.keymap import listed
from sfumato.weights.mapped import FileRanges, page_out
from sfumato.weights.meta import Module, on_meta
from sfumato.weights.packed import Packed
from sfumato.weights.source import Info, Weights, open_weights


def read_tensors(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a file of weights, mapped into memory where neither dtype nor device change.

    dtype: what floating-point tensors are converted to; integers stay as they are.
    Raises what `open_weights` raises.
    """
    with open_weights(path) as weights:
        return dict(weights.to(dtype, device))


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file in one step; `dtype` converts the floating-point ones.

    metadata: texts for the header, beside {"format": "pt"}, without which transformers refuses a file.
    """
    ready = {name: _placed(t.detach(), dtype, "cpu").contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata={**(metadata or {}), "format": "pt"})


def load_module(
    build: Callable[[], Module],
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignored: Sequence[str] = (),
    check: bool = True,
) -> Module:
    """Build a module without memory and fill it from a file of weights; it comes back in evaluation mode.

    Names, shapes and types are compared before a tensor is read.
    ignored: names that old files carry and no module needs; check: see `fill`.
    Raises what `open_weights` and `fill` raise.
    """
    module = on_meta(build)
    with open_weights(path) as file:
        weights = file.to(dtype, device)
        infos = {name: info for name, info in weights.infos.items() if name not in ignored}
        _compare(module, infos, str(path))
        _assign(module, {name: weights[name] for name in infos}, str(path), check)
    return module.eval()


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str = "the given tensors",
    check: bool = True,
    packed: bool = False,
) -> None:
    """Replace the parameters and buffers of `module` by `tensors` of the same names and shapes.

    packed: what is not a view of a file is not kept, but fetched from `tensors` again whenever it is needed
            (`Packed`); for modules whose weights come and go.
    check: look for NaN and infinite numbers, which reads everything once. Whoever opens a model leaves it out for
           mapped weights, which would have to be read for that alone, and looks at what the networks say instead
           (`blame`).
    Raises ValueError listing the names that are missing or unknown, the shapes or types that differ, and the tensors
    that hold NaN or infinite numbers.
    """
    if isinstance(tensors, Weights):
        _compare(module, tensors.infos, source)
    if packed:
        tensors = _packed(tensors, source)
    tensors = dict(tensors)  # each is read, and perhaps converted, once
    _compare(module, {name: Info(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, source)
    _assign(module, tensors, source, check)


def check_finite(tensors: Mapping[str, Tensor], source: str = "the given tensors") -> None:
    """Raise ValueError naming the tensors that hold NaN or infinite numbers.

    It reads every floating-point tensor once, at about the speed of memory.
    """
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise ValueError(
            f"{source} cannot be used: {listed('with NaN or infinite numbers', bad)}; "
            "fetch or save it again, and in float32 if it was converted to float16"
        )


def blame(what: str, modules: Mapping[str, nn.Module | None]) -> ValueError:
    """The error to raise when `what` gave NaN or infinite numbers: the weights of the modules, or the precision."""
    dtypes = set()
    for name, module in modules.items():
        if module is not None:
            try:
                check_finite(module.state_dict(), f"the file of the {name}")
            except ValueError as error:
                return error
            dtypes |= {str(weight.dtype).removeprefix("torch.") for weight in module.parameters()}
    mend = "use --precision float32" if dtypes != {"float32"} else "all weights are finite; is the model a trained one?"
    return ValueError(f"the {what} gave NaN or infinite numbers in {' and '.join(sorted(dtypes))}; {mend}")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity; integers always do."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # no reduction knows the 8-bit types
        tensor = tensor.to(torch.float32)
    # NaN wins over every number here, and unlike isfinite().all() nothing is written.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _compare(module: nn.Module, infos: Mapping[str, Info], source: str) -> None:
    wanted = module.state_dict()
    common = sorted(wanted.keys() & infos.keys())
    shapes = [
        f"{name} {infos[name].shape} instead of {tuple(wanted[name].shape)}"
        for name in common
        if infos[name].shape != tuple(wanted[name].shape)
    ]
    types = [
        f"{name} {infos[name].dtype} instead of {wanted[name].dtype}"
        for name in common
        if infos[name].dtype.is_floating_point != wanted[name].dtype.is_floating_point
    ]
    problems = [
        listed("missing", sorted(wanted.keys() - infos.keys())),
        listed("unknown", sorted(infos.keys() - wanted.keys())),
        listed("of another shape", shapes),
        listed("of another type", types),
    ]
    if any(problems):
        kind = type(module).__name__
        raise ValueError(
            f"{source} does not fit {kind} as its config describes it; "
            + "; ".join(p for p in problems if p)
            + "; check that the config and the weights belong together"
        )


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str, check: bool) -> None:
    if check:
        check_finite(tensors, source)
    module.load_state_dict(tensors, assign=True)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta and not isinstance(tensor, Packed):
            raise ValueError(f"{type(module).__name__}: {name} is kept in no file, so it cannot be loaded")


def _packed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    files, found = FileRanges(), {}
    for name in tensors:
        tensor = tensors[name]
        if tensor not in files:
            check_finite({name: tensor}, source)
            tensor = Packed.of(Info(tuple(tensor.shape), tensor.dtype), partial(tensors.__getitem__, name))
        found[name] = tensor
    return found


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device, dtype=wanted)


def lay_out(module: nn.Module) -> None:
    """Store the kernels of convolutions channels-last, one after the other, as channels-last pictures need them.

    Parameters stay the same objects. Of mapped weights the file's pages are given back, so that they take the memory
    of the result. Does nothing where it was done before.
    """
    with torch.inference_mode(False), torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                old = weight.data
                weight.data = old.contiguous(memory_format=torch.channels_last)
                page_out(old)
