"""Rows of categories and numbers with clicks whose reasons are known, and logs of clicks from files.

A `Market` draws rows: half of its fields have a say, each by a weight of its value and some pairs by a product of two
vectors of their values (what FM models); the others are noise. One pair's values have a say together alone, each
combination another (what can only be memorised). The first field is the user. A number has a say that neither rises nor
falls throughout. The best possible score is `Market.logit`.

Files are read by `read_log`: Criteo's (tab-separated, without names: label, 13 numbers, 26 categories), or any table
with a line of names, of which one is "click" or "label"; columns that are called I1, I2 ..., or hold numbers with a
decimal point, are numbers, all others categories.

Shape letters: B rows, F fields, S fields that have a say, M numbers, K width of hidden vectors.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: of Criteo's files
CRITEO_NUMBERS, CRITEO_FIELDS = 13, 26
#: values that are seen less often share one number
RARE = 2
#: name of the column of clicks
LABELS = ("click", "label")
#: most values of a generated field, and of the users
_MOST, _USERS = 200, 120


class Clicks(NamedTuple):
    """Rows and what became of them.

    Attributes:
        ids: (B, F), of each field from 0; -1 is missing.
        numbers: (B, M), about 0 and of deviation 1.
        labels: (B,), 1 where there was a click, else 0.
    """

    ids: Tensor
    numbers: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Market:
    """Where generated rows come from.

    Args:
        count: F, of which half have a say; four at least.
        world: of what is drawn once: sizes, weights, vectors.
        cross: standard deviation of the say of the memorised pair.
        sizes: values of each field; drawn where empty.

    Raises:
        ValueError: if there are fewer than four fields, or sizes for others.

    >>> rows = Market(6).drawn(4, torch.Generator().manual_seed(0))
    >>> tuple(rows.ids.shape), tuple(rows.numbers.shape)
    ((4, 6), (4, 1))
    """

    count: int = 20
    world: int = 0
    cross: float = 2.0
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 4:
            raise ValueError(f"a market must have four fields at least, got {self.count}")
        if self.sizes and len(self.sizes) != self.count:
            raise ValueError(f"sizes must be those of {self.count} fields, got {len(self.sizes)}")

    @property
    def said(self) -> int:
        """How many fields have a say: those that come first."""
        return self.count // 2

    @property
    def crossed(self) -> tuple[int, int]:
        """The pair whose values have a say together only."""
        return self.said - 2, self.said - 1

    @property
    def multiplied(self) -> tuple[tuple[int, int], ...]:
        """The pairs that have a say by a product of vectors."""
        last = self.said - 2
        return tuple((i, i + 1) for i in range(0, last - 1, 2))

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """How many values each field has. The memorised pair has few, so that each combination is seen."""
        if self.sizes:
            return self.sizes
        generator = torch.Generator().manual_seed(self.world)
        drawn = torch.randint(10, _MOST, (self.count,), generator=generator).tolist()
        few = [min(size, 12) if i in self.crossed else size for i, size in enumerate(drawn)]
        return (_USERS, *few[1:])

    @cached_property
    def _drawn_once(self) -> tuple[Tensor, Tensor, Tensor]:
        """A weight and a vector (4) of each value that has a say, and the say of the pair's combinations."""
        generator = torch.Generator().manual_seed(self.world + 1)
        first, second = (self.fields[i] for i in self.crossed)
        values = sum(self.fields[: self.said])
        weights = 0.5 * torch.randn(values, generator=generator)
        vectors = 0.7 * torch.randn(values, 4, generator=generator)
        return weights, vectors, self.cross * torch.randn(first, second, generator=generator).sign()

    def logit(self, ids_BF: Tensor, numbers_BM: Tensor) -> Tensor:
        """The logit (B,) with which clicks are drawn.

        Args:
            ids_BF, numbers_BM: of rows.
        """
        weights, vectors, crosses = self._drawn_once
        starts = torch.tensor((0, *accumulate(self.fields[: self.said - 1])))
        row_BS = ids_BF[:, : self.said].cpu() + starts
        alone_BS = weights[row_BS]
        alone_BS[:, list(self.crossed)] = 0
        e_BSK = vectors[row_BS]
        logit_B = alone_BS.sum(1) - 1
        for i, j in self.multiplied:
            logit_B = logit_B + (e_BSK[:, i] * e_BSK[:, j]).sum(1)
        i, j = self.crossed
        return logit_B + crosses[ids_BF[:, i].cpu(), ids_BF[:, j].cpu()] + (2 * numbers_BM[:, 0].cpu()).cos()

    def drawn(self, count: int, generator: torch.Generator) -> Clicks:
        """So many rows; values come by Zipf's law, 1 / (i + 3), those of the memorised pair alike.

        Args:
            count: B.
            generator: of all that is random.
        """
        columns = []
        for field, size in enumerate(self.fields):
            often = 1 / (torch.arange(size) + 3.0)
            weight = torch.ones(size) if field in self.crossed else often
            columns.append(torch.multinomial(weight, count, replacement=True, generator=generator))
        ids, numbers = torch.stack(columns, 1), torch.randn(count, 1, generator=generator)
        chance = self.logit(ids, numbers).sigmoid()
        return Clicks(ids, numbers, (torch.rand(count, generator=generator) < chance).float())


