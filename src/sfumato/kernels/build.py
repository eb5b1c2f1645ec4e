"""Compile the kernels: `python -m sfumato.kernels.build`. Installing the package does the same by itself.

Needs nothing but a C++17 compiler (g++ 12 or clang++ 15 and later) that makes code for x86-64 Linux, and imports
nothing of the package, so that it also runs before the package is installed. CXX in the environment names another one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "_native.so"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi",
)  # fmt: skip
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
PAIRS = (*WIDE, "-mavx512bf16")
# For each instruction set: its sources, the compiler's flags, floats a vector, rows of sums in registers.
ISAS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, int]] = {
    "avx2": (("attention", "pointwise", "product"), ("-mavx2", "-mfma"), 8, 6),
    "avx512": (("attention", "pointwise", "product"), WIDE, 16, 12),
    "avx512bf16": (("tiles",), PAIRS, 16, 12),
    "amx": (("tiles",), (*PAIRS, "-mamx-tile", "-mamx-bf16"), 16, 12),
}
OPTIONAL = ("avx512bf16", "amx")  # left out where the compiler does not know them
SECONDS = 300  # before a compiler is given up


def build(out: Path = LIBRARY, emulated: Sequence[str] = ()) -> str | None:
    """Compile the library to `out` unless it is there for these sources and this compiler; None, or why not.

    emulated: instruction sets whose code is made of AVX2 instructions, vectors and tiles being what they are with the
    real ones; for tests of their logic on a processor that lacks them.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"the kernels are for x86-64 Linux, this is {sys.platform} on {platform.machine()}"
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "clang++", "c++")), "")]
    if not compiler[0] or not shutil.which(compiler[0]):
        return f"no C++ compiler found ({compiler[0] or 'g++, clang++, c++'}); install one or set CXX"
    with tempfile.TemporaryDirectory() as folder:
        try:
            mark = fingerprint(compiler, emulated)
            if out.is_file() and mark.encode() in out.read_bytes():
                return None
            made = compile_all(compiler, Path(folder), mark, emulated)
            # beside its place first: whoever has the old one open keeps it
            shutil.copy(made, out.with_suffix(".new"))
            os.replace(out.with_suffix(".new"), out)
        except subprocess.TimeoutExpired:
            return f"{compiler[0]} took more than {SECONDS} s"
        except (subprocess.CalledProcessError, OSError) as error:
            said = str(getattr(error, "stderr", "") or error).strip()
            return f"{compiler[0]} failed: {said[:2000]}"
    return None


def fingerprint(compiler: Sequence[str], emulated: Sequence[str]) -> str:
    """What the library depends on, as a word that is compiled into it."""
    digest = hashlib.sha256(run([*compiler, "--version"]).encode())
    for path in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(path.read_bytes())
    digest.update(" ".join(emulated).encode())
    return f"sfumato-{digest.hexdigest()[:32]}"


def compile_all(compiler: Sequence[str], folder: Path, mark: str, emulated: Sequence[str]) -> Path:
    """Each source for each instruction set, side by side, then the library."""
    plain = (*ISAS["avx2"][1], "-O1")  # wide vectors of narrow ones take long to optimise
    used = {isa: plain if isa in emulated else entry[1] for isa, entry in ISAS.items()}
    used = {isa: flags for isa, flags in used.items() if isa not in OPTIONAL or accepts(compiler, flags)}
    have = [f"-DHAVE_{isa.upper()}" for isa in used]
    jobs: list[tuple[tuple[str, ...], str, list[str]]] = [((), "library", [f'-DMARK="{mark}"', *have])]
    for isa, flags in used.items():
        names, _, width, rows = ISAS[isa]
        for name in names:
            jobs.append((flags, name, [f"-DWIDTH={width}", f"-DROWS={rows}", f"-DKERNEL={name}_{isa}"]))
    running = []
    for i, (flags, name, macros) in enumerate(jobs):
        command = [*compiler, *FLAGS, *flags, *macros, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{i}.o")]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    failed = None
    for command, process in running:
        _, said = process.communicate(timeout=SECONDS)
        if process.returncode:
            failed = subprocess.CalledProcessError(process.returncode, command, stderr=said)
    if failed is not None:
        raise failed
    made = folder / "library.so"
    run([*compiler, "-shared", "-pthread", "-s", "-o", str(made), *(str(folder / f"{i}.o") for i in range(len(jobs)))])
    return made


def accepts(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=SECONDS).returncode == 0


def run(command: Sequence[str]) -> str:
    """What a command prints; CalledProcessError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    return done.stdout


if __name__ == "__main__":
    problem = build()
    print(f"kernels not built: {problem}" if problem else f"kernels: {LIBRARY}", file=sys.stderr)
    sys.exit(1 if problem else 0)
