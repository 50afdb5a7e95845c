"""The cache of a layer under a policy: it attends, lets the policy see, and stores what stays.

    out = attention over what is held and the new tokens (causal among them);   then the policy, for later steps

Shape letters: B batch, H query heads, K key heads, G = H / K, N new tokens, M places of the row that holds most,
A = M + N, D head dim, E width of values, C channels, F numbers of a token, R = B K rows, P pages, p places of a page,
n = G N queries of a row, m keys of a row that are in no page, or that somebody else chose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.compress.policies.budget import Budget, share_out
from saccade.compress.policies.policy import Entering, Held, Policy
from saccade.layers.ragged_tokens import PAGE, RaggedTokens
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import FOREVER, Lifetimes, Mask
from saccade.ops.merge import add_sink
from saccade.ops.ragged import attend_pages, received_weights

__all__ = ["PolicyCache"]

#: new tokens up to which each key is read in its place; for more, keys are first laid side by side
_FEW = 8

#: single steps between two returns of the places of tokens that have died
_TIDY_EVERY = 16


class PolicyCache:
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
        if least is not None and not 0 <= least <= 1:
            raise ValueError(f"least must be between 0 and 1, or None, got {least}")
        self.policy, self.budget, self.least, self.window = policy, Budget.of(budget), least, window
        bound, name = self.budget != Budget(), type(policy).__name__
        if bound == (policy.budget_is == "refused") and policy.budget_is != "optional":
            raise ValueError(f"{name} takes no budget, got {budget!r}" if bound else f"{name} needs a budget")
        self.number, self.layers = number, layers
        self.is_mortal = policy.is_mortal or window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = self._steps = 0
        self.tokens: RaggedTokens | None = None
        self.seen_B: Tensor
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
        came_BN = torch.ones(B, N, dtype=torch.long, device=k_BKND.device) if real_BN is None else real_BN.long()
        position_BN = self.seen_B[:, None] + came_BN.cumsum(1) - 1
        new = Entering(self.number, position_BN, k_BKND, v_BKNE, hidden_BNC, call)
        if real_BN is not None:
            new.position_BN = position_BN.masked_fill(~real_BN, -1)
        with torch.no_grad():
            held = self._held()
            numbers = self.policy.enter(new, held if self.length else None)
            if numbers is None:
                numbers = k_BKND.new_zeros(B, K, N, 0, dtype=torch.float32)
            elif self.policy.is_mortal and self.length:
                self.tokens.numbers_PpF = self.tokens.paged(held.numbers_BKMF)
        few = N == 1 or (N <= _FEW and real_BN is None and not self.is_mortal and self.policy.watched(N) == N)
        look = self._few if few and self.length else self._many
        out = look(q_BHND, new, held, numbers, position_BN, sink_logits, scores)
        self.seen_B, self.length = self.seen_B + came_BN.sum(1), self.length + N
        with torch.no_grad():
            short = self.policy.shorten(new) if self.length == N else None
            if short is not None:
                self._take(*short)
            elif N == 1:
                self._step(new, numbers)
            else:
                self._fold(new, numbers)
        return out

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
        held: Held,
        numbers: Tensor,
        position_BN: Tensor,
        sink_logits: Tensor | None,
        scores: dict[str, Any],
    ) -> Tensor:
        """Every key is read where it lies."""
        (B, H, N, _), K, tokens = q.shape, new.k_BKND.shape[1], self.tokens
        G, R = H // K, B * K
        assert tokens is not None
        seen_BKM = held.filled_BKM
        if self.is_mortal:
            seen_BKM = seen_BKM & (self._last(held) >= position_BN[:, None])
        keys, values = tokens.evenly()
        seen_Pp = seen_BKM.view(R, -1) if keys is not tokens.keys_PpD else tokens.paged(seen_BKM)
        causal_NN = torch.ones(N, N, dtype=torch.bool, device=q.device).tril()
        seen_BNN = causal_NN & (new.position_BN >= 0)[:, None]
        seen_Rnm = seen_BNN[:, None, None].expand(-1, K, G, -1, -1).reshape(R, G * N, N)
        found = attend_pages(
            q.reshape(R, G * N, -1),
            keys,
            values,
            tokens.owner_P,
            seen_Pp,
            new.k_BKND.reshape(R, N, -1),
            new.v_BKNE.reshape(R, N, -1),
            seen_Rnm,
            sink_Rn=None if sink_logits is None else _of_rows(sink_logits, B, K, N),
            **scores,
        )
        if self.policy.accumulates:
            asks_BK1 = (new.position_BN >= 0).any(1)[:, None, None].expand(B, K, 1)
            page_Pp = found.page_Pp.view(-1, PAGE)
            if B > 1:
                page_Pp = page_Pp * tokens.paged(asks_BK1.expand(-1, -1, tokens.width))
            tokens.numbers_PpF[..., 0] += page_Pp
            numbers[..., 0] += found.new_Rm.view(B, K, N)
        return found.out_RnE.view(B, H, N, -1)

    def _many(
        self,
        q: Tensor,
        new: Entering,
        held: Held,
        numbers: Tensor,
        position_BN: Tensor,
        sink_logits: Tensor | None,
        scores: dict[str, Any],
    ) -> Tensor:
        """Keys are laid side by side, and who sees whom is a mask."""
        k, v, tokens = new.k_BKND, new.v_BKNE, self.tokens
        (B, K, N, _), H = k.shape, q.shape[1]
        assert tokens is not None
        if tokens.width:
            k = torch.cat([tokens.in_rows(tokens.keys_PpD), k], 2)
            v = torch.cat([tokens.in_rows(tokens.values_PpE), v], 2)
        number_N = torch.arange(N, device=k.device)
        real_BN = new.position_BN >= 0
        last_BKM = torch.where(held.filled_BKM, FOREVER, -1)
        last_BKN = torch.where(real_BN, FOREVER, -1)[:, None].expand(-1, K, -1)
        last_BKA = torch.cat([last_BKM, last_BKN], 2)
        if self.is_mortal:
            position = self._last(self._all(new, numbers))
            # positions of queries rise, and stay where there is padding: the last query up to a position, by number
            number = torch.searchsorted(position_BN, position.flatten(1).long(), right=True) - 1
            last_BKA = torch.minimum(last_BKA, number.view_as(last_BKA))
        first_BKA = torch.cat([torch.zeros_like(last_BKM), number_N.expand(B, K, -1)], 2)
        if tokens.width or self.policy.is_mortal:
            mask: Mask = Lifetimes(first_BKA.int(), last_BKA.int(), H // K)
        else:
            mask = masks.causal() if self.window is None else masks.window(self.window - 1)
            mask = mask if real_BN.all() else mask & masks.padding(real_BN)
        soft_cap = scores["soft_cap"]
        how: dict[str, Any] = {"mask": mask, "scale": scores["scale"]}
        how["score_mod"] = None if soft_cap is None else score_mods.soft_cap(soft_cap)
        if sink_logits is None:
            out = attend(q, k, v, **how)
        else:
            out = add_sink(*attend(q, k, v, return_lse=True, **how), sink_logits)[0]
        if self.policy.accumulates:
            with torch.no_grad():
                start = N - self.policy.watched(N)
                given = received_weights(q, k, first_BKA, last_BKA, real_BN=real_BN, start=start, **scores)
                if tokens.width:
                    tokens.numbers_PpF[..., 0] += tokens.paged(given[..., : tokens.width])
                numbers[..., 0] += given[..., tokens.width :]
        return out

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
        budget_B = self._budget()
        if budget_B is None:
            return held.filled_BKM
        priority = self.policy.priority(held, budget_B)
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

    def _budget(self) -> Tensor | None:
        tokens = self.tokens
        assert tokens is not None

        def fitting(nbytes: int) -> int:
            fit = tokens.fitting(nbytes / self.layers)
            # of each head's last page a part may be empty
            return fit if self.least is None else fit - PAGE

        return self.budget.of_rows(self.seen_B, fitting)

    def _step(self, new: Entering, numbers: Tensor) -> None:
        """One token has come: it takes the place of the one that goes, if one does."""
        tokens, budget_B = self.tokens, self._budget()
        assert tokens is not None
        comes_BK = (new.position_BN >= 0).expand_as(tokens.length_BK)
        self._steps += 1
        place_BK = torch.where(comes_BK, tokens.length_BK, -1)
        held = self._all(new, numbers) if budget_B is not None or self.is_mortal else None
        if held is not None:
            if self.is_mortal and self._steps % _TIDY_EVERY == 0:
                return self._fold(new, numbers)
            excess_BK, shared = self._excess(tokens.length_BK + comes_BK.long(), budget_B)
            if shared or int(excess_BK.max()) > 1:
                return self._fold(new, numbers)
            worst_BK, dead_BK = self._worst(held, budget_B)
            goes_BK = (excess_BK > 0) | dead_BK
            place_BK = torch.where(goes_BK & (comes_BK | (excess_BK > 0)), worst_BK, place_BK)
            place_BK = place_BK.masked_fill(~comes_BK | (place_BK == tokens.width) & goes_BK, -1)
        if bool((place_BK >= PAGE * tokens.pages_BK).any()):
            kept_BKM = tokens.filled_BKM & (torch.arange(tokens.width, device=place_BK.device) != place_BK[..., None])
            kept = torch.cat([kept_BKM, (place_BK >= 0)[..., None]], 2)
            tokens.keep(kept, new.k_BKND, new.v_BKNE, new.position_BN, numbers)
        else:
            tokens.put(place_BK, new.k_BKND, new.v_BKNE, new.position_BN, numbers)

    def _excess(self, length_BK: Tensor, budget_B: Tensor | None) -> tuple[Tensor, bool]:
        """Tokens over each head's budget, and whether the heads of a row must first share it."""
        if budget_B is None:
            return torch.zeros_like(length_BK), False
        if self.least is None:
            return length_BK - budget_B[:, None], False
        part_BK = self._part_BK * budget_B[:, None]
        unshared_B = part_BK.isinf().any(1) & (length_BK.sum(1) > budget_B * length_BK.shape[1])
        return length_BK - part_BK.round().clamp(max=FOREVER).long(), bool(unshared_B.any())

    def _worst(self, held: Held, budget_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """The place (B, K) of the token that goes first in each row, and whether it is one that has died."""
        if budget_B is None:
            priority = torch.zeros_like(held.position_BKM, dtype=torch.float32)
        else:
            priority = self.policy.priority(held, budget_B).clamp(max=torch.finfo(torch.float32).max)
        priority = priority.masked_fill(~held.filled_BKM, float("inf"))
        if not self.is_mortal:
            worst = priority.argmin(-1)
            return worst, torch.zeros_like(worst, dtype=torch.bool)
        dead_BKA = held.filled_BKM & (self._last(held) < held.seen_B[:, None, None])
        worst = priority.masked_fill(dead_BKA, float("-inf")).argmin(-1)
        return worst, dead_BKA.gather(-1, worst[..., None])[..., 0]

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
        held = self._held()
        return torch.where(held.filled_BKM, held.position_BKM, -1)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, places that hold no token counted."""
        return 0 if self.tokens is None else self.tokens.nbytes


def _of_rows(logit_H: Tensor, B: int, K: int, N: int) -> Tensor:
    """A number of each query head as that of each row's queries."""
    return logit_H.view(1, K, -1, 1).expand(B, -1, -1, N).reshape(B * K, -1)