@dataclass(frozen=True)
class Log:
    """Clicks from files.

    Attributes:
        learn, judge: rows to learn from, and the last tenth.
        fields: how many values each field has; its value 0 stands for all that are rare or new.
        names: of the fields.
    """

    learn: Clicks
    judge: Clicks
    fields: tuple[int, ...]
    names: tuple[str, ...]


def read_log(paths: Sequence[str | Path]) -> Log:
    """Logs of clicks, one file after the other; the last tenth of the rows is judged on.

    A value that is seen fewer than `RARE` times in what is learned from has number 0, an empty one is missing.
    Numbers become sign(x) log(1 + |x|), about the mean and deviation of what is learned from; an empty one is 0.

    Args:
        paths: of tables, see above; all of one form.

    Raises:
        OSError: if one cannot be read.
        ValueError: if one is no such table, or there are fewer than 20 rows.
    """
    names: list[str] = []
    rows: list[list[str]] = []
    for path in paths:
        header, found = _table(Path(path))
        if names and header != names:
            raise ValueError(f"{path} must have the columns of {paths[0]}")
        names, rows = header, rows + found
    if len(rows) < 20:
        raise ValueError(f"the files must have at least 20 rows, got {len(rows)}")
    label = next(i for i, name in enumerate(names) if name in LABELS)
    columns = list(zip(*rows, strict=True))
    numeric = [i for i, name in enumerate(names) if i != label and _is_number(name, columns[i])]
    fields = [i for i in range(len(names)) if i != label and i not in numeric]
    if not fields:
        raise ValueError(f"{paths[0]} must have a column of categories, got numbers only")
    learned = len(rows) - len(rows) // 10
    labels = torch.tensor([_label(text) for text in columns[label]])
    coded = [_coded(columns[i], learned) for i in fields]
    ids = torch.stack([ids for ids, _ in coded], 1)
    numbers = torch.stack([_scaled(columns[i], learned) for i in numeric], 1) if numeric else torch.zeros(len(rows), 0)
    parts = (Clicks(*(x[part] for x in (ids, numbers, labels))) for part in (slice(learned), slice(learned, None)))
    learn, judge = parts
    return Log(learn, judge, tuple(size for _, size in coded), tuple(names[i] for i in fields))


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            start = file.readline()
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter="\t" if "\t" in start else ",") if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    names = [name.strip().lower() for name in rows[0]]
    if any(name in LABELS for name in names):
        rows = rows[1:]
    elif len(rows[0]) == 1 + CRITEO_NUMBERS + CRITEO_FIELDS and rows[0][0] in ("0", "1"):
        names = ["label", *(f"i{i + 1}" for i in range(CRITEO_NUMBERS)), *(f"c{i + 1}" for i in range(CRITEO_FIELDS))]
    else:
        raise ValueError(
            f"{path} must have a line of names with 'click' or 'label', or be Criteo's: a label, {CRITEO_NUMBERS} "
            f"numbers and {CRITEO_FIELDS} categories between tabs"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"{path}: row {number} must have {len(names)} columns, got {len(row)}")
    return names, rows


def _is_number(name: str, column: Sequence[str]) -> bool:
    called = name[:1] == "i" and name[1:].isdigit()
    return called or (any("." in text for text in column) and all(_number(text) is not None for text in column if text))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _label(text: str) -> float:
    value = _number(text)
    if value not in (0, 1):
        raise ValueError(f"labels must be 0 or 1, got {text!r}")
    return value


def _coded(column: Sequence[str], learned: int) -> tuple[Tensor, int]:
    seen = Counter(text for text in column[:learned] if text)
    number = {text: i for i, text in enumerate((t for t, times in seen.items() if times >= RARE), 1)}
    return torch.tensor([number.get(text, 0) if text else -1 for text in column]), len(number) + 1


def _scaled(column: Sequence[str], learned: int) -> Tensor:
    values = torch.tensor([value if text and (value := _number(text)) is not None else math.nan for text in column])
    values = values.sign() * values.abs().log1p()
    known = values[:learned][~values[:learned].isnan()]
    if not len(known):
        return torch.zeros(len(column))
    spread = known.std(correction=0).clamp(min=1e-6)
    return ((values - known.mean()) / spread).nan_to_num(0.0)
