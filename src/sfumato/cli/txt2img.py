"""`sfumato txt2img`: pictures from a prompt. Its flags are `Request`'s fields, and where the pictures go."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sfumato.pipelines.request import Flag, Request, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.pipelines.pipeline import Callback, Pipeline, Progress

FOLDER = Path("outputs")


def command() -> Callable[..., None]:
    """The command as typer takes it: its signature lists Request's fields and the flags of `run`."""

    def txt2img(**given: Any) -> None:
        fields = {name: given.pop(name) for name in Request.model_fields}
        run({name: value for name, value in fields.items() if value is not None}, **given)

    own = [p for name, p in inspect.signature(run, eval_str=True).parameters.items() if name != "fields"]
    generated = [_parameter(name) for name in Request.model_fields]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*generated, *own)]
    txt2img.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    txt2img.__annotations__ = {p.name: p.annotation for p in parameters}
    txt2img.__doc__ = "Make pictures from a prompt; prints the path of each file."
    return txt2img


def run(
    fields: dict[str, Any],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="File (of several: NAME-0.png...) or folder (default: outputs/00000.png...)."),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Also write a sheet of all pictures: to --out, or to 00000-grid.png."),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="PNG of this program to make again, changed by the other flags."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="float32, bfloat16 or float16 (default: this machine's best)."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1 (default: the best there is).")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Pictures advanced together: faster, equal but for rounding."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only paths and errors.")] = False,
) -> None:
    """Make the pictures that `fields`, the given ones of Request's, describe."""
    if recipe is not None:
        from sfumato.images import read_made_with, read_recipe

        fields = read_recipe(recipe).model_dump() | fields
        precision = precision or read_made_with(recipe).get("precision")
    request = parse(**fields)
    places = Places(out, request.num_images, grid)

    from sfumato.pipelines.pipeline import load

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    pipe = load(request.model, precision, device, batch, request.vae, request.base, request.prediction)
    singles = pipe.resolve(request)
    if not quiet:
        print(describe(pipe, singles[0]), file=sys.stderr)
    with progress_bar(len(singles), quiet) as report:
        write(pipe, singles, places, report)


class Places:
    """Where pictures and sheet are written; refuses at once what could not be written later."""

    def __init__(self, out: str | None, count: int, grid: bool) -> None:
        path = FOLDER if out is None else Path(out)
        is_folder = out is None or out.endswith(("/", "\\")) or path.is_dir()
        self.folder = path if is_folder else path.parent
        self.file = None if is_folder else path
        self.several = count > 1
        self.grid = grid and self.several
        self.first: Path | None = None
        if self.file is not None:
            from sfumato.images import check_suffix

            check_suffix(self.file)
        self.folder.mkdir(parents=True, exist_ok=True)

    def picture(self, index: int) -> Path:
        """The path of picture number `index`."""
        if self.file is None:
            from sfumato.images import next_path

            path = next_path(self.folder)
        else:
            file = self.file
            path = file.with_name(f"{file.stem}-{index}{file.suffix}") if self.several else file
        self.first = self.first or path
        return path

    def sheet(self) -> Path:
        """The path of the sheet of all pictures."""
        if self.file is not None:
            return self.file
        assert self.first is not None
        return self.first.with_name(f"{self.first.stem}-grid.png")


def write(pipe: Pipeline, singles: Sequence[Request], places: Places, report: Callback | None) -> None:
    """Make the pictures one group after the other; save and name each as soon as it is there."""
    from sfumato import images

    made_with = pipe.made_with()
    pictures: list[Image] = []
    for i, (request, picture) in enumerate(pipe.stream(singles, report)):
        path = places.picture(i)
        images.save(picture, path, request, made_with)
        print(path, flush=True)
        if places.grid:
            pictures.append(picture)
    if places.grid:
        whole = singles[0].model_copy(update={"num_images": len(singles)})
        images.save(images.grid(pictures), places.sheet(), whole, made_with)
        print(places.sheet(), flush=True)


def describe(pipe: Pipeline, request: Request) -> str:
    """One line on what is about to happen, and why there."""
    return (
        f"{request.model} ({pipe.preset.title}), seed {request.seed}, {request.width}x{request.height}, "
        f"{request.num_inference_steps} steps of {request.sampler} ({request.spacing}), "
        f"guidance {request.guidance_scale:g}; {pipe.runtime.reason}"
    )


@contextmanager
def progress_bar(pictures: int, quiet: bool) -> Iterator[Callback | None]:
    """A bar on stderr while it is a terminal; gives the callback that moves it, or None."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("denoising", total=None)

        def report(step: Progress) -> None:
            bar.update(task, advance=1, total=step.total * pictures)

        yield report


def _parameter(name: str) -> inspect.Parameter:
    """A field of Request as a command-line parameter; None means not given."""
    field = Request.model_fields[name]
    kind: Any = next((a for a in get_args(field.annotation) if a is not type(None)), field.annotation)
    flag = next((extra for extra in field.metadata if isinstance(extra, Flag)), Flag())
    names = (*flag.names, f"--{name.replace('_', '-')}")
    # Text is handed on as it is: Request alone says what is a number, and words the errors.
    role: Any = typer.Option(*names, help=field.description, metavar=flag.value or kind.__name__.upper())
    if name == "prompt":
        role = typer.Argument(help=field.description)
    annotation = Annotated[str | None, role]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
