"""`sfumato eval mini`: how well the built-in model draws what its prompts ask for.

Five hundred fixed prompts (`prompts.py`) are drawn, each from a seed of its own, and each picture is measured by its
pixels (`measure.py`) and by an independently trained classifier (`judge.py`):

    concept            is the asked concept the judge's first guess, or among its first five?
    background colour  which of the eighteen grounds is nearest to the border's colour in Lab?
    white background   the same where the prompt names none
    object colour      which hue do most vivid pixels of the object have?
    order              do the two halves fit the asked order better than the swapped one?
    both things        is each asked thing among the judge's first five guesses for its half?
    count              how many objects of about one size are there?
    corner             is there one small object, in the asked corner?
    everything asked   all of the above at once that the prompt asks for, with concepts among the first five

With an icon set the same measures are taken of scenes drawn for the same prompts: what a perfect model would reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.data.icons import IconSet
from sfumato.data.scenes import HUES, Composer, concepts, dominating_hue
from sfumato.evaluate import measure
from sfumato.evaluate.judge import Judge, load_judge
from sfumato.evaluate.prompts import NEVER, OWN, SYNONYMS, Prompt, read_prompts, thinned
from sfumato.evaluate.report import Report, Row
from sfumato.evaluate.sheet import contact_sheet
from sfumato.images import check_suffix, save, to_unit
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.pipelines.pipeline import Pipeline, load
from sfumato.pipelines.request import parse

Progress = Callable[[int, int], None]
Marks = dict[str, bool]
MEASURES = (
    "concept top-1", "concept top-5", "background colour", "white background", "object colour", "order", "both things",
    "count", "corner", "everything asked",
)  # fmt: skip
HELD_OUT = 128  # pictures that the autoencoder is measured on
NO_ICONS = "not measured: no icon set"


def run(
    model: str | Path | None = None,
    out: str | Path | None = None,
    prompts: int | Sequence[Prompt] | None = None,
    progress: Progress | None = None,
    icons: str | Path | None = None,
    steps: int = 20,
    grid: str | Path | None = None,
) -> Report:
    """Measure a model and return its report.

    model:    a model folder; the built-in model by default.
    out:      a folder for report.json, report.md and the pictures.
    prompts:  how many of the five hundred, spread evenly over them, or prompts of your own; all by default.
    progress: called with (pictures made, pictures in all).
    icons:    a folder made by `sfumato data icons`, for the ceiling and the autoencoder's PSNR.
    steps:    denoising steps; guidance is the model's default.
    grid:     a file for a labelled contact sheet of (up to) 64 of the pictures.

    Before a picture is made it raises ValueError when the sheet's name is no picture's, and FileNotFoundError when the
    model or the icon set is missing.
    """
    if grid is not None:
        check_suffix(Path(grid))
    asked = read_prompts()
    if prompts is not None:
        asked = thinned(asked, prompts) if isinstance(prompts, int) else tuple(prompts)
    icon_set = IconSet(icons) if icons is not None else None
    judge = load_judge()
    pipe = load(model or "mini")
    since = time.perf_counter()
    pictures = paint(pipe, asked, steps, progress)
    about = {
        "model": str(model or "mini"),
        "prompts": len(asked),
        "steps": steps,
        "seconds": round(time.perf_counter() - since, 1),
    }
    vae = pipe.vae if isinstance(pipe.vae, AutoencoderKL) else None
    report = make_report(asked, pictures, judge, about, icon_set, vae)
    if out is not None:
        report.save(Path(out))
        folder = Path(out) / "pictures"
        folder.mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{i:03d}.png")
    if grid is not None:
        chosen = thinned(range(len(asked)), min(64, len(asked)))
        save(contact_sheet([pictures[i] for i in chosen], [asked[i].text for i in chosen]), grid)
    return report


def paint(
    pipe: Pipeline, prompts: Sequence[Prompt], steps: int = 20, progress: Progress | None = None
) -> list[np.ndarray]:
    """One picture a prompt, uint8 (H, W, 3), from the prompt's own seed."""
    requests = [parse(prompt=p.text, seed=p.seed, num_inference_steps=steps, model=pipe.model) for p in prompts]
    pictures: list[np.ndarray] = []
    for _, image in pipe.stream(requests):
        pictures.append(np.asarray(image))
        if progress:
            progress(len(pictures), len(prompts))
    return pictures


def marks(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray], judge: Judge) -> list[Marks]:
    """For each prompt, which of the things that it asks for its picture shows."""
    crops: list[np.ndarray] = []
    places: list[int] = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        places.append(len(crops))
        if prompt.layout in {"beside", "above"}:
            crops += measure.crop_halves(picture, above=prompt.layout == "above")
        else:
            crops.append(measure.crop_largest(picture) if prompt.layout == "copies" else measure.crop_object(picture))
    scores = judge.log_probs(crops)  # (crops, N)
    return [
        _marks(prompt, picture, scores[place : place + len(prompt.things)], judge)
        for prompt, picture, place in zip(prompts, pictures, places, strict=True)
    ]


