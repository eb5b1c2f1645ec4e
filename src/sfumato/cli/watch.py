"""Watching pictures being made: a bar on a terminal, JSON for programs, previews, what an interruption left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress as Bar

    from sfumato.pipelines.pipeline import Pipeline, Progress
    from sfumato.pipelines.request import Request

# How the weights are kept, in the line before a picture.
KEPT = {
    "fast": "",
    "balanced": "; memory balanced: weights are there for their stage",
    "low": "; memory low: weights are read for each layer, pictures beyond 512 pixels decoded in tiles",
}
SEEDS = 5  # listed of pictures that were not made


class Interrupted(Exception):
    """An interruption that says what was finished and what was not; typer would take the words from Python's own."""


def emit(event: str, **values: Any) -> None:
    """One JSON line on stdout."""
    print(json.dumps({"event": event, **values}), flush=True)


class Previews:
    """Writes what is foreseen every some evaluations: to one file again and again, or to a folder.

    Only files that were previews before are replaced. Raises FileExistsError for another one.
    """

    MARK = "sfumato-preview"  # PNG text entry

    def __init__(self, place: str, every: int) -> None:
        path = Path(place)
        self.every = every
        self.is_folder = place.endswith(("/", "\\")) or path.is_dir() or not path.suffix
        self.path = path
        if not self.is_folder:
            if path.suffix.lower() != ".png":
                raise ValueError(f"--preview {place}: previews are PNG; name a file that ends in .png, or a folder")
            self._check(path)
        from sfumato.cli.places import check_folder

        check_folder(path if self.is_folder else path.parent)

    def due(self, step: Progress) -> bool:
        """Whether to show this evaluation; the first one and the last always."""
        return step.done % self.every == 0 or step.done in (1, step.total)

    def write(self, image: Image, seed: int, step: Progress) -> Path:
        """Write a picture; returns its path."""
        from sfumato.files import replacing
        from sfumato.recipes.embed import png

        path = self.path / f"seed-{seed}-step-{step.done:03d}.png" if self.is_folder else self.path
        self._check(path)
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=png({self.MARK: f"{step.done}/{step.total}"}))
        return path

    def _check(self, path: Path) -> None:
        from sfumato.recipes.embed import read

        if not path.exists():
            return
        try:
            ours = self.MARK in read(path)
        except ValueError:
            ours = False
        if not ours:
            raise FileExistsError(f"{path} exists, is no preview and is not overwritten; name another with --preview")


class Watch:
    """Tells of pictures being made. A context: the bar is there while inside.

    singles:  the requests, one a picture.
    quiet:    neither a bar nor words. as_json: events on stdout, one line each, and nothing else there.
    previews: where to write what is foreseen; None does not.
    """

    def __init__(
        self,
        pipe: Pipeline,
        singles: Sequence[Request],
        quiet: bool = False,
        as_json: bool = False,
        previews: Previews | None = None,
    ) -> None:
        self.singles = singles
        self.quiet = quiet or as_json
        self.as_json = as_json
        self.previews = previews
        self.finished: list[Path] = []
        self.steps = 0
        self.latest = (0, 0)
        self._bar: Bar | None = None
        self._painter: Any = None
        if previews is not None:
            from sfumato.previews import Preview

            self._painter = Preview(pipe.vae)
        if as_json:
            made_with = pipe.made_with()
            emit("start", pictures=len(singles), request=singles[0].model_dump(mode="json"), made_with=made_with)
        elif not quiet:
            print(describe(pipe, singles[0]), file=sys.stderr)

    def __enter__(self) -> Watch:
        self.began = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._bar = bar()
            self._bar.__enter__()
            self._task = self._bar.add_task("denoising", total=None, speed="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            message = self.left()
            if self.as_json:
                emit("interrupted", finished=[str(path) for path in self.finished], message=message)
            raise Interrupted(message) from None
        if kind is None:
            seconds = time.monotonic() - self.began
            if self.as_json:
                emit("end", pictures=len(self.finished), seconds=round(seconds, 3))
            elif not self.quiet and self._bar is not None:
                print(f"{counted(len(self.finished))} in {seconds:.1f} s ({rate(self.speed())})", file=sys.stderr)

    def step(self, step: Progress) -> None:
        """The callback for `Pipeline.stream`."""
        self.steps += 1
        self.latest = (step.image, step.done)
        total = step.total * len(self.singles) or None  # an adaptive sampler does not know
        speed = self.speed()
        if self._bar is not None:
            text = f"picture {step.image + 1} of {len(self.singles)}" if len(self.singles) > 1 else "denoising"
            self._bar.update(self._task, completed=self.steps, total=total, description=text, speed=rate(speed))
        if self.as_json:
            emit(
                "step",
                picture=step.image,
                step=step.done,
                steps=step.total,
                per_second=round(speed, 3),
                seconds_left=round((total - self.steps) / speed, 1) if total else None,
            )
        if self.previews is not None and self.previews.due(step):
            seed = self.singles[step.image].seed or 0
            path = self.previews.write(self._painter.picture(step.x0), seed, step)
            if self.as_json:
                emit("preview", picture=step.image, step=step.done, path=str(path))

    def picture(self, index: int, path: Path, request: Request) -> None:
        """A picture was written."""
        self.finished.append(path)
        if self.as_json:
            emit("picture", picture=index, path=str(path), seed=request.seed, request=request.model_dump(mode="json"))
        else:
            print(path, flush=True)

    def sheet(self, path: Path) -> None:
        """The sheet of all pictures was written."""
        if self.as_json:
            emit("grid", path=str(path))
        else:
            print(path, flush=True)

    def speed(self) -> float:
        """Evaluations a second so far."""
        return self.steps / max(time.monotonic() - self.began, 1e-6)

    def left(self) -> str:
        """What an interruption leaves: "1 of 3 pictures finished; not made: seeds 41, 42"."""
        missing = [str(request.seed) for request in self.singles[len(self.finished) :]]
        text = f"{len(self.finished)} of {counted(len(self.singles))} finished"
        if missing:
            more = f" and {len(missing) - SEEDS} more" if len(missing) > SEEDS else ""
            text += f"; not made: seed{'s' * (len(missing) > 1)} {', '.join(missing[:SEEDS])}{more}"
            image, done = self.latest
            if done and image >= len(self.finished):
                text += f" (seed {self.singles[image].seed} was at step {done})"
        return text


def bar() -> Bar:
    """A bar on stderr: what, how far, how fast, how long to go."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # Else rich would send the paths that are printed to stderr, also where stdout goes into a file.
        redirect_stdout=sys.stdout.isatty(),
    )


def describe(pipe: Pipeline, request: Request) -> str:
    """One line on what is about to happen, and why there."""
    return (
        f"{request.model} ({pipe.preset.title}), seed {request.seed}, {request.width}x{request.height}, "
        f"{request.num_inference_steps} steps of {request.sampler} ({request.spacing}), "
        f"guidance {request.guidance_scale:g}; {pipe.runtime.reason}{KEPT[pipe.memory]}"
    )


def rate(speed: float) -> str:
    """Evaluations a second, or seconds an evaluation where those are the smaller number."""
    return f"{speed:.1f} it/s" if speed >= 1 or not speed else f"{1 / speed:.1f} s/it"


def counted(pictures: int) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{pictures} picture{'s' * (pictures != 1)}"
