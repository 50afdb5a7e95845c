"""Row-wise normalisers of attention scores, in the online form that a tiled evaluation needs.

The form is AttentionEngine's (Chen et al., arXiv 2502.15349): a row keeps a small state; each tile of scores updates
it and yields unnormalised weights, together with the factor by which what was accumulated so far must be multiplied.

    state = init(rows);   p, state, c = update(scores, allowed, state);   out = out * c + p @ v;   ...
    f, final = finish(state);   out = out * f

The gradient follows from the recursion itself, so these three are all that a user writes. Where weights and gradient
have a closed form in the final state, as in the paper's `forward` and `backward`, `weights` and `grad` save the
backward pass one round over the tiles. The published instances below are written with nothing but this interface:
they are the examples to start from.

Shape letters: B batch, H heads, n queries and m keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NAMES",
    "AbsSum",
    "Normalizer",
    "Relu",
    "Retention",
    "Sigmoid",
    "Softmax",
    "check_normalizer",
    "named",
]

#: normalisers that every backend knows by name
NAMES = ("softmax", "sigmoid", "relu", "abs-sum")

State = dict[str, Tensor]


class Normalizer:
    """A user-defined normaliser. Subclasses give `init`, `update` and `finish`; tensors are (B, H, n, 1) per row.

    For tiles of scores s (B, H, n, m) with `allowed` of the same shape, in any order:

        state = init(rows)                                  rows: (B, H, n, 1) of zeros
        p, state, rescale = update(s, allowed, state)       out = out * rescale + p @ v;  rescale may be None (= 1)
        factor, state = finish(state)                       out = out * factor;           factor may be None (= 1)

    Weights of pairs that are not allowed must come out as exactly 0, and the factor must be finite for a row that
    saw no key. The three must be made of differentiable torch operations and keep the scores' dtype; they may use
    parameters, which then receive gradients. `update` must not change its arguments in place.

    Optional, both or neither, for a backward pass without the recursion (not used where the normaliser has parameters
    that need a gradient):

        p = weights(s, allowed, final)                      what finish's factor times update's p would be at the end
        ds = grad(s, p, dp, delta, final)                   dp = d loss / d p,  delta (B, H, n, 1) = sum_j p_j dp_j

    >>> class SoftmaxWithSink(Normalizer):
    ...     def init(self, rows):                           # a sink of score 0: exp(0) is in the sum from the start
    ...         return {"top": rows, "total": rows + 1.0}
    ...     def update(self, scores, allowed, state):
    ...         scores = scores.masked_fill(~allowed, float("-inf"))
    ...         top = torch.maximum(state["top"], scores.amax(-1, keepdim=True))
    ...         rescale, p = (state["top"] - top).exp(), (scores - top).exp()
    ...         return p, {"top": top, "total": state["total"] * rescale + p.sum(-1, keepdim=True)}, rescale
    ...     def finish(self, state):
    ...         return 1.0 / state["total"], state
    >>> import saccade
    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> saccade.attend(q, k, torch.ones(1, 1, 3, 1), normalize=SoftmaxWithSink()).flatten()
    tensor([0.7500, 0.7500, 0.7500])
    """

    #: a class that sets this is given None as `allowed` where a whole tile is allowed
    none_is_all = False

    def init(self, rows: Tensor) -> State:
        return {}

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, Tensor | None]:
        raise NotImplementedError

    def finish(self, state: State) -> tuple[Tensor | None, State]:
        return None, state

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        raise NotImplementedError

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether weights and gradient are given in closed form."""
        cls = type(self)
        return cls.weights is not Normalizer.weights and cls.grad is not Normalizer.grad

    def dense(self, scores: Tensor, allowed: Tensor) -> Tensor:
        """The weights, from all scores at once."""
        state = self.init(scores.new_zeros(*scores.shape[:-1], 1))
        if not scores.shape[-1]:
            return scores
        weights, state, _ = self.update(scores, allowed, state)
        factor, _ = self.finish(state)
        return weights if factor is None else weights * factor

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _fill(scores: Tensor, allowed: Tensor | None, value: float) -> Tensor:
    return scores if allowed is None else scores.masked_fill(~allowed, value)


