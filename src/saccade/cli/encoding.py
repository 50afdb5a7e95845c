"""Output in whatever encoding the terminal has: what it lacks is written in ASCII, and never ends a command."""

from __future__ import annotations

import codecs
import io
import unicodedata

_ASCII = {
    "─": "-", "━": "-", "│": "|", "┃": "|", "×": "x", "±": "+/-", "↑": "^", "↓": "v", "→": "->", "·": "*", "•": "*",
    "…": "...", "≈": "~", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for the characters that could not be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


codecs.register_error("saccade.ascii", _in_ascii)


def say_in_any_encoding(stream: io.TextIOWrapper) -> None:
    """From now on the stream takes every text.

    >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    >>> say_in_any_encoding(stream)
    >>> stream.write("é ± 1 → 日")
    9
    >>> stream.flush(); stream.buffer.getvalue()
    b'e +/- 1 -> ?'
    """
    stream.reconfigure(errors="saccade.ascii")
