"""How a layer reads what it holds: few queries each key where it lies, many with keys side by side and a mask.

Shape letters: B batch, H query heads, K key heads, G = H / K, N new tokens, M places of the row that holds most,
A = M + N, D head dim, E width of values, F numbers of a token, R = B K rows, P pages, p places of a page,
n = G N queries of a row, m new keys of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.compress.policies.policy import Entering, Held, Policy
from saccade.layers.ragged_tokens import PAGE, RaggedTokens
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import FOREVER, Lifetimes, Mask
from saccade.ops.merge import add_sink
from saccade.ops.ragged import attend_pages, received_weights

__all__ = ["Reader"]

#: new tokens up to which each key is read in its place; for more, keys are first laid side by side
_FEW = 8


class Reader:
    """Attention of new tokens to those held and to each other, of which the policy is told the weights.

    Args:
        policy: whose tokens they are.
        window: W, where queries see no key more than W - 1 tokens before them.
    """

    def __init__(self, policy: Policy, window: int | None) -> None:
        self.policy, self.window = policy, window
        self.is_mortal = policy.is_mortal or window is not None
        self.tokens: RaggedTokens | None = None
        self.seen_B: Tensor

    def _read(
        self,
        q_BHND: Tensor,
        new: Entering,
        real_BN: Tensor | None,
        numbers: Tensor,
        position_BN: Tensor,
        sink_logits: Tensor | None,
        scores: dict[str, Any],
    ) -> Tensor:
        """(B, H, N, E); the weights that tokens are given are added to their first number where the policy says so.

        Args:
            q_BHND: queries.
            new: the new tokens.
            real_BN: bool, False = padding; all are real where None.
            numbers: of the new tokens.
            position_BN: of the queries; that of padding is the position before it.
            sink_logits, scores: as `PolicyCache.attend` is given them.
        """
        N = q_BHND.shape[2]
        few = N == 1 or (N <= _FEW and real_BN is None and not self.is_mortal and self.policy.watched(N) == N)
        look = self._few if few and self.tokens is not None and self.tokens.width else self._many
        return look(q_BHND, new, real_BN, numbers, position_BN, sink_logits, scores)

    def _held(self) -> Held:
        """What is held, row by row."""
        tokens = self.tokens
        assert tokens is not None
        in_rows = tokens.in_rows
        return Held(in_rows(tokens.position_Pp), in_rows(tokens.numbers_PpF), self.seen_B, tokens.filled_BKM)

    def _all(self, new: Entering, numbers: Tensor) -> Held:
        """What is held and what comes."""
        held, K = self._held(), new.k_BKND.shape[1]
        position = new.position_BN[:, None].expand(-1, K, -1)
        return Held(
            torch.cat([held.position_BKM, position], 2),
            torch.cat([held.numbers_BKMF, numbers], 2),
            self.seen_B,
            torch.cat([held.filled_BKM, position >= 0], 2),
        )

    def _last(self, held: Held) -> Tensor:
        """Position of the last query that sees each token, of a layer in which tokens die."""
        if not self.policy.is_mortal:
            assert self.window is not None
            return held.position_BKM + (self.window - 1)
        last = self.policy.last_query(held)
        return last if self.window is None else torch.minimum(last, held.position_BKM + (self.window - 1))

    def _few(
        self,
        q: Tensor,
        new: Entering,
        real_BN: Tensor | None,
        numbers: Tensor,
        position_BN: Tensor,
        sink_logits: Tensor | None,
        scores: dict[str, Any],
    ) -> Tensor:
        """Every key is read where it lies."""
        (B, H, N, _), K, tokens = q.shape, new.k_BKND.shape[1], self.tokens
        G, R = H // K, B * K
        assert tokens is not None
        keys, values, owner = tokens.evenly()
        seen_Pp: Tensor | None = tokens.filled_Pp
        if self.is_mortal:
            held = self._held()
            seen_Pp = tokens.paged(held.filled_BKM & (self._last(held) >= position_BN[:, None]))
        elif tokens.is_full:
            seen_Pp = None
        if seen_Pp is not None and owner is None:
            seen_Pp = seen_Pp.view(R, tokens.width)
        seen_Rnm = None
        if N > 1 or real_BN is not None:
            seen_BNN = torch.ones(B, N, N, dtype=torch.bool, device=q.device).tril()
            seen_BNN = seen_BNN if real_BN is None else seen_BNN & real_BN[:, None]
            seen_Rnm = seen_BNN[:, None, None].expand(-1, K, G, -1, -1).reshape(R, G * N, N)
        found = attend_pages(
            q.reshape(R, G * N, -1),
            keys,
            values,
            owner,
            seen_Pp,
            new.k_BKND.reshape(R, N, -1),
            new.v_BKNE.reshape(R, N, -1),
            seen_Rnm,
            sink_Rn=None if sink_logits is None else _of_rows(sink_logits, B, K, N),
            **scores,
        )
        if self.policy.accumulates:
            page_Pp = found.page_Pp.view(-1, PAGE)
            if real_BN is not None:
                asks_BKM = real_BN.any(1)[:, None, None].expand(B, K, tokens.width)
                page_Pp = page_Pp * tokens.paged(asks_BKM)
            with torch.no_grad():
                tokens.numbers_PpF[..., 0] += page_Pp
                numbers[..., 0] += self.policy.counted(found.new_Rm.view(B, K, N))
        return found.out_RnE.view(B, H, N, -1)

    def _many(
        self,
        q: Tensor,
        new: Entering,
        real_BN: Tensor | None,
        numbers: Tensor,
        position_BN: Tensor,
        sink_logits: Tensor | None,
        scores: dict[str, Any],
    ) -> Tensor:
        """Keys are laid side by side, and who sees whom is a mask."""
        k, v, tokens = new.k_BKND, new.v_BKNE, self.tokens
        (_, K, N, _), H = k.shape, q.shape[1]
        assert tokens is not None
        M = tokens.width
        if M:
            k = torch.cat([tokens.in_rows(tokens.keys_PpD), k], 2)
            v = torch.cat([tokens.in_rows(tokens.values_PpE), v], 2)
        mask: Mask
        last_BKA = self._last_numbers(new, numbers, position_BN)
        if M or self.policy.is_mortal:
            first_A = torch.arange(-M, N, device=k.device)
            mask = Lifetimes(first_A.expand_as(last_BKA).int(), last_BKA.int(), H // K)
        else:
            mask = masks.causal() if self.window is None else masks.window(self.window - 1)
            mask = mask if real_BN is None else mask & masks.padding(real_BN)
        soft_cap = scores["soft_cap"]
        how: dict[str, Any] = {"mask": mask, "scale": scores["scale"]}
        how["score_mod"] = None if soft_cap is None else score_mods.soft_cap(soft_cap)
        if sink_logits is None and not self.policy.accumulates:
            return attend(q, k, v, **how)
        out, lse = attend(q, k, v, return_lse=True, **how)
        if sink_logits is not None:
            out, lse = add_sink(out, lse, sink_logits)
        if self.policy.accumulates:
            with torch.no_grad():
                start = N - self.policy.watched(N)
                given = received_weights(q, k, lse, last_BKA, real_BN=real_BN, start=start, **scores)
                if M:
                    tokens.numbers_PpF[..., 0] += tokens.paged(given[..., :M])
                numbers[..., 0] += self.policy.counted(given[..., M:])
        return out

    def _last_numbers(self, new: Entering, numbers: Tensor, position_BN: Tensor) -> Tensor:
        """The number within the call, (B, K, A), of the last query that sees each token held and each that comes."""
        held = self._all(new, numbers)
        last = torch.where(held.filled_BKM, FOREVER, -1)
        if not self.is_mortal:
            return last
        # positions of queries rise, and stay where there is padding: the last query up to a position, by number
        position = self._last(held).flatten(1).long()
        number = torch.searchsorted(position_BN.contiguous(), position, right=True) - 1
        return torch.minimum(last, number.view_as(last))


def _of_rows(logit_H: Tensor, B: int, K: int, N: int) -> Tensor:
    """A number of each query head as that of each row's queries."""
    return logit_H.view(1, K, -1, 1).expand(B, -1, -1, N).reshape(B * K, -1)
