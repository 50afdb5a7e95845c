"""English, the user's own files, and windows of them.

Shape letters: B batch, N tokens, L bytes of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

#: characters of a sentence, and sentences of a topic at least
_SHORT, _LONG, _LEAST = 40, 250, 8
#: paragraphs of the text that go to one side together, and how many such runs there are to each held-out one
_RUN, _EVERY = 16, 10


@cache
def text_bytes(split: str = "all") -> Tensor:
    """English as bytes: Python's own language reference, uint8 (bytes,).

    `"all"` is the whole text, topics in alphabetical order. `"train"` and `"held-out"` are nine tenths and one tenth
    of its paragraphs, each paragraph once (a fifth of the text repeats others, and would be known by heart).

    Args:
        split: "all", "train" or "held-out".

    Raises:
        ValueError: for another split.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    if split == "all":
        return _as_tensor(text.encode("utf-8"))
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'all', 'train' or 'held-out', got {split!r}")
    paragraphs = list(dict.fromkeys(text.split("\n\n")))
    held_out = split == "held-out"
    chosen = [p for i, p in enumerate(paragraphs) if (i // _RUN % _EVERY == _EVERY - 1) == held_out]
    return _as_tensor("\n\n".join(chosen).encode("utf-8"))


def sentences(split: str = "all") -> list[list[str]]:
    """The sentences of each topic of Python's language reference that has eight or more, each sentence once.

    Args:
        split: "all", "train" (three quarters of the topics) or "held-out".

    Raises:
        ValueError: for another split.
    """
    from pydoc_data.topics import topics

    if split not in ("all", "train", "held-out"):
        raise ValueError(f"split must be 'all', 'train' or 'held-out', got {split!r}")
    seen: set[str] = set()
    found = []
    for name in sorted(topics):
        cut = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(topics[name].split()))
        new = [each for each in dict.fromkeys(cut) if _SHORT <= len(each) <= _LONG and each not in seen]
        seen.update(new)
        if len(new) >= _LEAST:
            found.append(new)
    return [topic for i, topic in enumerate(found) if split == "all" or (i % 4 == 3) == (split == "held-out")]


def read_files(paths: Sequence[str | Path], least: int = 4096) -> Tensor:
    """The bytes of files, one after the other, uint8 (bytes,).

    Args:
        paths: one or several.
        least: bytes that they must have together.

    Raises:
        ValueError: if a file is empty or no text, or all together have fewer than `least` bytes.
        OSError: if one cannot be read, or is no file (a folder, a pipe, a device).
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    pieces = []
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not a data file")
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device may never end
            raise OSError(f"{path} is no regular file: give the name of a file with text")
        try:
            piece = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"no data file at {path}") from None
        except OSError as error:
            raise OSError(f"cannot read {path}: {error.strerror or error}") from error
        if not piece:
            raise ValueError(f"data file {path} is empty")
        if 0 in piece:
            raise ValueError(f"data file {path} is no text (it has zero bytes); save it as UTF-8, or give its tensor")
        pieces.append(piece)
    data = b"".join(pieces)
    if len(data) < least:
        raise ValueError(f"the data must have at least {least} bytes, got {len(data)}")
    return _as_tensor(data)


def windows(data_L: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a byte tensor: inputs and, one further, targets; int64 (B, N) each.

    Args:
        data_L: bytes.
        batch: B.
        length: N.
        generator: of the places.

    Raises:
        ValueError: if the data are shorter than a window.
    """
    if len(data_L) < length + 1:
        raise ValueError(f"the data must have at least {length + 1} bytes, got {len(data_L)}")
    start_B = torch.randint(len(data_L) - length, (batch,), generator=generator)
    window_BN = data_L[start_B[:, None] + torch.arange(length + 1)].long()
    return window_BN[:, :-1], window_BN[:, 1:]


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
