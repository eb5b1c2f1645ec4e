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
from sfumato.cli import convert, data, evaluate, info, models, train

PICTURE = "txt2img"
COMMANDS = (PICTURE, "info", "convert", "models", "samplers", "spacings", "data", "train", "eval")
GROUP_OPTIONS = ("--help", "-h", "--version")
INTERRUPTED = 130
TRACEBACK = "SFUMATO_TRACEBACK"  # set it to see where an error came from
# The base of all complaints about arguments; typer exports only this descendant of it.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 when interrupted."""
    args = with_command(list(sys.argv[1:] if argv is None else argv))
    try:
        # The flags of txt2img are generated from Request, which takes pydantic: only when it is called.
        app = make_app(full=args[:1] == [PICTURE])
        code = int(app(args or ["--help"], prog_name="sfumato", standalone_mode=False) or 0)
    except ClickError as error:
        return complain(str(getattr(error, "format_message", error.__str__)()) or "see `sfumato --help`")
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # ImportError: an extra is not installed
        if os.environ.get(TRACEBACK):
            raise
        return complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def with_command(args: list[str]) -> list[str]:
    """The arguments with `txt2img` in front where they start with a prompt or one of its flags.

    A single word that is almost a command is left alone, to be refused as one.
    """
    if not args or args[0] in (*COMMANDS, *GROUP_OPTIONS):
        return args
    if " " not in args[0] and difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.75):
        return args
    return [PICTURE, *args]


def make_app(full: bool = True) -> typer.Typer:
    """The typer application; without `full` the command txt2img has a name and a help text but no flags."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help='Pictures out of noise. `sfumato "a red apple"` is short for `sfumato txt2img "a red apple"`.',
    )
    app.callback(invoke_without_command=True)(options)
    if full:
        from sfumato.cli import txt2img

        app.command(PICTURE)(txt2img.command())
    else:
        app.command(PICTURE)(placeholder)
    app.command("info")(info.info)
    app.command("convert")(convert.convert)
    app.command("models")(models.models)
    app.command("samplers")(info.samplers)
    app.command("spacings")(info.spacings)
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
    """Make pictures from a prompt; `sfumato txt2img --help` lists the flags."""


def complain(message: str) -> int:
    """One line on stderr; returns the exit code of bad input."""
    print("sfumato: " + " ".join(message.split()), file=sys.stderr)
    return 2
