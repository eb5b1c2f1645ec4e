"""What each opt-in approximation costs in PSNR against the exact picture, and what it saves in processor time.

    python benchmarks/approximations.py                            # the built-in model, and a sheet of pictures
    python benchmarks/approximations.py --only transformer --model runs/mmdit/model   # one of `recipes/mmdit.yaml`
    python benchmarks/approximations.py --only sizes               # networks at true size, random weights: times alone

Writes benchmarks/results/approximations.json and .md; what is not measured anew stays. Eight prompts, a seed each,
20 steps with guidance. For each prompt the exact picture and the approximations take turns, so that other programs
disturb them alike; a ratio is the median over the prompts of processor time, the whole picture with its decoding. PSNR
is of the 8-bit picture. Fewer steps stand beside them: what does not beat them is of no use to this model. At true size
steps of both kinds take turns; what one of so many costs follows from the two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine
from PIL import Image

from sfumato.pipelines.pipeline import Pipeline, load

ROOT = Path(__file__).parent.parent
RESULTS, SHEET = ROOT / "benchmarks" / "results", ROOT / "docs" / "images" / "approximations.jpg"
PROMPTS = (
    "a red apple on a blue background",
    "two green frogs",
    "a cat left of a red car",
    "a pink star on a yellow background",
    "a rainbow above a house",
    "a guitar, flat style",
    "an owl on a dark green background, sticker style",
    "a butterfly",
)
FIRST_SEED = 40
STEPS, SCALE = 20, 3.5
EXACT = "exact"
BLOCKS = 3  # of the 24 of Stable Diffusion 3 medium
# Name -> the options that make it.
WAYS: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "guidance_interval 0.1,1": {"guidance_interval": (0.1, 1.0)},
    "guidance_interval 0.2,1": {"guidance_interval": (0.2, 1.0)},
    "guidance_interval 0,0.8": {"guidance_interval": (0.0, 0.8)},
    "deep_cache 2": {"deep_cache": 2},
    "deep_cache 3": {"deep_cache": 3},
    "deep_cache 5": {"deep_cache": 5},
    "fast": {"fast": True},
    "10 steps instead": {"num_inference_steps": 10},
    "7 steps instead": {"num_inference_steps": 7},
}
TRANSFORMER_WAYS: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "block_cache 0.05": {"block_cache": 0.05},
    "block_cache 0.1": {"block_cache": 0.1},
    "block_cache 0.2": {"block_cache": 0.2},
    "block_cache 0.1, guidance_interval 0.1,1": {"block_cache": 0.1, "guidance_interval": (0.1, 1.0)},
    "int8": {"int8": True},
    "10 steps instead": {"num_inference_steps": 10},
}
SHOWN = (EXACT, "guidance_interval 0.1,1", "deep_cache 2", "deep_cache 3", "deep_cache 5", "fast", "7 steps instead")


def painted(pipe: Pipeline, prompt: str, seed: int, options: Mapping[str, Any]) -> tuple[Image.Image, float]:
    """A picture and the processor time that it took."""
    told = {"num_inference_steps": STEPS, "guidance_scale": SCALE, **options}
    since = time.process_time()
    (image,) = pipe(prompt, seed=seed, **told).images
    return image, time.process_time() - since


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Of 8-bit pictures, in dB; 99 for equal ones."""
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def measured(
    pipe: Pipeline, prompts: Sequence[str], ways: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, list[Image.Image]]]:
    """A row for each way, and the pictures."""
    for options in ways.values():  # what is made once is made before the clock runs
        painted(pipe, prompts[0], 0, {**options, "num_inference_steps": 3})
    pictures: dict[str, list[Image.Image]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i, prompt in enumerate(prompts):
        for name, options in ways.items():
            image, used = painted(pipe, prompt, FIRST_SEED + i, options)
            pictures[name].append(image)
            seconds[name].append(used)
        print(f"{i + 1}/{len(prompts)} {prompt}", flush=True)
    rows = []
    for name in ways:
        found = [psnr(a, b) for a, b in zip(pictures[name], pictures[EXACT], strict=True)]
        ratios = [a / b for a, b in zip(seconds[name], seconds[EXACT], strict=True)]
        rows.append({"way": name, "mean": statistics.mean(found), "worst": min(found),
                     "ratio": statistics.median(ratios), "psnr": found, "seconds": seconds[name]})  # fmt: skip
    return rows, pictures


def filled(config: Any) -> Any:
    """A network of true size with random weights."""
    from sfumato.weights.parts import network

    net = network(config).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.uniform_(-0.03, 0.03)
    return net


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of some calls that take turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, call in calls.items():
                since = time.process_time()
                call()
                if turn:
                    seconds[name].append(time.process_time() - since)
    return seconds


def full_unet(side: int = 32, turns: int = 3) -> dict[str, Any]:
    """A step of SD 1.5's U-Net with guidance, whole and with kept features."""
    from sfumato.approximate import reuse
    from sfumato.cond import Cond, Memo
    from sfumato.prepare import prepare
    from sfumato.presets import PRESETS

    config = next(preset.denoiser for preset in PRESETS if preset.name == "sd15")
    net = filled(config).to(memory_format=torch.channels_last)
    prepare(net)
    reuse(net)
    memos = tuple(Memo(net) for _ in range(2))
    x, t = torch.randn(2, 4, side, side), torch.full((2,), 500.0)
    cond = Cond(torch.randn(2, 77, 768), memo=memos)

    def step(fresh: bool) -> None:
        for memo in memos:
            memo.fresh = fresh
        net(x, t, cond)

    seconds = in_turns({"whole": lambda: step(True), "kept": lambda: step(False)}, turns)
    whole, kept = (statistics.median(seconds[name]) for name in ("whole", "kept"))
    share = kept / whole
    every = {n: (1 + (n - 1) * share) / n for n in (2, 3, 5)}
    return {"side": 8 * side, "whole": whole, "kept": kept, "share": share, "every": every, "seconds": seconds}


def full_transformer(side: int = 32, turns: int = 2) -> dict[str, Any]:
    """A step of some blocks of Stable Diffusion 3 medium with guidance, in float32 and in 8 bits."""
    from dataclasses import replace

    from sfumato.approximate import rounded
    from sfumato.cond import Cond
    from sfumato.presets import PRESETS

    config = next(preset.denoiser for preset in PRESETS if preset.name == "sd3-medium")
    net = filled(replace(config, num_layers=BLOCKS))
    x, t = torch.randn(2, 16, side, side), torch.full((2,), 500.0)
    cond = Cond(torch.randn(2, 154, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim))

    def step() -> Any:
        return net(x, t, cond)

    seconds = in_turns({"float32": step, "int8": lambda: rounded(net)(step)()}, turns)
    plain, less = (statistics.median(seconds[name]) for name in ("float32", "int8"))
    return {"side": 8 * side, "float32": plain, "int8": less, "ratio": less / plain, "seconds": seconds}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows but the exact one."""
    lines = ["| | PSNR, mean | worst | processor time |", "|---|---:|---:|---:|"]
    for row in rows[1:]:
        lines.append(f"| {row['way']} | {row['mean']:.1f} dB | {row['worst']:.1f} dB | {row['ratio']:.2f} |")
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    """All that was measured."""
    lines: list[str] = []
    for name, title in (("builtin", "Built-in model"), ("transformer", "Transformer of `recipes/mmdit.yaml`")):
        if name in found:
            count = len(found[name][0]["psnr"])
            lines += [f"{title}, {count} prompts, {STEPS} steps, guidance {SCALE}.", "", *table(found[name]), ""]
    if "unet" in found:
        full = found["unet"]
        lines += [f"SD 1.5's U-Net at {full['side']}x{full['side']} with guidance, random weights: a whole step "
                  f"{full['whole']:.2f} s of processor time, one with kept features {full['kept']:.2f} s "
                  f"({full['share']:.0%}).", "", "| deep_cache | all steps together |", "|---|---:|"]  # fmt: skip
        lines += [f"| {n} | {ratio:.2f} |" for n, ratio in full["every"].items()]
    if "blocks" in found:
        full = found["blocks"]
        lines += ["", f"{BLOCKS} blocks of Stable Diffusion 3 medium at {full['side']}x{full['side']} with guidance, "
                  f"random weights: {full['float32']:.2f} s of processor time in float32, {full['int8']:.2f} s in 8 "
                  f"bits ({full['ratio']:.2f}).", ""]  # fmt: skip
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in found["machine"].items()), ""])


def sheet(pictures: Mapping[str, Sequence[Image.Image]], prompts: int = 6) -> Image.Image:
    """A column for each way that is shown, a row for each prompt."""
    from PIL import ImageDraw

    side, head, gap = 128, 22, 6
    canvas = Image.new("RGB", (len(SHOWN) * (side + gap) + gap, head + prompts * (side + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(SHOWN):
        x = gap + column * (side + gap)
        pen.text((x + side // 2, head // 2), name.replace("guidance_interval", "interval"), fill="black", anchor="mm")
        for row in range(prompts):
            canvas.paste(pictures[name][row], (x, head + row * (side + gap)))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost and the gain of each opt-in approximation.")
    parser.add_argument("--only", choices=("builtin", "transformer", "unet", "blocks", "sizes"), default="builtin",
                        help="unet takes 4 GB of memory; sizes: unet and blocks")  # fmt: skip
    parser.add_argument(
        "--model", type=Path, default=ROOT / "runs" / "mmdit" / "model", help="the transformer's folder"
    )
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="so many of the prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of approximations.json and .md")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="where the built-in model's pictures go")
    asked = parser.parse_args()
    file = asked.out / "approximations.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    prompts = PROMPTS[: asked.prompts]
    if asked.only == "builtin":
        found["builtin"], pictures = measured(load("mini", "float32", "cpu"), prompts, WAYS)
        sheet(pictures, min(6, len(prompts))).save(asked.sheet, quality=88)
    if asked.only == "transformer":
        found["transformer"], _ = measured(load(asked.model, "float32", "cpu"), prompts, TRANSFORMER_WAYS)
    if asked.only in ("unet", "sizes"):
        found["unet"] = full_unet()
    if asked.only in ("blocks", "sizes"):
        found["blocks"] = full_transformer()
    found["machine"] = {**machine(), "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
    asked.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    (asked.out / "approximations.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
