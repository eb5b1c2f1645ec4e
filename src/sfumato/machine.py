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


def available(root: Path = Path("/")) -> int | None:
    """Bytes of memory that are free here and within the limits of this process; None if unknown."""
    table = _numbers(root / "proc/meminfo")
    found = [table["MemAvailable"] * 1024] if "MemAvailable" in table else []
    for group in _groups(root):
        limit, used = (_whole(group / name) for name in ("memory.max", "memory.current"))
        if limit is None or used is None:
            limit, used = (_whole(group / name) for name in ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            cache = _numbers(group / "memory.stat").get("inactive_file", 0)
            found.append(limit - used + cache)
    return max(0, min(found)) if found else None


def _memory(root: Path) -> tuple[int, int]:
    """Bytes in all, within the limits of this process, and bytes that are free; 0 where unknown."""
    memory = _numbers(root / "proc/meminfo").get("MemTotal", 0) * 1024
    limit = _whole(root / "sys/fs/cgroup/memory.max")
    return memory if limit is None else min(memory, limit), available(root) or 0


def _groups(root: Path) -> list[Path]:
    """The control groups whose limits hold for this process."""
    table = root / "proc/self/cgroup"
    base = root / "sys/fs/cgroup"
    found = [base, base / "memory"]
    for line in table.read_text().splitlines() if table.is_file() else []:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            place = base / kinds / path.lstrip("/")
            found += [place, *(up for up in place.parents if base in up.parents)]
    return found


def _numbers(path: Path) -> dict[str, int]:
    """The table in a file of the system: a name, a number and perhaps a unit in each line."""
    if not path.is_file():
        return {}
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _whole(path: Path) -> int | None:
    """The one number in a file of the system; None where there is none, as where nothing is limited."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
