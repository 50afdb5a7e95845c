"""What a person saw in attention, written down: from the words of a text to which pairs of them it is about.

    P_ij = 1: token i may attend to token j

| predicate | P_ij |
|---|---|
| `matching` | x_i = x_j |
| `within_sentences` | i and j lie in one span from a start token to the end token of the same number |
| `within_context` | i and j lie on the same side of the first separator; all of row 0, the class token |
| `positional` | j - i is one of some offsets |
| `written` | any rule of (x_i, x_j, i, j) |

Shape letters: B batch, L tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: ids (B, L) -> bool (B, L, L)
Predicate = Callable[[Tensor], Tensor]

#: the patterns of position, whose heads need no queries and keys
POSITIONAL = ("previous", "next")


def matching(ids_BL: Tensor, *, ignored: Sequence[int] = (), diagonal: bool = False, fallback: bool = True) -> Tensor:
    """Tokens that are the same.

    Args:
        ids_BL: tokens.
        ignored: those whose rows are cleared first, as `without_letters` finds them.
        diagonal: a token attends to itself too.
        fallback: a row without any match may attend to all.

    >>> matching(torch.tensor([[5, 6, 5]]), fallback=False).int().tolist()
    [[[0, 0, 1], [0, 0, 0], [1, 0, 0]]]
    """
    same_BLL = ids_BL[:, :, None] == ids_BL[:, None]
    if not diagonal:
        same_BLL = same_BLL & ~torch.eye(ids_BL.shape[1], dtype=torch.bool, device=ids_BL.device)
    if len(ignored):
        there = torch.isin(ids_BL, torch.as_tensor(ignored, device=ids_BL.device))
        same_BLL = same_BLL & ~there[:, :, None]
    return same_BLL | ~same_BLL.any(-1, keepdim=True) if fallback else same_BLL


def within_sentences(ids_BL: Tensor, start: int, end: int) -> Tensor:
    """Tokens of one sentence: the n-th span goes from the n-th start to the n-th end, both in it.

    A row in no span is empty.

    Args:
        ids_BL: tokens.
        start, end: the ids that open and close a sentence.
    """
    starts_BL, ends_BL = ids_BL == start, ids_BL == end
    # i lies in the spans from `closed` + 1 to `opened`
    opened_BL, closed_BL = starts_BL.cumsum(1), ends_BL.cumsum(1) - ends_BL.long()
    opened_BL = torch.minimum(opened_BL, ends_BL.sum(1, keepdim=True))
    last_BLL = torch.minimum(opened_BL[:, :, None], opened_BL[:, None])
    return torch.maximum(closed_BL[:, :, None], closed_BL[:, None]) < last_BLL


def within_context(ids_BL: Tensor, separator: int) -> Tensor:
    """Tokens on the same side of the first separator, which is of the right side; the first row is full.

    Args:
        ids_BL: tokens.
        separator: its id.
    """
    right_BL = (ids_BL == separator).cumsum(1) > 0
    first_L1 = torch.arange(ids_BL.shape[1], device=ids_BL.device)[:, None] == 0
    return (right_BL[:, :, None] == right_BL[:, None]) | first_L1


def positional(ids_BL: Tensor, *offsets: int) -> Tensor:
    """Tokens at an offset from each other: -1 is the previous one, 1 the next; of several, any.

    Args:
        ids_BL: tokens.
        *offsets: j - i.
    """
    i_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    apart_LL = i_L - i_L[:, None]
    return torch.isin(apart_LL, torch.tensor(offsets, device=ids_BL.device)).expand(len(ids_BL), -1, -1)


def written(ids_BL: Tensor, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Tokens for which a rule holds.

    Args:
        ids_BL: tokens.
        rule: of x_i (B, L, 1), x_j (B, 1, L), i (L, 1) and j (1, L), to bool.

    >>> written(torch.tensor([[3, 4, 3]]), lambda xi, xj, i, j: (xi == xj) & (j < i)).int().tolist()
    [[[0, 0, 0], [0, 0, 0], [1, 0, 0]]]
    """
    i_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    found = rule(ids_BL[:, :, None], ids_BL[:, None], i_L[:, None], i_L[None])
    return found.expand(len(ids_BL), len(i_L), len(i_L))


