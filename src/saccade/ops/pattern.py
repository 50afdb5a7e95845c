"""Who may attend to whom in one call: whatever mask the caller gave, resolved once, at the door.

    pattern = Pattern.of(mask, batch, n, m, causal=True, offset=m - n).only(("padding", "documents"), "MoBA")

A layer or function makes it from what it was given, says once which of its parts the mechanism can take, and hands it
down. What is left is read off its fields, or off `mask`, which is all of it as one mask object.

Shape letters: B batch, H heads, N queries, M keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.masks import Band, Mask
from saccade.ops.masks.bands import tighter

__all__ = ["EVERYTHING", "GivenMask", "Pattern", "Said"]

#: what a caller may give as a mask, see `Pattern.of`
GivenMask: TypeAlias = "Tensor | Mask | Pattern | None"

#: what a mask may say
Said: TypeAlias = Literal["causal", "window", "padding", "documents", "pairs"]

EVERYTHING: tuple[Said, ...] = ("causal", "window", "padding", "documents", "pairs")

#: those in words, for a refusal
_WORDS: dict[str, str] = {
    "padding": "padding (batch, keys)",
    "documents": "packed sequences",
    "window": "a window",
    "causal": "causality",
    "pairs": "any other pairs",
}


#: a mask that nobody has asked for yet
_NOT_MADE: Any = object()


# not frozen, which would take three microseconds of every decoded token; nothing changes it
@dataclass(eq=False)
class Pattern:
    """Who may attend to whom in a layer: every field hides more.

    Attributes:
        causal: keys after the query are hidden. Query 0 stands at key `offset`.
        left, right: a window, keys q - left to q + right; None is no bound.
        sinks: the first keys, which are seen beside the window (those up to q + right).
        valid_BM: real tokens among the keys; B may be 1.
        ids_BM: sequences packed into one row, by number; B may be 1. The queries are the keys from `offset` to the end.
        pairs: any other mask.
        crosses: the queries are other tokens than the keys.
        always_causal: the mechanism is, whatever its mask (also where that hides nothing, as from a single last query).
    """

    causal: bool = False
    offset: int = 0
    left: int | None = None
    right: int | None = None
    sinks: int = 0
    valid_BM: Tensor | None = None
    ids_BM: Tensor | None = None
    pairs: Mask | None = None
    crosses: bool = False
    always_causal: bool = False
    _mask: Mask | None = field(default=_NOT_MADE, init=False, repr=False)

    @classmethod
    def of(
        cls,
        mask: GivenMask,
        batch: int,
        n: int,
        m: int,
        *,
        heads: int | None = None,
        causal: bool = False,
        offset: int = 0,
        crosses: bool = False,
    ) -> Pattern:
        """What a mask says of `n` queries and `m` keys, on top of causality.

        Args:
            mask: None; bool (B, M) or (B, 1, 1, M), True = real token; bool of 4 axes that broadcast to (B, H, N, M),
                True = may attend; integers (S + 1,), the `cu_seqlens` of packed sequences; a mask object, which is
                taken apart at its `&`; or a pattern, which is given back.
            heads: H, where masks of another number are to be refused here.
            causal: queries see no later key, whatever the mask says.
            offset: the key at which query 0 stands.
            crosses: the queries are other tokens than the keys.

        Raises:
            ValueError: if the mask is nothing of this, or of another size.
        """
        if isinstance(mask, Pattern):
            return mask
        plain = cls(causal=causal and offset < m - 1, offset=offset, crosses=crosses, always_causal=causal)
        if mask is None:
            return plain
        if not isinstance(mask, Mask):
            plain.valid_BM = _real_tokens(mask, batch, m)
            if plain.valid_BM is not None:
                return plain
            mask = masks.dense(mask) if mask.ndim == 4 else masks.packed(mask)
        if mask.batch not in (1, batch):
            raise ValueError(f"the mask is for {mask.batch} batch rows, got {batch}")
        if heads is not None and mask.heads not in (1, heads):
            raise ValueError(f"the mask is for {mask.heads} heads, got {heads}")
        mask.check(n, m)
        return plain.also(mask, n, m)

    @property
    def mask(self) -> Mask | None:
        """All of it as one mask object, the same for every layer of a pass; None where nothing is hidden."""
        if self._mask is _NOT_MADE:
            self._mask = self._joined()
        return self._mask

    @property
    def rest(self) -> Mask | None:
        """All but causality as one mask object."""
        return replace(self, causal=False).mask if self.causal else self.mask

    @property
    def says(self) -> tuple[Said, ...]:
        """What is hidden, in the words that `only` takes."""
        said: list[Said] = []
        if self.causal:
            said.append("causal")
        if self.left is not None or self.right is not None:
            said.append("window")
        if self.valid_BM is not None:
            said.append("padding")
        if self.ids_BM is not None:
            said.append("documents")
        if self.pairs is not None:
            said.append("pairs")
        return tuple(said)

    def only(self, takes: tuple[Said, ...], who: str) -> Pattern:
        """Itself, if it says nothing but what `takes` names, and causality where the mechanism has that anyway.

        Raises:
            ValueError: else; in the name of `who`.
        """
        if takes is EVERYTHING:
            return self
        said = self.says
        foreign = [part for part in said if part not in takes and not (part == "causal" and self.always_causal)]
        if foreign:
            able = " and ".join(words for part, words in _WORDS.items() if part in takes)
            got = " and ".join(words for part, words in _WORDS.items() if part in foreign)
            detail = f", {self.pairs!r:.60}" if foreign == ["pairs"] else ""
            raise ValueError(f"{who} takes {f'{able} as its mask' if able else 'no mask'}, got {got}{detail}")
        return self

    def simplify(self, n: int, m: int) -> Pattern:
        """The same for `n` queries and `m` keys, without the fields that hide nothing there."""
        valid = self.valid_BM
        if valid is not None and bool(valid.all()):
            valid = None
        left = None if self.left is not None and self.left >= n - 1 + self.offset else self.left
        right = None if self.right is not None and self.right >= m - 1 - self.offset else self.right
        causal = self.causal and self.offset < m - 1
        return replace(
            self, causal=causal, left=left, right=right, sinks=0 if left is None else self.sinks, valid_BM=valid
        )

    def crop(self, n: int, m: int) -> tuple[Pattern, int]:
        """Without the keys at the end that lie in the future of every query (a static cache that is still empty)."""
        if not self.causal or self.pairs is not None or self.offset + n >= m:
            return self, m
        keys = self.offset + n
        valid, ids = (None if x is None else x[:, :keys] for x in (self.valid_BM, self.ids_BM))
        return replace(self, valid_BM=valid, ids_BM=ids).simplify(n, keys), keys

    def from_key(self, first: int) -> Pattern:
        """The same where the first keys are left out; not of `sinks` and `pairs`, which count from the first."""
        if not first:
            return self
        valid, ids = (None if x is None else x[:, first:] for x in (self.valid_BM, self.ids_BM))
        return replace(self, offset=self.offset - first, valid_BM=valid, ids_BM=ids)

    def real_keys(self, batch: int) -> Tensor | None:
        """Real tokens among the keys, (B, M); None where all are."""
        valid = self.valid_BM
        return valid if valid is None or valid.shape[0] == batch else valid.expand(batch, -1)

    def real_queries(self, batch: int, n: int) -> Tensor | None:
        """Real tokens among the `n` queries, (B, N); None where all are, or where they are other tokens."""
        if self.crosses:
            return None
        valid = self.real_keys(batch)
        return valid if valid is None or valid.shape[1] == n else valid[:, self.offset : self.offset + n]

    @property
    def is_whole_sequences(self) -> bool:
        """Nothing is hidden but the future, padding, and other sequences packed into the row."""
        return self.left is None and self.right is None and self.pairs is None

    def _joined(self) -> Mask | None:
        if self.left is not None or self.right is not None:
            whole: Mask | None = self._window()
        else:
            whole = masks.causal(self.offset) if self.causal else None
        if self.valid_BM is not None:
            whole = _and(whole, masks.padding(self.valid_BM))
        if self.ids_BM is not None:
            own_BN = self.ids_BM[:, self.offset :] if self.offset else self.ids_BM
            whole = _and(whole, masks.documents(own_BN, self.ids_BM))
        return whole if self.pairs is None else _and(whole, self.pairs)

    def sequence_ids(self, batch: int, m: int) -> Tensor | None:
        """Which sequence each key belongs to, integers (B, M) from 0, -1 for padding; None where a row is one whole."""
        ids = None if self.ids_BM is None else self.ids_BM.unique(return_inverse=True)[1].expand(batch, m)
        if self.valid_BM is None:
            return ids
        if ids is None:
            return self.valid_BM.long().expand(batch, m) - 1
        return torch.where(self.valid_BM, ids, -1)

    def _bounds(self) -> tuple[int | None, int | None]:
        """First and last key of the window, and of causality, by how far it is from the query's number."""
        high = None if self.right is None else self.offset + self.right
        return (
            None if self.left is None else self.offset - self.left,
            tighter(self.offset, high, min) if self.causal else high,
        )

    def _window(self) -> Mask:
        low, high = self._bounds()
        near = Band(low, high, f"window({self.left}, {None if high is None else high - self.offset})")
        if not self.sinks or low is None:
            return near
        first = masks.prefix(self.sinks)
        return near | (first if high is None else first & Band(None, high, f"causal({high})"))

    def also(self, mask: Mask, n: int, m: int) -> Pattern:
        """With what a mask object hides of `n` queries and `m` keys besides, in the fields that there are for it."""
        (low, high), sinks = self._bounds(), self.sinks
        valid, ids, pairs = self.valid_BM, self.ids_BM, self.pairs
        conjuncts = mask.conjuncts()
        # windows join, but not those that leave the first keys to be seen
        alone = low is None and not any(isinstance(part, Band) and part.low is not None for part in conjuncts)
        for part in conjuncts:
            with_sinks = _with_sinks(part) if alone and not sinks else None
            if with_sinks is not None:
                part, sinks = with_sinks
            if isinstance(part, Band) and not (self.sinks and part.low is not None):
                low, high = tighter(low, part.low, max), tighter(high, part.high, min)
            elif isinstance(part, masks.Padding):
                valid = part.valid_BM if valid is None else valid & part.valid_BM
            elif isinstance(part, masks.Dense) and part.mask_BHNM.shape[1:] == (1, 1, m):
                real_BM = part.mask_BHNM[:, 0, 0]
                valid = real_BM if valid is None else valid & real_BM
            elif isinstance(part, masks.Documents) and self._numbers_tokens(part, n, m):
                ids = part.key_BM if ids is None else _both(ids, part.key_BM)
            else:
                pairs = _and(pairs, part)
        low, high = Band(low, high, "").nearest(n, m)
        causal = high == self.offset
        return replace(
            self,
            causal=causal,
            left=None if low is None else self.offset - low,
            right=None if high is None or causal else high - self.offset,
            sinks=0 if low is None else sinks,
            valid_BM=valid,
            ids_BM=ids,
            pairs=pairs,
        )

    def _numbers_tokens(self, part: masks.Documents, n: int, m: int) -> bool:
        """The queries of a mask of documents are the last of its keys."""
        if self.crosses or self.offset + n != m:
            return False
        same = part.query_BN is part.key_BM
        return same if same or part.query_BN.is_meta else torch.equal(part.query_BN, part.key_BM[:, self.offset :])


