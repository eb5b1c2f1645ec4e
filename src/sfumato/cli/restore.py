"""`sfumato restore`: a picture without its noise, holes, blur or coarseness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def restore(
    picture: Annotated[Path, typer.Argument(help="The damaged picture.")],
    degradation: Annotated[
        str, typer.Option("--degradation", "-d", help="auto, noise, missing, blur or lowres.")
    ] = "auto",
    noise: Annotated[
        float | None, typer.Option("--noise", help="Deviation of the noise, from 0 to 1 (default: estimated).")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="White where pixels are missing (default: where the picture is transparent)."),
    ] = None,
    blur: Annotated[float | None, typer.Option("--blur", help="Deviation of the blur in pixels.")] = None,
    scale: Annotated[int | None, typer.Option("--scale", help="Enlarge by 2 or 4 (lowres).")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What it shows; for a latent model.")] = "",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A latent model to do it with (default: the pixel model of the package)."),
    ] = None,
    guidance_scale: Annotated[float, typer.Option("--cfg", help="Weight of the prompt; 1 is no guidance.")] = 1.0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Network evaluations.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; none is overwritten.")] = Path(
        "restored.png"
    ),
) -> None:
    """Restore a picture: noise, missing pixels, blur, low resolution."""
    from sfumato import images
    from sfumato.pipelines.restore import restore as repair

    images.check_suffix(out)
    if out.exists():
        raise FileExistsError(f"{out} exists and is not overwritten; name another file with -o")
    pipe = None
    if model is not None or prompt:
        from sfumato.pipelines.pipeline import load

        pipe = load(model or "mini", precision="float32")
    found = repair(
        picture,
        degradation,
        noise=noise,
        mask=mask,
        blur=blur,
        scale=scale,
        prompt=prompt,
        guidance_scale=guidance_scale,
        steps=steps,
        seed=seed,
        pipe=pipe,
    )
    print(f"{found.damage.name}, noise of {found.damage.noise:.3f} (from 0 to 1)", file=sys.stderr)
    images.save(found.image, out, overwrite=False)
    print(out, flush=True)
