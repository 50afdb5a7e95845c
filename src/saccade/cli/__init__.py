"""The command line: `saccade`, also `python -m saccade`. Options in, tables out; no logic of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2 (`--debug` shows the traceback)."""
    from saccade.cli.commands import app

    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = _repeat_data([argument for argument in arguments if argument != "--debug"])
    try:
        app(args=arguments, prog_name="saccade")
    except (ValueError, OSError, ImportError) as error:
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
        print("saccade: interrupted", file=sys.stderr)
        sys.exit(130)


def _repeat_data(arguments: list[str]) -> list[str]:
    """`--data a b` as `--data a --data b`: what follows a data file and is a file is one more."""
    expanded: list[str] = []
    for argument in arguments:
        if len(expanded) > 1 and expanded[-2] == "--data" and not argument.startswith("-") and Path(argument).is_file():
            expanded.append("--data")
        expanded.append(argument)
    return expanded


def one_line(error: BaseException) -> str:
    """The error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
