"""Row-wise normalisers of attention scores, in the online form that a tiled evaluation needs.

The form is AttentionEngine's (Chen et al., arXiv 2502.15349): a row keeps a small state; each tile of scores updates
it and yields unnormalised weights, together with the factor by which what was accumulated so far must be multiplied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: normalisers that every backend knows by name
NAMES = ("softmax", "sigmoid", "relu", "abs-sum")


class Normalizer:
    """A user-defined normaliser. Subclasses give `init`, `update` and `finish`; tensors are (B, H, n, 1) per row.

    For tiles of scores s (B, H, n, m) with `allowed` of the same shape, in any order:

        state = init(rows)                                  rows: (B, H, n, 1) of zeros
        p, state, rescale = update(s, allowed, state)       out = out * rescale + p @ v;  rescale may be None (= 1)
        factor, state = finish(state)                       out = out * factor;           factor may be None (= 1)

    Weights of pairs that are not allowed must come out as exactly 0.
    """

    def init(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def update(
        self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        raise NotImplementedError

    def finish(self, state: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        return None, state

    def dense(self, scores: Tensor, allowed: Tensor) -> Tensor:
        """The weights, from all scores at once."""
        state = self.init(scores.new_zeros(*scores.shape[:-1], 1))
        weights, state, _ = self.update(scores, allowed, state)
        factor, _ = self.finish(state)
        return weights if factor is None else weights * factor


def check_normalizer(normalize: Any) -> None:
    """Raise ValueError unless `normalize` is a known name or a Normalizer."""
    if isinstance(normalize, Normalizer) or (isinstance(normalize, str) and normalize in NAMES):
        return
    raise ValueError(f"normalize must be one of {', '.join(NAMES)} or a Normalizer, got {normalize!r}")