class Softmax(Normalizer):
    """p_j = exp(s_j - m) with the running maximum m, out / r with r = sum_j p_j; final state lse = m + log r."""

    none_is_all = True

    def init(self, rows: Tensor) -> State:
        return {"top": rows - torch.inf, "total": rows}

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, Tensor]:
        scores = _fill(scores, allowed, -torch.inf)
        # the maximum cancels out of the result, so no gradient goes through it
        before = state["top"].detach()
        top = torch.maximum(before, scores.detach().amax(-1, keepdim=True))
        # a row that has seen no key yet has no maximum: -inf - -inf is NaN, -inf - 0 gives weight 0
        safe = top.masked_fill(top == -torch.inf, 0.0)
        p = (scores - safe).exp_()
        rescale = (before - safe).exp_()
        return p, {"top": top, "total": state["total"] * rescale + p.sum(-1, keepdim=True)}, rescale

    def finish(self, state: State) -> tuple[Tensor, State]:
        total = state["total"]
        none = total == 0
        factor = total.masked_fill(none, 1.0).reciprocal()
        return factor, {"lse": state["top"] + total.masked_fill(none, 1.0).log()}

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        lse = final["lse"]
        return (_fill(scores, allowed, -torch.inf) - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return (grad_weights - delta).mul_(weights)


class Sigmoid(Normalizer):
    """p_j = sigmoid(s_j); no state."""

    none_is_all = True

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        return _fill(scores.sigmoid(), allowed, 0.0), state, None

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return _fill(scores.sigmoid(), allowed, 0.0)

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return weights * (1.0 - weights) * grad_weights


class Relu(Normalizer):
    """p_j = max(s_j, 0); no state."""

    none_is_all = True

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        return _fill(scores.relu(), allowed, 0.0), state, None

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return _fill(scores.relu(), allowed, 0.0)

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return grad_weights.masked_fill(weights <= 0, 0.0)


class AbsSum(Normalizer):
    """p_j = s_j / r with r = max(sum_j |s_j|, 1), the normaliser of parallel retention.

    d s_j = (dp_j - [r > 1] sign(s_j) sum_i p_i dp_i) / r.

    Args:
        detach: treat r as a constant in the gradient, d s_j = dp_j / r, as AttentionEngine's retention does. The
            name "abs-sum" stands for the exact gradient.
    """

    none_is_all = True

    def __init__(self, detach: bool = False) -> None:
        self.detach = detach

    def init(self, rows: Tensor) -> State:
        return {"total": rows}

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        scores = _fill(scores, allowed, 0.0)
        return scores, {"total": state["total"] + scores.abs().sum(-1, keepdim=True)}, None

    def finish(self, state: State) -> tuple[Tensor, State]:
        total = state["total"].detach() if self.detach else state["total"]
        scale = total.clamp(min=1.0)
        return scale.reciprocal(), {"scale": scale}

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return _fill(scores, allowed, 0.0) / final["scale"]

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        scale = final["scale"]
        if not self.detach:
            # weights, not scores: the sign of a masked weight is 0
            grad_weights = grad_weights - weights.sign() * delta.masked_fill(scale <= 1.0, 0.0)
        return grad_weights / scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}(detach={self.detach})"


class Retention(AbsSum):
    """`AbsSum` with the gradient of the authors' code: the normaliser is a constant in the backward pass."""

    def __init__(self, detach: bool = True) -> None:
        super().__init__(detach)


_NAMED: dict[str, Normalizer] = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "relu": Relu(),
    "abs-sum": AbsSum(),
}


def named(normalize: str | Normalizer) -> Normalizer:
    """The object that a name stands for."""
    return _NAMED[normalize] if isinstance(normalize, str) else normalize


def check_normalizer(normalize: Any) -> None:
    """Raise ValueError unless `normalize` is a known name or a Normalizer."""
    if isinstance(normalize, Normalizer) or (isinstance(normalize, str) and normalize in NAMES):
        return
    raise ValueError(f"normalize must be one of {', '.join(NAMES)} or a Normalizer, got {normalize!r}")
