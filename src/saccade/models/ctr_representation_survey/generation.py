"""Which combinations of features get a representation: what the interaction network is told of pairs.

    OptInter     a = softmax(alpha_p / tau):   e_p = a_0 Cross[x_i, x_j] + a_1 (u_i * u_j) + a_2 0
    OptFeature   1[s_p > 0] <e_i, e_j>,   s_p = sum_k r_k m_ik m_jk of the values, or of the fields, by sigma(alpha_p)
    AutoFIS      alpha_p BN(<e_i, e_j>)

Shape letters: B batch, F fields, P pairs, D width, E width of a pair, K width of m, N rows of data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from saccade.models.click import MISSING, FieldTable, inner_products, pairs_of

#: the columns of OptInter's logits
MEMORISE, FACTORISE, NAIVE = range(3)


def cross_sizes(fields: Sequence[int], pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """How many combinations each pair has.

    Args:
        fields: how many values each has.
        pairs: of fields.
    """
    return tuple(fields[i] * fields[j] for i, j in pairs)


def cross_rows(ids_BF: Tensor, fields: Sequence[int], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The rows (B, P) of all pairs' combinations in one table, -1 where a value is missing.

    Args:
        ids_BF: from 0 in each field, -1 is missing.
        fields: how many values each has.
        pairs: of fields.

    >>> cross_rows(torch.tensor([[1, 2, 0]]), (2, 3, 2), [(0, 1), (1, 2)]).tolist()
    [[5, 10]]
    """
    first, second = (ids_BF[:, [pair[k] for pair in pairs]] for k in (0, 1))
    start = ids_BF.new_tensor((0, *accumulate(cross_sizes(fields, pairs)[:-1])))
    row_BP = first * ids_BF.new_tensor([fields[j] for _, j in pairs]) + second + start
    return torch.where((first == MISSING) | (second == MISSING), MISSING, row_BP)


def frequent(rows_NP: Tensor, total: int, least: int = 20) -> tuple[Tensor, int]:
    """New numbers of combinations: those that are seen often enough have one each, all others share row 0.

    Args:
        rows_NP: of `cross_rows`, over all data that are learned from.
        total: how many combinations there are.
        least: how often is often.

    Returns:
        the new number of each combination, (total,), and how many there are: `numbers[rows]` is `crosses`, what
        networks take.
    """
    times = rows_NP[rows_NP >= 0].bincount(minlength=total)
    often = times >= least
    return torch.where(often, often.cumsum(0), 0), 1 + int(often.sum())