def _marks(prompt: Prompt, picture: np.ndarray, scores: np.ndarray, judge: Judge) -> Marks:
    wanted = [[judge.index(noun) for noun in accepted] for accepted in prompt.things]
    ranks = [int((row > row[right].max()).sum()) for row, right in zip(scores, wanted, strict=True)]
    found: Marks = {}
    if len(wanted) == 2:
        fit = [[half[right].max() for right in wanted] for half in scores]  # [half][thing]
        found["order"] = bool(fit[0][0] + fit[1][1] > fit[0][1] + fit[1][0])
        found["both things"] = max(ranks) < 5
    else:
        found["concept top-1"] = ranks[0] == 0
        found["concept top-5"] = ranks[0] < 5
    ground = measure.ground_colour(picture)
    found["background colour" if prompt.ground else "white background"] = ground == (prompt.ground or "white")
    if len(wanted) == 1 and prompt.colours[0]:
        found["object colour"] = measure.object_colour(picture) == prompt.colours[0]
    if prompt.layout == "copies":
        found["count"] = len(measure.objects(picture)) == prompt.count
    if prompt.layout == "corner":
        found["corner"] = measure.corner(picture) == prompt.place
    found["everything asked"] = all(found[name] for name in found if name not in {"concept top-1", "white background"})
    return found


def draw_prompts(prompts: Sequence[Prompt], icons: IconSet, seed: int = 0) -> list[np.ndarray]:
    """Real scenes of the prompts, uint8 (128, 128, 3): what a perfect model would make.

    Raises ValueError when the set lacks an icon that a prompt names.
    """
    composer, table = Composer(icons), icons.by_code()
    codes = {noun: code for code, noun in composer.nouns.items()}
    pictures = []
    for i, prompt in enumerate(prompts):
        style = prompt.style or "3d"
        chosen, turns = [], []
        for accepted, colour in zip(prompt.things, prompt.colours, strict=True):
            icon = table.get(codes.get(accepted[0], ""), {}).get(style)
            if icon is None:
                raise ValueError(
                    f"the icon set has no {accepted[0]!r} in the {style} style, which {prompt.text!r} needs"
                )
            hue = dominating_hue(composer.pixels(icon)) if colour else None
            # Colours are asked only of icons with one hue; should a set lack it, the drawing stays and counts as wrong.
            turns.append(0.0 if hue is None else (HUES[colour] - hue) / 360)
            chosen.append(icon)
        pictures.append(composer.draw(prompt.scene(chosen, turns), np.random.default_rng((seed, i))))
    return pictures


def held_out_scenes(icons: IconSet, count: int = HELD_OUT, seed: int = 0) -> np.ndarray:
    """Scenes of single icons that show none of the model's concepts, uint8 (count, 128, 128, 3)."""
    others = {icon.code: icon.label for icon in icons.icons if icon.code not in concepts()}
    composer = Composer(icons, nouns=others, weights={"single": 1.0}, styled=1.0)
    rng = np.random.default_rng(seed)
    return np.stack([composer.draw(composer.sample(rng), rng) for _ in range(count)])


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 16) -> float:
    """Mean over pictures (N, H, W, 3) uint8 of 10 log10(1 / mean squared error) in dB, after encoding and decoding."""
    weight = next(vae.parameters())
    found: list[float] = []
    for first in range(0, len(pictures), batch):
        x = to_unit(torch.from_numpy(pictures[first : first + batch])).to(weight.device, weight.dtype)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        error = (y.float() - x.float()).div(2).square().mean(dim=(1, 2, 3))
        found += (-10 * error.clamp_min(1e-10).log10()).tolist()
    return float(np.mean(found))


def make_report(
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    judge: Judge,
    about: dict[str, Any],
    icons: IconSet | None = None,
    vae: AutoencoderKL | None = None,
) -> Report:
    """The report on pictures that were made for prompts; the ceiling and the autoencoder need an icon set."""
    found = marks(prompts, pictures, judge)
    best = marks(prompts, draw_prompts(prompts, icons), judge) if icons else None
    rows: list[Row] = []
    for name, chosen in _blocks(prompts):
        for what in MEASURES:
            if what == "white background" and name != OWN:
                continue
            rows += _rows(name, what, [(prompts[i], found[i], best[i] if best else None) for i in chosen])
    if icons and vae is not None:
        scenes = held_out_scenes(icons)
        rows.append(Row("held-out icons", "VAE PSNR", len(scenes), reconstruction_psnr(vae, scenes), unit="dB"))
    else:
        rows.append(Row("held-out icons", "VAE PSNR", 0, None, unit="dB", note=NO_ICONS))
    return Report(about, tuple(rows))


def _blocks(prompts: Sequence[Prompt]) -> Iterator[tuple[str, list[int]]]:
    """The table's blocks, by the prompts' numbers: own list, never composed in all and one by one, synonyms."""
    for kind in (OWN, NEVER, SYNONYMS):
        chosen = [i for i, p in enumerate(prompts) if p.kind == kind]
        yield kind, chosen
        if kind == NEVER:
            for group in dict.fromkeys(prompts[i].group for i in chosen):
                yield f"{kind}: {group}", [i for i in chosen if prompts[i].group == group]


def _rows(kind: str, what: str, items: Sequence[tuple[Prompt, Marks, Marks | None]]) -> list[Row]:
    """The row of one measure, and for concepts and orders a row for each way of asking."""
    items = [item for item in items if what in item[1]]
    parts = {what: items}
    if what == "order":
        parts = {"left/right": [x for x in items if x[0].layout == "beside"],
                 "above/below": [x for x in items if x[0].layout == "above"]}  # fmt: skip
    elif what.startswith("concept") and kind == OWN:
        parts[f"{what}, one icon, default style"] = [x for x in items if x[0].group == "concept"]
        parts[f"{what}, named style"] = [x for x in items if x[0].group == "style"]
    rows = []
    for name, part in parts.items():
        if part:
            value = float(np.mean([mark[what] for _, mark, _ in part]))
            ceiling = [best[what] for _, _, best in part if best is not None]
            rows.append(Row(kind, name, len(part), value, float(np.mean(ceiling)) if ceiling else None))
    return rows
