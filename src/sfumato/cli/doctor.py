"""`sfumato doctor`: what is chosen on this machine, why, and what would make it faster."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sfumato.machine import Machine
    from sfumato.runtime import Choice

PACKAGES = ("sfumato", "torch", "numpy", "pillow", "safetensors")
GIB = 2**30
NEEDED = 6 * GIB  # for a Stable Diffusion 1.5 in float32 at 512x512, with room to spare


def doctor(
    device: Annotated[str | None, typer.Option("--device", help="Say it of this device: cpu, cuda, cuda:1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is chosen on this machine, why, and what would make it faster."""
    from sfumato.kernels import library_reason
    from sfumato.machine import examine
    from sfumato.runtime import Choice, choices

    machine = examine()
    decided = [*choices(device), Choice("kernels", *kernels(library_reason()))]
    packages = versions()
    tips = advice(machine, decided)
    if as_json:
        chosen = {choice.name: {"value": choice.value, "reason": choice.reason} for choice in decided}
        print(json.dumps({"chosen": chosen, "machine": machine.to_dict(), "versions": packages, "advice": tips},
                         indent=2))  # fmt: skip
        return
    tables = {
        "chosen": [(choice.name, choice.value, choice.reason) for choice in decided],
        "machine": facts(machine),
        "versions": [(name, version, "") for name, version in packages.items()],
    }
    (rich_tables if sys.stdout.isatty() else plain)(tables, tips)


def kernels(reason: str) -> tuple[str, str]:
    """Whether there are kernels of our own, and the reason in the words of their library."""
    from sfumato.kernels import available

    found = available()
    return ("PyTorch's" if found is None else f"our own, {found}"), reason


def versions() -> dict[str, str]:
    """The versions of what the figures depend on, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(machine: Machine) -> list[tuple[str, str, str]]:
    """What the machine is: name, value, note."""
    import torch

    def amount(size: int) -> str:
        return f"{size / GIB:.1f} GiB" if size else "unknown"

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        ("processor", machine.cpu, machine.system),
        ("instruction sets", ", ".join(machine.flags) or "unknown", f"PyTorch uses {_capability()}"),
        ("cores", str(machine.cores), f"{machine.physical or 'unknown'} without second threads"),
        ("load", f"{machine.load:g}", "programs that wanted to run in the last minute"),
        ("memory", amount(machine.memory), f"{amount(machine.free)} free"),
        *(("GPU", card.name, amount(card.total_memory)) for card in cards),
        *([] if cards else [("GPU", "none", "that this PyTorch can use")]),
    ]


def advice(machine: Machine, decided: list[Choice]) -> list[str]:
    """What would make it faster, the largest gain first."""
    import torch

    from sfumato.runtime import isa_limited

    chosen = {choice.name: choice for choice in decided}
    on_cpu = not chosen["device"].value.startswith("cuda")
    tips = []
    if on_cpu and not torch.cuda.is_available() and (Path("/proc/driver/nvidia/version").exists()):
        tips.append("there is an NVIDIA GPU, but this PyTorch has no CUDA: install a build with it (pytorch.org)")
    if on_cpu and isa_limited():
        tips.append(f"unset {isa_limited().partition('=')[0]}: it keeps oneDNN from instruction sets that are there")
    threads = int(chosen["threads"].value)
    if on_cpu and threads < (machine.physical or machine.cores):
        tips.append(f"{threads} of {machine.physical or machine.cores} cores are used: unset OMP_NUM_THREADS")
    if on_cpu and machine.load > machine.cores:
        tips.append(f"other programs want the cores as well (load {machine.load:g} on {machine.cores}): let them end")
    if on_cpu and chosen["kernels"].value == "PyTorch's":
        tips.append(chosen["kernels"].reason)
    if on_cpu and chosen["allocator"].value == "system":
        tips.append(f"the allocator is {chosen['allocator'].reason}; keeping large buffers saves a fifth and more")
    if on_cpu and chosen["precision"].value == "float32" and not isa_limited():
        tips.append("a CPU with AMX (Intel Xeon since 2023) or a GPU makes pictures several times as fast")
    if 0 < machine.free < NEEDED:
        tips.append(f"{machine.free / GIB:.1f} GiB are free: 512x512 wants about {NEEDED // GIB}; else give --tile")
    return tips


def plain(tables: dict[str, list[tuple[str, str, str]]], tips: list[str]) -> None:
    """Lines of words for pipes: name, value, note."""
    for title, rows in tables.items():
        print(title)
        width, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        for name, value, note in rows:
            print(f"  {name:<{width}}  {value:<{middle}}  {note}".rstrip())
    print("faster")
    for tip in tips or ["nothing to mend"]:
        print(f"  {tip}")


def rich_tables(tables: dict[str, list[tuple[str, str, str]]], tips: list[str]) -> None:
    """The same for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in tables.items():
        table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        table.add_column(style="dim")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("faster", style="bold")
    for tip in tips or ["nothing to mend"]:
        console.print(f"  - {tip}", markup=False)


def _capability() -> str:
    import torch

    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    return torch.backends.cpu.get_cpu_capability() + (f", as ATEN_CPU_CAPABILITY={limit} asks" if limit else "")
