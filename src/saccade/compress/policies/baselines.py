"""What every cache policy is compared with: all, a window, the most looked at, the shortest keys, any.

Shape letters: B batch, K key heads, N tokens that come, M tokens held, D head dim, F numbers of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.policies.policy import Entering, Held, Policy

__all__ = ["Full", "HeavyHitters", "KeyNorm", "Random", "Window"]


@dataclass(frozen=True)
class Full(Policy):
    """Everything stays; a budget is refused."""

    budget_is = "refused"

    def score(self, held: Held) -> Tensor:
        return held.position_BKM


@dataclass(frozen=True)
class Window(Policy):
    """The first tokens and the latest (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv
    2309.17453); positions stay true ones.

    Attributes:
        sinks: first tokens that stay.
        recent: of no effect: all that is not a sink is a latest token.
    """

    def score(self, held: Held) -> Tensor:
        return held.position_BKM


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """What has been given most weight (Zhang et al., "H2O", arXiv 2306.14048).

        s_j = sum over the group's query heads and the queries i so far of a_ij

    Attributes:
        sinks: first tokens that stay.
        recent: share of the budget for the latest tokens.
        observe: of a call's queries only so many last ones count (Li et al., "SnapKV", arXiv 2404.14469); None, all.
            A prompt that ends with a question is so compressed by what the question looks at.
        spread: w, in tokens: what each token of a call is given counts for those up to w before and after it alike, so
            that what stands around a token that is looked at stays with it (the pooling of the same paper).

    Raises:
        ValueError: if an option is out of its range.
    """

    sinks: int = 0
    recent: float = 0.5
    observe: int | None = None
    spread: int = 0

    numbers = 1
    accumulates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observe is not None and (not isinstance(self.observe, int) or self.observe < 1):
            raise ValueError(f"observe must be a number of queries, at least 1, or None, got {self.observe!r}")
        if not isinstance(self.spread, int) or self.spread < 0:
            raise ValueError(f"spread must be a number of tokens, 0 or more, got {self.spread!r}")

    def enter(self, new: Entering, held: Held | None) -> Tensor:
        return new.k_BKND.new_zeros(*new.k_BKND.shape[:3], 1, dtype=torch.float32)

    def score(self, held: Held) -> Tensor:
        return held.numbers_BKMF[..., 0]

    def watched(self, queries: int) -> int:
        return queries if self.observe is None else min(self.observe, queries)

    def counted(self, given_BKN: Tensor) -> Tensor:
        if not self.spread or given_BKN.shape[-1] == 1:
            return given_BKN
        return F.avg_pool1d(given_BKN, 2 * self.spread + 1, stride=1, padding=self.spread)


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Short keys stay, which tend to be given much weight (Devoto et al., arXiv 2406.11430); no weights are needed.

        s_j = -|k_j|

    Attributes:
        sinks: first tokens that stay.
        recent: share of the budget for the latest tokens.
    """

    numbers = 1

    def enter(self, new: Entering, held: Held | None) -> Tensor:
        return -new.k_BKND.float().norm(dim=-1)[..., None]

    def score(self, held: Held) -> Tensor:
        return held.numbers_BKMF[..., 0]


@dataclass(frozen=True)
class Random(Policy):
    """Any tokens stay, by lot: of the seed, the head and the position, whatever the batch and its padding.

    Attributes:
        sinks: first tokens that stay.
        recent: share of the budget for the latest tokens.
        seed: of the lots.

    Raises:
        ValueError: if an option is out of its range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")

    def score(self, held: Held) -> Tensor:
        head_K1 = torch.arange(held.position_BKM.shape[1], device=held.position_BKM.device)[:, None]
        return _lot(held.position_BKM.long() + 0x9E3779B1 * (1 + head_K1) + 0x7FEB352D * (self.seed & 0xFFFFFFFF))


def _lot(x: Tensor) -> Tensor:
    """Of an integer a number in [0, 1) that looks drawn: multiplications and shifts of 32 bits (after Steele, Lea and
    Flood's SplitMix)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return (x ^ (x >> 15)).float() / 2**32
