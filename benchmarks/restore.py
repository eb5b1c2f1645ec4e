"""Restoration of held-out icons beside scikit-image's methods: `python benchmarks/restore.py runs/icons`.

Pictures of icons that the pixel model never saw and nobody chose settings by (`held_out_codes`) are degraded in the
four ways, mildly and strongly, and restored. Deviations are on the scale from 0 to 1; noise is not clipped; the blurred
pictures carry noise of 0.01; methods are told what the degradation is and how strong. Parameters of bilateral, TV and
Richardson-Lucy are those of a few that give the best PSNR on pictures of other icons (`validation_codes`), which ours
were chosen on too. The guess is what our model starts from: total variation, without a network.

feature distance: pictures go through the judge's convolutions; at each place of its four resolutions the feature
vectors are brought to length 1 and their squared distance is averaged, over places and then resolutions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_bilateral, denoise_tv_chambolle, inpaint_biharmonic, richardson_lucy
from torch import Tensor

from sfumato.data.icons import IconSet
from sfumato.data.scenes import Composer
from sfumato.diffusion.degrade import Blur, LowRes, Missing, Noise
from sfumato.evaluate.judge import Judge, load_judge
from sfumato.images import to_pil, to_unit
from sfumato.pipelines.restore import Damage, load_pixel_model, restore_latent
from sfumato.train.restorer import held_out_codes, validation_codes

SEEDS = {"validation": 0, "pictures": 4, "masks": 1, "noise": 10, "noise on validation": 3}
Method = Callable[[Tensor, Damage], Tensor]
TV = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.2)
BILATERAL = ((0.05, 2), (0.1, 2), (0.1, 4), (0.2, 2), (0.4, 2))  # of colour, of place
TUNING = 8  # pictures on which parameters of rivals are chosen
ITERATIONS = 10, 30, 100


def pictures(icons: IconSet, codes: set[str], count: int, seed: int) -> Tensor:
    """Scenes of single icons of some codes in all styles, (N, 3, 128, 128) in [-1, 1]."""
    nouns = {icon.code: icon.label for icon in icons.icons if icon.code in codes}
    composer = Composer(icons, nouns=nouns, weights={"single": 1.0}, styled=1.0)
    rng = np.random.default_rng(seed)
    drawn = np.stack([composer.draw(composer.sample(rng), rng) for _ in range(count)])
    return to_unit(torch.from_numpy(drawn)).contiguous()


def settings(count: int, seed: int = SEEDS["masks"]) -> dict[str, Damage]:
    """The eight settings, the strong one of each kind second."""
    known = torch.rand(count, 1, 128, 128, generator=torch.Generator().manual_seed(seed))
    return {
        "noise 0.1": Damage("noise", Noise(), 0.1),
        "noise 0.5": Damage("noise", Noise(), 0.5),
        "missing 30 %": Damage("missing", Missing((known > 0.3).float()), 0.0),
        "missing 80 %": Damage("missing", Missing((known > 0.8).float()), 0.0),
        "blur 1": Damage("blur", Blur(1.0), 0.01),
        "blur 3": Damage("blur", Blur(3.0), 0.01),
        "2x": Damage("lowres", LowRes(2), 0.0),
        "4x": Damage("lowres", LowRes(4), 0.0),
    }


def each(function: Callable[[np.ndarray, int], np.ndarray], y: Tensor) -> Tensor:
    """A function of arrays (H, W, 3) in [0, 1] and their number, over pictures in [-1, 1]."""
    rows = [function((row.permute(1, 2, 0).double().numpy() + 1) / 2, i) for i, row in enumerate(y)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() * 2 - 1


def rivals(damage: Damage) -> dict[str, list[Method]]:
    """scikit-image's methods for a degradation; of several under one name the best on validation counts."""
    if damage.name == "noise":
        return {
            "bilateral": [
                lambda y, _, c=c, s=s: each(
                    lambda a, i: denoise_bilateral(np.clip(a, 0, 1), sigma_color=c, sigma_spatial=s, channel_axis=-1), y
                )
                for c, s in BILATERAL
            ],
            "TV": [
                lambda y, _, w=w: each(lambda a, i: denoise_tv_chambolle(a, weight=w, channel_axis=-1), y) for w in TV
            ],
        }
    if damage.name == "missing":
        return {"biharmonic": [biharmonic]}
    if damage.name == "blur":
        return {"Richardson-Lucy": [partial(lucy, iterations=n) for n in ITERATIONS]}
    return {"bicubic": [lambda y, d: F.interpolate(y, scale_factor=d.operator.factor, mode="bicubic")]}


