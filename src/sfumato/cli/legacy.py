"""The flags of the research scripts txt2img.py and img2img.py (CompVis/stable-diffusion, `scripts/`).

One of their own flags makes the whole line theirs: flags, defaults and the names of files. Nothing here imports torch
before the line is understood.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.pipelines.request import Request

SCRIPTS = ("txt2img", "img2img")
PROMPT = "a painting of a virus monster playing guitar"
CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
LAION = ("models/ldm/text2img-large/model.ckpt", "outputs/txt2img-samples-laion400m")
MULTIPLE = 32  # img2img cuts the sides of its picture down to multiples of this
# Flags that both have, and that therefore decide nothing.
SHARED = ("--prompt", "--seed", "--strength", "--precision")
OURS = ("--device", "--threads", "--preview", "--preview-every", "--json", "--quiet", "-q", "--help", "-h")
EXAMPLES = MappingProxyType(
    {
        "--steps": "--ddim_steps",
        "--num-inference-steps": "--ddim_steps",
        "--cfg": "--scale",
        "--guidance-scale": "--scale",
        "--width": "--W",
        "--height": "--H",
        "--model": "--ckpt",
        "-m": "--ckpt",
        "--out": "--outdir",
        "-o": "--outdir",
        "--num-images": "--n_samples",
        "-n": "--n_samples",
        "--eta": "--ddim_eta",
        "--image": "--init-img",
        "-i": "--init-img",
    }
)
EPILOG = (
    "These are the flags of the research script. As soon as one that only the script has is given, its flags, "
    "defaults and names of files hold; sfumato's own flags (`sfumato txt2img --help`) cannot be mixed in, but for the "
    "last group. Differences: picture k has the noise of seed + k, whatever the batch; levels are rounded, not cut; "
    "there is neither a safety checker nor a watermark; files are never overwritten."
)


def applies(args: Sequence[str]) -> bool:
    """Whether a command line is a research script's: one of the flags that only it has is there."""
    if not args or args[0] not in SCRIPTS:
        return False
    own = own_flags(parser(args[0]))
    return any(arg.split("=")[0] in own for arg in args[1:])


def own_flags(made: argparse.ArgumentParser) -> set[str]:
    """The flags that only the script has."""
    return {flag for action in made._actions for flag in action.option_strings} - {*SHARED, *OURS}


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line that say which spelling was mixed in."""

    def error(self, message: str) -> NoReturn:
        """ValueError instead of leaving the program."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word = unknown[1].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            near = [EXAMPLES[word]] if word in EXAMPLES else difflib.get_close_matches(word, known, n=1)
            hint = f"; write {near[0]}" if near and near[0] in known else ""
            message = (
                f"{word} is not one of the research script's flags, which the others are, and they do not mix{hint}"
            )
        raise ValueError(f"{message}; see `{self.prog} --ddim_steps 50 --help`")


def parser(script: str) -> Parser:
    """The flags of a script with its defaults."""
    image = script == "img2img"
    made = Parser(f"sfumato {script}", allow_abbrev=False, epilog=EPILOG)
    add = made.add_argument
    add("--prompt", default=PROMPT, help="the prompt to render")
    if image:
        add("--init-img", metavar="FILE", help="picture to start from; its size, cut to multiples of 32, is used")
        add("--strength", type=float, default=0.75, help="how far to leave the picture, 0 to 1")
    add("--outdir", default=f"outputs/{script}-samples", help="folder for samples/00000.png... and grid-0000.png...")
    add("--skip_grid", action="store_true", help="do not write a grid")
    add("--skip_save", action="store_true", help="do not write single samples")
    add("--ddim_steps", type=int, default=50, help="number of steps")
    add("--plms", action="store_true", help="use plms (default: ddim)")
    if not image:
        add("--dpm_solver", action="store_true", help="use dpmpp_2m, evenly spaced in time")
        add("--laion400m", action="store_true", help="latent diffusion trained on LAION-400M, with its checkpoint")
        add("--H", type=int, default=512, help="height in pixels")
        add("--W", type=int, default=512, help="width in pixels")
    add("--fixed_code", action="store_true", help="the same noise in each iteration")
    add("--ddim_eta", type=float, default=0.0, help="share of fresh noise in ddim's steps")
    add("--n_iter", type=int, default=1 if image else 2, help="iterations")
    add("--C", type=int, help="latent channels, checked against the model's")
    add("--f", type=int, help="factor between picture and latent, checked against the model's")
    add("--n_samples", type=int, default=2 if image else 3, help="pictures of a prompt in each iteration")
    add("--n_rows", type=int, default=0, help="pictures in a row of the grid (default: n_samples)")
    add("--scale", type=float, default=5.0 if image else 7.5, help="guidance scale")
    add("--from-file", metavar="FILE", help="one prompt a line, n_samples of them together")
    add("--config", metavar="YAML", help="read only for what the network predicts; the rest shows in the checkpoint")
    add("--ckpt", default=CKPT, help="checkpoint; or anything that --model takes elsewhere")
    add("--seed", type=int, default=42, help="of the first picture")
    add(
        "--precision", choices=("full", "autocast"), default="autocast", help="full is float32, autocast this machine's"
    )
    ours = made.add_argument_group("sfumato's own")
    ours.add_argument("--device", help="cpu, cuda, cuda:1")
    ours.add_argument("--threads", type=int, help="CPU threads")
    ours.add_argument("--preview", metavar="FILE", help="write what is foreseen: to a PNG again and again, or a folder")
    ours.add_argument("--preview-every", type=int, default=1, metavar="N", help="steps from one preview to the next")
    ours.add_argument("--json", action="store_true", help="one line of JSON on stdout for each event")
    ours.add_argument("--quiet", "-q", action="store_true", help="only paths and errors")
    return made


