"""The cache of a layer under a policy: it attends, lets the policy see, and stores what stays.

    out = attention over what is held and the new tokens (causal among them);   then the policy, for later steps

Shape letters: B batch, H query heads, K key heads, N new tokens, M places of the row that holds most, A = M + N, D head
dim, E width of values, C channels or sequences to go on with, F numbers of a token, P pages,
p places of a page, m tokens that somebody else chose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.compress.policies.budget import Budget, share_out
from saccade.compress.policies.policy import Entering, Held, Policy
from saccade.compress.policies.reading import Reader
from saccade.layers.ragged_tokens import PAGE, RaggedTokens
from saccade.ops.masks import FOREVER

__all__ = ["PolicyCache"]

#: single steps between two returns of the places of tokens that have died
_TIDY_EVERY = 16


class PolicyCache(Reader):
    """One layer's keys and values under a policy; for inference.

    After each call a key head holds at most its budget; what a call evicts is missed by later calls only. A budget that
    the heads share (`least`) is dealt out anew in every call of several tokens; while single tokens come, each head
    keeps its part.

    Args:
        policy: which tokens stay.
        budget: how many.
        least: where the heads of the layer share their budget, the part of the average that each has for certain; None
            gives every head the same.
        window: W, where queries see no key more than W - 1 tokens before them.
        number: of the layer, which the policy is told.
        layers: how many there are of this kind, which share a budget of bytes evenly.

    Attributes:
        length: tokens seen, padding counted.
        seen_B: tokens of each sequence, padding not counted.

    Raises:
        ValueError: if `least` is not between 0 and 1, or the policy needs a budget, or refuses one.

    >>> from saccade.compress.policies import Window
    >>> cache = PolicyCache(Window(sinks=1), 4)
    >>> x = torch.randn(2, 1, 9, 8)
    >>> cache.attend(x, x, x).shape, cache.lengths.tolist(), cache.positions[0, 0, :4].tolist()
    (torch.Size([2, 1, 9, 8]), [[4], [4]], [0, 6, 7, 8])
    """

    def __init__(
        self,
        policy: Policy,
        budget: int | float | str | Budget | None = None,
        *,
        least: float | None = None,
        window: int | None = None,
        number: int = 0,
        layers: int = 1,
    ) -> None:
        if least is not None and not (isinstance(least, (int, float)) and 0 <= least <= 1):
            raise ValueError(f"least must be between 0 and 1, or None, got {least!r}")
        super().__init__(policy, window)
        self.budget, self.least = Budget.of(budget), least
        bound, name = self.budget != Budget(), type(policy).__name__
        if bound == (policy.budget_is == "refused") and policy.budget_is != "optional":
            raise ValueError(f"{name} takes no budget, got {budget!r}" if bound else f"{name} needs a budget")
        self.number, self.layers = number, layers
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = self._steps = 0
        self.tokens = None
        #: tokens of each head for a budget of 1 a head; inf where the row is not over its budget yet
        self._part_BK: Tensor

    def attend(
        self,
        q_BHND: Tensor,
        k_BKND: Tensor,
        v_BKNE: Tensor,
        *,
        real_BN: Tensor | None = None,
        hidden_BNC: Tensor | None = None,
        call: Any = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of N tokens to those held and to each other, (B, H, N, E); then the policy.

        Args:
            q_BHND, k_BKND, v_BKNE: of the new tokens, with their positions rotated in.
            real_BN: bool, False = padding, which is never stored.
            hidden_BNC: what the layer reads, for a policy that `needs_hidden`.
            call: what the layer was called with, for a policy that wants it.
            scale: of the dot products, D ** -0.5 where None.
            soft_cap: scores become c tanh(s / c).
            sink_logits: (H,), a logit of each head in the softmax's denominator.

        Raises:
            ValueError: if the batch is of another size than what is held.
        """
        (B, K, N, _), D = k_BKND.shape, q_BHND.shape[3]
        if self.tokens is None:
            self.tokens = RaggedTokens(k_BKND, v_BKNE, self.policy.numbers)
            self.seen_B = torch.zeros(B, dtype=torch.long, device=k_BKND.device)
            self._part_BK = torch.full((B, K), float("inf"), device=k_BKND.device)
        if self.seen_B.shape[0] != B:
            raise ValueError(f"the cache holds {self.seen_B.shape[0]} sequences, got {B}")
        scores: dict[str, Any] = {"scale": D**-0.5 if scale is None else scale, "soft_cap": soft_cap}
        if real_BN is None:
            position_BN = own_BN = self.seen_B[:, None] + torch.arange(N, device=k_BKND.device)
        else:
            position_BN = self.seen_B[:, None] + real_BN.cumsum(1) - 1
            own_BN = position_BN.masked_fill(~real_BN, -1)
        new = Entering(self.number, own_BN, k_BKND, v_BKNE, hidden_BNC, call)
        with torch.no_grad():
            numbers = self._entered(new)
        out = self._read(q_BHND, new, real_BN, numbers, position_BN, sink_logits, scores)
        self.seen_B, self.length = position_BN[:, -1] + 1, self.length + N
        with torch.no_grad():
            short = self.policy.shorten(new) if self.length == N else None
            if short is not None:
                self._take(*short)
            elif N == 1:
                self._step(new, real_BN, numbers)
            else:
                self._fold(new, numbers)
        return out

    def _entered(self, new: Entering) -> Tensor:
        """The numbers of the new tokens."""
        held = self._held() if self.policy.is_mortal and self.length else None
        numbers = self.policy.enter(new, held)
        if numbers is None:
            return new.k_BKND.new_zeros(*new.k_BKND.shape[:3], 0, dtype=torch.float32)
        if held is not None and self.tokens is not None:
            self.tokens.numbers_PpF = self.tokens.paged(held.numbers_BKMF)
        return numbers

    def _take(self, k_BKmD: Tensor, v_BKmE: Tensor) -> None:
        """Store what something else has chosen, of which the positions are not known."""
        tokens, (B, K, m, _) = self.tokens, k_BKmD.shape
        assert tokens is not None
        everything = torch.ones(B, K, m, dtype=torch.bool, device=k_BKmD.device)
        unknown = torch.full((B, m), -1, device=k_BKmD.device)
        tokens.keep(everything, k_BKmD, v_BKmE, unknown, k_BKmD.new_zeros(B, K, m, 0, dtype=torch.float32))

    def _fold(self, new: Entering, numbers: Tensor) -> None:
        """What stays of what is held and what comes, laid out anew."""
        assert self.tokens is not None
        held = self._all(new, numbers)
        self.tokens.keep(self._kept(held), new.k_BKND, new.v_BKNE, new.position_BN, numbers)

    def _kept(self, held: Held) -> Tensor:
        if self.is_mortal:
            held = replace(held, filled_BKM=held.filled_BKM & (self._last(held) >= held.seen_B[:, None, None]))
        budget = self._budget()
        if budget is None:
            return held.filled_BKM
        priority = self.policy.priority(held, budget)
        budget_B = torch.full_like(self.seen_B, budget) if isinstance(budget, int) else budget
        budget_BK = budget_B[:, None].expand(priority.shape[:2])
        if self.least is not None:
            over_B1 = (held.filled_BKM.sum((1, 2)) > budget_BK.sum(1))[:, None]
            shared_BK = share_out(priority, budget_B, self.least)
            self._part_BK = torch.where(over_B1, shared_BK / budget_B[:, None], float("inf"))
            budget_BK = torch.where(over_B1, shared_BK, FOREVER)
        most = min(int(budget_BK.max()), priority.shape[2])
        best = priority.topk(most, -1).indices
        first = torch.arange(most, device=best.device) < budget_BK[..., None]
        return torch.zeros_like(held.filled_BKM).scatter(-1, best, first) & held.filled_BKM

    def _budget(self) -> int | Tensor | None:
        """Tokens a head: of all sequences, or (B,)."""
        tokens = self.tokens
        assert tokens is not None

        def fitting(nbytes: int) -> int:
            fit = tokens.fitting(nbytes / self.layers)
            # of each head's last page a part may be empty
            return fit if self.least is None else fit - PAGE

        return self.budget.of_rows(self.seen_B, fitting)

    def _step(self, new: Entering, real_BN: Tensor | None, numbers: Tensor) -> None:
        """One token has come: it takes the place of the one that goes, if one does."""
        tokens, budget = self.tokens, self._budget()
        assert tokens is not None
        self._steps += 1
        if self.is_mortal and self._steps % _TIDY_EVERY == 0:
            return self._fold(new, numbers)
        length_BK = tokens.length_BK
        place_BK = length_BK if real_BN is None else torch.where(real_BN, length_BK, -1)
        excess_BK, shared = self._excess(length_BK + (1 if real_BN is None else real_BN.long()), budget)
        most = -1 if excess_BK is None else int(excess_BK.max())
        if shared or most > 1:
            return self._fold(new, numbers)
        if most > 0 or self.is_mortal:
            worst_BK, dead_BK = self._worst(self._all(new, numbers), budget)
            goes_BK = torch.zeros_like(worst_BK, dtype=torch.bool) if excess_BK is None else excess_BK > 0
            goes_BK = goes_BK if dead_BK is None else goes_BK | dead_BK
            place_BK = torch.where(goes_BK & (place_BK >= 0), worst_BK, place_BK)
            # the new token itself, which is the last of them
            place_BK = place_BK.masked_fill(goes_BK & (worst_BK == tokens.width), -1)
        if bool((place_BK >= PAGE * tokens.pages_BK).any()):
            kept_BKM = tokens.filled_BKM & (torch.arange(tokens.width, device=place_BK.device) != place_BK[..., None])
            kept = torch.cat([kept_BKM, (place_BK >= 0)[..., None]], 2)
            tokens.keep(kept, new.k_BKND, new.v_BKNE, new.position_BN, numbers)
        else:
            tokens.put(place_BK, new.k_BKND, new.v_BKNE, new.position_BN, numbers)

    def _excess(self, length_BK: Tensor, budget: int | Tensor | None) -> tuple[Tensor | None, bool]:
        """Tokens over each head's budget, None if there is none; and whether the heads of a row must first share it."""
        if budget is None:
            return None, False
        budget_B1 = budget if isinstance(budget, int) else budget[:, None]
        if self.least is None:
            return length_BK - budget_B1, False
        part_BK = self._part_BK * budget_B1
        over_BK = length_BK.sum(1, keepdim=True) > budget_B1 * length_BK.shape[1]
        shared = bool((part_BK.isinf() & over_BK).any())
        return length_BK - part_BK.round().clamp(max=FOREVER).long(), shared

    def _worst(self, held: Held, budget: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The place (B, K) of the token that goes first in each row, and whether it is one that has died."""
        if budget is None:
            priority = torch.zeros_like(held.position_BKM, dtype=torch.float32)
        else:
            priority = self.policy.priority(held, budget).clamp_(max=torch.finfo(torch.float32).max)
        priority = priority.masked_fill_(~held.filled_BKM, float("inf"))
        if not self.is_mortal:
            return priority.argmin(-1), None
        dead_BKA = held.filled_BKM & (self._last(held) < held.seen_B[:, None, None])
        worst_BK = priority.masked_fill_(dead_BKA, float("-inf")).argmin(-1)
        return worst_BK, dead_BKA.gather(-1, worst_BK[..., None])[..., 0]

    def take_rows(self, index_C: Tensor) -> None:
        """Go on with the sequences at `index_C`, as beam search does."""
        if self.tokens is not None:
            self.tokens.take_rows(index_C)
            self.seen_B, self._part_BK = self.seen_B[index_C], self._part_BK[index_C]

    @property
    def lengths(self) -> Tensor:
        """Tokens held, (B, K)."""
        if self.tokens is None:
            raise ValueError("the cache has seen no token")
        return self.tokens.length_BK

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens held, (B, K, M), in their order within the row; -1 where it has fewer, or where they
        are not known."""
        if self.tokens is None:
            raise ValueError("the cache has seen no token")
        held = self._held()
        return torch.where(held.filled_BKM, held.position_BKM, -1)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, places that hold no token counted."""
        return 0 if self.tokens is None else self.tokens.nbytes
