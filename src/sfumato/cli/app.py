"""The `sfumato` command: what is registered, which command a bare prompt means, and how errors are worded.

Nothing here imports torch or pydantic: `sfumato --help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sfumato import __version__
from sfumato.cli import bench, convert, data, doctor, evaluate, info, legacy, models, replay, restore, train
from sfumato.cli.watch import Interrupted

PICTURE = "txt2img"
# The commands whose flags are Request's fields.
TASKS = {
    PICTURE: "Make pictures from a prompt.",
    "img2img": "Make pictures from a picture and a prompt.",
    "inpaint": "Repaint a part of a picture.",
    "depth2img": "Make pictures of the same depth as a picture.",
    "upscale": "Enlarge a picture.",
    "instruct": "Change a picture as an instruction says.",
}
COMMANDS = (
    *TASKS,
    "restore",
    "replay",
    "recipe",
    "info",
    "convert",
    "models",
    "samplers",
    "spacings",
    "doctor",
    "bench",
    "data",
    "train",
    "eval",
)
GROUP_OPTIONS = ("--help", "-h", "--version")
INTERRUPTED = 130
TRACEBACK = "SFUMATO_TRACEBACK"  # set it to see where an error came from
# The base of all complaints about arguments; typer exports only this descendant of it.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 when interrupted."""
    args = with_command(list(sys.argv[1:] if argv is None else argv))
    as_json = "--json" in args and args[0] in (*TASKS, "replay")
    try:
        if legacy.applies(args):
            legacy.run(args)
            return 0
        # The flags of a task are generated from Request, which takes pydantic: only when one is called.
        app = make_app(full=args[0] if args and args[0] in TASKS else None)
        code = int(app(args or ["--help"], prog_name="sfumato", standalone_mode=False) or 0)
    except ClickError as error:
        message = str(getattr(error, "format_message", error.__str__)()) or "see `sfumato --help`"
        return complain(message, as_json)
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # ImportError: an extra is not installed
        if os.environ.get(TRACEBACK):
            raise
        return complain(str(error), as_json)
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def with_command(args: list[str]) -> list[str]:
    """The arguments with `txt2img` in front where they start with a prompt or one of its flags.

    A single word that is almost a command is left alone, to be refused as one. `--prompt TEXT` is the text alone,
    unless the line is a research script's.
    """
    if args and args[0] in TASKS and "--prompt" in args[:-1] and not legacy.applies(args):
        at = args.index("--prompt")
        return [*args[:at], *args[at + 1 :]]
    if not args or args[0] in (*COMMANDS, *GROUP_OPTIONS):
        return args
    if (
        not args[0].startswith("-")
        and " " not in args[0]
        and difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.75)
    ):
        return args
    return with_command([PICTURE, *args])


def make_app(full: str | None = PICTURE) -> typer.Typer:
    """The typer application; of the tasks only `full` has its flags, the others a name and a help text."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help='Pictures out of noise. `sfumato "a red apple"` is short for `sfumato txt2img "a red apple"`.',
    )
    app.callback(invoke_without_command=True)(options)
    for task, text in TASKS.items():
        if task == full:
            from sfumato.cli import txt2img

            app.command(task)(txt2img.command(task))
        else:
            app.command(task, help=f"{text} `sfumato {task} --help` lists the flags.")(placeholder)
    app.command("restore")(restore.restore)
    app.command("replay")(replay.replay)
    app.command("recipe")(replay.recipe)
    app.command("info")(info.info)
    app.command("convert")(convert.convert)
    app.command("models")(models.models)
    app.command("samplers")(info.samplers)
    app.command("spacings")(info.spacings)
    app.command("doctor")(doctor.doctor)
    app.command("bench")(bench.bench)
    app.add_typer(data.app, name="data")
    app.command("train")(train.train)
    app.add_typer(evaluate.app, name="eval")
    return app


def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """What stands before the command."""
    if version:
        print(__version__)
        raise typer.Exit()


def placeholder() -> None:
    """A task that was not called."""


def complain(message: str, as_json: bool = False) -> int:
    """One line on stderr, and on stdout as an event for programs; returns the exit code of bad input."""
    line = " ".join(message.split())
    if as_json:
        from sfumato.cli.watch import emit

        emit("error", message=line)
    print(f"sfumato: {line}", file=sys.stderr)
    return 2