def biharmonic(y: Tensor, damage: Damage) -> Tensor:
    """The smooth surface through the known pixels."""
    gaps = damage.operator.known[:, 0].numpy() == 0
    return each(lambda a, i: inpaint_biharmonic(a, gaps[i], channel_axis=-1), y)


def lucy(y: Tensor, damage: Damage, iterations: int) -> Tensor:
    """Some iterations of Richardson and Lucy's, on a picture mirrored at its edges."""
    sigma = damage.operator.sigma
    reach = int(4 * sigma + 0.5)
    beyond = 48  # what it makes of the zeros beyond an edge does not come in from there
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    spot = np.outer(line, line) / line.sum() ** 2

    def one(a: np.ndarray, _: int) -> np.ndarray:
        wide = np.pad(np.clip(a, 0, 1), ((beyond, beyond), (beyond, beyond), (0, 0)), mode="symmetric")
        rows = [richardson_lucy(wide[..., c], spot, num_iter=iterations) for c in range(3)]
        return np.stack(rows, -1)[beyond:-beyond, beyond:-beyond]

    return each(one, y)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures, in dB."""
    return float((-10 * ((x - y) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).mean())


def ssim(x: Tensor, y: Tensor) -> float:
    """Mean over pictures; Gaussian windows of deviation 1.5, as Wang et al. 2004."""
    a, b = (((v + 1) / 2).permute(0, 2, 3, 1).double().numpy() for v in (x, y))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(
        np.mean(
            [structural_similarity(p, q, data_range=1.0, channel_axis=-1, **options) for p, q in zip(a, b, strict=True)]
        )
    )


@torch.no_grad()
def feature_distance(judge: Judge, x: Tensor, y: Tensor) -> float:
    """See the top of this file."""
    total, stages = 0.0, 0
    for layer in judge.features:
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            apart = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            total, stages = total + float(apart.square().sum(1).mean()), stages + 1
    return total / stages


def latent(y: Tensor, damage: Damage) -> Tensor:
    """The built-in latent model without a prompt, picture by picture."""
    from sfumato.pipelines.pipeline import load

    pipe = load("mini", precision="float32")
    rows = []
    for i in range(len(y)):
        operator = damage.operator
        if isinstance(operator, Missing):
            operator = Missing(operator.known[i : i + 1])
        rows.append(restore_latent(pipe, y[i : i + 1], Damage(damage.name, operator, damage.noise), steps=30, seed=i))
    return torch.cat(rows)


def autoencoded(x: Tensor) -> Tensor:
    """Pictures through the built-in model's autoencoder: the limit of whatever goes through its latents."""
    from sfumato.pipelines.pipeline import load

    vae = load("mini", precision="float32").vae
    with torch.no_grad():
        return torch.cat([vae.decode(vae.encode(row[None]).latent_dist.mode()).sample for row in x])


def degraded(x: Tensor, damage: Damage, seed: int) -> Tensor:
    """What is seen of pictures."""
    y = damage.operator.forward(x)
    y = y + 2 * damage.noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return y * damage.operator.known if isinstance(damage.operator, Missing) else y


def chosen(tuning: Tensor, damage: Damage) -> dict[str, Method]:
    """Of each rival the one with the best PSNR on pictures for validation."""
    y = degraded(tuning, damage, SEEDS["noise on validation"])
    best = {}
    for name, methods in rivals(damage).items():
        scores = [psnr(m(y, damage).clamp(-1, 1), tuning) if len(methods) > 1 else 0.0 for m in methods]
        best[name] = methods[int(np.argmax(scores))]
    return best