class OptInter(nn.Module):
    """Each pair of categories is memorised, factorised, or left out: by soft weights, and then by the largest.

    Args:
        fields: how many values each has; the first `numeric` of them are numbers, and are not paired.
        dim: of the embeddings, not used.
        numeric: how many are numbers.
        width: E.
        pairs: of categories, counted from the first of them; all where None.
        crosses: rows of the table of combinations, where these are given with each row; all where None.

    Attributes:
        temperature: tau; the trainer lowers it, see `temperature_at`.
        chosen: (P,) of 0 memorise, 1 factorise, 2 naive, once decided; None while searching.

    Raises:
        ValueError: if a pair is none of two categories.
    """

    def __init__(
        self,
        fields: Sequence[int],
        dim: int,
        *,
        numeric: int = 0,
        width: int = 10,
        pairs: Sequence[tuple[int, int]] | None = None,
        crosses: int | None = None,
    ) -> None:
        super().__init__()
        self.categories, self.numeric = tuple(fields[numeric:]), numeric
        count = len(self.categories)
        found = pairs_of(count) if pairs is None else list(pairs)
        if not found or any(len(pair) != 2 or not 0 <= pair[0] < pair[1] < count for pair in found):
            raise ValueError(f"pairs must be (i, j) with i < j of {count} categories, one at least, got {found}")
        self.pairs = tuple((i, j) for i, j in found)
        self.given = crosses is not None
        total = crosses if crosses is not None else sum(cross_sizes(self.categories, self.pairs))
        self.cross, self.factors = FieldTable([total], width), FieldTable(fields, width)
        self.logits = nn.Parameter(torch.zeros(len(self.pairs), 3))
        self.temperature = 1.0
        self.chosen: tuple[int, ...] | None = None
        self.outputs = len(self.pairs) * width

    def shares(self) -> Tensor:
        """a, (P, 3): of memorise, factorise, naive."""
        if self.chosen is not None:
            return torch.eye(3, device=self.logits.device, dtype=self.logits.dtype)[list(self.chosen)]
        return (self.logits / self.temperature).softmax(1)

    def decide(self, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
        """Keep one form of each pair from now on.

        Args:
            chosen: of each pair 0, 1 or 2; the largest logits where None.

        Raises:
            ValueError: if they are not such numbers, one for each pair.
        """
        found = tuple(self.logits.argmax(1).tolist() if chosen is None else chosen)
        if len(found) != len(self.pairs) or not set(found) <= {0, 1, 2}:
            raise ValueError(f"chosen must be 0, 1 or 2 for each of {len(self.pairs)} pairs, got {found}")
        self.chosen = found
        return found

    def forward(self, e_BFD: Tensor, ids: Tensor, crosses: Tensor | None = None) -> Tensor:
        """The pairs' vectors side by side, (B, P E).

        Args:
            e_BFD: embeddings, not used.
            ids: (B, F), numbers first, whose id is 0.
            crosses: rows (B, P) in the table of combinations, -1 is missing; computed where None.

        Raises:
            ValueError: if fields have several values, or crosses are needed and not given.
        """
        if ids.ndim != 2:
            raise ValueError(f"optinter takes one value a field, ids (batch, fields), got {tuple(ids.shape)}")
        if self.given != (crosses is not None):
            raise ValueError("crosses must be given exactly where the network was built with their number")
        if crosses is None:
            crosses = cross_rows(ids[:, self.numeric :], self.categories, self.pairs)
        memorised = self.cross(crosses.flatten()[:, None])[:, 0].unflatten(0, crosses.shape)
        u_BFE = self.factors(ids)[:, self.numeric :]
        factorised = u_BFE[:, [i for i, _ in self.pairs]] * u_BFE[:, [j for _, j in self.pairs]]
        share = self.shares()
        return (share[:, :1] * memorised + share[:, 1:2] * factorised).flatten(1)


def straight_step(s: Tensor) -> Tensor:
    """1[s > 0], with the gradient of s.

    Args:
        s: scores.
    """
    return s + ((s > 0).to(s.dtype) - s).detach()


class OptFeature(nn.Module):
    """Each pair of a row is used or not, by its values or by its fields: gated inner products.

    Args:
        fields: how many values each has.
        dim: of the embeddings, not used.
        numeric: how many of the fields are numbers; they are paired as well.
        width: of the selection embeddings.
        hidden: K.

    Attributes:
        hard: in retraining, a pair is judged by its values where alpha > 0, else by its fields.
    """

    def __init__(
        self, fields: Sequence[int], dim: int, *, numeric: int = 0, width: int = 16, hidden: int = 128
    ) -> None:
        super().__init__()
        self.values, self.field = FieldTable(fields, width), nn.Parameter(torch.empty(len(fields), width))
        nn.init.xavier_uniform_(self.field)
        self.of_value, self.of_field = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.r_value, self.r_field = (nn.Parameter(torch.full((hidden,), hidden**-0.5)) for _ in range(2))
        self.outputs = len(fields) * (len(fields) - 1) // 2
        self.alpha, self.hard = nn.Parameter(torch.zeros(self.outputs)), False

    def scores(self, ids: Tensor) -> Tensor:
        """s, (B, P)."""
        m_BFK, m_1FK = self.of_value(self.values(ids)), self.of_field(self.field)[None]
        by_value = inner_products(m_BFK, m_BFK * self.r_value)
        by_field = inner_products(m_1FK, m_1FK * self.r_field)
        share_P = (self.alpha > 0).to(self.alpha.dtype) if self.hard else self.alpha.sigmoid()
        return share_P * by_value + (1 - share_P) * by_field

    def forward(self, e_BFD: Tensor, ids: Tensor, crosses: Tensor | None = None) -> Tensor:
        """The gated products (B, P).

        Args:
            e_BFD: embeddings.
            ids: (B, F), numbers first.
            crosses: is not used.
        """
        return straight_step(self.scores(ids)) * inner_products(e_BFD)


class AutoFIS(nn.Module):
    """A gate for each pair's inner product; those that become 0 are dropped.

    Args:
        fields: how many values each has.
        dim: of the embeddings, not used.
        numeric: how many of the fields are numbers; they are paired as well.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, numeric: int = 0) -> None:
        super().__init__()
        self.outputs = len(fields) * (len(fields) - 1) // 2
        self.gates = nn.Parameter(torch.ones(self.outputs))
        self.norm = nn.BatchNorm1d(self.outputs, affine=False)

    def forward(self, e_BFD: Tensor, ids: Tensor, crosses: Tensor | None = None) -> Tensor:
        """The gated products (B, P).

        Args:
            e_BFD: embeddings.
            ids, crosses: are not used.
        """
        return self.gates * self.norm(inner_products(e_BFD))


GENERATIONS = {"optinter": OptInter, "optfeature": OptFeature, "autofis": AutoFIS}
