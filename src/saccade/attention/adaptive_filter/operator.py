"""The filter as functions of tensors: the common frame, the score of a tile, the isotropic and the tensor form.

Shape letters: B batch, H heads, N queries, M keys, D head dim of q and k (real), d = D / 2, E of values, e = E / 2,
X = D + 1: channels and the token's time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.autocast import off, working_dtype
from saccade.ops.masks import Mask

Bias = Literal["none", "precision", "linear"]
InnerResidual = Literal["learned", "precision", "sum", "none"]
Rotation = Literal["learned", "fixed", "rope", "none"]


#: numbers of a block of the tensor form, over pairs and channels; some ten arrays of it live at a time
BLOCK = 2**20


class Dynamics(NamedTuple):
    """A noisy linear system for each head (H,), in the tensor form for each channel (H, d); None is exactly 0.

    decay is mu <= 0, process_noise sigma^2, key_noise eta^2, query_noise gamma^2, frequency (H, d) omega.
    """

    decay: Tensor | None
    frequency: Tensor | None
    process_noise: Tensor | None
    key_noise: Tensor | None
    query_noise: Tensor

    def variance(self, growth: Tensor | None, lag: Tensor) -> Tensor:
        """V from growth = E - 1 (None: 0) and lag; parameters are shaped to broadcast with them already.

        E^2 - 1 = (E - 1)(E + 1), which loses nothing where mu tau is small.
        """
        floor = self.query_noise if self.key_noise is None else self.query_noise + self.key_noise
        if growth is None:
            return floor + (lag * 0.0 if self.process_noise is None else self.process_noise * lag)
        slope = self.query_noise * 0.0 if self.key_noise is None else self.key_noise
        if self.process_noise is not None and self.decay is not None:
            slope = slope + self.process_noise / (2.0 * self.decay)
        return floor + growth * (growth + 2.0) * slope

    def over_pairs(self, axes: int) -> Dynamics:
        """Parameters with `axes` more axes behind the heads, in the accumulation's dtype, and mu < 0 (see `_TINY`)."""

        def shaped(x: Tensor | None) -> Any:
            return None if x is None else x.reshape(x.shape[0], *[1] * axes, *x.shape[1:])

        decay = None if self.decay is None else shaped(self.decay.clamp(max=-_TINY))
        return Dynamics(decay, None, *(shaped(x) for x in self[2:]))


#: mu = 0 is replaced by this: V then is sigma^2 tau + eta^2 + gamma^2 up to rounding, and nothing is divided by 0
_TINY = 1e-12


@dataclass(frozen=True)
class Weighting:
    """How residual and variance become a weight; see the paper's page.

    Args:
        robust: weights 1 / (1 + R S), else exp(-R S).
        residual: "full", or "dot": -2 E Re(q^H k) alone.
        additive, multiplicative: B and S.
        exponents: what mu tau is clipped to.

    Raises:
        ValueError: if a name is unknown, or robust weights are asked of the dot product, whose log may not exist.
    """

    robust: bool = True
    residual: Literal["full", "dot"] = "full"
    additive: Bias = "precision"
    multiplicative: Bias = "precision"
    exponents: tuple[float, float] = (-10.0, 10.0)

    def __post_init__(self) -> None:
        if self.residual not in ("full", "dot"):
            raise ValueError(f"residual must be 'full' or 'dot', got {self.residual!r}")
        for name in ("additive", "multiplicative"):
            if getattr(self, name) not in ("none", "precision", "linear"):
                raise ValueError(f"{name} must be 'none', 'precision' or 'linear', got {getattr(self, name)!r}")
        if self.robust and self.residual == "dot":
            raise ValueError("robust weights need residual='full': log(1 + R S) may not exist for residual='dot'")


