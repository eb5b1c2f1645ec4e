"""Products of a transformer's tokens with its weights in 8 bits, by oneDNN's kernels for CPUs.

Weights are rounded for each output channel; what they are multiplied with is rounded at each call, over its own range,
to 7 bits: processors without instructions for it add products in 16 bits, which 8 bits would overflow. The weights
themselves stay: what is packed is a copy, made anew when they are others.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.mmdit import MMDiT
from sfumato.models.network import Network
from sfumato.prepare.way import Stamp, Way, quick, stamp, unwatched

ROWS = 32  # below which rounding takes longer than it saves
LEVELS = 127  # of what is multiplied with the weights, above 0
Packed = tuple[Tensor, Tensor, Tensor]


class Switch(threading.local):
    """Whether this thread is at a picture that wants 8 bits."""

    on = False


class Rounded(Way[nn.Linear]):
    """A linear layer in 8 bits while the switch is on."""

    def __init__(self, module: nn.Linear, switch: Switch | None = None) -> None:
        super().__init__(module)
        self.switch = Switch() if switch is None else switch
        self.made: tuple[Stamp, Packed, list[Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D_out)."""
        own = self.module
        if not self.switch.on or x.shape[:-1].numel() < ROWS or not quick(x, own.weight) or not unwatched(own):
            return self.plain(x)
        held = [own.weight] if own.bias is None else [own.weight, own.bias]
        now = stamp(*held)
        if self.made is None or self.made[0] != now:
            self.made = now, packed(own.weight), held
        return multiplied(x, self.made[1], own.bias)


def packed(weight: Tensor) -> Packed:
    """A weight (D_out, D) in whole numbers from -127 to 127 as oneDNN wants it; its scales (D_out,), and zeros."""
    weight = weight.detach()
    scales = weight.abs().amax(1).clamp(min=1e-12) / 127  # (D_out,)
    whole = (weight / scales[:, None]).round_().to(torch.int8)
    return torch.ops.onednn.qlinear_prepack(whole, None), scales, torch.zeros(len(weight), dtype=torch.int8)


def multiplied(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (..., D) in whole numbers from 0 to `LEVELS` with a weight, and what they stand for: (..., D_out)."""
    low, high = (float(bound) for bound in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-12) / LEVELS
    zero = round(-low / scale)
    whole = torch.mul(x, 1 / scale).add_(zero).round_().clamp_(0, LEVELS).to(torch.uint8)
    # The answer: neither scaled nor moved, in float32, with nothing done to it.
    return torch.ops.onednn.qlinear_pointwise(whole, scale, zero, *weight, bias, 1.0, 0, torch.float32, "none", [], "")


def rounded(net: nn.Module) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let a transformer's blocks compute in 8 bits; returns what makes a call of the network do so.

    Everything else that calls the network, also in another thread meanwhile, gets what it always did.
    Raises ValueError for a network that cannot, see `why_not`.
    """
    reason = why_not(net)
    if reason:
        raise ValueError(f"no int8: {reason}")
    assert isinstance(net, MMDiT)
    layers = [module for module in net.transformer_blocks.modules() if type(module) is nn.Linear]
    known = [way for way in (layer.__dict__.get("forward") for layer in layers) if isinstance(way, Rounded)]
    switch = known[0].switch if known else Switch()
    for layer in layers:
        if "forward" not in layer.__dict__:
            object.__setattr__(layer, "forward", Rounded(layer, switch))

    def wrapped(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(*args: Any) -> Tensor:
            with turned_on(switch):
                return call(*args)

        return inside

    return wrapped


@contextmanager
def turned_on(switch: Switch) -> Iterator[None]:
    """The switch on in this thread meanwhile."""
    before, switch.on = switch.on, True
    try:
        yield
    finally:
        switch.on = before


def why_not(net: nn.Module) -> str:
    """Why a network does not compute in 8 bits; "" where it does."""
    if not isinstance(net, MMDiT):
        return "it is for transformers, and a U-Net spends most of its time in convolutions"
    device, dtype = net.device, net.dtype
    if device.type != "cpu" or dtype != torch.float32:
        return f"it is for CPUs in float32, and this runs on {device} in {str(dtype).removeprefix('torch.')}"
    if isinstance(net, Network) and net.runs_in is not None:
        return "it packs the weights once, and these come and go; take --memory fast"
    if not has_kernels():
        return "this PyTorch has no quick products in 8 bits for this processor"
    return ""


def has_kernels() -> bool:
    """Whether PyTorch came with oneDNN's products in 8 bits, on a processor for which they were measured."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return there and platform.machine().lower() in ("x86_64", "amd64")
