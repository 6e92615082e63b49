"""The door: which commands there are, and how what goes wrong is told."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from stillhouse._version import __version__
from stillhouse.errors import Interrupted, StillhouseError

# Each command's file is of its name; the line is what the list of commands says.
COMMANDS = {
    "run": "Run a recipe, or go on with a run.",
    "methods": "List methods; show all about one.",
    "data": "List data sets; show all about one.",
    "bench": "Compare a method with its baselines.",
    "infer": "Use what a run has left.",
    "report": "Show what a run has shown.",
    "export": "Take a model to another library.",
    "doctor": "Look at this machine.",
}


def build(chosen: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line.

    Args:
        chosen: the commands that may be called. The others are only listed, which spares their
            import and the construction of their options: half of the time of a short command.
    """
    app = typer.Typer(
        name="stillhouse",
        help="Distil models, data sets and labels, and report honestly what they are worth.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Frames are for people; Rich costs more time than all the rest of `--help`.
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(door)
    called = set(chosen)
    for name, line in COMMANDS.items():
        command: Any = _only_listed
        if name in called:
            command = getattr(importlib.import_module(f"stillhouse.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(command)
    return app


def _only_listed() -> None:
    raise AssertionError("a command was called that had not been built")


def called_commands(words: Sequence[str]) -> Iterable[str]:
    """The commands that a line may call: its first word that is no option, or none.

    The shell's completion names its line in the environment, and may ask for any.
    """
    if "_STILLHOUSE_COMPLETE" in os.environ:
        return COMMANDS
    first = next((word for word in words if not word.startswith("-")), "")
    return [first] if first in COMMANDS else []


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def door(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose; anywhere in the line.")
    ] = False,
) -> None:
    """Read the options that stand before a command."""


def main() -> None:
    """Run the command line; ends the process with its exit code.

    0 done; 1 what the message says; 2 the line was not understood; 130 and 143 stopped by
    SIGINT and SIGTERM.
    """
    traceback = _take_traceback()
    try:
        build(called_commands(sys.argv[1:]))(prog_name="stillhouse")
    except BrokenPipeError:
        # The reader has left (`| head`): nothing is wrong. The flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        tell("stopped")
        sys.exit(130)
    except Interrupted as error:
        tell(str(error), title="stopped")
        sys.exit(128 + error.signal)
    except StillhouseError as error:
        if traceback:
            raise
        tell(str(error))
        sys.exit(1)
    except OSError as error:
        if traceback:
            raise
        tell(_of_the_system(error))
        sys.exit(1)
    except Exception as error:
        if traceback:
            raise
        from stillhouse.cli.printing import process

        if process() and "closed by peer" in str(error):
            # The process that failed has told why; this one only lost its connection.
            sys.exit(1)
        tell(
            f"{type(error).__name__}: {error}\n"
            "This should have been told better; --traceback shows where it arose.",
            title="unexpected",
        )
        sys.exit(1)


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, about which file."""
    from pathlib import Path

    from stillhouse.writing import FULL, disk_full

    named = error.filename if isinstance(error.filename, str) else ""
    if error.errno in FULL:
        return disk_full(Path(named or "."))
    return f"{named}: {error.strerror}" if named and error.strerror else str(error)


def _take_traceback() -> bool:
    """Whether tracebacks are wanted; the option may stand anywhere before `--`."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked = "--traceback" in sys.argv[1:end]
    if asked:
        sys.argv = [a for a in sys.argv[:end] if a != "--traceback"] + sys.argv[end:]
    return asked or os.environ.get("STILLHOUSE_TRACEBACK", "") not in {"", "0"}


def tell(message: str, title: str = "error") -> None:
    """One message on stderr: in a frame on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        print(f"{title}: {message}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    colour = "yellow" if title == "stopped" else "red"
    Console(stderr=True).print(
        Panel(Text(message), title=title, title_align="left", border_style=colour)
    )