def run(args: Sequence[str]) -> None:
    """Do as the script would with these arguments; the first is its name.

    Raises ValueError or OSError in one line.
    """
    given = parser(args[0]).parse_args(args[1:])
    for name in ("n_iter", "n_samples", "ddim_steps"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} {getattr(given, name)}: give 1 or more")
    if args[0] == "img2img" and given.plms:
        raise ValueError("--plms cannot begin from a picture in the script; leave it out, which takes ddim")
    if args[0] == "img2img" and given.init_img is None:
        raise ValueError("img2img needs --init-img FILE")
    if getattr(given, "laion400m", False):
        given.ckpt, given.outdir = LAION
    if given.ckpt in (CKPT, LAION[0]) and not Path(given.ckpt).is_file():
        raise FileNotFoundError(f"no checkpoint {given.ckpt}, which is the script's default; name one with --ckpt")
    from sfumato.cli.places import check_folder
    from sfumato.cli.txt2img import opened
    from sfumato.cli.watch import Previews, Watch

    check_folder(Path(given.outdir))
    previews = None if given.preview is None else Previews(given.preview, given.preview_every)
    wanted = requests(given)
    pipe = opened(wanted[0], "float32" if given.precision == "full" else None, given.device, None, given.threads)
    for name, value, actual in (("C", given.C, pipe.unet.config.out_channels), ("f", given.f, pipe.factor)):
        if value is not None and value != actual:
            raise ValueError(f"--{name} {value}, but {given.ckpt} has {actual}; leave the flag out")
    if pipe.runtime.device.type != "cpu":
        pipe.batch = given.n_samples
    singles = pipe.resolve(wanted)
    with Watch(pipe, singles, given.quiet, given.json, previews) as watch:
        write(given, pipe, singles, watch)


def requests(given: argparse.Namespace) -> list[Request]:
    """One request a picture, in the order in which the script makes them."""
    from sfumato.pipelines.request import parse

    prompts = [given.prompt] * given.n_samples
    if given.from_file is not None:
        file = Path(given.from_file)
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; --from-file names one with a prompt in each line")
        prompts = file.read_text(encoding="utf-8").splitlines()
        if not prompts:
            raise ValueError(f"{file} is empty; it should have a prompt in each line")
    sampler, spacing = "ddim", "leading"
    if given.plms:
        sampler = "plms"
    elif getattr(given, "dpm_solver", False):
        sampler, spacing = "dpmpp_2m", "linspace"
    shared: dict[str, Any] = {
        "model": given.ckpt,
        "prediction": None if given.config is None else parameterization(Path(given.config)),
        "sampler": sampler,
        "spacing": spacing,
        "num_inference_steps": given.ddim_steps,
        "guidance_scale": given.scale,
        "eta": given.ddim_eta if sampler == "ddim" and given.ddim_eta else None,
    }
    if "init_img" in given:
        shared |= {"image": given.init_img, "strength": given.strength, **size_of(given.init_img)}
    else:
        shared |= {"width": given.W, "height": given.H}
    made = []
    for i in range(given.n_iter):
        first = given.seed if given.fixed_code else given.seed + i * len(prompts)
        made += [parse(prompt=prompt, seed=first + j, **shared) for j, prompt in enumerate(prompts)]
    return made


def size_of(path: str) -> dict[str, int]:
    """The size that the script makes of its picture."""
    from sfumato.pipelines.inputs import open_picture

    image = open_picture(path, "--init-img")
    cut = {name: side // MULTIPLE * MULTIPLE for name, side in (("width", image.width), ("height", image.height))}
    if not all(cut.values()):
        raise ValueError(f"--init-img {path} has {image.width}x{image.height} pixels; give one of at least 32x32")
    return cut


def parameterization(path: Path) -> str:
    """What the network predicts, by a configuration of the research code."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; leave out --config, as the checkpoint's shapes say what it is")
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        return str(params.get("parameterization", "eps"))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no configuration of the research code: it has no model.params") from None


def write(given: argparse.Namespace, pipe: Any, singles: Sequence[Request], watch: Any) -> None:
    """The pictures into samples/, counted on from the files there, and their sheet beside that folder."""
    from sfumato import images
    from sfumato.cli.txt2img import MadeWith

    samples = Path(given.outdir) / "samples"
    made_with = MadeWith(pipe)
    pictures: list[Image] = []
    for i, (request, picture) in enumerate(pipe.stream(singles, watch.step)):
        if not given.skip_save:
            watch.picture(i, save_counted(samples, "{:05}.png", picture, request, made_with.get()), request)
        pictures.append(picture)
    if not given.skip_grid:
        sheet = images.grid(pictures, columns=given.n_rows or given.n_samples)
        # A sheet of several prompts, or of noise that comes again, is not the sheet of one request.
        one = given.from_file is None and not given.fixed_code
        whole = singles[0].model_copy(update={"num_images": len(singles)}) if one else None
        watch.sheet(save_counted(Path(given.outdir), "grid-{:04}.png", sheet, whole, made_with.get()))


def save_counted(
    folder: Path, pattern: str, image: Image, request: Request | None, made_with: Mapping[str, Any]
) -> Path:
    """Save under the first number, counted from that of the files of this pattern, which nothing has yet."""
    from sfumato.images import save

    like = re.compile(re.sub(r"\{.*\}", r"(\\d+)", pattern))
    names = [like.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    number = max((int(match[1]) + 1 for match in names if match), default=0)
    while True:
        path = folder / pattern.format(number)
        try:
            save(image, path, request, made_with, overwrite=False)
        except FileExistsError:
            number += 1
        else:
            return path
