"""Contenders timed in turns, what the machine can do at most, and how much a model has to compute.

B pictures, C latent channels, h w latent height and width, L tokens, D width.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.cond import Cond
from sfumato.machine import examine
from sfumato.weights.parts import NETWORKS

PRODUCT = 1024  # rows and columns of the matrix product that takes its turn among the contenders
LARGEST = (1024, 2048)  # of those that look for the machine's best
COPIED = 2**28  # bytes, more than any cache holds
PEAK = "peak "  # what a worker's last line begins with


@dataclass(frozen=True)
class Usage:
    """One turn: seconds, those of all processors together, minor page faults, the most bytes that were resident."""

    seconds: float
    processor: float
    faults: int
    peak: int = 0


@dataclass(frozen=True)
class Timing:
    """All turns of a contender at a task.

    work:    floating-point operations of a turn; 0 where they were not counted.
    ceiling: operations a second of a matrix product in the same turns; 0 where it took none.
    facts:   what held while it was measured: threads, the machine's load before, versions.
    """

    task: str
    contender: str
    turns: tuple[Usage, ...]
    work: float = 0.0
    ceiling: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(turn.seconds for turn in self.turns)

    @property
    def processor(self) -> float:
        """Median of the processors' seconds."""
        return statistics.median(turn.processor for turn in self.turns)

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the fastest and of the slowest turn."""
        seconds = [turn.seconds for turn in self.turns]
        return min(seconds), max(seconds)

    @property
    def share(self) -> float | None:
        """Of what the machine can do; None where that is not known."""
        return self.work / self.median / self.ceiling if self.work and self.ceiling else None

    def to_dict(self) -> dict[str, Any]:
        """As entries of a JSON file."""
        turns = [vars(turn) for turn in self.turns]
        figures = {"median": self.median, "processor": self.processor, "share": self.share}
        return {"task": self.task, "contender": self.contender, **figures,
                "work": self.work, "ceiling": self.ceiling, "facts": dict(self.facts), "turns": turns}  # fmt: skip

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Timing:
        """What `to_dict` wrote, also before there were facts."""
        turns = tuple(Usage(**turn) for turn in entries["turns"])
        named = entries["task"], entries["contender"], turns, entries["work"], entries["ceiling"]
        return cls(*named, entries.get("facts", {}))


@dataclass(frozen=True)
class Ceiling:
    """Operations a second of the largest matrix products by precision, and bytes a second of a copy."""

    products: Mapping[str, float]
    bandwidth: float


def interleaved(
    task: str,
    able: Mapping[str, Callable[[], Usage | None]],
    rounds: int,
    work: float = 0.0,
    warm: int = 1,
    dtype: torch.dtype | None = torch.float32,
) -> list[Timing]:
    """Let contenders take turns (A B C A B C...), and a matrix product of the dtype with them, unless that is None.

    able: functions to time; one that measures itself returns a Usage. warm: rounds that do not count.
    The machine's load is the one before the first turn, which is not our own.
    """
    facts = {"threads": torch.get_num_threads(), "load": examine().load}
    turns: dict[str, list[Usage]] = {name: [] for name in able}
    product = None if dtype is None else multiplied(PRODUCT, dtype)
    rates: list[float] = []
    for turn in range(warm + rounds):
        for name, run in able.items():
            used = timed(run)
            if turn >= warm:
                turns[name].append(used)
        if product is not None:
            seconds = min(timed(product).seconds for _ in range(2))
            if turn >= warm:
                rates.append(2 * PRODUCT**3 / seconds)
    ceiling = statistics.median(rates) if rates else 0.0
    return [Timing(task, name, tuple(used), work, ceiling, facts) for name, used in turns.items()]


def timed(run: Callable[[], Usage | None]) -> Usage:
    """One turn."""
    faults, used, since = _faults(), time.process_time(), time.perf_counter()
    own = run()
    seconds = time.perf_counter() - since
    return own if isinstance(own, Usage) else Usage(seconds, time.process_time() - used, _faults() - faults)


def spawned(line: Sequence[str], more: Mapping[str, str] | None = None) -> Usage:
    """A process from its start to its end, with further environment variables.

    The peak is read off its last line, where that says one. Raises RuntimeError with what it said where it fails.
    """
    since = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **(more or {})}, check=False)
    seconds, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}: {(done.stderr.splitlines() or ['-'])[-1]}")
    last = (done.stdout.splitlines() or [""])[-1]
    peak = int(last.removeprefix(PEAK)) if last.startswith(PEAK) else 0
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, used, after.ru_minflt - before.ru_minflt, peak)


def measured_ceiling(rounds: int = 3) -> Ceiling:
    """The best of some rounds; bfloat16 in small products where no units for it are there."""
    from sfumato.runtime import cpu_has_bfloat16

    sizes = {torch.float32: LARGEST, torch.bfloat16: LARGEST if cpu_has_bfloat16() else (256,)}
    products = {}
    for dtype, sides in sizes.items():
        rates = []
        for side in sides:
            run = multiplied(side, dtype)
            rates.append(2 * side**3 / min(timed(run).seconds for _ in range(rounds + 1)))
        products[str(dtype).removeprefix("torch.")] = max(rates)
    a, b = torch.ones(COPIED // 4), torch.ones(COPIED // 4)

    def copy() -> None:
        b.copy_(a)

    return Ceiling(products, 2 * COPIED / min(timed(copy).seconds for _ in range(rounds + 1)))


def multiplied(side: int, dtype: torch.dtype) -> Callable[[], None]:
    """A product of square matrices into a buffer that is there."""
    a, b, c = (torch.rand(side, side).to(dtype) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=c)

    return run


def counted(config: Any, *shapes: Sequence[int], method: str = "", device: str = "meta") -> float:
    """Floating-point operations of a network of this configuration; on `meta` nothing is computed.

    shapes: of a U-Net x (B, C, h, w) and context (B, L, D); of an autoencoder one, with method "encode" or "decode";
            of a text tower the tokens' (B, L).
    """
    with torch.device(device):
        net: nn.Module = NETWORKS[type(config)](config)
        inputs = [torch.empty(*shape) for shape in shapes]
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            if method:
                getattr(net, method)(inputs[0])
            elif len(shapes) == 2:
                net(inputs[0], torch.zeros(len(inputs[0])), Cond(inputs[1]))
            else:
                net(inputs[0].long())
    return float(counter.get_total_flops())


def peak_line() -> str:
    """What a worker prints last: the most bytes that were ever resident."""
    with open("/proc/self/status", encoding="utf-8") as file:
        size = next(int(row.split()[1]) * 1024 for row in file if row.startswith("VmHWM:"))
    return f"{PEAK}{size}"


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
