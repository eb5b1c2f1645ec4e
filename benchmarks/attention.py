"""The compiled kernels beside PyTorch: attention, group norm with SiLU, GEGLU, at the sizes of the models.

    python benchmarks/attention.py               # writes benchmarks/results/attention.json and attention.md

The contenders and a matrix product that measures the ceiling take turns (A B C D A B C D...), all with gradients off
and warm; medians of seconds and of each round's ratio count. Attention also against matmul, softmax, matmul with
buffers that are used again. On a machine that does other things, too, `--threads 1 --cpu-time` counts the thread's own
time. All numbers are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from full_size import machine
from torch import Tensor

from sfumato import kernels

RESULTS = Path(__file__).parent / "results"
OURS, TORCH, CEILING = "sfumato", "PyTorch", "matrix product"
SAMPLE = 0.004
SCORES = 1 << 24  # numbers in the buffer of the plain way
# Where it comes from, (B, N, L, K, D).
ATTENTION: tuple[tuple[str, tuple[int, int, int, int, int]], ...] = (
    ("SD 1.5, 512x512, 64x64 latents", (2, 8, 4096, 4096, 40)),
    ("SD 1.5, 32x32", (2, 8, 1024, 1024, 80)),
    ("SD 1.5, 16x16", (2, 8, 256, 256, 160)),
    ("SD 1.5, 8x8", (2, 8, 64, 64, 160)),
    ("SD 1.5, 64x64 to the text", (2, 8, 4096, 77, 40)),
    ("SD 1.5, 32x32 to the text", (2, 8, 1024, 77, 80)),
    ("SD 1.5, 16x16 to the text", (2, 8, 256, 77, 160)),
    ("SDXL, 64x64", (2, 10, 4096, 4096, 64)),
    ("SDXL, 32x32", (2, 20, 1024, 1024, 64)),
    ("SDXL, 32x32 to the text", (2, 20, 1024, 77, 64)),
    ("SD 3, 512x512", (2, 24, 1178, 1178, 64)),
    ("autoencoder, 64x64", (1, 1, 4096, 4096, 512)),
    ("CLIP's text tower", (1, 12, 77, 77, 64)),
    ("built-in model, 8x8", (2, 4, 64, 64, 24)),
    ("built-in model, 8x8 to the text", (2, 4, 64, 32, 24)),
    ("built-in model, 4x4", (2, 4, 16, 16, 56)),
)
# (B, C, H, W, groups).
NORMS: tuple[tuple[str, tuple[int, int, int, int, int]], ...] = (
    ("SD 1.5, 64x64", (2, 320, 64, 64, 32)),
    ("SD 1.5, 64x64, widest", (2, 960, 64, 64, 32)),
    ("SD 1.5, 32x32", (2, 640, 32, 32, 32)),
    ("SD 1.5, 8x8", (2, 1280, 8, 8, 32)),
    ("autoencoder, 512x512", (1, 128, 512, 512, 32)),
    ("built-in model, 16x16", (2, 48, 16, 16, 16)),
    ("built-in model, 8x8", (2, 96, 8, 8, 16)),
    ("built-in decoder, 128x128", (1, 16, 128, 128, 2)),
)
# (rows, width).
GATES: tuple[tuple[str, tuple[int, int]], ...] = (
    ("SD 1.5, 64x64", (8192, 1280)),
    ("SD 1.5, 32x32", (2048, 2560)),
    ("SD 1.5, 16x16", (512, 5120)),
    ("built-in model, 8x8", (128, 384)),
)


def plain(shape: tuple[int, int, int, int, int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Matmul, softmax, matmul, a few heads at a time, into buffers that are kept."""
    B, N, L, K, D = shape
    step = max(1, min(B * N, SCORES // (L * K)))
    scores, out = torch.empty(step, L, K), torch.empty(B * N, L, D)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q * D**-0.5, k, v))  # (B * N, L or K, D)
        for i in range(0, B * N, step):
            some = scores[: min(step, B * N - i)]
            torch.bmm(q[i : i + step], k[i : i + step].transpose(1, 2), out=some)
            torch.softmax(some, dim=-1, out=some)
            torch.bmm(some, v[i : i + step], out=out[i : i + step])
        return out

    return attend


def attention_case(shape: tuple[int, int, int, int, int]) -> tuple[float, dict[str, Callable[[], Tensor]]]:
    """Floating-point operations, and the contenders."""
    B, N, L, K, D = shape
    q, k, v = (torch.randn(B, n, N * D).unflatten(-1, (N, D)).transpose(1, 2) for n in (L, K, K))
    way = plain(shape)
    return 4.0 * B * N * L * K * D, {
        OURS: lambda: kernels.fused(q, k, v),
        TORCH: lambda: F.scaled_dot_product_attention(q, k, v),
        "matmul, softmax, matmul": lambda: way(q, k, v),
    }


