"""What this machine is: processor, cores, memory. Read from the system, without torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that matter to networks, as /proc/cpuinfo calls them, from the plainest to the best.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A machine as a program sees it.

    flags:  the instruction sets of `FLAGS` that the processor has.
    cores:  that this process may use: its affinity, and the share that a container is given.
    physical: cores that are not another one's second thread, of those allowed; 0 where the system does not say.
    memory, free: bytes in all and not in use, 0 where the system does not say; a container's limit counts.
    load:   programs that wanted to run in the last minute, on average.
    """

    cpu: str
    flags: tuple[str, ...]
    cores: int
    physical: int
    memory: int
    free: int
    load: float
    system: str
    python: str

    def to_dict(self) -> dict[str, object]:
        """As entries of a JSON file."""
        return {**vars(self), "flags": list(self.flags)}


def examine(root: Path = Path("/")) -> Machine:
    """This machine; root: where `proc` and `sys` lie, for tests."""
    entries = _cpuinfo(root)
    first = entries[0] if entries else {}
    allowed = _allowed()
    physical = {
        (entry.get("physical id", "0"), entry.get("core id", entry.get("processor", "")))
        for entry in entries
        if allowed is None or int(entry.get("processor", "-1")) in allowed
    }
    cores = len(allowed) if allowed else os.cpu_count() or 1
    quota = _quota(root)
    cores = max(1, min(cores, quota)) if quota else cores
    memory, free = _memory(root)
    return Machine(
        cpu=first.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in first.get("flags", "").split()),
        cores=cores,
        physical=min(len(physical), cores),
        memory=memory,
        free=free,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dictionary a logical processor."""
    blocks = _read(root / "proc/cpuinfo").strip().split("\n\n")
    pairs = ([line.partition(":") for line in block.splitlines()] for block in blocks if block)
    return [{name.strip(): value.strip() for name, _, value in lines} for lines in pairs]


def _allowed() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _quota(root: Path) -> int | None:
    """Whole cores that a container's share of time comes to, rounded up; None without a limit."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) != 2 or not words[0].isdigit():
        return None
    return -(-int(words[0]) // int(words[1]))


def _memory(root: Path) -> tuple[int, int]:
    rows = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    found = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}
    memory, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    limit, used = (_read(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        memory, free = min(memory, int(limit)), min(free, max(int(limit) - int(used), 0))
    return memory, free
