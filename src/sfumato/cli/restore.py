"""`sfumato restore`: a picture without its noise, holes, blur or coarseness."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sfumato.cli.places import Places
    from sfumato.recipes.restored import Restored


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
    from sfumato.cli.places import Places
    from sfumato.recipes.restored import Restored
    from sfumato.runtime import use_threads

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is not overwritten; name another file with -o")
    places = Places(str(out), 1)
    asked = Restored(
        str(picture),
        degradation,
        noise,
        str(mask) if mask is not None else None,
        blur,
        scale,
        prompt,
        model or ("mini" if prompt else ""),
        guidance_scale,
        steps,
        seed,
    )
    use_threads()
    print(made(asked, places)[0], flush=True)


def made(asked: Restored, places: Places, quiet: bool = False) -> tuple[Path, dict[str, Any]]:
    """Restore as asked and write the picture with its recipe; returns its path and what else decided the pixels.

    The recipe has what was found of the damage in the place of what was left open.
    """
    import torch

    from sfumato import __version__
    from sfumato.pipelines.restore import WEIGHTS
    from sfumato.pipelines.restore import restore as repair
    from sfumato.recipes.identity import fingerprint

    if asked.model:
        from sfumato.cli.txt2img import MadeWith
        from sfumato.pipelines.pipeline import load

        pipe = load(asked.model, precision="float32")
        made_with = MadeWith(pipe).get()
    else:
        pipe, threads = None, torch.get_num_threads()
        made_with = {"sfumato": __version__, "torch": torch.__version__, "device": "cpu", "precision": "float32"}
        made_with |= {"threads": threads, "model_hash": fingerprint(WEIGHTS)}
    made_with["picture_hash"] = fingerprint(Path(asked.picture))
    options = {name: value for name, value in asdict(asked).items() if name != "model"}
    found = repair(**options, pipe=pipe)
    damage = found.damage
    if not quiet:
        print(f"{damage.name}, noise of {damage.noise:.3f} (from 0 to 1)", file=sys.stderr)
    settled = replace(asked, degradation=damage.name, noise=damage.noise)
    path = places.picture(0, found.image, settled, made_with)
    return path, made_with


def restored_again(
    recipe: Mapping[str, Any], picture: Path, out: str | None, model: str | None, threads: int | None, quiet: bool
) -> tuple[Path, dict[str, Any]]:
    """Make a restored picture again from its recipe; the damaged one may also lie beside it.

    Raises FileNotFoundError where that is in neither place, ValueError for a recipe that is none.
    """
    from sfumato.cli.places import Places
    from sfumato.recipes.restored import Restored
    from sfumato.runtime import use_threads

    asked = Restored.of(recipe).found(picture.parent)
    if model is not None:
        asked = replace(asked, model=model)
    use_threads(threads)
    return made(asked, Places(out, 1, suffix=picture.suffix.lower()), quiet)
