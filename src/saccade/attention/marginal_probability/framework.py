"""The framework: a prior over edges, a potential of pairs, an inference, and the expectation of values under it.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, X structures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.ops import score_mods
from saccade.ops.attend import attend
from saccade.ops.distributions import gumbel_noise
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.score_mods import ScoreMod

Over = Literal["keys", "queries"]


@dataclass(frozen=True)
class Prior:
    """p(phi_i = j), up to a constant: 0 where `mask` hides the pair, else exp of what `log` adds to a score.

    `prior & other` is their product.

    Attributes:
        mask: the edges that there may be; all where None.
        log: of `saccade.score_mods`, or any (score, b, h, i, j) -> score + log p; uniform where None.
    """

    mask: Mask | None = None
    log: ScoreMod | None = None

    def __and__(self, other: Prior) -> Prior:
        both = [given for given in (self.mask, other.mask) if given is not None]
        logs = [given for given in (self.log, other.log) if given is not None]
        mask = both[0] & both[1] if len(both) == 2 else next(iter(both), None)
        return Prior(mask, score_mods.compose(*logs) if len(logs) == 2 else next(iter(logs), None))

    def from_query(self, offset: int) -> Prior:
        """The same where the queries begin at position `offset`; of the logarithm alone, a mask is as it was given."""
        return self if self.log is None or not offset else replace(self, log=score_mods.shifted(self.log, offset))


@dataclass(frozen=True)
class DotProduct:
    """log psi = scale q . k.

    Attributes:
        scale: D ** -0.5 where None.
    """

    scale: float | None = None

    def __call__(self, q_BHND: Tensor, k_BHMD: Tensor) -> Tensor:
        return q_BHND @ k_BHMD.mT * (q_BHND.shape[-1] ** -0.5 if self.scale is None else self.scale)


@dataclass(frozen=True)
class Gaussian:
    """log psi = log Normal(q; k, I / precision), normalised: the log marginal is a mixture's log likelihood.

    Attributes:
        precision: alpha.

    Raises:
        ValueError: if it is not positive.
    """

    precision: float = 1.0

    def __post_init__(self) -> None:
        if not self.precision > 0:
            raise ValueError(f"precision must be positive, got {self.precision}")

    def __call__(self, q_BHND: Tensor, k_BHMD: Tensor) -> Tensor:
        size_BHN1, size_BH1M = q_BHND.square().sum(-1, keepdim=True), k_BHMD.square().sum(-1)[..., None, :]
        squares = size_BHN1 - 2 * q_BHND @ k_BHMD.mT + size_BH1M
        return q_BHND.shape[-1] / 2 * math.log(self.precision / (2 * math.pi)) - self.precision / 2 * squares


Potential = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exact:
    """The posterior itself: soft weights."""

    def weights(self, log_weights: Tensor, dim: int) -> Tensor:
        return log_weights.exp()


@dataclass(frozen=True)
class Map:
    """The likeliest edge alone: hard weights, the limit of a potential of ever larger scale."""

    def weights(self, log_weights: Tensor, dim: int) -> Tensor:
        return _one_hot(log_weights, dim)


@dataclass(frozen=True)
class Sample:
    """One edge drawn from the posterior (the largest of log p + Gumbel noise): hard weights, right in the mean.

    Attributes:
        straight_through: the gradient is that of the soft weights; else there is none to the scores.
        generator: of the noise; torch's own where None.
    """

    straight_through: bool = True
    generator: torch.Generator | None = None

    def weights(self, log_weights: Tensor, dim: int) -> Tensor:
        hard = _one_hot((log_weights + gumbel_noise(log_weights, self.generator)).detach(), dim)
        if not self.straight_through:
            return hard
        soft = log_weights.exp()
        return hard + soft - soft.detach()


@dataclass(frozen=True)
class EM(Exact):
    """Queries that are estimated anew, each time as the expectation of the keys, before the values are read.

    Over keys it climbs the log marginal of a dot product (a Hopfield network); over queries it is EM of a mixture whose
    means are the queries (slots).

    Attributes:
        steps: how often.

    Raises:
        ValueError: if it is negative.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")


Inference = Exact | Map | Sample | EM


@dataclass(frozen=True)
class Posterior:
    """p(phi | x), edge by edge.

    Attributes:
        log_weights: log p, (B, H, N, M); -inf throughout where nothing may be chosen.
        log_marginal: z, of each query (B, H, N), or of each key (B, H, M) where keys choose; -inf there.
        over: who is chosen.
    """

    log_weights: Tensor
    log_marginal: Tensor
    over: Over