def measure(
    x: Tensor, tuning: Tensor, judge: Judge, with_latent: bool, names: Sequence[str]
) -> tuple[list[dict], dict[str, list]]:
    """Rows of the table, and for each setting its pictures by method."""
    rows: list[dict] = []
    kept: dict[str, list[tuple[str, Tensor]]] = {}
    model = load_pixel_model()

    def add(setting: str, name: str, method: Method, y: Tensor, damage: Damage) -> None:
        begun = time.perf_counter()
        made = method(y, damage).clamp(-1, 1)
        seconds = (time.perf_counter() - begun) / len(x)
        row = {"setting": setting, "method": name, "psnr": psnr(made, x), "ssim": ssim(made, x)}
        rows.append({**row, "features": feature_distance(judge, made, x), "seconds": seconds})
        kept[setting].append((name, made))
        sys.stderr.write(json.dumps(rows[-1]) + "\n")

    similar = settings(len(tuning))
    for i, (setting, damage) in enumerate(settings(len(x)).items()):
        if names and setting not in names:
            continue
        y = degraded(x, damage, SEEDS["noise"] + i)
        kept[setting] = [("seen", F.interpolate(y, size=x.shape[2:]).clamp(-1, 1))]
        for name, method in chosen(tuning, similar[setting]).items():
            add(setting, name, method, y, damage)
        add(setting, "guess without a network", lambda y, d: d.operator.guess(y, 2 * d.noise), y, damage)
        add(setting, "sfumato", model, y, damage)
        if with_latent:
            add(setting, "sfumato, latent (mini)", latent, y, damage)
    return rows, kept


def sheet(x: Tensor, kept: dict[str, list[tuple[str, Tensor]]], chosen: Sequence[int], path: Path) -> None:
    """Seen, the best rival, ours and the truth, for the strong settings; a row for each of some pictures."""
    strong = ("noise 0.5", "missing 80 %", "blur 3", "4x")
    shown = [(s, i) for s in strong if s in kept for i in chosen]
    side, head = 128, 16
    columns = ("seen", "scikit-image", "sfumato", "truth")
    image = Image.new("RGB", (96 + len(columns) * (side + 4), head + len(shown) * (side + 4)), "white")
    draw = ImageDraw.Draw(image)
    for c, title in enumerate(columns):
        draw.text((96 + c * (side + 4), 2), title, fill="black")
    for r, (setting, i) in enumerate(shown):
        made = dict(kept[setting])
        rival = next(name for name in ("TV", "biharmonic", "Richardson-Lucy", "bicubic") if name in made)
        draw.text((2, head + r * (side + 4) + 50), f"{setting}\n{rival}", fill="black")
        for c, tensor in enumerate((made["seen"], made[rival], made["sfumato"], x)):
            image.paste(to_pil(tensor[i : i + 1])[0], (96 + c * (side + 4), head + r * (side + 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> None:
    """Print the table in Markdown; write it as JSON and the sheet where asked."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("icons", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--latent", action="store_true", help="also the built-in latent model; slow")
    parser.add_argument("--validation", action="store_true", help="pictures for validation, not the held-out ones")
    parser.add_argument("--only", action="append", default=[], help="a setting, such as '4x'; may be repeated")
    parser.add_argument("--out", type=Path, help="file for the numbers")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of pictures")
    asked = parser.parse_args()
    icons, judge = IconSet(asked.icons), load_judge()
    tuning = pictures(icons, validation_codes(icons), TUNING, SEEDS["validation"])
    codes = validation_codes(icons) if asked.validation else held_out_codes(icons)
    x = pictures(icons, codes, asked.count, SEEDS["pictures"])
    rows, kept = measure(x, tuning, judge, asked.latent, asked.only)
    limit = autoencoded(x).clamp(-1, 1)
    bound = {"psnr": psnr(limit, x), "ssim": ssim(limit, x), "features": feature_distance(judge, limit, x)}
    rows.append({"setting": "nothing", "method": "mini's autoencoder alone", **bound, "seconds": 0.0})
    lines = ["| setting | method | PSNR, dB | SSIM | feature distance | s a picture |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = f"{row['psnr']:.2f} | {row['ssim']:.3f} | {row['features']:.4f} | {row['seconds']:.2f}"
        lines.append(f"| {row['setting']} | {row['method']} | {cells} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"pictures": asked.count, "seeds": SEEDS, "scale": "deviations from 0 to 1", "rows": rows}
        asked.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if asked.sheet:
        sheet(x, kept, (0, 5), asked.sheet)


if __name__ == "__main__":
    main()
