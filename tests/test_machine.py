from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfumato.cli import main
from sfumato.machine import examine
from sfumato.runtime import choices, choose, cpu_has_bfloat16, isa_limited, threads, use_threads

CPUINFO = """processor\t: {0}
model name\t: A Processor
physical id\t: 0
core id\t\t: {1}
flags\t\t: fpu avx2 fma avx512f amx_tile amx_bf16
"""


def system(root: Path, quota: str = "max 100000") -> Path:
    """A system with four logical processors on two cores."""
    for name, text in {
        "proc/cpuinfo": "\n".join(CPUINFO.format(i, i // 2) for i in range(4)),
        "proc/meminfo": "MemTotal:  8388608 kB\nMemAvailable: 4194304 kB\n",
        "sys/fs/cgroup/cpu.max": quota,
        "sys/fs/cgroup/memory.max": "4294967296\n",
        "sys/fs/cgroup/memory.current": "1073741824\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_is_read_off_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    machine = examine(system(tmp_path))
    assert (machine.cpu, machine.flags) == ("A Processor", ("avx2", "fma", "avx512f", "amx_tile", "amx_bf16"))
    assert (machine.cores, machine.physical) == (4, 2)
    assert (machine.memory, machine.free) == (4 * 2**30, 3 * 2**30)
    assert examine(system(tmp_path, "150000 100000")).cores == 2
    nothing = examine(tmp_path / "none")
    assert nothing.cores == 4 and (nothing.memory, nothing.physical, nothing.flags) == (0, 0, ())


def test_threads_heed_cores_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert threads(examine(system(tmp_path))).value == "2"
    assert threads(examine(system(tmp_path, "100000 100000"))).value == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads(examine(system(tmp_path))).reason == "OMP_NUM_THREADS = 4"


def test_bfloat16_is_for_processors_that_have_and_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_has_bfloat16() and choose("cpu").precision == "bfloat16"
    for limit in ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert isa_limited() == f"ONEDNN_MAX_CPU_ISA={limit}" and choose("cpu").precision == "float32"
    for limit in ("AVX512_CORE_AMX", "avx512_core_bf16", "DEFAULT"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert not isa_limited()


def test_small_pictures_go_together() -> None:
    runtime = choose("cpu", "float32")
    assert [runtime.together(side, side) for side in (8, 16, 32, 64, 128)] == [8, 8, 2, 1, 1]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_ALLOCATOR", "system")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("chosen\n", "  precision", "machine\n", "versions\n", "faster\n", "left alone by SFUMATO_ALLOCATOR"):
        assert words in out, out
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"chosen", "machine", "versions", "advice"}
    assert {choice.name for choice in choices("cpu")} < set(told["chosen"])
    assert any("keeping large buffers" in tip for tip in told["advice"])
    monkeypatch.setenv("SFUMATO_ALLOCATOR", "fast")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_asked_for_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    use_threads(3)
    use_threads()
    use_threads(64)
    assert told[0] == 3 and told[1] < 64 and len(told) == 2
