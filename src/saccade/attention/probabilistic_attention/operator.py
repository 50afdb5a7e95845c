"""The mixture: its log joint as one dot product, responsibilities, EM of keys and of values, the read-out.

Shape letters: B batch, H query heads, K key heads, N queries, M units (keys), D head dim, E width of values, F features
whose dot product is the log joint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops import score_mods
from saccade.ops.attend import attend
from saccade.ops.distributions import distribute
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern

#: added to sums of weights by which is divided
EPS = 1e-20


@dataclass(frozen=True)
class RelativePositions:
    """Embeddings of pairs, which enter the log joint as |q_i - r^q_ij|^2 and |zeta_j - r^k_ji|^2; each may be None.

    Attributes:
        query: r^q (N, M, D).
        key: r^k (M, N, D).
        value: r^v (N, M, E), read out beside the values.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True)
class Annotations:
    """Values that somebody fixed at some of the positions.

    Attributes:
        values: (B, H, N, E); what stands at the other positions does not count.
        given: m, which positions (B, H, N), bool; H may be 1.
        offsets: learnt offsets of the units (B, H, M, E), added to the read-out of relative positions.
    """

    values: Tensor
    given: Tensor
    offsets: Tensor | None = None


class Read(NamedTuple):
    """What a call gives.

    Attributes:
        out: v_i = sum_j w_ij mu_j, (B, H, N, E).
        offsets: e_i = sum_j w_ij r^v_ij, (B, H, N, E); None without r^v.
        weights: w (B, H, N, M); None where the engine read the values and nobody asked for them.
        keys, values: zeta and mu as they were adapted, (B, H, M, D) and (B, H, M, E).
    """

    out: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Mixture:
    """p(q_i, v_i, j) = pi_ij Normal(q_i; zeta_j, I / alpha_j) Normal(v_i; mu_j, I / beta_j), up to normalisers.

    Attributes:
        alpha: precision of keys, a number or a tensor, one for all or of each unit (B, H, M).
        beta: precision of values, the same.
        log_prior: log pi (B, H, N, M), each axis but the last may be 1; it comes before magnitude priors.
        magnitude_priors: log pi_ij = alpha_j / 2 |zeta_j|^2 + beta_j / 2 |mu_j|^2, which leaves dot products alone.
        positions: of pairs; none where None.
    """

    alpha: float | Tensor = 1.0
    beta: float | Tensor = 0.0
    log_prior: Tensor | None = None
    magnitude_priors: bool = True
    positions: RelativePositions | None = None

    @property
    def where(self) -> RelativePositions:
        """The positions, empty where there are none."""
        return RelativePositions() if self.positions is None else self.positions

    def features(self, q: Tensor, zeta: Tensor, mu: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of queries (B, H, N, F) and units (B, H, M, F): their dot product is the log joint, less what is the same for
        all units, and less prior and positions of pairs.

        Args:
            q, zeta, mu: queries, keys, value means.
            initial: v_init, a first guess of the values.
        """
        magnitude = self.magnitude_priors and self.log_prior is None
        alpha, per_unit = _of_units(self.alpha)
        ours, theirs = [q], [alpha * zeta]
        bias = torch.zeros_like(zeta[..., :1])
        plain = magnitude
        if per_unit:  # |q|^2 does not cancel
            twice = 1 if self.where.query is None else 2
            ours.append(-0.5 * twice * _squares(q))
            theirs.append(alpha.expand_as(bias))
        if not magnitude:
            bias = bias - alpha / 2 * _squares(zeta)
        if not _is_zero(self.beta):
            beta, per_unit = _of_units(self.beta)
            if initial is not None:
                ours.append(initial)
                theirs.append(beta * mu)
                if per_unit:
                    ours.append(-0.5 * _squares(initial))
                    theirs.append(beta.expand_as(bias))
            # the prior of the magnitude and the Gaussian's own cancel
            sign = int(magnitude and self.where.value is None) - int(initial is not None)
            plain = plain and not sign
            bias = bias + sign * beta / 2 * _squares(mu)
        if not plain:
            ours.append(torch.ones_like(q[..., :1]))
            theirs.append(bias)
        return torch.cat(ours, -1), torch.cat(theirs, -1)

    def of_pairs(self, q: Tensor, zeta: Tensor, mu: Tensor) -> Tensor | None:
        """What positions add to the log joint, (B, H, N, M); None without positions."""
        r_q, r_k, r_v = self.where.query, self.where.key, self.where.value
        magnitude = self.magnitude_priors and self.log_prior is None
        total: Tensor | None = None
        alpha = _row(self.alpha)
        if r_q is not None:
            near = torch.einsum("bhnd,nmd->bhnm", q, r_q)
            total = alpha * (near if magnitude else near - _squares(r_q)[..., 0] / 2)
        if r_k is not None:
            near = torch.einsum("bhmd,mnd->bhnm", zeta, r_k)
            apart = 0.0 if magnitude else _squares(zeta).mT / 2 + _squares(r_k)[..., 0].mT / 2
            total = alpha * (near - apart) + (0.0 if total is None else total)
        if r_v is not None and magnitude and not _is_zero(self.beta):
            cross = _squares(mu).mT + 2 * torch.einsum("bhme,nme->bhnm", mu, r_v) + _squares(r_v)[..., 0]
            total = _row(self.beta) / 2 * cross + (0.0 if total is None else total)
        return total

    def responsibilities(
        self, q: Tensor, zeta: Tensor, mu: Tensor, initial: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        """w_ij = p(j | q_i, v_i), (B, H, N, M); zeros where nothing is allowed."""
        ours, theirs = self.features(q, zeta, mu, initial)
        joint = ours @ theirs.mT
        for more in (self.log_prior, self.of_pairs(q, zeta, mu)):
            joint = joint if more is None else joint + more
        return distribute(joint, "softmax", allowed=allowed)


def adapt_keys(
    weights: Tensor,
    q: Tensor,
    zeta: Tensor,
    alpha: float | Tensor = 1.0,
    precision: float | Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """zeta_j <- (Lambda zeta_j + alpha_j sum_i w_ij q_i) / (Lambda + alpha_j sum_i w_ij), an EM step of the keys.

    Args:
        weights: w (B, H, N, M), rows of 0 for queries that do not count.
        q, zeta: queries (B, H, N, D) and keys (B, H, M, D).
        alpha: precision of keys, one or of each unit.
        precision: Lambda, of the prior that holds a key where it is, one or elementwise; 0 where None.
        prior: the prior's mean; the key itself where None.

    A unit that no query uses and no prior holds keeps its key.
    """
    alpha = _of_units(alpha)[0]
    total, count = alpha * (weights.mT @ q), alpha * weights.sum(-2)[..., None]
    if precision is not None:
        total, count = total + precision * (zeta if prior is None else prior), count + precision
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), zeta)


def propagate_values(
    weights: Tensor,
    mu: Tensor,
    annotations: Annotations,
    beta: float | Tensor = 1.0,
    precision: float | Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """mu_j <- (Lambda mu_j + beta_j sum_i w_ij v_i m_i) / (Lambda + beta_j sum_i w_ij m_i).

    So annotations reach the means of the units that stand for them.

    Args:
        weights: w (B, H, N, M).
        mu: value means (B, H, M, E).
        annotations: v and m; heads without any change nothing.
        beta: precision of values, one or of each unit; without a prior it cancels.
        precision: Lambda, one or elementwise; no prior where None.
        prior: the prior's mean; the value itself where None.
    """
    given = annotations.given[..., None].to(mu.dtype)
    total, count = weights.mT @ (annotations.values * given), weights.mT @ given
    if precision is None:
        new = total / (count + EPS)
    else:
        beta = _of_units(beta)[0]
        new = (precision * (mu if prior is None else prior) + beta * total) / (precision + beta * (count + EPS))
    return torch.where(annotations.given.any(-1)[..., None, None], new, mu)


def probabilistic_attend(
    q_BHND: Tensor,
    zeta_BKMD: Tensor,
    mu_BKME: Tensor,
    mixture: Mixture | None = None,
    *,
    initial: Tensor | None = None,
    mask: GivenMask = None,
    key_iterations: int = 0,
    key_precision: float | Tensor | None = None,
    annotations: Annotations | None = None,
    value_iterations: int = 0,
    value_precision: float | Tensor | None = None,
    map_iterations: int = 1,
    fixed_prior: bool = False,
    real_queries: Tensor | None = None,
    return_weights: bool = False,
) -> Read:
    """MAP inference of the values in a mixture whose units are the keys; softmax attention by default.

    Without iterations, annotations and positions of pairs it runs on the engine (`saccade.attend`), memory linear in
    N + M; else it computes the responsibilities, N x M.

    Args:
        q_BHND, zeta_BKMD, mu_BKME: queries, keys and value means; K divides H.
        mixture: precisions and prior; magnitude priors of alpha = 1 / sqrt D and beta = 0 where None: dot products.
        initial: v_init (B, H, N, E), a first guess of the values.
        mask: which units may be drawn; True = may.
        key_iterations: EM steps of the keys, before those of the values.
        key_precision: Lambda of the keys, one or (B, H, M, D).
        annotations: fixed values.
        value_iterations: EM steps of the values; nothing without annotations.
        value_precision: Lambda of the values, one or (B, H, M, E).
        map_iterations: passes of the whole, each with the values of the last as its first guess.
        fixed_prior: a prior's mean is the key or value that was given; the authors' moves along with each step.
        real_queries: (B, N), False for padding, which no key adapts to.
        return_weights: w as well.

    Raises:
        ValueError: if shapes do not fit, or a number of steps is out of range.
    """
    check_qkv(q_BHND, zeta_BKMD, mu_BKME)
    if min(key_iterations, value_iterations) < 0 or map_iterations < 1:
        numbers = f"{key_iterations}, {value_iterations} and {map_iterations}"
        raise ValueError(f"iterations must not be negative, and one of the whole at least, got {numbers}")
    B, H, N, D = q_BHND.shape
    M, E = zeta_BKMD.shape[2], mu_BKME.shape[3]
    for name, x, shape in (
        ("initial", initial, (B, H, N, E)),
        ("annotations.values", None if annotations is None else annotations.values, (B, H, N, E)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    mixture = Mixture(D**-0.5) if mixture is None else mixture
    given = Pattern.of(mask, B, N, M, heads=H).mask
    found, guess = None, initial
    for _ in range(map_iterations):
        zeta, mu = repeat_heads(zeta_BKMD, H), repeat_heads(mu_BKME, H)
        iterated = key_iterations or (value_iterations and annotations is not None)
        if not (iterated or mixture.positions is not None or return_weights):
            ours, theirs = mixture.features(q_BHND, zeta, mu, guess)
            mod = None if mixture.log_prior is None else score_mods.bias(mixture.log_prior)
            out = attend(ours, theirs, mu, mask=given, score_mod=mod, scale=1.0)
            found = Read(out, None, None, zeta, mu)
        else:
            allowed = None if given is None else given.dense(N, M, q_BHND.device)
            found = _iterated(
                mixture, q_BHND, zeta, mu, guess, allowed, real_queries, annotations,
                (key_iterations, key_precision), (value_iterations, value_precision), fixed_prior,
            )  # fmt: skip
        guess = found.out
    assert found is not None
    return found


def _iterated(
    mixture: Mixture,
    q: Tensor,
    zeta: Tensor,
    mu: Tensor,
    guess: Tensor | None,
    allowed: Tensor | None,
    real: Tensor | None,
    annotations: Annotations | None,
    keys: tuple[int, float | Tensor | None],
    values: tuple[int, float | Tensor | None],
    fixed_prior: bool,
) -> Read:
    weights = mixture.responsibilities(q, zeta, mu, guess, allowed)
    first_zeta, first_mu = (zeta, mu) if fixed_prior else (None, None)
    for _ in range(keys[0]):
        counted = weights if real is None else weights * real[:, None, :, None]
        zeta = adapt_keys(counted, q, zeta, mixture.alpha, keys[1], first_zeta)
        weights = mixture.responsibilities(q, zeta, mu, guess, allowed)
    more: Tensor | float = 0.0
    for _ in range(values[0] if annotations is not None else 0):
        assert annotations is not None
        if annotations.offsets is not None:
            more = more + weights @ annotations.offsets
        mu = propagate_values(weights, mu, annotations, mixture.beta, values[1], first_mu)
        weights = mixture.responsibilities(q, zeta, mu, guess, allowed)
    r_v = mixture.where.value
    offsets = None if r_v is None else torch.einsum("bhnm,nme->bhne", weights, r_v) + more
    return Read(weights @ mu, offsets, weights, zeta, mu)


def _of_units(precision: float | Tensor) -> tuple[Any, bool]:
    """A precision that multiplies (B, H, M, D), and whether it is of each unit."""
    if isinstance(precision, Tensor) and precision.ndim:
        return precision[..., None], True
    return precision, False


def _row(precision: float | Tensor) -> Any:
    """The same, to multiply (B, H, N, M)."""
    found, per_unit = _of_units(precision)
    return found.mT if per_unit else found


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _is_zero(precision: float | Tensor) -> bool:
    """Known to be zero, which a tensor is not."""
    return not isinstance(precision, Tensor) and precision == 0
