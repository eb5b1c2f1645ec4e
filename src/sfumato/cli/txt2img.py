"""`sfumato txt2img` and its kin: pictures from a prompt, a picture, or both.

Their flags are `Request`'s fields, and where the pictures go. The commands for tasks differ in what they insist on.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sfumato.cli.places import Places
from sfumato.cli.watch import Previews, Watch
from sfumato.pipelines.request import Flag, Request, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.pipelines.pipeline import Pipeline, Progress

# What a command insists on.
NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "txt2img": (),
        "img2img": ("image",),
        "inpaint": ("image", "mask"),
        "depth2img": ("image",),
        "upscale": ("image",),
        "instruct": ("prompt", "image"),
    }
)
HELP = MappingProxyType(
    {
        "txt2img": "Make pictures from a prompt; prints the path of each file.",
        "img2img": "Make pictures from a picture and a prompt; --strength says how far they may leave it.",
        "inpaint": "Repaint what is white in --mask, or let a picture grow by --outpaint.",
        "depth2img": "Make pictures of the same depth as a picture, with a depth model.",
        "upscale": "Enlarge a picture: by the factor of a model made for it; with another model twice (or to --width "
        "and --height), redrawn at --strength 0.4.",
        "instruct": "Change a picture as an instruction says, with a model that follows such.",
    }
)
# Commands that mean nothing to a model of another task, and a model to name.
TASKS = MappingProxyType(
    {
        "depth2img": ("depth", "stabilityai/stable-diffusion-2-depth"),
        "instruct": ("instruct", "timbrooks/instruct-pix2pix"),
    }
)
CLOSE = 0.4  # strength that keeps what an image shows
RESEARCH = (
    "\n\nThe research scripts' flags work as well (--ckpt, --ddim_steps, --plms, --H, --W, --scale, --n_samples, "
    "--n_iter, --outdir, --from-file...): as soon as one of them is given, all flags, defaults and names of files are "
    "that script's. `sfumato {} --ddim_steps 50 --help` lists them."
)


def command(name: str = "txt2img") -> Callable[..., None]:
    """A command as typer takes it: its signature lists Request's fields and the flags of `run`."""

    def made(**given: Any) -> None:
        fields = {name: given.pop(name) for name in Request.model_fields}
        run({name: value for name, value in fields.items() if value is not None}, name, **given)

    hidden = ("fields", "task")
    own = [p for n, p in inspect.signature(run, eval_str=True).parameters.items() if n not in hidden]
    generated = [_parameter(field) for field in Request.model_fields]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*generated, *own)]
    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made.__annotations__ = {p.name: p.annotation for p in parameters}
    made.__doc__ = HELP[name] + (RESEARCH.format(name) if name in ("txt2img", "img2img") else "")
    return made


def run(
    fields: dict[str, Any],
    task: str = "txt2img",
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
        typer.Option("--recipe", help="Picture (of this program, A1111 or ComfyUI) to take all flags from but these."),
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
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="fast, balanced (a network's weights are there while it is at work) or low (a layer's; slower) "
            "(default: the fastest that fits).",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    compiling: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="WAY",
            help="blocks, or graphs on a GPU: the first picture waits minutes, later ones gain.",
        ),
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(
            "--preview", metavar="FILE", help="Write what is foreseen: to a PNG again and again, or a folder."
        ),
    ] = None,
    preview_every: Annotated[
        int, typer.Option("--preview-every", min=1, help="Steps from one preview to the next.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON on stdout for each step, picture and preview.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only paths and errors.")] = False,
) -> None:
    """Make the pictures that `fields`, the given ones of Request's, describe."""
    if recipe is not None:
        from sfumato.recipes.recipe import read

        found = read(recipe)
        tell(found.notes, quiet or as_json)
        fields = {**found.request_fields, **fields}
        precision = precision or as_then(found.made_with, device)
    missing = [f"--{name}" if name != "prompt" else "a prompt" for name in NEEDS[task] if not fields.get(name)]
    if missing and not (missing == ["--mask"] and fields.get("outpaint")):
        raise ValueError(f"{task} needs {' and '.join(missing)}; see `sfumato {task} --help`")
    request = parse(**fields)
    places = Places(out, count(request), grid)
    previews = None if preview is None else Previews(preview, preview_every)
    pipe = opened(request, precision, device, batch, threads, memory, compiling)
    if pipe.runtime.compile != "off":
        from sfumato.runtime import compile_reason

        tell([f"compile {pipe.runtime.compile}: {compile_reason(pipe.runtime)}"], quiet or as_json)
    if task in TASKS and pipe.preset.task != TASKS[task][0]:
        raise ValueError(
            f"{task} needs a model that was made for it, which {request.model} ({pipe.preset.title}) was not; "
            f"name one with --model, for example {TASKS[task][1]}"
        )
    if task == "upscale" and pipe.preset.task != task:
        request = enlarged(request)
    singles = pipe.resolve(request)
    with Watch(pipe, singles, quiet, as_json, previews) as watch:
        write(pipe, request, singles, places, watch)


def count(request: Request) -> int:
    """How many pictures a request is for."""
    return len(request.model_copy(update={"seed": 0, "variation_seed": 0}).singles())


def enlarged(request: Request) -> Request:
    """An image to be enlarged by a model that was not made for it: image to image at twice the size, close to it."""
    from sfumato.pipelines.inputs import open_picture

    changes: dict[str, Any] = {"strength": CLOSE} if request.strength is None else {}
    if request.width is None and request.height is None and request.image is not None:
        changes["width"] = open_picture(request.image, "image").width * 2
    return parse(**{**request.model_dump(), **changes})


