"""Every released model at full size beside diffusers: the same random weights, the same noise, every file layout.

    python benchmarks/parity.py                      # all families; what parity.json has already is left out
    python benchmarks/parity.py --only sd15 --again  # one of them, anew

For each family a model is written by diffusers and read back through every layout, which has to give the same tensors
bit for bit. Then the networks are compared one by one, and a whole picture. Writes benchmarks/results/parity.json and
parity.md after each family; exits with 1 if a bound was missed. A family needs about 25 GB of disk and 12 of memory.
Of Stable Diffusion XL and 3 single networks are compared, in float32 and in bfloat16, within 2 GB of memory (large.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import BY_NAME, Peer, has_pipeline, machine, make, open_peer, quiet
from large import DEFAULT, LARGE, compare_large, relative
from layouts import single_file_in_peer, tensors_through_layouts
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.cond import Cond
from sfumato.pipelines.pipeline import Pipeline
from sfumato.presets import Preset
from sfumato.presets.classic import CLASSIC
from sfumato.weights.safe import lay_out

RESULTS = Path(__file__).parent / "results"
PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse on mars", "blurry, two green frogs"
SEED = 40
WHOLE = tuple(preset.name for preset in CLASSIC if preset.name in BY_NAME)
COMPONENT, LEVELS, DECIBEL, CHANGE = 1e-4, 2.0, 30.0, 20.0  # the bounds
AT_LEAST = ("dB", "levels changed")  # measures that may not be below their bound


@dataclass(frozen=True)
class Row:
    """One comparison: what, by which measure, its value and bound, and how long it took."""

    check: str
    measure: str
    value: float
    bound: float
    note: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the value is within its bound."""
        return self.value >= self.bound if self.measure in AT_LEAST else self.value <= self.bound


class Report:
    """Rows as they come, printed at once."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.rows: list[Row] = []

    def add(self, check: str, measure: str, bound: float, work: Callable[[], tuple[float, str]]) -> None:
        """Do one comparison; `work` gives its value and a remark."""
        since = time.perf_counter()
        value, note = work()
        row = Row(check, measure, value, bound, note, round(time.perf_counter() - since, 1))
        self.rows.append(row)
        verdict = "" if row.holds else "   MISSED"
        print(
            f"{self.family:18} {check:34} {value:.3g} {measure} (bound {bound:g}) {note} {row.seconds} s{verdict}",
            flush=True,
        )


def levels(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """The largest difference of pictures (1, 3, H, W) in [0, 1], in levels of 255."""
    clipped = float(((theirs == 0) | (theirs == 1)).float().mean())
    side = theirs.shape[-1]
    note = f"{side} pixels, deviation {float(theirs.std()) * 255:.0f} levels, {clipped:.0%} clipped"
    return float((ours - theirs).abs().max()) * 255, note


def decibel(ours: Tensor, theirs: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1]."""
    return -10 * math.log10(max(float((ours - theirs).square().mean()), 1e-12))


def drawn(side: int, seed: int) -> Image.Image:
    """A picture of soft random patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((side, side), Image.Resampling.BICUBIC)


def half_mask(side: int) -> Image.Image:
    """White on the right."""
    flags = np.zeros((side, side), dtype=np.uint8)
    flags[:, side // 2 :] = 255
    return Image.fromarray(flags)


def depths(side: int) -> np.ndarray:
    """A depth map: a slope with a hill."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return (y * 20 + 8 * np.exp(-20 * ((x - 0.4) ** 2 + (y - 0.5) ** 2)) + 3).astype(np.float32)


