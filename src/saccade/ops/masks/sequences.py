"""Masks of real tokens, and of sequences that are packed into one row.

Shape letters: B batch, N queries, M keys, S sequences; m blocks of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from saccade.ops.masks.bands import Band
from saccade.ops.masks.block_states import PARTIAL, as_states, block_range, block_sums, known_true, row_of, size_pair
from saccade.ops.masks.mask import Mask, agree
from saccade.ops.masks.runs import Runs, joined, runs_of


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys that are real tokens.

    Attributes:
        valid_BM: bool; B may be 1, for all rows.
    """

    valid_BM: Tensor

    @property
    def batch(self) -> int:
        return self.valid_BM.shape[0]

    def check(self, n: int, m: int) -> None:
        if self.valid_BM.shape[1] != m:
            raise ValueError(f"the padding mask is for {self.valid_BM.shape[1]} keys, got {m}")

    def tensors(self) -> list[Tensor]:
        return [self.valid_BM]

    def to(self, device: torch.device | str) -> Mask:
        return Padding(self.valid_BM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.valid_BM[row_of(b, self.batch), k] & (q >= 0)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        counts_Bm = block_sums(self.valid_BM.to(device).to(torch.int32), block_k)
        sizes_m = block_sums(torch.ones(1, m, dtype=torch.int32, device=device), block_k)
        states = as_states(counts_Bm > 0, counts_Bm == sizes_m)
        return states[:, None, None].expand(-1, -1, ceil(n / block_q), -1)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        return Padding(self.valid_BM[:, keys.start : keys.stop])

    def reach(self, queries: range, n: int, m: int) -> Runs:
        return runs_of(self.valid_BM.any(0)) if queries else []

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        self.check(n, m)
        return self.valid_BM.to(device)[:, None, None].expand(-1, 1, n, -1)

    def hides_nothing(self, n: int, m: int) -> bool:
        return known_true(self.valid_BM)

    def __repr__(self) -> str:
        return f"padding({self.valid_BM.shape[0]} rows of {self.valid_BM.shape[1]})"


def padding(valid_BM: Tensor) -> Mask:
    """Keys marked True in `valid_BM` (B, M), for every query.

    Args:
        valid_BM: bool, True = real token; B may be 1, for all rows.

    Raises:
        ValueError: if it is no bool tensor of two axes.
    """
    if valid_BM.dtype != torch.bool or valid_BM.ndim != 2:
        raise ValueError(
            f"valid must be a bool tensor of shape (B, M), got {valid_BM.dtype} of shape {tuple(valid_BM.shape)}"
        )
    return Padding(valid_BM)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Pairs in the same document.

    Attributes:
        query_BN, key_BM: integer ids; B may be 1, for all rows.
    """

    query_BN: Tensor
    key_BM: Tensor

    @property
    def batch(self) -> int:
        return agree(self.query_BN.shape[0], self.key_BM.shape[0], "batch rows")

    def check(self, n: int, m: int) -> None:
        if (self.query_BN.shape[1], self.key_BM.shape[1]) != (n, m):
            raise ValueError(
                f"documents() was given ids of {self.query_BN.shape[1]} queries and {self.key_BM.shape[1]} keys, "
                f"but there are {n} queries and {m} keys"
            )

    def tensors(self) -> list[Tensor]:
        return [self.query_BN, self.key_BM]

    def to(self, device: torch.device | str) -> Mask:
        return Documents(self.query_BN.to(device), self.key_BM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = self.query_BN[row_of(b, self.query_BN.shape[0]), q]
        return query == self.key_BM[row_of(b, self.key_BM.shape[0]), k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        low_q, high_q = block_range(self.query_BN.to(device), block_q)
        low_k, high_k = block_range(self.key_BM.to(device), block_k)
        low_q, high_q, low_k, high_k = low_q[..., None], high_q[..., None], low_k[:, None], high_k[:, None]
        some = (low_q <= high_k) & (low_k <= high_q)
        every = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
        return as_states(some, every)[:, None]

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        return Documents(self.query_BN[:, queries.start : queries.stop], self.key_BM[:, keys.start : keys.stop])

    def reach(self, queries: range, n: int, m: int) -> Runs:
        asking, rows = self.query_BN[:, queries.start : queries.stop], self.batch
        if not queries or not m:
            return []
        found: Runs = []
        for ids, keys in zip(asking.expand(rows, -1), self.key_BM.expand(rows, -1)):
            if bool((keys[1:] >= keys[:-1]).all()):  # packed one after the other
                first, end = torch.searchsorted(keys, ids.min()), torch.searchsorted(keys, ids.max(), right=True)
                found.append(range(int(first), int(end)))
            else:
                found += runs_of(torch.isin(keys, ids.unique()))
        return joined(found)

    def hides_nothing(self, n: int, m: int) -> bool:
        return (
            m > 0 and known_true(self.query_BN == self.key_BM[:, :1]) and known_true(self.key_BM == self.key_BM[:, :1])
        )

    def __repr__(self) -> str:
        count = int(self.key_BM.max()) - int(self.key_BM.min()) + 1 if self.key_BM.numel() else 0
        return f"documents({count} of {self.key_BM.shape[1]} tokens)"


def documents(ids_BN: Tensor, key_ids_BM: Tensor | None = None) -> Mask:
    """Pairs whose document ids are equal. Sorted ids (packed sequences) give an exact block structure.

    Args:
        ids_BN: integer ids (B, N), or (1, N) for all rows, or (N,).
        key_ids_BM: ids of the keys where they differ from the queries'.

    Raises:
        ValueError: if the ids are no integers of these shapes.
    """
    query = torch.atleast_2d(ids_BN)
    key = query if key_ids_BM is None else torch.atleast_2d(key_ids_BM)
    for ids in (query, key):
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers of shape (B, N), got {ids.dtype} of shape {tuple(ids.shape)}")
    return Documents(query, key)


def packed(cu_seqlens: Tensor) -> Mask:
    """Pairs in the same one of the sequences that are packed, one after the other, into one row.

    >>> import torch
    >>> packed(torch.tensor([0, 2, 3])).dense(3, 3)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]

    Args:
        cu_seqlens: integers (S + 1,), where each of the S sequences begins and the last one ends: 0, ..., N; as
            variable-length attention takes it.

    Raises:
        ValueError: if it does not rise from 0.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(
            f"cu_seqlens must be integers of shape (sequences + 1,), got {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, got {cu_seqlens.tolist()}")
    return documents(torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths))