def opened(
    request: Request,
    precision: str | None,
    device: str | None,
    batch: int | None,
    threads: int | None,
    memory: str | None = None,
    compiling: str | None = None,
) -> Pipeline:
    """The request's model, ready to run; ValueError where memory does not suffice for the picture."""
    from sfumato.pipelines.pipeline import load
    from sfumato.runtime import use_threads

    use_threads(threads)
    parts = request.vae, request.base, request.prediction
    return load(request.model, precision, device, batch, *parts, memory=memory, request=request, compile=compiling)


def as_then(made_with: Mapping[str, Any], device: str | None) -> str | None:
    """The precision that a picture was made in, unless it was made on a GPU and there is none now."""
    import torch

    then = str(made_with.get("device", "cpu"))
    there = torch.cuda.is_available() if device is None else not device.startswith("cpu")
    return None if then.startswith("cuda") and not there else made_with.get("precision")


class MadeWith:
    """What besides the requests decides the exact pixels; the weights are read through while pictures are made."""

    def __init__(self, pipe: Pipeline) -> None:
        import torch

        from sfumato.recipes.identity import Fingerprint
        from sfumato.weights.hub import find_model
        from sfumato.weights.model import locate

        self.known: dict[str, Any] = {**pipe.made_with(), "threads": torch.get_num_threads()}
        if pipe.batch is not None and pipe.batch > 1:
            self.known["batch"] = pipe.batch
        places = {"model": locate(pipe.model, pipe.runtime.dtype)}
        vae = pipe.source["vae"]
        if vae is not None:
            places["vae"] = find_model(vae, "vae", pipe.runtime.dtype)
        # Of a folder it is a sum over several files, which other programs should not take for a file's.
        self.sums = {
            f"{name}_hash" if path.is_file() else f"{name}_files_hash": Fingerprint(path)
            for name, path in places.items()
        }

    def get(self, company: tuple[int, int] | None = None) -> dict[str, Any]:
        """Everything, waiting for the fingerprints; company: a picture's place among those that it was made with."""
        found = {name: fingerprint.get() for name, fingerprint in self.sums.items()}
        extra = {} if company is None or company[1] == 1 else {"company": list(company)}
        return {**self.known, **extra, **{name: value for name, value in found.items() if value is not None}}


def write(
    pipe: Pipeline,
    request: Request,
    singles: Sequence[Request],
    places: Places,
    watch: Watch,
    company: tuple[int, int] | None = None,
) -> list[Path]:
    """Make the pictures one group after the other; save and name each as soon as it is there.

    request: what `singles` come from. company: make the only one as the picture at this place among so many.
    Returns the paths, the sheet's last.
    """
    from sfumato import images
    from sfumato.pipelines.making import companies
    from sfumato.pipelines.matrix import columns_of

    made_with = MadeWith(pipe)
    pictures: list[Image] = []
    paths: list[Path] = []
    among = companies(pipe, singles) if company is None else [company]
    made = pipe.stream(singles, watch.step) if company is None else accompanied(pipe, singles[0], company, watch)
    for i, (single, picture) in enumerate(made):
        paths.append(places.picture(i, picture, single, made_with.get(among[i])))
        watch.picture(i, paths[-1], single)
        if places.grid:
            pictures.append(picture)
    if places.grid:
        unlike = {name: getattr(request, name) for name in ("prompt", "num_images", "prompt_matrix")}
        columns = columns_of(request.prompt) * request.num_images if request.prompt_matrix else None
        sheet = images.grid(pictures, columns)
        paths.append(places.sheet(sheet, singles[0].model_copy(update=unlike), made_with.get()))
        watch.sheet(paths[-1])
    return paths


def accompanied(
    pipe: Pipeline, single: Request, company: tuple[int, int], watch: Watch
) -> Iterator[tuple[Request, Image]]:
    """A picture made at its place among copies of itself, whose numbers of rows decide its last bits."""
    from dataclasses import replace

    place, many = company

    def step(progress: Progress) -> None:
        if progress.image == place:
            watch.step(replace(progress, image=0))

    before, pipe.batch = pipe.batch, many
    try:
        yield list(pipe.stream([single] * many, step))[place]
    finally:
        pipe.batch = before


def tell(notes: Sequence[str], quiet: bool) -> None:
    """A line on stderr for each note."""
    for note in () if quiet else notes:
        print(f"note: {note}", file=sys.stderr)


def _parameter(name: str) -> inspect.Parameter:
    """A field of Request as a command-line parameter; None means not given."""
    field = Request.model_fields[name]
    kind: Any = next((a for a in get_args(field.annotation) if a is not type(None)), field.annotation)
    flag = next((extra for extra in field.metadata if isinstance(extra, Flag)), Flag())
    long = name.replace("_", "-")
    if kind is bool:
        switch = typer.Option(*flag.names, f"--{long}/--no-{long}", help=field.description, show_default=False)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[bool | None, switch]
        )
    names = (*flag.names, f"--{long}")
    # Text is handed on as it is: Request alone says what is a number, and words the errors.
    role: Any = typer.Option(*names, help=field.description, metavar=flag.value or kind.__name__.upper())
    if name == "prompt":
        role = typer.Argument(help=field.description)
    annotation = Annotated[str | None, role]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