def common_frame(z_BHNE: Tensor, frequency_He: Tensor | None, times_BN: Tensor, *, back: bool = False) -> Tensor:
    """z e^(-i omega t), or z e^(i omega t) with `back`: complex numbers turned by their times.

    Args:
        z_BHNE: halves of the last axis are real and imaginary parts.
        frequency_He: omega of each complex channel; None leaves z as it is.
        times_BN: t, (1 or B, N).
        back: out of the common frame instead of into it.
    """
    if frequency_He is None:
        return z_BHNE
    angles = (times_BN[:, None, :, None] * frequency_He[:, None]).to(z_BHNE.dtype)
    cos, sin = angles.cos(), angles.sin() if back else -angles.sin()
    real, imaginary = z_BHNE.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def adaptive_filter_attend(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    dynamics: Dynamics,
    *,
    temperature_H: Tensor | float = 1.0,
    robustness_H: Tensor | float = 1.0,
    weighting: Weighting | None = None,
    value_dynamics: Dynamics | None = None,
    rotate_values: bool | None = True,
    times: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The estimate e and log P of the paper's page, isotropic or tensor form by the dynamics' shape.

    Args:
        q_BHND, k_BHMD, v_BHME: halves of the last axis are real and imaginary parts.
        dynamics: of the keys and, without `value_dynamics`, of the values.
        temperature_H, robustness_H: temp and nu, one for all heads or one a head.
        weighting: the paper's robust weights where None.
        value_dynamics: of the values, where they have a system of their own.
        rotate_values: False leaves e in the common frame, without e^(i omega t_i); None does not turn values at all.
        times: (N,) or (B, N), rising; 0, 1, 2 ... where None. Needs N = M.
        mask: as `attend`'s, beside causality.
        causal: no query sees a later key; otherwise N = M.

    Returns:
        e (B, H, N, E), and log P (B, H, N, 1), in the tensor form (B, H, N, d).

    Raises:
        ValueError: if shapes do not fit, or the weighting is one that these dynamics or the tensor form do not have.
    """
    if times is not None and q_BHND.shape[2] != k_BHMD.shape[2]:
        raise ValueError(f"times need as many queries as keys, got {q_BHND.shape[2]} and {k_BHMD.shape[2]}")
    if not causal and q_BHND.shape[2] != k_BHMD.shape[2]:
        raise ValueError(f"without causality queries must be the keys' tokens, got {q_BHND.shape[2]}")
    given, values = v_BHME.dtype, value_dynamics or dynamics
    wide = working_dtype(given)
    q, k, v = (x.to(wide) for x in (q_BHND, k_BHMD, v_BHME))
    times_BM = check_times(times, k_BHMD.shape[0], 0, k_BHMD.shape[2], q)
    times_BN = times_BM[:, : q.shape[2]]
    mask = masks.dense(mask) if isinstance(mask, Tensor) else mask
    if causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    e, log_precision = filter_in_common_frame(
        with_times(common_frame(q, dynamics.frequency, times_BN), times_BN),
        with_times(common_frame(k, dynamics.frequency, times_BM), times_BM),
        common_frame(v, None if rotate_values is None else values.frequency, times_BM),
        dynamics,
        values,
        temperature_H,
        robustness_H,
        weighting or Weighting(),
        mask,
    )
    return common_frame(e, values.frequency if rotate_values else None, times_BN, back=True).to(given), log_precision


def check_times(times: Tensor | None, batch: int, start: int, number: int, like: Tensor) -> Tensor:
    """Times (1 or B, N) in the accumulation's dtype: those given, or start, start + 1, ..."""
    if times is None:
        return torch.arange(start, start + number, device=like.device, dtype=like.dtype)[None]
    if times.shape not in ((number,), (batch, number)):
        raise ValueError(f"times must be ({number},) or ({batch}, {number}), got {tuple(times.shape)}")
    return times.to(like.dtype).view(-1, number)


def with_times(x_BHND: Tensor, times_BN: Tensor) -> Tensor:
    """The token's time as one more channel, so that it is cached and tiled with it."""
    return torch.cat([x_BHND, times_BN[:, None, :, None].expand(*x_BHND.shape[:3], 1)], -1)


def filter_in_common_frame(
    q_BHNX: Tensor,
    k_BHMX: Tensor,
    v_BHME: Tensor,
    dynamics: Dynamics,
    values: Dynamics,
    temperature: Tensor | float,
    robustness: Tensor | float,
    weighting: Weighting,
    mask: Mask | None,
    *,
    decay_values: bool = True,
    separable: bool = False,
) -> tuple[Tensor, Tensor]:
    """sum_j A_ij E_ij v_j and log P, for q, k with times (X = D + 1) and v in the common frame.

    Args:
        decay_values: False leaves E out: the bare weights A.
        separable: no mu (t_i - t_j) reaches the clip, so that E = exp(mu t_i) exp(-mu t_j).
    """
    H = q_BHNX.shape[1]
    temp, nu = (_per_head(x, H, q_BHNX) for x in (temperature, robustness))
    if dynamics.query_noise.ndim == 2:
        return _tensor_form(q_BHNX, k_BHMX, v_BHME, dynamics, values, temp, nu, weighting, mask, decay_values)
    still = all(x is None for d in (dynamics, values) for x in (d.decay, d.process_noise))
    if still and not weighting.robust and weighting.additive != "linear":
        return _dot_product_form(q_BHNX, k_BHMX, v_BHME, dynamics, values, temp, nu, weighting, mask)
    score = _score(dynamics, values, temp, nu, weighting)
    if values.decay is None or not decay_values:
        out, lse = attend(q_BHNX, k_BHMX, v_BHME, mask=mask, score=score, return_lse=True)
        return out, lse[..., None]
    if separable:
        # halfway between the first and the last time, so that neither factor grows large
        tq, tk = q_BHNX[..., -1:], k_BHMX[..., -1:]
        middle = (tk[:, :, :1] + tk[:, :, -1:]) / 2 if tk.shape[2] else 0.0
        decay = values.decay[:, None, None]
        out, lse = attend(
            q_BHNX, k_BHMX, v_BHME * (decay * (middle - tk)).exp(), mask=mask, score=score, return_lse=True
        )
        return out * (decay * (tq - middle)).exp(), lse[..., None]
    lse = attend(q_BHNX, k_BHMX, v_BHME[..., :0], mask=mask, score=score, return_lse=True)[1]
    decayed = _score(dynamics, values, temp, nu, weighting, decayed=True)
    out, above = attend(q_BHNX, k_BHMX, v_BHME, mask=mask, score=decayed, return_lse=True)
    nothing = lse == -torch.inf
    return out * (above - lse.masked_fill(nothing, torch.inf)).exp()[..., None], lse[..., None]


def _per_head(x: Tensor | float, heads: int, like: Tensor) -> Tensor:
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    return x.expand(heads)[:, None, None]


def _score(
    dynamics: Dynamics, values: Dynamics, temp: Tensor, nu: Tensor, weighting: Weighting, decayed: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """l (with `decayed` plus the values' exponent a) of a tile of queries and keys that carry their times."""
    shared = values is dynamics
    of_keys, of_values = dynamics.over_pairs(2), values.over_pairs(2)
    both = weighting.robust and weighting.additive == weighting.multiplicative == "precision" and shared

    def score(q: Tensor, k: Tensor) -> Tensor:
        with off(q.device.type):
            d = (q.shape[-1] - 1) // 2
            lag = _lag(q, k)
            growth, variance = _growth_and_variance(of_keys, lag, weighting)
            residual = -2.0 * q[..., :-1] @ k[..., :-1].mT
            if weighting.residual == "full":
                squares_q, squares_k = (x[..., :-1].square().sum(-1, keepdim=True) for x in (q, k))
                decayed_k = squares_k.mT if growth is None else (growth + 1.0) * squares_k.mT
                residual = residual + decayed_k
                residual = squares_q + (residual if growth is None else (growth + 1.0) * residual)
                residual = residual.clamp(min=0.0)  # a square, up to rounding
            elif growth is not None:
                residual = (growth + 1.0) * residual
            if both:  # -log V - log(1 + R / (nu d V)) in one logarithm
                scores = -temp * (variance + residual / (nu * d)).log()
            else:
                scores = residual * _multiplier(of_keys, variance, lag, nu, weighting) / d
                scores = -scores.log1p() if weighting.robust else -scores
                if weighting.additive == "linear":
                    scores = scores - nu * lag
                elif weighting.additive == "precision":
                    own = variance if shared else _growth_and_variance(of_values, lag, weighting)[1]
                    scores = scores - own.log()
                scores = temp * scores
            if decayed and of_values.decay is not None:
                scores = scores + (of_values.decay * lag).clamp(*weighting.exponents)
            return scores

    return score


def _lag(q: Tensor, k: Tensor) -> Tensor:
    """|t_i - t_j| (B, 1, n, m): times are the same in all heads."""
    return (q[:, :1, :, -1:] - k[:, :1, :, -1:].mT).abs()


def _growth_and_variance(dynamics: Dynamics, lag: Tensor, weighting: Weighting) -> tuple[Tensor | None, Tensor]:
    growth = None if dynamics.decay is None else (dynamics.decay * lag).clamp(*weighting.exponents).expm1()
    return growth, dynamics.variance(growth, lag)


def _multiplier(dynamics: Dynamics, variance: Tensor, lag: Tensor, nu: Tensor, weighting: Weighting) -> Tensor | float:
    """d S."""
    if weighting.multiplicative == "none":
        return 1.0
    if weighting.multiplicative == "precision":
        return 1.0 / (nu * variance)
    noise = dynamics.key_noise
    if noise is None:
        raise ValueError("multiplicative='linear' divides by the keys' noise, which is 0 here")
    return 1.0 / (noise if dynamics.process_noise is None else noise + dynamics.process_noise * lag)


def _dot_product_form(
    q_BHNX: Tensor,
    k_BHMX: Tensor,
    v_BHME: Tensor,
    dynamics: Dynamics,
    values: Dynamics,
    temp: Tensor,
    nu: Tensor,
    weighting: Weighting,
    mask: Mask | None,
) -> tuple[Tensor, Tensor]:
    """E = 1 and V constant: l = temp (B - S |q|^2) + 2 temp S Re(q^H k) - temp S |k|^2, B and S numbers of the head."""
    q, k = q_BHNX[..., :-1], k_BHMX[..., :-1]
    nowhere = torch.zeros_like(temp)
    variance = dynamics.over_pairs(2).variance(None, nowhere)
    factor = temp * _multiplier(dynamics.over_pairs(2), variance, nowhere, nu, weighting) / (q.shape[-1] // 2)
    level = nowhere
    if weighting.additive == "precision":
        level = -temp * values.over_pairs(2).variance(None, nowhere).log()
    scaled = 2.0 * factor * q
    if weighting.residual == "full":
        level = level - factor * q.square().sum(-1, keepdim=True)
        scaled = torch.cat([scaled, -factor.expand(q.shape[0], -1, q.shape[2], 1)], -1)
        k = torch.cat([k, k.square().sum(-1, keepdim=True)], -1)
    out, lse = attend(scaled, k, v_BHME, mask=mask, scale=1.0, return_lse=True)
    return out, lse[..., None] + level


def _tensor_form(
    q_BHNX: Tensor,
    k_BHMX: Tensor,
    v_BHME: Tensor,
    dynamics: Dynamics,
    values: Dynamics,
    temp: Tensor,
    nu: Tensor,
    weighting: Weighting,
    mask: Mask | None,
    decay_values: bool,
) -> tuple[Tensor, Tensor]:
    """By blocks of queries; nothing over pairs and channels outlives its block, forward or backward."""
    if dynamics is not values or weighting != Weighting(robust=weighting.robust, exponents=weighting.exponents):
        raise ValueError("the tensor form has one dynamics, residual='full', additive = multiplicative = 'precision'")
    B, H, N, _ = q_BHNX.shape
    M, d = k_BHMX.shape[2], (k_BHMX.shape[3] - 1) // 2
    of_pairs = dynamics.over_pairs(2)
    size = max(1, BLOCK // max(1, B * H * M * d))

    def block(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        lag = _lag(q, k)[..., None]
        growth, variance = _growth_and_variance(of_pairs, lag, weighting)
        precision = 1.0 / variance
        decayed = precision if growth is None else precision * (growth + 1.0)
        twice = decayed if growth is None else decayed * (growth + 1.0)
        real_q, imaginary_q = q[..., None, :-1].chunk(2, -1)
        real_k, imaginary_k = k[..., None, :, :-1].chunk(2, -1)
        squares_q = real_q.square() + imaginary_q.square()
        squares_k = real_k.square() + imaginary_k.square()
        cross = real_q * real_k + imaginary_q * imaginary_k
        misfit = (precision * squares_q + twice * squares_k - 2.0 * decayed * cross).sum(-1).clamp(min=0.0) / (nu * d)
        scores = -temp[..., None] * (variance.log() + (misfit.log1p() if weighting.robust else misfit)[..., None])
        if mask is not None:
            batch_B, head_H, key_M = (torch.arange(n, device=q.device) for n in (B, H, M))
            allowed = mask.allowed(batch_B[:, None, None, None], head_H[:, None, None], rows[:, None], key_M)
            scores = scores.masked_fill(~allowed[..., None], -torch.inf)
        log_precision = scores.logsumexp(-2)
        weights = (scores - log_precision.masked_fill(log_precision == -torch.inf, 0.0)[..., None, :]).exp()
        if decay_values and growth is not None:
            weights = weights * (growth + 1.0)
        return torch.einsum("bhnmd,bhmpd->bhnpd", weights, v.unflatten(-1, (2, d))).flatten(-2), log_precision

    rows = torch.arange(N, device=q_BHNX.device)
    outs = [
        checkpoint(block, q_BHNX[:, :, i : i + size], k_BHMX, v_BHME, rows[i : i + size], use_reentrant=False)
        for i in range(0, N, size)
    ]
    return torch.cat([out for out, _ in outs], 2), torch.cat([log for _, log in outs], 2)
