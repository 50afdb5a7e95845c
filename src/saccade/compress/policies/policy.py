"""What a policy is: it says which tokens of a key head go first. The cache stores what stays, and nothing else.

    kept = the `budget` tokens of highest priority:  the first `sinks`, the latest `recent` share, the rest by score

A policy holds no tokens and no state: what it must remember of a token it says in numbers, which the cache keeps beside
key and value. A policy of one's own is a subclass with `score`, and, if it is to remember something, `numbers` and
`enter`:

    >>> @dataclass(frozen=True)
    ... class LoudValues(Policy):                   # keeps what has large values
    ...     numbers = 1
    ...
    ...     def enter(self, new, held):
    ...         return new.v_BKNE.float().norm(dim=-1)[..., None]
    ...
    ...     def score(self, held):
    ...         return held.numbers_BKMF[..., 0]
    >>> import torch; from saccade.compress.policies import PolicyCache
    >>> cache, x = PolicyCache(LoudValues(sinks=0, recent=0.0), 2), torch.tensor([1.0, 4.0, 2.0, 3.0]).view(1, 1, 4, 1)
    >>> cache.attend(x, x, x).shape, cache.positions[0, 0, :2].tolist()
    (torch.Size([1, 1, 4, 1]), [1, 3])

Shape letters: B batch, H query heads, K key heads, N tokens that come, M tokens held (places of them), C channels,
D head dim, E width of values, F numbers of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Entering", "Held", "Policy"]


@dataclass
class Entering:
    """Tokens that come into a layer's cache.

    Attributes:
        layer: its number.
        position_BN: place of each among its sequence's tokens, padding not counted; -1 for padding.
        k_BKND, v_BKNE: keys, with their positions rotated in, and values.
        hidden_BNC: what the layer reads, for a policy that `needs_hidden`.
        call: what the layer was called with, for a policy that `needs_hidden`; by the names of its caller.
    """

    layer: int
    position_BN: Tensor
    k_BKND: Tensor
    v_BKNE: Tensor
    hidden_BNC: Tensor | None = None
    call: Any = None


@dataclass
class Held:
    """Tokens that may stay.

    Attributes:
        position_BKM: place of each among its sequence's tokens.
        numbers_BKMF: what the policy keeps of each.
        seen_B: tokens of each sequence so far.
        filled_BKM: which places hold a token.
    """

    position_BKM: Tensor
    numbers_BKMF: Tensor
    seen_B: Tensor
    filled_BKM: Tensor


@dataclass(frozen=True)
class Policy:
    """Which tokens of a key head stay where there is a budget; base of all policies.

    Attributes:
        sinks: first tokens of a sequence that stay, as far as the budget lets one other token stay.
        recent: share of the budget, without the sinks, that is for the latest tokens.

    Raises:
        ValueError: if one is out of its range.
    """

    sinks: int = 4
    recent: float = 0.25

    #: whether a budget is "needed", "optional" or "refused"
    budget_is = "needed"
    #: how many numbers are kept of each token
    numbers = 0
    #: whether the weights that tokens are given are added to their first number
    accumulates = False
    #: whether `enter` must be told what the layer reads
    needs_hidden = False
    #: whether tokens die (`last_query`), whatever the budget
    is_mortal = False

    def __post_init__(self) -> None:
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks must be a number of tokens, 0 or more, got {self.sinks!r}")
        if not isinstance(self.recent, (int, float)) or not 0 <= self.recent <= 1:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent!r}")

    def enter(self, new: Entering, held: Held | None) -> Tensor | None:
        """The numbers (B, K, N, F) of tokens that come, None if F is 0; those of tokens held may be changed in place.

        Args:
            new: the tokens.
            held: those that are there, for a policy that `is_mortal`; None for others, and before the first.
        """
        return None

    def score(self, held: Held) -> Tensor:
        """(B, K, M): the higher, the later a token goes.

        Args:
            held: the tokens.
        """
        raise NotImplementedError

    def last_query(self, held: Held) -> Tensor:
        """Position (B, K, M) of the last query that sees each token, for a policy that `is_mortal`.

        Args:
            held: the tokens.
        """
        raise NotImplementedError

    def watched(self, queries: int) -> int:
        """How many of a call's last queries give the weights that are accumulated.

        Args:
            queries: of the call.
        """
        return queries

    def counted(self, given_BKN: Tensor) -> Tensor:
        """What the tokens of a call are held to have been given: that by which their first numbers rise, (B, K, N).

        Args:
            given_BKN: the weights that they were given by the queries of their own call that are `watched`.
        """
        return given_BKN

    def shorten(self, new: Entering) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, K, m, ...) to store of a prompt, for what does not choose tokens by score; else None.

        Args:
            new: the prompt.
        """
        return None

    def priority(self, held: Held, budget: int | Tensor) -> Tensor:
        """(B, K, M), float32: what stays for certain is +inf, what holds no token -inf.

        Args:
            held: the tokens.
            budget: tokens that a key head keeps, of every sequence or (B,).
        """
        if isinstance(budget, int):
            sinks = min(self.sinks, budget - 1)
            latest_B = held.seen_B - round(self.recent * (budget - sinks))
            sure = held.position_BKM < sinks
        else:
            sinks_B = (budget - 1).clamp(max=self.sinks)
            latest_B = held.seen_B - (self.recent * (budget - sinks_B)).round().long()
            sure = held.position_BKM < sinks_B[:, None, None]
        sure |= held.position_BKM >= latest_B[:, None, None]
        priority = self.score(held).float().masked_fill(sure, float("inf"))
        return priority.masked_fill_(~held.filled_BKM, float("-inf"))