def inputs(preset: Preset, side: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a task takes besides the prompt, as our pipeline and as diffusers' is given it; side: of the latent."""
    full = side * preset.vae.factor
    image = drawn(full, 1)
    if preset.task == "inpaint":
        return {"image": image, "mask": half_mask(full)}, {
            "image": image, "mask_image": half_mask(full), "strength": 1.0, "height": full, "width": full,
        }  # fmt: skip
    if preset.task == "depth":
        both: dict[str, Any] = {"image": image, "strength": 1.0}
        return both | {"depth": Image.fromarray(depths(full))}, both | {
            "depth_map": torch.from_numpy(depths(full))[None]
        }
    if preset.task == "instruct":
        both = {"image": image, "image_guidance_scale": 1.5}
        return both, both
    if preset.task == "upscale":
        both = {"image": drawn(side, 1), "noise_level": 20}
        return both, both
    size = {"height": full, "width": full}
    return size, size


def our_picture(pipe: Pipeline, side: int, steps: int, prompt: str = PROMPT) -> Tensor:
    """A picture (1, 3, H, W) in [0, 1] by the folder's own scheduler."""
    ours, _ = inputs(pipe.preset, side)
    images = pipe(
        prompt, negative_prompt=NEGATIVE, seed=SEED, num_inference_steps=steps, sampler=pipe.scheduler.entry.name,
        guidance_scale=pipe.preset.guidance_scale, output_type="pt", **ours,
    ).images  # fmt: skip
    assert isinstance(images, Tensor)
    return images


def their_picture(peer: Peer, preset: Preset, side: int, steps: int) -> Tensor:
    """The same by diffusers."""
    _, theirs = inputs(preset, side)
    images = peer.pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(SEED), output_type="np",
        num_inference_steps=steps, guidance_scale=preset.guidance_scale, **theirs,
    ).images  # fmt: skip
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@torch.inference_mode()
def compare_networks(report: Report, pipe: Pipeline, peer: Peer, side: int) -> None:
    """Text, U-Net, encoder and decoder on the same inputs."""
    preset, factor = pipe.preset, pipe.factor
    draw = torch.Generator().manual_seed(1)
    cond = Cond()
    if preset.text is not None:
        word = PROMPT if pipe.tokenizer is not None else "207"
        cond = pipe.towers.condition(word)
    if peer.text_encoder is not None:
        report.add("text embeddings", "of range", COMPONENT, lambda: compare_texts(pipe, peer))
    x = torch.randn(1, preset.unet.in_channels, side, side, generator=draw)
    t = torch.tensor([601])
    label = None if preset.unet.num_class_embeds is None else torch.tensor([20])

    def unet() -> tuple[float, str]:
        told = Cond(context=cond.context, pooled=None if label is None else label[:, None])
        ours = pipe.net(x, t, told)
        if cond.context is None:
            return relative(ours, peer.unet(x, t).sample)
        extra = {} if label is None else {"class_labels": label}
        return relative(ours, peer.unet(x, t, encoder_hidden_states=cond.context, **extra).sample)

    report.add("U-Net, one call", "of range", COMPONENT, unet)
    pixels = torch.from_numpy(np.array(drawn(side * factor, 2))).permute(2, 0, 1)[None] / 127.5 - 1
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=draw)
    kl = hasattr(peer.vae, "quant_conv") and not hasattr(peer.vae, "quantize")

    def encode() -> tuple[float, str]:
        ours, theirs = pipe.vae.encode(pixels), peer.vae.encode(pixels)
        if not kl:
            return relative(ours.latents, theirs.latents)
        pairs = [(getattr(ours.latent_dist, n), getattr(theirs.latent_dist, n)) for n in ("mean", "logvar")]
        return max(relative(*pair) for pair in pairs)

    report.add("VAE encode", "of range", COMPONENT, encode)
    z = torch.randn(1, preset.vae.latent_channels, side, side, generator=draw)
    report.add(
        "VAE decode", "of range", COMPONENT, lambda: relative(pipe.vae.decode(z).sample, peer.vae.decode(z).sample)
    )


def compare_texts(pipe: Pipeline, peer: Peer) -> tuple[float, str]:
    """The states of a prompt and of the empty one; the peers' own tokeniser where there is one."""
    found = []
    for text in (PROMPT, ""):
        ours = pipe.towers.condition(text).context
        assert ours is not None and pipe.tokenizer is not None
        ids = pipe.tokenizer([text])
        if peer.tokenizer is not None:
            theirs = peer.tokenizer(text, padding="max_length", max_length=ids.shape[1], return_tensors="pt").input_ids
            if not torch.equal(ids, theirs):
                raise ValueError(f"the tokenisers differ on {text!r}")
        found.append(relative(ours, peer.text_encoder(ids)[0]))
    return max(found)


def precision(report: Report, preset: Preset, folder: Path, side: int, steps: int) -> None:
    """A small picture in bfloat16 beside our own in float32, and beside one of another prompt.

    The latter shows that the pictures could differ: that they depend on what the networks do.
    """
    pipe = sfumato.load(folder, precision="float32", device="cpu")
    exact, other = (our_picture(pipe, side, steps, text) for text in (PROMPT, "two green frogs"))
    note = f"{exact.shape[-1]} pixels, {steps} steps"
    report.add("another prompt", "levels changed", CHANGE, lambda: (levels(other, exact)[0], note))
    del pipe
    gc.collect()
    half = sfumato.load(folder, precision="bfloat16", device="cpu")
    report.add("picture in bfloat16", "dB", DECIBEL, lambda: (decibel(our_picture(half, side, steps), exact), note))