def norm_case(shape: tuple[int, int, int, int, int]) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(shape[:4]).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1])
    return {
        OURS: lambda: kernels.group_norm(x, shape[4], weight, bias, 1e-5, True),
        TORCH: lambda: F.silu(F.group_norm(x, shape[4], weight, bias, 1e-5), inplace=True),
    }


def gate_case(shape: tuple[int, int]) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(shape[0], 2 * shape[1])
    h, gate = x.chunk(2, dim=-1)
    return {OURS: lambda: kernels.geglu(x), TORCH: lambda: h * F.gelu(gate)}


def rounds(
    able: Mapping[str, Callable[[], Tensor]], clock: Callable[[], float], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: at least 5 rounds and one that does not count, more while time is left.

    What takes less than SAMPLE seconds is repeated in its turn, so that it does not start with the others' caches.
    """
    found: dict[str, list[float]] = {name: [] for name in able}
    since = clock()
    able[OURS]()
    able[OURS]()
    repeats = max(1, min(200, round(2 * SAMPLE / max(clock() - since, 1e-6))))
    end = time.perf_counter() + seconds
    while len(found[OURS]) < 6 or (time.perf_counter() < end and len(found[OURS]) < 200):
        for name, run in able.items():
            n = 1 if name == CEILING else repeats
            since = clock()
            for _ in range(n):
                run()
            found[name].append((clock() - since) / n)
    return {name: times[1:] for name, times in found.items()}


def measure(clock: Callable[[], float], seconds: float) -> list[dict[str, object]]:
    """A row for each kernel and size."""
    a, b, c = torch.randn(3, 1024, 1024)
    product = {CEILING: lambda: torch.mm(a, b, out=c)}
    cases = [
        *(("attention", where, shape, *attention_case(shape)) for where, shape in ATTENTION),
        *(("group norm, SiLU", where, shape, 0.0, norm_case(shape)) for where, shape in NORMS),
        *(("GEGLU", where, shape, 0.0, gate_case(shape)) for where, shape in GATES),
    ]
    rows: list[dict[str, object]] = []
    for kernel, where, shape, flops, able in cases:
        times = rounds({**able, **product} if flops else able, clock, seconds)
        row: dict[str, object] = {"kernel": kernel, "where": where, "shape": shape, "rounds": len(times[OURS])}
        row["seconds"] = {name: spread(t) for name, t in times.items() if name != CEILING}
        others = [name for name in able if name != OURS]
        row["ratio"] = {n: spread([x / y for x, y in zip(times[OURS], times[n], strict=True)]) for n in others}
        if flops:
            ceiling = 2 * 1024**3 / statistics.median(times[CEILING])
            row["ceiling_gflops"] = ceiling / 1e9
            row["share"] = {name: flops / statistics.median(times[name]) / ceiling for name in able}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def line(row: Mapping[str, object]) -> str:
    """A row of the table."""
    times, ratios, shares = row["seconds"], row["ratio"], row.get("share", {})
    assert isinstance(times, dict) and isinstance(ratios, dict) and isinstance(shares, dict)
    said = " | ".join(f"{1e3 * times[n]['median']:.3g}" if n in times else "" for n in (OURS, TORCH))
    r = ratios[TORCH]
    share = " | ".join(f"{100 * shares[n]:.0f} %" if n in shares else "" for n in (OURS, TORCH))
    other = next((f"{v['median']:.2f}" for n, v in ratios.items() if n != TORCH), "")
    shape = "x".join(map(str, row["shape"]))  # type: ignore[call-overload]
    return (
        f"| {row['kernel']} | {row['where']} | {shape} | {said} | "
        f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {other} | {share} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the compiled kernels beside PyTorch's.")
    parser.add_argument("--threads", type=int, default=None, help="of torch and the kernels [default: torch's own]")
    parser.add_argument("--cpu-time", action="store_true", help="count the calling thread's time, for one thread only")
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on each size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of attention.json and attention.md")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time sees the calling thread only; add --threads 1")
    if kernels.available() is None:
        parser.error(kernels.library_reason())
    head = (
        f"| kernel | where | shape | {OURS} ms | {TORCH} ms | ratio (quartiles) | to matmul, softmax, matmul | "
        f"{OURS} of the ceiling | {TORCH} of the ceiling |\n|---|---|---|---:|---:|---:|---:|---:|---:|"
    )
    print(head)
    clock = time.thread_time if asked.cpu_time else time.perf_counter
    with torch.inference_mode():
        rows = measure(clock, asked.seconds)
    kind = "CPU time of one thread" if asked.cpu_time else "wall time"
    about = {**machine(), "threads": torch.get_num_threads(), "kernels": kernels.available(), "clock": kind}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "attention.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    foot = ", ".join(f"{key} {value}" for key, value in about.items())
    (asked.out / "attention.md").write_text("\n".join([head, *map(line, rows), "", foot, ""]))


if __name__ == "__main__":
    main()
