"""`sfumato replay`: a picture made again; `sfumato recipe`: what it was made from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

MOST_COMPANY = 64  # a file that names more than anybody makes together is not followed
WORDS = {
    "sfumato": "sfumato",
    "torch": "PyTorch",
    "device": "device",
    "precision": "precision",
    "threads": "threads",
    "batch": "batch",
    "company": "place in its batch",
    "model_hash": "the model's sha256",
    "model_files_hash": "the sha256 of the model's files",
    "vae_hash": "the autoencoder's sha256",
    "vae_files_hash": "the sha256 of the autoencoder's files",
    "picture_hash": "the sha256 of the damaged picture",
}


def replay(
    picture: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP of this program; of A1111 or ComfyUI, as far.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File or folder for the new one (default: in outputs/).")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Take this model, wherever it lies now.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="Default: as then.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: the best there is.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Default: as then.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as then.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON on stdout for each event.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only paths and errors.")] = False,
) -> None:
    """Make a picture again from the recipe in it, and say whether the pixels are the same.

    To change something, use `sfumato txt2img --recipe PICTURE` with other flags.
    """
    from sfumato.cli.restore import restored_again
    from sfumato.cli.watch import emit
    from sfumato.recipes.recipe import read
    from sfumato.recipes.restored import is_restored

    found = read(picture)
    then = found.made_with
    if is_restored(found.fields):
        if device is not None or precision is not None or batch is not None:
            raise ValueError(
                f"{picture} was restored, which is done as it was then; leave out device, precision, batch"
            )
        path, now = restored_again(found.fields, picture, out, model, threads or then.get("threads"), quiet or as_json)
        if as_json:
            emit("picture", picture=0, path=str(path))
        else:
            print(path, flush=True)
        tell_sameness(picture, path, then, now, quiet, as_json)
        return
    from sfumato.cli.places import Places
    from sfumato.cli.txt2img import MadeWith, as_then, count, opened, tell, write
    from sfumato.cli.watch import Watch

    tell(found.notes, quiet or as_json)
    fields = {**found.fields, **beside(found.fields, picture.parent)}
    fields |= {} if model is None else {"model": model}
    if found.program != "sfumato" and "model" not in fields:
        raise ValueError(f"{picture} does not name its model; name one with --model")
    request = type(found)(found.program, fields).request
    places = Places(out, count(request), grid=True, suffix=picture.suffix.lower())
    pipe = opened(
        request, precision or as_then(then, device), device, batch or then.get("batch"), threads or then.get("threads")
    )
    singles = pipe.resolve(request)
    company = company_of(then) if len(singles) == 1 else None
    with Watch(pipe, singles, quiet, as_json) as watch:
        paths = write(pipe, request, singles, places, watch, company)
    tell_sameness(picture, paths[-1], then, MadeWith(pipe).get(company), quiet, as_json)


def tell_sameness(
    old: Path, new: Path, then: Mapping[str, Any], now: Mapping[str, Any], quiet: bool, as_json: bool
) -> None:
    """Say whether two pictures are the same, and if not, what differs in how they were made."""
    from sfumato.cli.watch import emit

    differences = differing(then, now)
    same, words = compare(old, new)
    if as_json:
        emit("compared", same=same, result=words, differences=differences)
    elif not quiet:
        print(words, file=sys.stderr)
        for line in () if same else differences:
            print(f"note: {line}", file=sys.stderr)


def company_of(made_with: Mapping[str, Any]) -> tuple[int, int] | None:
    """A picture's place and the number of those that it was made with, as its file says it; None where it does not."""
    found = made_with.get("company")
    whole = isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
    return (found[0], found[1]) if found and whole and 0 <= found[0] < found[1] <= MOST_COMPANY else None


def recipe(
    picture: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP of this program, A1111 or ComfyUI.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_text: Annotated[bool, typer.Option("--text", help="Print A1111's text.")] = False,
) -> None:
    """Print what a picture was made from; on stderr, what could not be understood."""
    from sfumato.cli.txt2img import tell
    from sfumato.recipes.recipe import read

    found = read(picture)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    if as_text:
        from sfumato.recipes import infotext

        print(found.text or infotext.write(found.request))
    else:
        rows = {"program": found.program, **shown(found.fields), **told(found.made_with)}
        width = max(map(len, rows))
        for name, value in rows.items():
            text = str(value).replace("\n", "\n" + " " * (width + 2))
            print(f"{name:<{width}}  {text}")
    tell(found.notes, quiet=False)


def shown(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: neither empty nor what they are when nothing is said."""
    from sfumato.pipelines.request import Request
    from sfumato.recipes.restored import is_restored

    if is_restored(fields):
        return dict(fields)
    rows = {}
    for name, value in fields.items():
        default = Request.model_fields[name].default if name in Request.model_fields else None
        value = tuple(value) if isinstance(value, list) else value
        if name in ("prompt", "model") or value not in (None, "", (), default):
            rows[name] = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return rows


def told(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What else decided the pixels, under names for people."""
    return {WORDS.get(name, name): value for name, value in made_with.items()}


def beside(fields: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Pictures that a recipe names and that lie beside it, rather than where they were named from."""
    from sfumato.pipelines.check import PICTURES

    given = {name: fields[name] for name in PICTURES if isinstance(fields.get(name), str)}
    return {
        name: str(folder / path)
        for name, path in given.items()
        if not Path(path).exists() and (folder / path).is_file()
    }


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that decides the exact pixels and is not as it was."""
    if not then:
        return ["the picture does not say with which versions and on which device it was made"]
    names = [name for name in WORDS if name in then and then[name] != now.get(name)]
    return [f"{WORDS[name]} was {then[name]}, is {now.get(name, 'not known')}" for name in names]


def compare(old: Path, new: Path) -> tuple[bool, str]:
    """Whether two files show the same pixels, and a line that says so or how far they are apart."""
    import numpy as np
    from PIL import Image

    with Image.open(old) as first, Image.open(new) as second:
        a, b = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (first, second))
    if a.shape != b.shape:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (a, b)]
        return False, f"{new} has another size than {old}: {sizes[1]}, not {sizes[0]}"
    apart = np.abs(a - b)
    if not apart.any():
        return True, f"{new} has the same pixels as {old}"
    psnr = 10 * np.log10(255**2 / np.mean(np.square(apart, dtype=np.float64)))
    lossy = "; part of it is what the file formats lose" if old.suffix.lower() != new.suffix.lower() else ""
    share = (apart.max(axis=2) > 0).mean()
    much = f"in {share:.1%} of the pixels, by at most {apart.max()} of 255 (PSNR {psnr:.1f} dB)"
    return False, f"{new} differs from {old} {much}{lossy}"