@dataclass(frozen=True)
class Expectation:
    """What attention is: E[v(x, phi)] under the posterior.

    Attributes:
        out: (B, H, N, E).
        log_marginal: z; its negative sum is a loss that needs no targets.
        queries: (B, H, N, D), as EM leaves them.
    """

    out: Tensor
    log_marginal: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Mechanism:
    """An attention mechanism by its ingredients: out_i = sum_j p(phi_i = j | x) v_j.

    Where keys are chosen and the weights soft, it runs on the engine (`saccade.attend`): prior as mask and
    modification of scores, potential as score, log marginal as LSE; memory linear in N + M. What asks for the posterior
    itself (hard weights, choosing queries, values of pairs) computes it, N x M.

    Attributes:
        prior: of edges.
        potential: (queries (B, H, n, D), keys (B, H, m, D)) -> log psi (B, H, n, m).
        over: "keys": each query chooses a key; "queries": each key chooses a query, and a query reads the mean of
            those that chose it (slots).
        inference: `Exact`, `Map`, `Sample` or `EM`.

    Raises:
        ValueError: if `over` is another word.
    """

    prior: Prior = Prior()
    potential: Potential = DotProduct()
    over: Over = "keys"
    inference: Inference = Exact()

    def __post_init__(self) -> None:
        if self.over not in ("keys", "queries"):
            raise ValueError(f"over must be 'keys' or 'queries', got {self.over!r}")

    def __call__(
        self, q_BHND: Tensor, k_BKMD: Tensor, v: Tensor, *, mask: GivenMask = None, offset: int = 0
    ) -> Expectation:
        """
        Args:
            q_BHND, k_BKMD: queries and keys; K divides H.
            v: values of keys (B, K, M, E), or of pairs (B, H, N, M, E).
            mask: what the prior hides besides; True = may be chosen.
            offset: position of query 0 among the keys, for a prior that knows distances.

        Raises:
            ValueError: if the shapes do not fit.
        """
        check_pairs(q_BHND, k_BKMD, v)
        queries = q_BHND
        for _ in range(self.inference.steps if isinstance(self.inference, EM) else 0):
            queries, _ = self._expect(queries, k_BKMD, k_BKMD, mask, offset)
        return Expectation(*self._expect(queries, k_BKMD, v, mask, offset), queries)

    def posterior(self, q_BHND: Tensor, k_BKMD: Tensor, *, mask: GivenMask = None, offset: int = 0) -> Posterior:
        """p(phi | x) of these queries and keys, N x M. Arguments and errors as of the call."""
        check_pairs(q_BHND, k_BKMD, k_BKMD)
        whole = self._prior(q_BHND, k_BKMD, mask, offset)
        B, H, N, M = *q_BHND.shape[:3], k_BKMD.shape[2]
        scores = self.potential(q_BHND, repeat_heads(k_BKMD, H))
        if whole.log is not None:
            b, h, i, j = (torch.arange(size, device=scores.device) for size in (B, H, N, M))
            scores = whole.log(scores, b[:, None, None, None], h[:, None, None], i[:, None], j)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if whole.mask is not None:
            allowed = whole.mask.dense(N, M, scores.device).expand_as(scores)
        dim = -1 if self.over == "keys" else -2
        log_weights, marginal = _normalised(scores, allowed, dim)
        return Posterior(log_weights, marginal.squeeze(dim), self.over)

    def _expect(self, q: Tensor, k: Tensor, v: Tensor, mask: GivenMask, offset: int) -> tuple[Tensor, Tensor]:
        if self.over == "keys" and v.ndim == 4 and isinstance(self.inference, Exact):
            whole, psi = self._prior(q, k, mask, offset), self.potential
            form: dict[str, Any] = {"scale": psi.scale} if isinstance(psi, DotProduct) else {"score": psi}
            return attend(q, k, v, mask=whole.mask, score_mod=whole.log, return_lse=True, **form)
        found = self.posterior(q, k, mask=mask, offset=offset)
        if self.over == "keys":
            weights = self.inference.weights(found.log_weights, -1)
        else:
            weights = self.inference.weights(found.log_weights, -2)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        if v.ndim == 5:
            return torch.einsum("bhnm,bhnme->bhne", weights, v), found.log_marginal
        return weights.to(v.dtype) @ repeat_heads(v, q.shape[1]), found.log_marginal

    def _prior(self, q: Tensor, k: Tensor, mask: GivenMask, offset: int) -> Prior:
        given = Pattern.of(mask, q.shape[0], q.shape[2], k.shape[2], heads=q.shape[1], offset=offset).mask
        return self.prior.from_query(offset) & Prior(given)


def by_enumeration(log_weights_NM: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """E[v(x, phi)] and log sum_phi p(phi) psi(x, phi), by the sum over all M^N structures: the definition, for tests.

    Args:
        log_weights_NM: log p(phi_i = j) + log psi(x_i, x_j).
        value: v(x, phi) of a structure phi (N,), integers: of any shape, and of the whole structure.

    Raises:
        ValueError: if there are more than a million structures.
    """
    N, M = log_weights_NM.shape
    if M**N > 10**6:
        raise ValueError(f"{M} ** {N} structures are too many to be enumerated")
    phi_XN = torch.tensor(list(itertools.product(range(M), repeat=N)), device=log_weights_NM.device).view(-1, N)
    log_X = log_weights_NM.gather(1, phi_XN.T).sum(0)
    values = torch.stack([value(phi) for phi in phi_XN])
    return torch.tensordot(log_X.softmax(0), values, 1), log_X.logsumexp(0)


def check_pairs(q_BHND: Tensor, k_BKMD: Tensor, v: Tensor) -> None:
    """Raise ValueError if queries, keys and values, of keys or of pairs, do not fit together."""
    of_pairs = v.ndim == 5
    check_qkv(q_BHND, k_BKMD, k_BKMD if of_pairs else v)
    if of_pairs and v.shape[:4] != (*q_BHND.shape[:3], k_BKMD.shape[2]):
        raise ValueError(
            f"values of pairs must be {(*q_BHND.shape[:3], k_BKMD.shape[2])} and a width, got {tuple(v.shape)}"
        )


def _normalised(scores: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log p and z; both -inf, with gradients of 0, where nothing is allowed."""
    empty = ~allowed.any(dim, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
    marginal = scores.logsumexp(dim, keepdim=True)
    return (scores - marginal).masked_fill(empty, -torch.inf), marginal.masked_fill(empty, -torch.inf)


def _one_hot(log_weights: Tensor, dim: int) -> Tensor:
    chosen = torch.zeros_like(log_weights).scatter(dim, log_weights.argmax(dim, keepdim=True), 1.0)
    return chosen.masked_fill(log_weights == -torch.inf, 0.0)
