"""How much may stay: so many tokens a head, a share of those seen, or bytes in all.

Shape letters: B batch, K key heads, M tokens that may stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.masks import FOREVER

__all__ = ["Budget", "share_out"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


@dataclass(frozen=True)
class Budget:
    """What a cache may hold after each step; one of the three, or none for all.

    Attributes:
        tokens: of each key head.
        share: of the tokens that a sequence has had so far, padding not counted; at least one token.
        bytes: of all layers under the policy, rows of the batch and heads together, with what is kept of each token
            beside its key and value.

    Raises:
        ValueError: if more than one is given, or one is out of its range.

    >>> Budget.of(512), Budget.of(0.25), Budget.of("64 MiB").bytes
    (Budget(tokens=512, share=None, bytes=None), Budget(tokens=None, share=0.25, bytes=None), 67108864)
    """

    tokens: int | None = None
    share: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("tokens", "share", "bytes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a budget is tokens, a share or bytes, got {' and '.join(given)}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"a budget of tokens must be at least 1, got {self.tokens}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"a budget as a share must be above 0 and at most 1, got {self.share}")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"a budget of bytes must be at least 1, got {self.bytes}")

    @classmethod
    def of(cls, given: int | float | str | Budget | None) -> Budget:
        """The budget that a number or a text means.

        Args:
            given: int, tokens a key head; float, a share of the tokens seen; text such as "64 MiB" or "2GB", bytes of
                the whole cache; None, no bound.

        Raises:
            ValueError: if it is nothing of this.
        """
        if given is None or isinstance(given, Budget):
            return given or cls()
        if isinstance(given, bool) or not isinstance(given, (int, float, str)):
            raise ValueError(f"a budget is tokens (int), a share (float) or bytes (such as '64 MiB'), got {given!r}")
        if isinstance(given, int):
            return cls(tokens=given)
        if isinstance(given, float):
            return cls(share=given)
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b\s*", given.lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"a budget of bytes is a number and kB, MB, GB, KiB, MiB or GiB, got {given!r}")
        return cls(bytes=int(float(found[1]) * _UNITS[found[2]]))

    def of_rows(self, seen_B: Tensor, fitting: Callable[[int], int]) -> int | Tensor | None:
        """Tokens that a key head may keep: of every sequence, or (B,); None where there is no bound.

        Args:
            seen_B: tokens of each sequence so far.
            fitting: of bytes in all, the tokens of a key head that fit into them.

        Raises:
            ValueError: if not one token fits into the bytes.
        """
        if self.tokens is not None:
            return min(self.tokens, FOREVER)
        if self.share is not None:
            return (self.share * seen_B).round().long().clamp(min=1)
        if self.bytes is None:
            return None
        fit = min(fitting(self.bytes), FOREVER)
        if fit < 1:
            raise ValueError(f"a budget of {self.bytes} bytes holds no page of tokens in each key head of each layer")
        return fit

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        if self.share is not None:
            return f"{self.share:.0%}"
        return "all" if self.bytes is None else f"{self.bytes / 2**20:.4g} MiB"


def share_out(priority_BKM: Tensor, budget_B: Tensor, least: float) -> Tensor:
    """Tokens (B, K) that each key head may keep of a budget that the heads of a layer have together.

    The K budget_B tokens of highest priority stay, whichever heads they are of; before them, each head's best
    floor(least budget_B).

    Args:
        priority_BKM: higher stays; -inf where there is no token.
        budget_B: tokens a head on average.
        least: share of that which every head has for certain.

    >>> share_out(torch.tensor([[[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]]]), torch.tensor([2]), 0.5).tolist()
    [[3, 1]]
    """
    B, K, M = priority_BKM.shape
    order_BKM = priority_BKM.argsort(dim=-1, descending=True, stable=True)
    certain_B11 = (least * budget_B).floor().long()[:, None, None]
    first = torch.arange(M, device=priority_BKM.device) < certain_B11
    sure = torch.zeros_like(priority_BKM, dtype=torch.bool).scatter(-1, order_BKM, first.expand(-1, K, -1))
    # best first: those that are certain, the others by priority, and places without a token last
    rank = torch.where(sure, float("inf"), priority_BKM).masked_fill(priority_BKM == float("-inf"), float("-inf"))
    flat_order = rank.flatten(1).argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(K * M, device=rank.device) < (K * budget_B)[:, None]
    chosen = torch.zeros(B, K * M, dtype=torch.bool, device=rank.device).scatter(1, flat_order, kept)
    return (chosen.view(B, K, M) & (priority_BKM > float("-inf"))).sum(-1)
