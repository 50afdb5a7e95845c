"""Short labels of what is compared, for tables and plots, and the lines below them that tell the rest.

Options that all entries of one part have in common go to the caption; where the others are still long, a number
stands for them:

    >>> labels(["softmax", "moba:block_size=16,top_k=2", "moba:block_size=16,top_k=4"]).of
    {'softmax': 'softmax', 'moba:block_size=16,top_k=2': 'moba:top_k=2', 'moba:block_size=16,top_k=4': 'moba:top_k=4'}
    >>> labels(["moba:block_size=16,top_k=2"]).caption
    ['moba: block_size=16, top_k=2']
    >>> short = labels(["window:left=10,right=0", "window:left=20,right=3"], limit=16)
    >>> list(short.of.values()), short.caption
    (['window [1]', 'window [2]'], ['[1] window:left=10,right=0', '[2] window:left=20,right=3'])
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saccade.train.entries import split_options

#: the longest labels in a table, and in a plot
IN_TABLES, IN_PLOTS = 36, 22


@dataclass(frozen=True)
class Labels:
    """`of`: full name -> label, all different; `caption`: what the labels leave out, a line each."""

    of: dict[str, str]
    caption: list[str]


def labels(names: Iterable[str], limit: int = IN_TABLES) -> Labels:
    """Labels of at most `limit` characters, but for names without options that are longer by themselves."""
    names = list(dict.fromkeys(names))
    parts: dict[str, list[str]] = {}  # part -> its entries
    for name in names:
        parts.setdefault(name.partition(":")[0], []).append(name)
    of: dict[str, str] = {}
    caption: list[str] = []
    legend: list[str] = []
    for part, entries in parts.items():
        options = {name: [piece.strip() for piece in split_options(name.partition(":")[2])] for name in entries}
        common = [piece for piece in options[entries[0]] if all(piece in given for given in options.values())]
        if common:
            caption.append(f"{part}: {', '.join(common)}")
        for name, given in options.items():
            own = [piece for piece in given if piece not in common]
            of[name] = f"{part}:{','.join(own)}" if own else part
    for name in names:
        if ":" in of[name] and len(of[name]) > limit:
            legend.append(f"[{len(legend) + 1}] {of[name]}")
            part = name.partition(":")[0]
            number = f"[{len(legend)}]"
            of[name] = f"{part} {number}" if len(part) + 1 + len(number) <= limit else number
    return Labels({name: of[name] for name in names}, [*caption, *legend])
