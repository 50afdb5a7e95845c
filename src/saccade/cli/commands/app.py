"""The command itself, and what its commands share: options, JSON, integers in a list, what may fail afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from saccade import __version__

T = TypeVar("T")

app = typer.Typer(
    name="saccade",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Every published attention system as one kind of part: faithful, fast, inspectable, proved.\n\n"
    "Start with `saccade compare softmax lightning moba mosa --task text`, or `saccade list`.\n\n"
    "`--debug` after any command shows the traceback of an error.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _version(show: bool) -> None:
    if show:
        print(f"saccade {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def afterwards(what: str, make: Callable[[], T]) -> T | None:
    """What comes after the measurements, pictures above all. Where it fails, for whatever reason, one line says so:
    the measurements have been shown."""
    from saccade.cli.messages import one_line

    sys.stdout.flush()
    try:
        return make()
    except Exception as error:
        print(f"saccade: no {what}: {one_line(error)}", file=sys.stderr)
        return None


def integers(text: str, name: str, count: int | None = None) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be comma-separated integers, got {text!r}") from None
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} must be {count} integers, got {len(numbers)}")
    if min(numbers) < 1:
        raise ValueError(f"{name} must be positive, got {text!r}")
    return numbers
