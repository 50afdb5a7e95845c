"""The command line: `saccade`, also `python -m saccade`. Options in, tables out; no logic of its own."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from saccade.cli.encoding import say_in_any_encoding
from saccade.cli.messages import one_line

INTERRUPTED = 130
#: what is said after "stopped"
_GOES_ON = {
    "compare": "; the same command continues",
    "convert": "; the same command continues",
    "claim": "; what was measured is in --out, where it was given: --missing with it continues",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; whatever goes wrong ends with one line on stderr and exit code 2 (`--debug` shows the
    traceback), an interruption with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            say_in_any_encoding(stream)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = _repeat_data([argument for argument in arguments if argument != "--debug"]) or ["--help"]
    try:
        code = _run(arguments)
        sys.stdout.flush()  # where the output cannot be written, it is said here
        if code == INTERRUPTED:  # typer's word for it
            raise KeyboardInterrupt
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError):
            # the reader (head, less) has gone: nothing more to say, and nothing to flush into
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print(f"saccade: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"saccade: stopped{_GOES_ON.get(arguments[0], '')}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of a command.

    Raises:
        ValueError: if an argument of the command line is wrong.
    """
    from saccade.cli.commands.app import app

    try:
        return int(app(args=arguments, prog_name="saccade", standalone_mode=False) or 0)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own, which typer keeps under another name in each version
            raise ValueError(error.format_message()) from error
        raise


def _repeat_data(arguments: list[str]) -> list[str]:
    """`--data a b` as `--data a --data b`: what follows a data file and is a file is one more."""
    expanded: list[str] = []
    for argument in arguments:
        if len(expanded) > 1 and expanded[-2] == "--data" and not argument.startswith("-") and Path(argument).is_file():
            expanded.append("--data")
        expanded.append(argument)
    return expanded
