"""Modifications of scores and masks, FlexAttention's block lists, jagged batches, and the paged cache.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E head dim of v, R rotary channels,
P pages, T tokens of all sequences laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import EMPTY, FULL, PARTIAL, Mask
from saccade.ops.score_mods import ScoreMod


def relative() -> ScoreMod:
    """s + (i - j)."""
    return score_mods.alibi(torch.tensor([-1.0]))


def rope_part(q_BHNR: Tensor, k_BKMR: Tensor, scale: float) -> ScoreMod:
    """s + scale q_rope . k_rope: the decoupled rotary part of multi-head latent attention.

    Args:
        q_BHNR, k_BKMR: the rotated channels; K divides H.
        scale: of their product.
    """
    group = q_BHNR.shape[1] // k_BKMR.shape[1]

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h, i, j = (x.flatten() for x in (b, h, i, j))
        q = q_BHNR[b[:, None, None], h[:, None], i]
        k = k_BKMR[b[:, None, None], (h // group)[:, None], j]
        return s + scale * (q @ k.mT)

    return mod


def dilated_window(reach: int, dilation: int) -> Mask:
    """|i - j| <= reach and |i - j| a multiple of `dilation`.

    Args:
        reach: the largest distance.
        dilation: 1 is a plain window.

    Raises:
        ValueError: if `reach` is negative or `dilation` below 1.
    """
    if reach < 0 or dilation < 1:
        raise ValueError(f"reach must not be negative and dilation at least 1, got {reach} and {dilation}")
    return masks.window(reach, reach) & masks.function(lambda b, h, q, k: (q - k) % dilation == 0)


def global_window(tokens: int, left: int, right: int = 0) -> Mask:
    """A sliding window, and the first `tokens` keys for everybody.

    Args:
        tokens: how many.
        left, right: keys before and after a query that it sees.

    Raises:
        ValueError: if `tokens` is negative or the window would hold no key.
    """
    return masks.prefix(tokens) | masks.window(left, right)


@dataclass(frozen=True)
class BlockMask:
    """FlexAttention's block lists: columns by row, and (`q_*`) rows by column; entries after the counted ones are none.

    A block is partial where some of its pairs are allowed, full where all are; pairs beyond the last token are not.

    Attributes:
        kv_num_blocks, kv_indices: how many partial blocks each row has, (B', H', rows), and their columns, (B', H',
            rows, columns).
        full_kv_num_blocks, full_kv_indices: the same of the full ones.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the same with rows and columns exchanged.
        shape: numbers of queries and keys.
        block_size: queries and keys of a block.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    shape: tuple[int, int]
    block_size: tuple[int, int]

    def to_dense(self) -> Tensor:
        """1 where a block is partial or full, (B', H', rows, columns)."""
        dense = torch.zeros_like(self.kv_indices)
        columns = torch.arange(dense.shape[-1], device=dense.device)
        for count, index in ((self.kv_num_blocks, self.kv_indices), (self.full_kv_num_blocks, self.full_kv_indices)):
            dense = dense.scatter_add(-1, index.long(), (columns < count[..., None]).to(dense.dtype))
        return dense

    def sparsity(self) -> float:
        """Per cent of the pairs that lie in no listed block; below 0 where blocks reach beyond the tokens."""
        blocks = self.to_dense()
        computed = blocks.sum().item() * self.block_size[0] * self.block_size[1]
        return 100.0 * (1.0 - computed / (blocks.shape[0] * blocks.shape[1] * self.shape[0] * self.shape[1]))


def create_block_mask(mask: Mask, n: int, m: int, block_size: int | Sequence[int] = 128) -> BlockMask:
    """The block lists of a mask for `n` queries and `m` keys, each block judged by all its pairs.

    Args:
        mask: any mask object; B' and H' are its batch and heads, 1 where it does not vary.
        n, m: numbers of queries and keys.
        block_size: of a block, one number or (queries, keys).

    Raises:
        ValueError: if the mask is not for these lengths or the block size not positive.
    """
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    mask.check(n, m)
    # whatever a mask knows of its blocks is cautious: partial may be said of any. Asking for each pair is exact.
    exact = masks.function(mask.allowed, batch=mask.batch, heads=mask.heads)
    states = exact.block_map(n, m, (block_q, block_k)).clone()
    # a block that reaches beyond the last token holds pairs that are not allowed
    if n % block_q:
        states[..., -1, :] = states[..., -1, :].clamp(max=PARTIAL)
    if m % block_k:
        states[..., -1] = states[..., -1].clamp(max=PARTIAL)
    partial, full = states == PARTIAL, states == FULL
    lists = [_list(x) for x in (partial, full, partial.mT, full.mT)]
    (partial_rows, full_rows, partial_columns, full_columns) = lists
    return BlockMask(*partial_rows, *full_rows, *partial_columns, *full_columns, (n, m), (block_q, block_k))


