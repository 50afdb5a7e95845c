"""Which tokens stay: the best of the image, the best and the latest of the text, and when heads agree.

Shape letters: B batch, K key heads, N tokens, T text tokens stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class AVLOptions:
    """The policy; the paper's page says what each option does.

    Attributes:
        rate: share of the image's tokens that are dropped after the prefill; None keeps all.
        compute_rate: share of the image's tokens that a step does not read, at least `rate`.
        update_interval: steps from one choice of what is read to the next; 0 or less never chooses again and reads all.
        text_rate: share of the text's tokens that are dropped; None keeps all.
        text_init: the least number of text tokens that are kept.
        heavy_rate: share of the kept text that is kept for its weights, the rest for being recent ("heavy-hitter").
        text_policy: "heavy-hitter", "direct" or "history".
        prefill_rate: share of the image's tokens that do not pass `prefill_layer` in the prefill; None lets all pass.
        prefill_layer: layer, counted from 1, after which they are dropped.

    Raises:
        ValueError: if an option is out of its range.
    """

    rate: float | None = 0.5
    compute_rate: float = 0.7
    update_interval: int = 3
    text_rate: float | None = 0.4
    text_init: int = 20
    heavy_rate: float = 0.7
    text_policy: Literal["heavy-hitter", "direct", "history"] = "heavy-hitter"
    prefill_rate: float | None = None
    prefill_layer: int = 3

    def __post_init__(self) -> None:
        for name in ("rate", "text_rate", "prefill_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, or None, got {value}")
        if self.rate is not None and not self.rate <= self.compute_rate < 1:
            raise ValueError(f"compute_rate must be at least rate ({self.rate}) and below 1, got {self.compute_rate}")
        if self.prefill_rate is not None and self.rate is not None and self.prefill_rate > self.rate:
            raise ValueError(f"prefill_rate must be at most rate ({self.rate}), got {self.prefill_rate}")
        if self.text_init < 1 or self.prefill_layer < 1:
            raise ValueError(
                f"text_init and prefill_layer must be at least 1, got {self.text_init} and {self.prefill_layer}"
            )
        if not 0 <= self.heavy_rate <= 1:
            raise ValueError(f"heavy_rate must be between 0 and 1, got {self.heavy_rate}")
        if self.text_policy not in ("heavy-hitter", "direct", "history"):
            raise ValueError(f"text_policy must be heavy-hitter, direct or history, got {self.text_policy!r}")

    def stored(self, image_tokens: int) -> int:
        """n_S."""
        return image_tokens if self.rate is None else tokens_left(image_tokens, self.rate)

    def read(self, image_tokens: int) -> int:
        """n_C."""
        return image_tokens if self.rate is None else tokens_left(image_tokens, self.compute_rate)

    def text_budget(self, seen: int) -> tuple[int, int]:
        """Text tokens kept by score, and as the most recent, of `seen`."""
        if self.text_rate is None:
            return 0, seen
        budget = max(round((1 - self.text_rate) * seen), self.text_init)
        if self.text_policy == "direct":
            return budget, 0
        best = math.ceil(budget / 2) if self.text_policy == "history" else math.floor(self.heavy_rate * budget)
        return best, budget - best


def tokens_left(tokens: int, rate: float) -> int:
    """floor((1 - rate) tokens) in double precision, as the authors evaluate it: tokens_left(10, 0.9) is 0.

    Args:
        tokens: how many there are.
        rate: share that is dropped.
    """
    return int((1 - rate) * tokens)


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores along the last axis, in ascending order.

    Args:
        scores: (..., N).
        count: at most N.
    """
    return scores.topk(count, dim=-1).indices.sort(-1).values


def text_kept(scores_BKT: Tensor, best: int, recent: int) -> Tensor | None:
    """Places of the `recent` last tokens and of the `best` scores before them, per head; None where all stay.

    Args:
        scores_BKT: of the text's tokens, by position.
        best, recent: how many, as `AVLOptions.text_budget` gives them.
    """
    T = scores_BKT.shape[-1]
    if best + recent >= T:
        return None
    last = torch.arange(T - recent, T, device=scores_BKT.device).expand(*scores_BKT.shape[:-1], -1)
    return torch.cat([best_tokens(scores_BKT[..., : T - recent], best), last], -1)


def agreement(a_N: Tensor, b_N: Tensor, part: float) -> Tensor:
    """The paper's p%PPCI: how much the top `part` of two score vectors (..., N) overlap, from 0 to 1.

    Args:
        a_N, b_N: scores of the same tokens.
        part: share of the tokens that counts as the top; at least one token does.
    """
    count = max(1, int(part * a_N.shape[-1]))
    picks = [torch.zeros_like(x).scatter(-1, x.topk(count, -1).indices, 1.0) for x in (a_N, b_N)]
    return (picks[0] * picks[1]).sum(-1) / count
