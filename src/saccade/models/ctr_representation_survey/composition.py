"""How a feature is represented, by parts that features share.

    hash                 E[v mod m]
    double hash          E1[v mod m] + E2[h(v) mod m],   h(v) = (a v + b) mod p
    quotient-remainder   E_q[v div m] o E_r[v mod m],    o one of add, multiply, concat
    deep hash            MLP([h_1(v) .. h_k(v)]) of hashes in [-1, 1]
    tensor train         G_1[i_1] G_2[i_2] G_3[i_3],     i the digits of v
    codebook             [C_1[code_1(v)] .. C_G[code_G(v)]]

Shape letters: B batch, F fields, D width, V values of all fields, G groups, C codes, K hashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.click import FieldTable, rows_of
from saccade.models.ctr_representation_survey.tables import ComposedTable

#: p of the hashes, a prime, and how many places of a deep hash there are
PRIME, PLACES = 2**31 - 1, 1_000_000
OPERATIONS = ("add", "multiply", "concat")


def hashes(v: Tensor, count: int, seed: int = 0) -> Tensor:
    """(a v + b) mod p for `count` fixed pairs a, b, on a new last axis.

    Args:
        v: int64, below p.
        count: K.
        seed: of the pairs.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(1, PRIME, (2, count), generator=generator, device="cpu").tolist()
    a, b = (v.new_tensor(row) for row in drawn)
    return (v[..., None] * a + b) % PRIME


def share_of(fields: Sequence[int], compression: float) -> tuple[int, ...]:
    """How many rows each field has where all are fewer by a factor; one at least.

    Raises:
        ValueError: if the factor is below 1.
    """
    if compression < 1:
        raise ValueError(f"compression must be at least 1, got {compression}")
    return tuple(max(1, math.ceil(size / compression)) for size in fields)


class HashTable(ComposedTable):
    """Values that are alike modulo m share a vector.

    Args:
        fields, dim: of the table.
        compression: values of a field over its m; 1 gives each a vector of its own.

    Raises:
        ValueError: if the compression is below 1.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, compression: float = 10) -> None:
        super().__init__(fields, dim)
        self.table = FieldTable(share_of(fields, compression), dim)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        return self.table(ids_BF % ids_BF.new_tensor(self.table.fields))


class DoubleHashTable(ComposedTable):
    """Two hashes, each with a table; few values share both.

    Args:
        fields, dim: of the table.
        compression: values of a field over the rows of both of its tables.
        seed: of the second hash.

    Raises:
        ValueError: if the compression is below 1.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, compression: float = 10, seed: int = 0) -> None:
        super().__init__(fields, dim)
        rows, self.seed = share_of(share_of(fields, compression), 2), seed
        self.first, self.second = FieldTable(rows, dim), FieldTable(rows, dim)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        rows_F = ids_BF.new_tensor(self.first.fields)
        return self.first(ids_BF % rows_F) + self.second(hashes(ids_BF, 1, self.seed)[..., 0] % rows_F)