def _list(there: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are True, and which, in ascending order, the others after them."""
    order = there.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return there.sum(-1, dtype=torch.int32), order.to(torch.int32)


def activation_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    function: Callable[[Tensor], Tensor],
    offset: float,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """sum_j f(s_ij) v_j over the allowed pairs, through softmax attention: w = softmax(log(f(s) + N)).

    f(S) V = out exp(lse) - N sum of allowed v. The paper's trick; a `Normalizer` says the same directly.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        function: f, element-wise.
        offset: N, so large that f(s) + N > 0.
        mask: which pairs count; all where None.
        scale: D ** -0.5 where None.
    """
    plain: dict[str, Any] = {"mask": mask, "scale": scale}
    mod = lambda s, b, h, i, j: (function(s) + offset).log()  # noqa: E731
    out, lse = attend(q_BHND, k_BKMD, v_BKME, score_mod=mod, return_lse=True, **plain)
    mean, size = attend(q_BHND, k_BKMD, v_BKME, score_mod=lambda s, *_: s * 0, return_lse=True, **plain)
    return out * lse.exp()[..., None] - offset * mean * size.exp()[..., None]


def attend_jagged(q: Any, k: Any, v: Any, *, mask: Mask | None = None, **options: Any) -> Tensor:
    """`attend` on nested tensors of jagged layout, (B, tokens of each sequence, heads, D), without padding.

    The sequences are laid end to end and kept apart by a document mask, so empty pairs cost nothing.

    Args:
        q, k, v: such nested tensors, with sequences of the same lengths.
        mask: within each sequence, positions counted from its first token; one that does not vary over the batch.
        options: `attend`'s, but `return_lse`.

    Returns:
        a nested tensor like `q`, of width E.

    Raises:
        ValueError: if the tensors are not nested, their sequences differ in length, or the mask varies over the batch.
    """
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not x.is_nested or x.layout != torch.jagged or x.values().ndim != 3:
            raise ValueError(f"{name} must be a nested tensor of jagged layout, (batch, tokens, heads, width)")
        if not torch.equal(x.offsets(), q.offsets()):
            raise ValueError("query, key and value must have sequences of the same lengths")
    if mask is not None and mask.batch != 1:
        raise ValueError("a mask for jagged sequences must not vary over the batch")
    lengths = q.offsets().diff()
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)[None]
    packed = masks.documents(ids) if mask is None else masks.per_document(ids, mask)
    heads_first = [x.values().transpose(0, 1)[None] for x in (q, k, v)]
    out_1HTE = attend(heads_first[0], heads_first[1], heads_first[2], mask=packed, **options)
    return torch.nested.nested_tensor_from_jagged(out_1HTE[0].transpose(0, 1), q.offsets())


class PagedCache:
    """Keys and values of many sequences in one pool of pages, as PagedAttention keeps them.

    A sequence holds ceil(length / page_size) pages anywhere in the pool. Attention reads the pool itself: the mask of a
    sequence is translated from logical to physical positions, so nothing is copied together.

    Args:
        pages, page_size: the pool holds pages * page_size tokens.
        batch: sequences.
        num_kv_heads, head_dim, value_dim: K, D, E (D where None).
        device, dtype: of keys and values.

    Raises:
        ValueError: if a number is not positive.

    >>> cache = PagedCache(pages=8, page_size=4, batch=2, num_kv_heads=1, head_dim=2)
    >>> cache.append(1, torch.randn(1, 5, 2), torch.randn(1, 5, 2))
    >>> cache.lengths.tolist(), cache.free_pages
    ([0, 5], 6)
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if min(pages, page_size, batch, num_kv_heads, head_dim) < 1:
            raise ValueError("pages, page_size, batch, num_kv_heads and head_dim must be positive")
        self.page_size = page_size
        self.keys = torch.zeros(1, num_kv_heads, pages * page_size, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(1, num_kv_heads, pages * page_size, value_dim or head_dim, device=device, dtype=dtype)
        self.page_table = torch.full((batch, pages), -1, dtype=torch.long, device=device)
        self.logical_page = torch.full((batch, pages), -1, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self._free = list(range(pages))[::-1]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        pages = self.page_table.shape[1]
        used = self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()
        return used * (pages - len(self._free)) // pages

    def reserve(self, sequence: int, length: int) -> None:
        """Give `sequence` pages for `length` tokens.

        Raises:
            ValueError: if the pool has too few free pages; nothing is given then.
        """
        held = int((self.page_table[sequence] >= 0).sum())
        wanted = ceil(length / self.page_size) - held
        if wanted > len(self._free):
            raise ValueError(f"sequence {sequence} needs {wanted} more pages, but {len(self._free)} are free")
        for logical in range(held, held + max(0, wanted)):
            page = self._free.pop()
            self.page_table[sequence, logical] = page
            self.logical_page[sequence, page] = logical

    def append(self, sequence: int, k_KND: Tensor, v_KNE: Tensor) -> None:
        """Add N tokens to one sequence, reserving what they need.

        Raises:
            ValueError: if the pool is full; the sequence is then as it was.
        """
        start = int(self.lengths[sequence])
        self.reserve(sequence, start + k_KND.shape[1])
        logical = torch.arange(start, start + k_KND.shape[1], device=self.keys.device)
        place = self.page_table[sequence, logical // self.page_size] * self.page_size + logical % self.page_size
        self.keys[0, :, place] = k_KND.detach().to(self.keys.dtype)
        self.values[0, :, place] = v_KNE.detach().to(self.values.dtype)
        self.lengths[sequence] = start + k_KND.shape[1]

    def erase(self, sequence: int) -> None:
        """Forget a sequence and free its pages."""
        pages = self.page_table[sequence]
        self._free += pages[pages >= 0].tolist()
        self.page_table[sequence] = -1
        self.logical_page[sequence] = -1
        self.lengths[sequence] = 0

    def attend(
        self,
        q_BHND: Tensor,
        *,
        mask: Mask | None = None,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attention of each sequence's queries to its own tokens; `mask` and `score_mod` speak of logical positions.

        Raises:
            ValueError: if there is not one row of queries per sequence.
        """
        B = self.page_table.shape[0]
        if q_BHND.shape[0] != B:
            raise ValueError(f"the cache holds {B} sequences, got queries of {q_BHND.shape[0]}")
        paged = PagedMask(
            masks.prefix(self.keys.shape[2]) if mask is None else mask, self.logical_page, self.lengths, self.page_size
        )
        mod = None
        if score_mod is not None:
            mod = lambda s, b, h, i, j: score_mod(s, b, h, i, paged.logical(b, j).clamp(min=0))  # noqa: E731
        keys, values = (x.expand(B, -1, -1, -1) for x in (self.keys, self.values))
        return attend(q_BHND, keys, values, mask=paged, score_mod=mod, scale=scale, backend=backend)


@dataclass(frozen=True, eq=False)
class PagedMask(Mask):
    """A mask of logical positions over a pool of pages.

    Attributes:
        inner: the mask of logical positions.
        logical_page_BP: which page of its sequence each page of the pool is; -1 where it is none.
        lengths_B: tokens of each sequence.
        page_size: tokens of a page.
    """

    inner: Mask
    logical_page_BP: Tensor
    lengths_B: Tensor
    page_size: int

    @property
    def batch(self) -> int:
        return self.logical_page_BP.shape[0]

    @property
    def heads(self) -> int:
        return self.inner.heads

    def tensors(self) -> list[Tensor]:
        return [self.logical_page_BP, self.lengths_B, *self.inner.tensors()]

    def to(self, device: torch.device | str) -> Mask:
        return replace(
            self,
            inner=self.inner.to(device),
            logical_page_BP=self.logical_page_BP.to(device),
            lengths_B=self.lengths_B.to(device),
        )

    def logical(self, b: Tensor, k: Tensor) -> Tensor:
        """The position of a physical one in its sequence; negative where its page belongs to another."""
        page = self.logical_page_BP[b, k // self.page_size]
        return torch.where(page < 0, -1, page * self.page_size + k % self.page_size)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = self.logical(b, k)
        own = (position >= 0) & (position < self.lengths_B[b])
        return own & self.inner.allowed(b, h, q, position.clamp(min=0))

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
        if block_k % self.page_size and self.page_size % block_k:
            every = masks.function(self.to(device).allowed, batch=self.batch, heads=self.heads)
            return every.block_map(n, m, (block_q, block_k), device)
        # the states of logical pages, moved to where the pages lie
        logical = self.inner.block_map(n, self.logical_page_BP.shape[1] * self.page_size, (block_q, self.page_size))
        page = self.logical_page_BP.to(device)
        states = logical.to(device).expand(page.shape[0], -1, -1, -1)
        index = page.clamp(min=0)[:, None, None].expand(-1, *states.shape[1:3], -1)
        moved = states.gather(-1, index)
        room = (self.lengths_B.to(device)[:, None] - page * self.page_size)[:, None, None]
        moved = torch.where(room < self.page_size, moved.clamp(max=PARTIAL), moved)
        moved = torch.where((page[:, None, None] < 0) | (room <= 0), torch.full_like(moved, EMPTY), moved)
        if block_k < self.page_size:
            return moved.clamp(max=PARTIAL).repeat_interleave(self.page_size // block_k, -1)
        tiles = moved.unflatten(-1, (-1, 1)) if block_k == self.page_size else _tiles(moved, block_k // self.page_size)
        some, all_ = tiles.amax(-1) > EMPTY, tiles.amin(-1) == FULL
        return some.to(torch.int8) + all_.to(torch.int8)

    def __repr__(self) -> str:
        return f"paged({self.inner!r}, {self.page_size} tokens a page)"


def _tiles(states: Tensor, count: int) -> Tensor:
    """Neighbouring columns in groups of `count`; a short last group is filled with its own last column."""
    short = -states.shape[-1] % count
    last = states[..., -1:].expand(*states.shape[:-1], short)
    return torch.cat([states, last], -1).unflatten(-1, (-1, count))
