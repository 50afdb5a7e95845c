"""Tables as plain text, for every command and every `.table()`.

No name and no figure is ever cut. A table that is wider than the terminal folds its headings, then its prose; one that
is wider still becomes paragraphs, one for each row:

    >>> print(table(("part", "time", "what it is"), [("moba", "3 ms", "keys by blocks")], left=3, width=40))
    part  time  what it is
    ----  ----  --------------
    moba  3 ms  keys by blocks
    >>> print(table(("part", "time", "what it is"), [("moba", "3 ms", "keys by blocks")], left=3, width=16))
    moba
      time
        3 ms
      what it is
        keys by
        blocks
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

GAP = 2
#: prose is not folded into a column narrower than this
NARROWEST = 20
#: stands for "as wide as it comes", where nobody said how wide
UNLIMITED = 10**9


def terminal_width() -> int:
    """Columns that a line of output may have: `COLUMNS` where it is set, the terminal's, or no limit in a pipe or a
    file, so that each row stays one line there."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return UNLIMITED


def cell_width(text: str) -> int:
    """Columns that a terminal gives a text: two for a wide character."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1, width: int | None = None
) -> str:
    """Rows under headings.

    Args:
        columns: the headings.
        rows: cells as text, as many a row as there are headings.
        title: a line above.
        left: how many columns, from the first on, are aligned to the left and hold prose; the last one too, where its
            cells are prose. The others hold figures, aligned to the right.
        width: of the terminal, where None.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    width = terminal_width() if width is None else width
    prose = [i < left or any(len(row[i].split()) > 3 for row in rows) for i in range(len(columns))]
    widths = _widths(columns, rows, prose, width)
    body = _paragraphs(columns, rows, width) if widths is None else _lines(columns, rows, prose, widths)
    return "\n".join([*(fold(title, width) if title else ()), *body])


def fold(text: str, width: int | None = None, indent: str = "") -> list[str]:
    """A paragraph as lines no longer than `width` (the terminal's, where None); words are never cut."""
    width = terminal_width() if width is None else width
    return textwrap.wrap(
        text, max(width, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def facts(pairs: Sequence[tuple[str, str | Sequence[str]]], width: int | None = None, indent: str = "") -> list[str]:
    """Names and what they hold, one or several texts each, as lines: beside the names, or below them where lines are
    short. What is empty is left out.

    >>> print("\\n".join(facts([("state", "ready"), ("proved by", ["recordings", "a claim"])], width=40)))
    state      ready
    proved by  recordings
               a claim
    """
    width = terminal_width() if width is None else width
    texts = {name: [held] if isinstance(held, str) else list(held) for name, held in pairs if held}
    label = max(map(cell_width, texts), default=0) + GAP + len(indent)
    words = [cell_width(word) for held in texts.values() for text in held for word in text.split()]
    longest = max((cell_width(text) for held in texts.values() for text in held), default=0)
    beside = width - label >= max([min(NARROWEST, longest), *words])
    lines: list[str] = []
    for name, held in texts.items():
        below = label if beside else len(indent) + GAP
        body = [" " * below + line for text in held for line in fold(text, width - below)]
        start = indent + name
        lines += [start + " " * (label - cell_width(start)) + body[0][label:], *body[1:]] if beside else [start, *body]
    return lines


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Sequence[bool], width: int
) -> list[int] | None:
    """Columns of each, within `width` together; None where that would cut something."""
    cells = [max((cell_width(row[i]) for row in rows), default=0) for i in range(len(columns))]
    widths = [max(cell, cell_width(heading)) for cell, heading in zip(cells, columns)]
    room = width - GAP * (len(columns) - 1)
    if sum(widths) <= room:
        return widths
    # headings of figures fold at their spaces
    widths = [
        max(cell, max(map(cell_width, heading.split()), default=0) if not told else cell_width(heading))
        for cell, heading, told in zip(cells, columns, prose)
    ]
    least = [
        max(cell_width(word) for text in (heading, *(row[i] for row in rows)) for word in text.split() or [""])
        for i, heading in enumerate(columns)
    ]
    while sum(widths) > room:
        foldable = [
            i for i, told in enumerate(prose) if i > 0 and told and widths[i] > max(least[i], min(NARROWEST, cells[i]))
        ]
        if not foldable:
            return None
        widest = max(foldable, key=lambda i: widths[i])
        widths[widest] -= 1
    return widths


def _lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Sequence[bool], widths: Sequence[int]
) -> list[str]:
    heading = _row(columns, prose, widths)
    rule = (" " * GAP).join("-" * width for width in widths)
    return [*heading, rule, *(line for row in rows for line in _row(row, prose, widths))]


def _row(cells: Sequence[str], prose: Sequence[bool], widths: Sequence[int]) -> list[str]:
    """One row, as many lines as its longest cell takes."""
    folded = [fold(cell, width) for cell, width in zip(cells, widths)]
    lines = []
    for number in range(max(map(len, folded))):
        pieces = []
        for cell, told, width in zip(folded, prose, widths):
            piece = cell[number] if number < len(cell) else ""
            space = " " * (width - cell_width(piece))
            pieces.append(piece + space if told else space + piece)
        lines.append((" " * GAP).join(pieces).rstrip())
    return lines


def _paragraphs(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Each row as a paragraph: its first cell, then what the others say."""
    lines: list[str] = []
    for row in rows:
        lines += ["", row[0]] if lines else [row[0]]
        lines += facts(list(zip(columns[1:], row[1:])), width, indent="  ")
    return lines
