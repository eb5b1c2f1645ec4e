"""A loaded denoiser compiled by torch.compile: the same numbers to rounding, after a first picture that waits for it.

`compiled(net, "blocks")` puts compiled ways to compute in the place of the `forward` of residual and transformer blocks
and returns what takes them away again. Blocks of one class and of weights of the same shapes share what was compiled,
so a network of 40 blocks has some 15 to compile; a new size of picture compiles them once more, and the next ones no
more. "graphs" compiles the network as a whole, once for each size, and replays it as a CUDA graph.

Weights stay where and what they are: adapters merged into them, files and training see nothing of it. With gradients
on, and where hooks listen to a part, as adapters do that are not merged, a block computes as it always does. A network
is either compiled or prepared (`prepare`). What was compiled is kept on disk for later processes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.layers import BasicTransformerBlock, ResnetBlock2D
from sfumato.models.mmdit import JointTransformerBlock
from sfumato.runtime import COMPILE

BLOCKS: tuple[type[nn.Module], ...] = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock)
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compiled(net: nn.Module, how: str, backend: str = "inductor") -> Callable[[], None]:
    """Let a network compute by compiled code from its next call on; returns the function that undoes it.

    how:     one of `runtime.COMPILE`. backend: of torch.compile; another than its own one is for tests.
    Nothing is done where it was done before. Raises ValueError for another word, and for a prepared network.
    """
    if how not in COMPILE:
        raise ValueError(f"unknown way to compile {how!r}; known: {', '.join(COMPILE)}")
    if how == "off":
        return lambda: None
    keep_compiled(os.environ)
    chosen = [module for module in net.modules() if isinstance(module, BLOCKS)] if how == "blocks" else [net]
    new = [module for module in chosen if not isinstance(module.__dict__.get("forward"), Compiled)]
    if any("forward" in part.__dict__ for module in new for part in module.modules()):
        raise ValueError("a prepared network is not compiled; undo what `prepare` did before")
    functions: dict[object, Callable[..., Any]] = {}
    for module in new:
        key = type(module), tuple((name, p.shape) for name, p in module.named_parameters())
        if key not in functions:
            functions[key] = _compile(own_copy(type(module).forward, len(functions)), how, backend)
        object.__setattr__(module, "forward", Compiled(module, functions[key], replayed=how == "graphs"))

    def undo() -> None:
        for module in new:
            module.__dict__.pop("forward", None)

    return undo


class Compiled:
    """A module's compiled way to compute. Copies and pickles of it compute as the module's class does.

    replayed: the answer lies in a buffer of a CUDA graph, which the next call writes to, and has to be copied.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], replayed: bool = False) -> None:
        self.module, self.function, self.replayed = module, function, replayed

    def __call__(self, *args: Any) -> Any:
        """What the class's `forward` gives."""
        if torch.is_grad_enabled() or watched(self.module):
            return type(self.module).forward(self.module, *args)
        if not self.replayed:
            return self.function(self.module, *args)
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = self.function(self.module, *args)
        return out.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (type(self.module).forward, self.module)


def watched(module: nn.Module) -> bool:
    """Whether hooks listen to a module or a part of it; compiled code would not call those that came later."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def is_compiled(net: nn.Module) -> bool:
    """Whether a network, or a block of it, computes by compiled code."""
    return any(isinstance(module.__dict__.get("forward"), Compiled) for module in net.modules())


def own_copy(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A copy of a function with code of its own.

    PyTorch counts how often a piece of code was compiled and gives up after a few times. A class's blocks differ in
    width; each width has a copy and a count.
    """
    assert isinstance(function, FunctionType)
    code: CodeType = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def keep_compiled(environment: MutableMapping[str, str]) -> Path:
    """The folder of compiled code, made known to PyTorch by its variable, unless that names one.

    PyTorch itself would name a temporary folder there as soon as it compiles.
    """
    if not environment.get(VARIABLE):
        cache = environment.get("XDG_CACHE_HOME")
        folder = (Path(cache) if cache else Path.home() / ".cache") / "sfumato" / "compiled"
        environment[VARIABLE] = str(folder)
    return Path(environment[VARIABLE])


def _compile(function: Callable[..., Any], how: str, backend: str) -> Callable[..., Any]:
    if how == "graphs" and backend == "inductor":
        return torch.compile(function, mode="reduce-overhead", dynamic=False)
    return torch.compile(function, backend=backend)