def _real_tokens(mask: Tensor, batch: int, m: int) -> Tensor | None:
    """The padding mask (B, M) in a tensor; None where it speaks of pairs or of packed sequences."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a bool tensor or a mask of saccade.masks, got {type(mask).__name__}")
    if mask.ndim == 2:
        if mask.dtype != torch.bool or mask.shape[0] not in (1, batch) or mask.shape[1] != m:
            raise ValueError(
                f"a padding mask must be bool (batch, keys) = {(batch, m)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        return mask
    if mask.ndim not in (1, 4):
        raise ValueError(
            f"mask must have 2 axes (batch, keys), 4 axes, or be cu_seqlens, got shape {tuple(mask.shape)}"
        )
    is_padding = mask.ndim == 4 and mask.shape[1:] == (1, 1, m) and mask.shape[0] in (1, batch)
    return mask[:, 0, 0] if is_padding and mask.dtype == torch.bool else None


def _with_sinks(mask: Mask) -> tuple[Band, int] | None:
    """The band and the first keys of a window that has `sinks`."""
    if not (isinstance(mask, masks.Or) and isinstance(mask.left, Band) and isinstance(mask.right, masks.And)):
        return None
    near, (first, past) = mask.left, (mask.right.left, mask.right.right)
    if not (isinstance(first, masks.Prefix) and isinstance(first.length, int) and isinstance(past, Band)):
        return None
    return (near, first.length) if past.low is None and past.high == near.high and near.low is not None else None


def _and(mask: Mask | None, other: Mask) -> Mask:
    return other if mask is None else mask & other


def _both(ids_BM: Tensor, more_BM: Tensor) -> Tensor:
    """Numbers of the pairs of two numberings."""
    pair_2BM = torch.stack(torch.broadcast_tensors(ids_BM, more_BM))
    return pair_2BM.flatten(1).unique(dim=1, return_inverse=True)[1].view(pair_2BM.shape[1:])