def summarization(start: int, end: int, *, ignored: Sequence[int] = ()) -> dict[str, Predicate]:
    """The paper's four patterns of a text whose sentences are marked; heads in the order of the projected layers.

    Args:
        start, end: ids around each sentence, [CLS] and [SEP].
        ignored: of `matching`.
    """
    return {
        "matching": partial(matching, ignored=tuple(ignored)),
        "sentence": partial(within_sentences, start=start, end=end),
        **neighbours(),
    }


def segmentation(separator: int) -> dict[str, Predicate]:
    """The paper's four patterns of [CLS] left [SEP] right.

    Args:
        separator: the id of [SEP].
    """
    return {
        "matching": partial(matching, diagonal=True, fallback=False),
        "context": partial(within_context, separator=separator),
        **neighbours(),
    }


def neighbours() -> dict[str, Predicate]:
    """The previous token and the next one."""
    return {name: _Positional(offset) for name, offset in zip(POSITIONAL, (-1, 1))}


class _Positional:
    """`positional` with its offsets given."""

    def __init__(self, *offsets: int) -> None:
        self.offsets = offsets

    def __call__(self, ids_BL: Tensor) -> Tensor:
        return positional(ids_BL, *self.offsets)


def density(pattern_BLL: Tensor) -> Tensor:
    """The share of pairs that a pattern is about, which the paper calls its sparsity ratio."""
    return pattern_BLL.double().mean()


def without_letters(tokenizer: Any) -> list[int]:
    """The tokens that matching leaves out where it is fixed: special ones, and those without a letter.

    Args:
        tokenizer: of transformers.
    """
    special = set(tokenizer.all_special_ids)
    entries = tokenizer.get_vocab().items()
    return sorted(i for word, i in entries if i in special or not any(letter.isalpha() for letter in word))


def assigned(names: Iterable[str], num_heads: int, per_pattern: int = 1) -> dict[int, str]:
    """Which head has which pattern: of n patterns, pattern p has the heads n j + p for j below `per_pattern`.

    Args:
        names: of the patterns, in order.
        num_heads: of a layer.
        per_pattern: heads of each; 0 for none.

    Raises:
        ValueError: if there are too few heads.

    >>> assigned(("matching", "sentence"), 5, 2)
    {0: 'matching', 1: 'sentence', 2: 'matching', 3: 'sentence'}
    """
    names = list(names)
    if per_pattern < 0 or per_pattern * len(names) > num_heads:
        raise ValueError(f"{len(names)} patterns with {per_pattern} heads each do not fit into {num_heads} heads")
    return {len(names) * j + p: name for j in range(per_pattern) for p, name in enumerate(names)}


def by_head(ids_BL: Tensor, patterns: Mapping[str, Predicate], heads: Mapping[int, str], num_heads: int) -> Tensor:
    """The patterns of a layer's heads, (B, H, L, L); a head without one may attend to all.

    Args:
        ids_BL: tokens.
        patterns: by name.
        heads: number -> name.
        num_heads: H.

    Raises:
        ValueError: if a head's pattern is not among them.
    """
    if strange := set(heads.values()) - set(patterns):
        raise ValueError(f"heads must have patterns of {', '.join(patterns)}, got {', '.join(sorted(strange))}")
    made = {name: patterns[name](ids_BL) for name in dict.fromkeys(heads.values())}
    everything = torch.ones(*ids_BL.shape, ids_BL.shape[1], dtype=torch.bool, device=ids_BL.device)
    return torch.stack([made[heads[h]] if h in heads else everything for h in range(num_heads)], 1)