@dataclass(frozen=True, eq=False)
class PerDocument(Mask):
    """A mask within each document, its positions counted from the document's first token.

    Attributes:
        documents: which pairs are in one.
        inner: the mask within.
        query_start_BN, key_start_BM: position of the first token of each token's document.
    """

    documents: Documents
    inner: Mask
    query_start_BN: Tensor
    key_start_BM: Tensor

    @property
    def batch(self) -> int:
        return agree(self.documents.batch, self.inner.batch, "batch rows")

    @property
    def heads(self) -> int:
        return self.inner.heads

    def check(self, n: int, m: int) -> None:
        self.documents.check(n, m)

    def tensors(self) -> list[Tensor]:
        return [*self.documents.tensors(), *self.inner.tensors(), self.query_start_BN, self.key_start_BM]

    def to(self, device: torch.device | str) -> Mask:
        starts = self.query_start_BN.to(device), self.key_start_BM.to(device)
        return PerDocument(self.documents.to(device), self.inner.to(device), *starts)  # type: ignore[arg-type]

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first_q = self.query_start_BN[row_of(b, self.query_start_BN.shape[0]), q]
        first_k = self.key_start_BM[row_of(b, self.key_start_BM.shape[0]), k]
        # of another document the inner mask may say what it likes, but it must be asked for positions that there are
        inner = self.inner.allowed(b, h, q - first_q, (k - first_k).clamp(min=0))
        return self.documents.allowed(b, h, q, k) & inner

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        first_q = self.query_start_BN[:, queries.start : queries.stop] - queries.start
        first_k = self.key_start_BM[:, keys.start : keys.stop] - keys.start
        return PerDocument(self.documents.part(queries, keys, n, m), self.inner, first_q, first_k)  # type: ignore[arg-type]

    def reach(self, queries: range, n: int, m: int) -> Runs:
        return self.documents.reach(queries, n, m)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        # what the inner mask allows depends on where the document begins; only the documents are known by blocks
        return self.documents.block_map(n, m, block_size, device).clamp(max=PARTIAL)

    def __repr__(self) -> str:
        return f"per_document({self.documents!r}, {self.inner!r})"


def per_document(ids_BN: Tensor, inner: Mask) -> Mask:
    """`inner` within each document of a packed sequence, with positions counted from the document's first token.

    Args:
        ids_BN: sorted integer ids, as `documents` takes them.
        inner: a mask of positions within a document.

    Raises:
        ValueError: if the ids are no integers of these shapes.

    >>> import torch
    >>> from saccade.ops.masks import causal, prefix
    >>> mask = per_document(torch.tensor([0, 0, 0, 1, 1, 1]), prefix(1) | causal())
    >>> mask.dense(6, 6)[0, 0, 3].tolist()
    [False, False, False, True, False, False]
    """
    same = documents(ids_BN)
    assert isinstance(same, Documents)
    if isinstance(inner, Band):  # knows differences of positions only, which a common start does not change
        return same & inner
    ids = same.query_BN
    change = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    start = torch.where(change, torch.arange(ids.shape[1], device=ids.device), 0).cummax(-1).values
    return PerDocument(same, inner, start, start)