def family(preset: Preset, asked: argparse.Namespace, folder: Path) -> list[Row]:
    """All comparisons of one family."""
    report = Report(preset.name)
    side = asked.size // 8
    since = time.perf_counter()
    model = folder / "model"
    make(preset, model)
    print(f"{preset.name:18} written in {time.perf_counter() - since:.0f} s", flush=True)
    peer = open_peer(preset, model)
    tensors_through_layouts(report.add, preset, model, peer, folder)
    single_file_in_peer(report.add, preset, model, peer, folder)
    pipe = sfumato.load(model, precision="float32", device="cpu")
    for network in (pipe.unet, pipe.vae):
        lay_out(network)  # as the pipeline does before the first picture
    compare_networks(report, pipe, peer, side)
    if has_pipeline(preset):
        check = f"picture, {pipe.scheduler.entry.name}, {asked.steps} steps"
        report.add(
            check, "levels of 255", LEVELS,
            lambda: levels(our_picture(pipe, side, asked.steps), their_picture(peer, preset, side, asked.steps)),
        )  # fmt: skip
        del pipe, peer
        gc.collect()
        if asked.bf16_size:
            precision(report, preset, model, asked.bf16_size // 8, asked.bf16_steps)
    return report.rows


def whole(preset: Preset, asked: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """A family in a temporary folder, and the settings."""
    with tempfile.TemporaryDirectory(dir=asked.work, prefix="sfumato-parity-") as folder:
        return family(preset, asked, Path(folder)), {"size": asked.size, "steps": asked.steps, **machine()}


def networks_only(name: str) -> tuple[list[Row], dict[str, Any]]:
    """The networks of a large model, and the settings."""
    report = Report(name)
    return report.rows, compare_large(report.add, name)


def markdown(found: Mapping[str, Any]) -> str:
    """One table of all families, and under it the settings of those that share them."""
    lines = ["| model | check | measured | bound | |", "|---|---|---:|---:|---|"]
    for name, entry in found.items():
        for raw in entry["rows"]:
            row = Row(**raw)
            unit = "" if row.measure == "of range" else f" {row.measure}"
            note = row.note if row.holds else f"{row.note} **missed**"
            lines.append(f"| {name} | {row.check} | {row.value:.3g}{unit} | {row.bound:g} | {note} |")
    groups: dict[str, list[str]] = {}
    for name, entry in found.items():
        groups.setdefault(", ".join(f"{key} {value}" for key, value in entry["settings"].items()), []).append(name)
    for settings, names in groups.items():
        lines += ["", f"{', '.join(names)}: {settings}"]
    return "\n".join([*lines, ""])


def selected(names: Sequence[str]) -> Sequence[str]:
    """The names, in order; ValueError naming the known ones."""
    unknown = [name for name in names if name not in (*WHOLE, *LARGE)]
    if unknown:
        raise ValueError(f"unknown family {unknown[0]!r}; known: {', '.join((*WHOLE, *LARGE))}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare every family at full size with diffusers.")
    parser.add_argument("--only", nargs="+", default=[*WHOLE, *DEFAULT], metavar="NAME", help="families")
    parser.add_argument("--again", action="store_true", help="also what the results have already")
    parser.add_argument("--size", type=int, default=256, help="side of pictures; half for the x4-upscaler")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bf16-size", type=int, default=64, help="side of the picture in bfloat16; 0 leaves it out")
    parser.add_argument("--bf16-steps", type=int, default=10)
    parser.add_argument("--work", type=Path, default=None, help="where to put the models [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of parity.json and parity.md")
    asked = parser.parse_args()
    quiet()
    path = asked.out / "parity.json"
    found: dict[str, Any] = json.loads(path.read_text())["families"] if path.exists() else {}
    for name in selected(asked.only):
        if name in found and not asked.again:
            print(f"{name}: measured before; --again repeats it")
            continue
        rows, settings = networks_only(name) if name in LARGE else whole(BY_NAME[name], asked)
        gc.collect()
        found[name] = {"settings": settings, "rows": [asdict(row) for row in rows]}
        found = {name: found[name] for name in (*WHOLE, *LARGE) if name in found}
        asked.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"families": found}, indent=1) + "\n")
        (asked.out / "parity.md").write_text(markdown(found))
    rows_found = [(name, Row(**raw)) for name in asked.only for raw in found[name]["rows"]]
    missed = [f"{name}: {row.check} {row.value:.3g} (bound {row.bound:g})" for name, row in rows_found if not row.holds]
    print(f"{len(rows_found) - len(missed)} of {len(rows_found)} comparisons are within their bounds")
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
