"""Generators of sequences that are themselves the benchmark.

Shape letters: B batch, N tokens, P key-value pairs.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

#: label of positions that are not scored (`torch.nn.functional.cross_entropy`'s own)
IGNORE = -100


def recall(
    batch: int,
    length: int,
    pairs: int,
    *,
    vocab: int = 64,
    power: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: tokens and labels, int64 (B, N) each.

    A row begins with P pairs `key value`, all keys different. Later each key comes once more, alone; there its value
    is the label, every other label is `IGNORE`. The places of the queries are drawn without replacement with weight
    i^(power - 1) for the i-th place after the pairs: small powers ask soon, power 1 asks anywhere. Places between
    hold random values.

    Args:
        batch: B.
        length: N.
        pairs: P.
        vocab: tokens; the lower half are keys, the upper half values.
        power: where the queries come, see above; positive.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the pairs do not fit the length or the vocabulary.
    """
    if batch < 1 or pairs < 1:
        raise ValueError(f"batch and pairs must be positive, got {batch} and {pairs}")
    if 3 * pairs > length:
        raise ValueError(f"length must be at least 3 x pairs ({3 * pairs}), got {length}")
    if vocab < 2 or pairs > vocab // 2:
        raise ValueError(f"pairs must be at most half the vocabulary ({vocab // 2}), got {pairs}")
    if power <= 0:
        raise ValueError(f"power must be positive, got {power}")
    half = vocab // 2
    keys_BP = torch.rand(batch, half, generator=generator).argsort(-1)[:, :pairs]
    values_BP = torch.randint(half, vocab, (batch, pairs), generator=generator)
    tokens_BN = torch.randint(half, vocab, (batch, length), generator=generator)
    labels_BN = torch.full((batch, length), IGNORE)
    tokens_BN[:, 0 : 2 * pairs : 2] = keys_BP
    tokens_BN[:, 1 : 2 * pairs : 2] = values_BP
    weight = torch.arange(1, length - 2 * pairs + 1, dtype=torch.float).pow(power - 1)
    place_BP = 2 * pairs + torch.multinomial(weight.expand(batch, -1), pairs, generator=generator)
    tokens_BN.scatter_(1, place_BP, keys_BP)
    labels_BN.scatter_(1, place_BP, values_BP)
    return tokens_BN, labels_BN


#: tokens of ListOps by number; 0 fills up short rows
LISTOPS_TOKENS = ("", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")
_OPERATORS = ("[MAX", "[MIN", "[MED", "[SM")
_TOKEN = {name: number for number, name in enumerate(LISTOPS_TOKENS)}


def listops(
    batch: int,
    length: int,
    *,
    least: int | None = None,
    depth: int = 10,
    arguments: int = 10,
    nesting: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Long Range Arena's ListOps: tokens (B, N), filled up with 0 at the end, and values 0 to 9 (B,).

    An expression is an operator (maximum, minimum, median rounded down, sum modulo 10), two to `arguments` arguments
    and `]`; an argument is an expression with probability `nesting` (while above `depth` levels) and a digit
    otherwise. Expressions outside `least` to `length` tokens are drawn again. The Arena's own: length 2000, least 500,
    depth 10, 10 arguments.

    Args:
        batch: B.
        length: N, the most tokens that an expression has.
        least: a quarter of the length where None.
        depth: levels of expressions within each other, at most.
        arguments: of an operator, at most.
        nesting: probability that an argument is an expression.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the limits leave no expressions.

    >>> tokens, values = listops(1, 24, generator=torch.Generator().manual_seed(0))
    >>> " ".join(LISTOPS_TOKENS[t] for t in tokens[0] if t), int(values)
    ('[SM 1 8 [MAX 7 2 [MIN 1 0 1 6 ] 6 3 7 ] 1 5 ]', 2)
    """
    least = length // 4 if least is None else least
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    if depth < 1 or arguments < 2:
        raise ValueError(f"depth must be at least 1 and arguments at least 2, got {depth} and {arguments}")
    if length < 4 or least > length:
        raise ValueError(f"length must be at least 4 and no less than least ({least}), got {length}")
    if depth == 1 and least > arguments + 2:
        raise ValueError(f"least must be at most {arguments + 2} at depth 1, got {least}")
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    tokens_BN = torch.zeros(batch, length, dtype=torch.long)
    values = []
    for row in range(batch):
        for _ in range(100_000):
            names: list[str] = []
            value = _expression(draw, names, length, depth, arguments, nesting)
            if value is not None and len(names) >= least:
                break
        else:
            raise ValueError(f"no expression of {least} to {length} tokens was found at depth {depth}")
        tokens_BN[row, : len(names)] = torch.tensor([_TOKEN[name] for name in names])
        values.append(value)
    return tokens_BN, torch.tensor(values)


def _expression(
    draw: random.Random, names: list[str], length: int, depth: int, arguments: int, nesting: float
) -> int | None:
    """Append one expression to `names` and return its value; None once it grows past `length`."""
    operator = draw.choice(_OPERATORS)
    names.append(operator)
    values: list[int] = []
    for _ in range(draw.randint(2, arguments)):
        if depth > 1 and draw.random() < nesting:
            inner = _expression(draw, names, length, depth - 1, arguments, nesting)
            if inner is None:
                return None
            values.append(inner)
        else:
            values.append(draw.randint(0, 9))
            names.append(str(values[-1]))
        if len(names) >= length:
            return None
    names.append("]")
    if operator == "[MAX":
        return max(values)
    if operator == "[MIN":
        return min(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