class QuotientRemainderTable(ComposedTable):
    """A vector of the quotient with one of the remainder: distinct for distinct values, by few rows.

    Args:
        fields, dim: of the table; `dim` even for "concat".
        operation: "add", "multiply" or "concat".
        divisor: m of all fields; ceil(sqrt(values)) of each where None.

    Raises:
        ValueError: if the operation is unknown, m is not positive, or the width is odd for "concat".
    """

    def __init__(
        self, fields: Sequence[int], dim: int, *, operation: str = "multiply", divisor: int | None = None
    ) -> None:
        super().__init__(fields, dim)
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
        if divisor is not None and divisor < 1:
            raise ValueError(f"divisor must be positive, got {divisor}")
        if operation == "concat" and dim % 2:
            raise ValueError(f"dim must be even for concat, got {dim}")
        self.operation = operation
        self.divisors = tuple(math.ceil(math.sqrt(size)) if divisor is None else min(divisor, size) for size in fields)
        width = dim // 2 if operation == "concat" else dim
        self.quotient = FieldTable([math.ceil(size / m) for size, m in zip(fields, self.divisors)], width)
        self.remainder = FieldTable(self.divisors, width)
        if operation == "multiply":  # products of small numbers would be too small to begin with
            nn.init.ones_(self.quotient.weight)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        m_F = ids_BF.new_tensor(self.divisors)
        q_BFD, r_BFD = self.quotient(ids_BF // m_F), self.remainder(ids_BF % m_F)
        if self.operation == "concat":
            return torch.cat([q_BFD, r_BFD], -1)
        return q_BFD * r_BFD if self.operation == "multiply" else q_BFD + r_BFD


class DeepHashTable(ComposedTable):
    """DHE: no table at all; an MLP reads many hashes of a value.

    Args:
        fields, dim: of the table.
        hashes: K.
        hidden: width of the MLP.
        seed: of the hashes.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, hashes: int = 64, hidden: int = 64, seed: int = 0) -> None:
        super().__init__(fields, dim)
        self.hashes, self.seed = hashes, seed
        self.fc1, self.fc2 = nn.Linear(hashes, hidden), nn.Linear(hidden, dim)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        places = hashes(rows_of(ids_BF, self.fields)[0], self.hashes, self.seed) % PLACES
        code_BFK = (2 * places / (PLACES - 1) - 1).to(self.fc1.weight.dtype)
        return self.fc2(F.mish(self.fc1(code_BFK)))


class TensorTrainTable(ComposedTable):
    """The whole table as a product of three small ones (TT-Rec).

    Args:
        fields, dim: of the table; `dim` is d^3 or more, and cut.
        rank: of the products.

    Raises:
        ValueError: if the rank is not positive.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, rank: int = 4) -> None:
        super().__init__(fields, dim)
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        self.digits, d = _root(sum(fields)), _root(dim)
        sizes = ((1, d, rank), (rank, d, rank), (rank, d, 1))
        scale = (0.05 / rank) ** (1 / 3)
        self.cores = nn.ParameterList(nn.Parameter(scale * torch.randn(self.digits, *size)) for size in sizes)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        row_BF = rows_of(ids_BF, self.fields)[0]
        n = self.digits
        first, second, third = (core[row_BF // n**k % n] for k, core in enumerate(self.cores))
        left = torch.einsum("bfiar,bfrcs->bfacs", first, second)
        return torch.einsum("bfacs,bfsdj->bfacd", left, third).flatten(2)[..., : self.dim]


def _root(size: int) -> int:
    """The smallest n with n^3 >= size."""
    n = max(1, math.floor(size ** (1 / 3)) - 1)
    while n**3 < size:
        n += 1
    return n


class CodebookTable(ComposedTable):
    """Product quantisation: a value's vector is put together of G entries of shared codebooks.

    Args:
        fields, dim: of the table.
        groups: G, which divides `dim`.
        codes: C, entries of a codebook, 256 at most.

    Raises:
        ValueError: if the groups do not divide the width, or there are too many codes.
    """

    codes: Tensor

    def __init__(self, fields: Sequence[int], dim: int, *, groups: int = 4, codes: int = 16) -> None:
        super().__init__(fields, dim)
        if groups < 1 or dim % groups or not 1 <= codes <= 256:
            raise ValueError(f"groups must divide dim ({dim}), codes be 1 to 256; got {groups} and {codes}")
        self.books = nn.Parameter(0.05 * torch.randn(groups, codes, dim // groups))
        self.register_buffer("codes", hashes(torch.arange(sum(fields)), groups) % codes)

    @classmethod
    def of(cls, table: FieldTable, *, groups: int = 4, codes: int = 16, rounds: int = 10) -> CodebookTable:
        """A trained table in codes: k-means of each group's numbers, from rows that are spread evenly by their size.

        Args:
            table: whose weight is quantised.
            groups, codes: as for the constructor.
            rounds: of k-means.

        Raises:
            ValueError: as for the constructor.
        """
        made = cls(table.fields, table.dim, groups=groups, codes=codes).to(table.weight)
        for g, part_VD in enumerate(table.weight.detach().chunk(groups, 1)):
            order = part_VD.norm(dim=1).argsort()
            middle_CD = part_VD[order[torch.linspace(0, len(part_VD) - 1, codes).long()]].clone()
            for _ in range(rounds):
                code_V = torch.cdist(part_VD, middle_CD).argmin(1)
                member_VC = F.one_hot(code_V, codes).to(part_VD)
                count_C1 = member_VC.sum(0)[:, None]
                middle_CD = torch.where(count_C1 > 0, member_VC.T @ part_VD / count_C1.clamp(min=1), middle_CD)
            made.codes[:, g] = torch.cdist(part_VD, middle_CD).argmin(1)
            made.books.data[g] = middle_CD
        return made

    def vectors(self, ids_BF: Tensor) -> Tensor:
        code_BFG = self.codes[rows_of(ids_BF, self.fields)[0]]
        groups = torch.arange(len(self.books), device=code_BFG.device)
        return self.books[groups, code_BFG].flatten(2)

    def stored(self) -> int:
        """The codebooks, and the bits of the codes in words of 32."""
        bits = self.codes.numel() * max(1, math.ceil(math.log2(self.books.shape[1])))
        return self.books.numel() + math.ceil(bits / 32)
