"""Adaptive Filter Attention: keys are carried to the query's time by a learned noisy linear system, and weighed by
how sure they then are and how well they then fit.

Racioppo, "Attention as an Adaptive Filter", arXiv 2509.04154.

A channel is complex: z = x[c] + i x[d + c]. It follows dx = lambda x dt + sigma dw, lambda = mu + i omega, mu <= 0, and
is seen with noise: eta^2 on keys, gamma^2 on queries. With the lag tau_ij = |t_i - t_j| and a = clip(mu tau),

    E_ij = exp(a),    V_ij = sigma^2 (1 - E^2) / (-2 mu) + eta^2 E^2 + gamma^2            the propagated variance
    R_ij = |q_i - E_ij e^(i omega tau) k_j|^2
    l_ij = temp (B_ij - log(1 + R_ij S_ij))         robust;    temp (B_ij - R_ij S_ij)    exponential
    e_i = e^(i omega t_i) sum_j A_ij E_ij e^(-i omega t_j) v_j,    A = softmax_j(l) over j <= i,   P_i = sum_j exp(l_ij)
    z_i = g e_i + (1 - g) v_i,     y_i = [Re, Im](e^(mu + i omega) z_i) Wo                an estimate, one step ahead

**Isotropic** (one mu, sigma, eta, gamma a head): by default A is proportional to (V + R / (nu d))^-temp. q, k, v are
turned once into the common frame e^(-i omega t), so that R = |q|^2 + E^2 |k|^2 - 2 E Re(q^H k): dot products, and
no tensor over pairs and channels. Where E and V are constant and weights exponential, the score is a dot product
itself and torch's fused kernel runs; elsewhere it goes tile by tile, memory linear in N. The factor E after the softmax
is moved onto the values, exp(-mu t_j), where no exponent reaches the clip; else a second pass gives A's denominator.

**Tensor** (all of them for each channel c): W_ij,c = P_ij,c / (1 + sum_c P_ij,c |r_ij,c|^2 / (nu d)), P = 1 / V, and
e = sum_j W E v / sum_j W for each channel; N^2 D operations that are no matrix product, by blocks of queries that are
computed again in the backward pass. With equal channels it is the isotropic form (hence the d beside nu).

| symbol | here | symbol | here |
|---|---|---|---|
| mu, omega | decay, frequency | temp = tau^2 | temperature |
| sigma^2, eta^2, gamma^2 | process_noise, key_noise, query_noise | nu | robustness |
| B, S | additive, multiplicative: "none", "precision", "linear" | g | inner_residual |

From the card's account of the authors' code: parametrisation (s_r = 10 / (2 L_max), s_i = 2 pi s_r), options, defaults.
From the recordings: fixed frequencies are multiplied by s_i too; the inner residual is v before its norm. Left open,
chosen here: with separate dynamics the values' V is in B and the keys' in S; head_dim counts real numbers (d = half),
so that a layer is as large as softmax attention's. The radial-tangential variant is not specified on the card.

Shape letters: B batch, H heads, N queries, M keys, C channels, D head dim of q and k (real), d = D / 2, E of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, Names, register
from saccade.layers.cache import KVCache
from saccade.layers.pretrained import read_softmax
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.autocast import off
from saccade.ops.masks import Mask

if TYPE_CHECKING:
    from typing_extensions import Self

    from saccade.catalogue.lab import Lab

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
    """How residual and variance become a weight; see the module's docstring.

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
    """z e^(-i omega t), or z e^(i omega t) with `back`; halves of E are real and imaginary parts; times (1 or B, N)."""
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
    """The estimate e and log P of the module's docstring, isotropic or tensor form by the dynamics' shape.

    Args:
        q_BHND, k_BHMD, v_BHME: halves of the last axis are real and imaginary parts.
        dynamics: of the keys and, without `value_dynamics`, of the values.
        rotate_values: False leaves e in the common frame, without e^(i omega t_i); None does not turn values at all.
        times: (N,) or (B, N), rising; 0, 1, 2 ... where None. Needs N = M.
        mask: as `attend`'s, beside causality.

    Returns:
        e (B, H, N, E), and log P (B, H, N, 1), in the tensor form (B, H, N, d).

    Raises:
        ValueError: if shapes do not fit.
    """
    if times is not None and q_BHND.shape[2] != k_BHMD.shape[2]:
        raise ValueError(f"times need as many queries as keys, got {q_BHND.shape[2]} and {k_BHMD.shape[2]}")
    if not causal and q_BHND.shape[2] != k_BHMD.shape[2]:
        raise ValueError(f"without causality queries must be the keys' tokens, got {q_BHND.shape[2]}")
    given, values = v_BHME.dtype, value_dynamics or dynamics
    wide = torch.float64 if given == torch.float64 else torch.float32
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


class LinearDynamics(nn.Module):
    """Learned `Dynamics`: decay (sigmoid(raw) - 1) s_r - 1e-5 and noises softplus(raw), all of a head or each channel.

    Raw parameters stay where their quantity is switched off, as in the authors' checkpoints, and are not trained.
    """

    def __init__(
        self,
        heads: int,
        channels: int,
        seq_len: int,
        *,
        each_channel: bool = False,
        rotation: Rotation = "learned",
        rope_base: float = 10000.0,
        decay: bool = True,
        process_noise: bool = True,
        key_noise: bool = True,
    ) -> None:
        super().__init__()
        if rotation not in ("learned", "fixed", "rope", "none"):
            raise ValueError(f"rotation must be 'learned', 'fixed', 'rope' or 'none', got {rotation!r}")
        if rotation in ("learned", "fixed") and channels % 2:
            raise ValueError(f"conjugate pairs of frequencies need a head_dim divisible by 4, got {2 * channels}")
        self.has_decay, self.has_process_noise, self.has_key_noise = decay, process_noise, key_noise
        self.rate, self.rotation = 10.0 / (2 * seq_len), rotation
        shape = (heads, channels) if each_channel else (heads,)
        used = {"decay": decay, "process_noise": process_noise, "key_noise": key_noise, "query_noise": True}
        for name, trained in used.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=trained))
        steps = torch.arange(channels)
        if rotation == "learned":
            self.frequency = nn.Parameter(torch.randn(heads, channels // 2))
        elif rotation == "fixed":
            fixed = rope_base ** (-steps[: channels // 2] / (channels / 2))
            self.register_buffer("frequency", fixed.expand(heads, -1).clone())
        elif rotation == "rope":  # x e^(+i p w) there, x e^(-i omega t) here
            self.register_buffer("frequency", -(rope_base ** (-steps / channels)).expand(heads, -1).clone())

    @property
    def largest_rate(self) -> float:
        """No mu is below minus this."""
        return self.rate + 1e-5 if self.has_decay else 0.0

    def forward(self) -> Dynamics:
        wide = torch.float64 if self.decay.dtype == torch.float64 else torch.float32
        frequency = None
        if self.rotation != "none":
            frequency = self.frequency.to(wide)
        if frequency is not None and self.rotation != "rope":
            frequency = torch.stack([frequency, -frequency], -1).flatten(1) * (2 * math.pi * self.rate)
        raw = {name: getattr(self, name).to(wide) for name in ("decay", "process_noise", "key_noise", "query_noise")}
        return Dynamics(
            (raw["decay"].sigmoid() - 1.0) * self.rate - 1e-5 if self.has_decay else None,
            frequency,
            F.softplus(raw["process_noise"]) if self.has_process_noise else None,
            F.softplus(raw["key_noise"]) + 1e-5 if self.has_key_noise else None,
            F.softplus(raw["query_noise"]) + 1e-5,
        )


class ComplexRMSNorm(nn.Module):
    """z <- z rsqrt(mean(z^2 over channels, real and imaginary) + 1e-6) weight, a weight for each complex channel."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))

    def forward(self, z_BHNE: Tensor) -> Tensor:
        weight = self.weight.to(z_BHNE.dtype)[:, None].repeat(1, 1, 2)
        return z_BHNE * (z_BHNE.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


class AdaptiveFilterAttention(QKVAttention):
    """Causal attention as a learned filter; real in, real out, complex inside.

    Args:
        dim: channels C.
        num_heads: heads H.
        causal: must be True; a filter knows the past alone.
        seq_len: the length L_max to which decay and frequencies are scaled; longer inputs work.
        form: "isotropic" or "tensor".
        head_dim: D, real numbers of a head (d = D / 2 complex channels); C / H where None.
        value_head_dim: that of the values, D where None; another one needs `separate_dynamics`.
        separate_dynamics: keys and queries have a system of their own.
        rotation: frequencies "learned" or "fixed" (in conjugate pairs), "rope" (rotary positions, unscaled) or "none".
        rope_base: base of the latter two.
        rotate_values: True turns values into the common frame and e back; False leaves e in the common frame, as the
            authors do; None does not turn values.
        robust, residual, additive, multiplicative: see `Weighting`.
        decay, process_noise, key_noise: False sets mu, sigma, eta to exactly 0.
        inner_residual: g is "learned", "precision": sigmoid(scale^2 log P - log(prior^2 + 1e-5)); "sum" is e + v,
            "none" e alone.
        input_norm, output_norm: complex RMS norms of q, k, v and of z.
        predict: carry the estimate one step ahead.
        exponents: what mu tau is clipped to.
        qkv_bias, proj_bias: biases.

    Raises:
        ValueError: if arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        seq_len: int = 1024,
        form: Literal["isotropic", "tensor"] = "isotropic",
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        separate_dynamics: bool = False,
        rotation: Rotation = "learned",
        rope_base: float = 10000.0,
        rotate_values: bool | None = True,
        robust: bool = True,
        residual: Literal["full", "dot"] = "full",
        additive: Bias = "precision",
        multiplicative: Bias = "precision",
        decay: bool = True,
        process_noise: bool = True,
        key_noise: bool = True,
        inner_residual: InnerResidual = "learned",
        input_norm: bool = False,
        output_norm: bool = False,
        predict: bool = True,
        exponents: tuple[float, float] = (-10.0, 10.0),
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, causal, head_dim=head_dim, rope=False, qkv_bias=qkv_bias, proj_bias=proj_bias)
        if not causal:
            raise ValueError("causal must be True: a filter knows the past alone, got False")
        value_dim = self.head_dim if value_head_dim is None else value_head_dim
        if self.head_dim % 2 or value_dim % 2:
            raise ValueError(f"head_dim must be even (real and imaginary parts), got {self.head_dim} and {value_dim}")
        if form not in ("isotropic", "tensor"):
            raise ValueError(f"form must be 'isotropic' or 'tensor', got {form!r}")
        if inner_residual not in ("learned", "precision", "sum", "none"):
            raise ValueError(f"inner_residual must be learned, precision, sum or none, got {inner_residual!r}")
        if seq_len < 1 or not exponents[0] < 0 < exponents[1]:
            raise ValueError(f"seq_len must be positive and exponents go from < 0 to > 0, got {seq_len}, {exponents}")
        if value_dim != self.head_dim and not separate_dynamics:
            raise ValueError(f"value_head_dim must be head_dim ({self.head_dim}) in shared dynamics, got {value_dim}")
        if multiplicative == "linear" and not key_noise:
            raise ValueError("multiplicative='linear' divides by the keys' noise: it needs key_noise=True")
        self.weighting = Weighting(robust, residual, additive, multiplicative, exponents)
        if form == "tensor" and (separate_dynamics or (residual, additive, multiplicative) != _TENSOR):
            raise ValueError(
                "form='tensor' has one dynamics, residual='full', additive = multiplicative = 'precision', "
                f"got separate_dynamics={separate_dynamics}, {residual!r}, {additive!r}, {multiplicative!r}"
            )
        self.form, self.rotate_values, self.predict, self.inner_residual = form, rotate_values, predict, inner_residual
        self.value_head_dim, self.rope, self.rope_base = value_dim, rotation == "rope", rope_base
        if value_dim != self.head_dim:
            self.v_proj = nn.Linear(dim, num_heads * value_dim, bias=qkv_bias)
            self.out_proj = nn.Linear(num_heads * value_dim, dim, bias=proj_bias)
        system: dict[str, Any] = {
            "each_channel": form == "tensor",
            "rotation": rotation,
            "rope_base": rope_base,
            "decay": decay,
            "process_noise": process_noise,
            "key_noise": key_noise,
        }
        self.dynamics = LinearDynamics(num_heads, value_dim // 2, seq_len, **system)
        self.key_dynamics = (
            LinearDynamics(num_heads, self.head_dim // 2, seq_len, **system) if separate_dynamics else None
        )
        self.temperature = nn.Parameter(torch.ones(num_heads))
        self.robustness = nn.Parameter(torch.ones(num_heads))
        self.gate_scale, self.gate_prior = (nn.Parameter(torch.rand(num_heads, value_dim // 2)) for _ in range(2))
        norms = [
            ComplexRMSNorm(num_heads, width // 2) if wanted else nn.Identity()
            for width, wanted in (
                (self.head_dim, input_norm),
                (self.head_dim, input_norm),
                (value_dim, input_norm),
                (value_dim, output_norm),
            )
        ]
        self.q_norm, self.k_norm, self.v_norm, self.output_norm = norms
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            self._initialise(projection)
        for parameter in self._unused():
            parameter.requires_grad_(False)

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
        times: Tensor | None = None,
        sample: bool = False,
    ) -> Tensor:
        """Filter `x_BNC`, or continue with it the sequence that `cache` holds.

        Args:
            mask: bool (B, M), True = real token, or what `attend` takes; with a cache M counts all tokens so far.
            times: (N,) or (B, N), rising; positions where None.
            sample: add noise of the estimate's variance to the last token (1 / P + gamma^2, half of it in each of the
                real and the imaginary part).

        Raises:
            ValueError: if the arguments do not fit together.
        """
        z_BHNE, _, log_precision = self.estimate(x_BNC, context_BMC, mask=mask, cache=cache, times=times)
        z_BHNE, values = self.output_norm(z_BHNE), self.dynamics()
        if self.predict:
            if values.decay is not None:
                z_BHNE = z_BHNE * self._of_channels(values.decay).exp()
            z_BHNE = common_frame(z_BHNE, values.frequency, z_BHNE.new_ones(1, 1), back=True)
        if sample:
            variance = (-_both_parts(log_precision[:, :, -1:])).exp() + self._of_channels(values.query_noise)
            noise = (variance / 2).sqrt() * torch.randn_like(z_BHNE[:, :, -1:])
            z_BHNE = torch.cat([z_BHNE[:, :, :-1], z_BHNE[:, :, -1:] + noise], 2)
        return self.out_proj(z_BHNE.transpose(1, 2).flatten(2).to(x_BNC.dtype))

    def estimate(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z before its norm and the prediction, e (B, H, N, E; halves real and imaginary), log P; as `forward`."""
        if context_BMC is not None:
            raise ValueError("a filter takes no context")
        self._check(x_BNC, None, cache)
        wide = torch.float64 if x_BNC.dtype == torch.float64 else torch.float32
        start = 0 if cache is None else cache.length
        v_BHNE = self._split(self.v_proj(x_BNC)).to(wide)
        q, k, times_BN = self._in_common_frame(x_BNC, start, times)
        values = self.dynamics()
        v = common_frame(self.v_norm(v_BHNE), None if self.rotate_values is None else values.frequency, times_BN)
        if cache is not None:
            k, v = cache.append(k, v)
        e, log_precision = self._filter(q, k, v, mask, start, times)
        e = common_frame(e, values.frequency if self.rotate_values else None, times_BN, back=True)
        z = e
        if self.inner_residual == "sum":
            z = e + v_BHNE
        elif self.inner_residual != "none":
            gate = self.gate_scale.to(wide)[:, None]
            if self.inner_residual == "precision":
                # a token without any key knows nothing: P = 0, whose log is no number to multiply with
                known = gate.square() * log_precision.clamp(min=-100.0)
                gate = known - (self.gate_prior.to(wide)[:, None].square() + 1e-5).log()
            gate = torch.cat([gate, gate], -1).sigmoid()
            z = gate * e + (1.0 - gate) * v_BHNE
        return z, e, log_precision

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None, decay: bool = True
    ) -> Tensor:
        """A E applied to given values; with `decay=False` A alone. The tensor form has no one matrix for a head."""
        if self.form == "tensor":
            raise ValueError("in the tensor form each channel has its own weights: there is no matrix of a head")
        q, k, _ = self._in_common_frame(x_BNC, 0, None)
        return self._filter(q, k, values_BHME.to(q.dtype), mask, 0, None, decay_values=decay)[0].to(x_BNC.dtype)

    @classmethod
    def from_softmax(cls, module: nn.Module, *, rope: bool | None = None, **arguments: Any) -> Self:
        """The zero-noise limit, which equals the softmax attention it is made from; arguments switch parts on.

        Raises:
            ValueError: as `QKVAttention.from_softmax`.
        """
        rotary = read_softmax(module).rope if rope is None else rope
        limit: dict[str, Any] = {
            "rotation": "rope" if rotary else "none",
            "rotate_values": None,
            "robust": False,
            "residual": "dot",
            "additive": "none",
            "multiplicative": "none",
            "decay": False,
            "process_noise": False,
            "inner_residual": "none",
            "predict": False,
        }
        return super().from_softmax(module, **{**limit, **arguments})

    def start_as_softmax(self) -> None:
        """2 temp / d = D^-1/2."""
        nn.init.constant_(self.temperature, math.sqrt(math.sqrt(self.head_dim) / 4))

    def _unused(self) -> Iterator[Any]:
        """What these options leave without effect. It stays, as in the authors' checkpoints, and is not trained."""
        systems = [self.dynamics] if self.key_dynamics is None else [self.dynamics, self.key_dynamics]
        if self.inner_residual not in ("learned", "precision"):
            yield self.gate_scale
        if self.inner_residual != "precision":
            yield self.gate_prior
        if self.weighting.multiplicative != "precision":
            yield self.robustness
        if self.weighting.additive == self.weighting.multiplicative == "none":
            yield from (x for each in systems for x in (each.process_noise, each.key_noise, each.query_noise))
        if self.key_dynamics is not None and not self.rotate_values and not self.predict:
            yield from (x for name, x in self.dynamics.named_parameters() if name == "frequency")

    def _filter(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Mask | None,
        start: int,
        times: Tensor | None,
        decay_values: bool = True,
    ) -> tuple[Tensor, Tensor]:
        pairs = as_mask(mask, k)
        if q.shape[2] > 1 or not start:
            pairs = masks.causal(start) if pairs is None else pairs & masks.causal(start)
        values = self.dynamics()
        return filter_in_common_frame(
            q,
            k,
            v,
            values if self.key_dynamics is None else self.key_dynamics(),
            values,
            self.temperature.to(q.dtype).square(),
            F.softplus(self.robustness.to(q.dtype)) + 1e-5,
            self.weighting,
            pairs,
            decay_values=decay_values,
            separable=times is None and self.dynamics.largest_rate * k.shape[2] < -self.weighting.exponents[0],
        )

    def _in_common_frame(self, x_BNC: Tensor, start: int, times: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, turned queries and keys that carry their times, and the times."""
        wide = torch.float64 if x_BNC.dtype == torch.float64 else torch.float32
        q, k = (self._split(projection(x_BNC)).to(wide) for projection in (self.q_proj, self.k_proj))
        frequency = (self.dynamics if self.key_dynamics is None else self.key_dynamics)().frequency
        times_BN = check_times(times, x_BNC.shape[0], start, x_BNC.shape[1], q)
        q, k = (with_times(common_frame(x, frequency, times_BN), times_BN) for x in (self.q_norm(q), self.k_norm(k)))
        return q, k, times_BN

    def _split(self, x_BNX: Tensor) -> Tensor:
        return x_BNX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _of_channels(self, x: Tensor) -> Tensor:
        """Of a head (H,) or a channel (H, d) -> (H, 1, 1 or E)."""
        return _both_parts(x.reshape(self.num_heads, 1, -1))

    def _initialise(self, projection: nn.Linear) -> None:
        """Complex numbers of magnitude N(0, 2 / (in + out)) and any phase."""
        with torch.no_grad():
            weight = projection.weight
            into = projection is not self.out_proj
            rows = weight if into else weight.T
            halves = rows.unflatten(0, (self.num_heads, 2, -1))
            shape = halves[:, 0].shape
            magnitude = torch.randn(shape) * math.sqrt(2.0 / (self.dim + rows.shape[0] / 2))
            phase = torch.rand(shape) * 2 * math.pi
            halves[:, 0], halves[:, 1] = magnitude * phase.cos(), magnitude * phase.sin()
            if projection.bias is not None:
                projection.bias.zero_()


def _both_parts(x: Tensor) -> Tensor:
    """A number for each complex channel, given to its real and its imaginary part."""
    return x if x.shape[-1] == 1 else torch.cat([x, x], -1)


_TENSOR = ("full", "precision", "precision")


class AdaptiveFilterBlock(nn.Module):
    """x <- x + attention(norm(x));  x <- x + W2 relu(W1 norm(x)). `attention` maps (B, N, C) to itself."""

    def __init__(self, attention: nn.Module, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden_dim is None else hidden_dim
        self.attention_norm, self.norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = attention
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x_BNC: Tensor, **options: Any) -> Tensor:
        x_BNC = x_BNC + self.attention(self.attention_norm(x_BNC), **options)
        return x_BNC + self.feed_forward(self.norm(x_BNC))


class AdaptiveFilterNetwork(nn.Module):
    """Measurements (B, N, channels) -> the next ones: linear map, blocks, RMSNorm, linear map.

    Args:
        channels: of a measurement.
        dim: of the blocks.
        layers: how many blocks.
        attention: dim -> attention layer; `AdaptiveFilterAttention(dim, **arguments)` where None.
        arguments: of that.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        layers: int = 1,
        *,
        attention: Callable[[int], nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        make = attention or (lambda dim: AdaptiveFilterAttention(dim, **arguments))
        self.input, self.output = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.blocks = nn.ModuleList(AdaptiveFilterBlock(make(dim), dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)

    def forward(self, z_BNC: Tensor, **options: Any) -> Tensor:
        x = self.input(z_BNC)
        for block in self.blocks:
            x = block(x, **options)
        return self.output(self.norm(x))


def simulate(
    transition: Tensor,
    start_BC: Tensor,
    *,
    process_noise: float,
    key_noise: float,
    generator: torch.Generator,
    duration: float = 10.0,
    step: float = 0.01,
    every: int = 10,
) -> tuple[Tensor, Tensor]:
    """States and measurements (B, duration / step / every + 1, C) of dx = A x dt + sigma dw, z = x + eta v (Euler).

    process_noise is sigma^2, key_noise eta^2.
    """
    x, kept = start_BC, [start_BC]
    for number in range(1, round(duration / step) + 1):
        noise = torch.randn(x.shape, generator=generator) * math.sqrt(process_noise * step)
        x = x + step * x @ transition.T + noise
        if number % every == 0:
            kept.append(x)
    states = torch.stack(kept, 1)
    return states, states + math.sqrt(key_noise) * torch.randn(states.shape, generator=generator)


# The authors' module.


def _build(args: dict[str, Any]) -> nn.Module:
    given = {
        "max_exponent": 10,
        "min_exponent": -10,
        "sep_params": 0,
        "lambda_real_zero": 0,
        "use_full_residual_norm": 1,
        "use_robust_weight": 1,
        "additive_bias_type": 1,
        "multiplicative_bias_type": 1,
        "compute_next_step_pred": 1,
        "learn_rotations": 1,
        "rotate_values": 1,
        "zero_process_noise": 0,
        "zero_key_measurement_noise": 0,
        "use_total_precision_gate": 2,
        "use_complex_input_norm": 0,
        "use_complex_output_norm": 0,
        "use_inner_residual": 1,
        "epsilon": 1e-5,
        **args,
    }
    if given["use_complex_input_norm"] not in (0, 1):
        raise ValueError(f"use_complex_input_norm must be 0 or 1, got {given['use_complex_input_norm']}")
    if given["epsilon"] != 1e-5:
        raise ValueError(f"epsilon must be 1e-5, the only one whose places are known, got {given['epsilon']}")
    heads = given["n_heads"]
    biases: tuple[Bias, ...] = ("none", "precision", "linear")
    gates: tuple[InnerResidual, ...] = ("sum", "precision", "learned")
    return AdaptiveFilterAttention(
        given["d_e"],
        heads,
        seq_len=given["seq_len"],
        head_dim=2 * given["d_k_total"] // heads,
        value_head_dim=2 * given["d_v_total"] // heads,
        separate_dynamics=bool(given["sep_params"]),
        rotation="learned" if given["learn_rotations"] else "fixed",
        rotate_values=bool(given["rotate_values"]),
        robust=bool(given["use_robust_weight"]),
        residual="full" if given["use_full_residual_norm"] else "dot",
        additive=biases[given["additive_bias_type"]],
        multiplicative=biases[given["multiplicative_bias_type"]],
        decay=not given["lambda_real_zero"],
        process_noise=not given["zero_process_noise"],
        key_noise=not given["zero_key_measurement_noise"],
        inner_residual=gates[given["use_total_precision_gate"]] if given["use_inner_residual"] else "none",
        input_norm=bool(given["use_complex_input_norm"]),
        output_norm=bool(given["use_complex_output_norm"]),
        predict=bool(given["compute_next_step_pred"]),
        exponents=(float(given["min_exponent"]), float(given["max_exponent"])),
    )


_NAMES = {
    "W_q": "q_proj",
    "W_k": "k_proj",
    "W_v": "v_proj",
    "W_o": "out_proj",
    "cn_q": "q_norm",
    "cn_k": "k_norm",
    "cn_v": "v_norm",
    "cn_o": "output_norm",
    "lambda_imag": "frequency",
    "mu": "decay",
    "sigma": "process_noise",
    "eta": "key_noise",
    "gamma": "query_noise",
    "tau": "temperature",
    "nu_sqrt": "robustness",
    "P_scale": "gate_scale",
    "P_prior_param": "gate_prior",
}


_PLACES = Names({
    **{f"W_{x}.{{leaf}}": f"{_NAMES[f'W_{x}']}.{{leaf}}" for x in "qkvo"},
    **{f"cn_{x}.gamma": f"{_NAMES[f'cn_{x}']}.weight" for x in "qkvo"},
    **{name: _NAMES[name] for name in ("tau", "nu_sqrt", "P_scale", "P_prior_param")},
    **{
        f"{name}_{side}": f"{system}.{_NAMES[name]}"
        for name in ("lambda_imag", "mu", "sigma", "eta", "gamma")
        for side, system in (("v", "dynamics"), ("k", "key_dynamics"))
    },
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = _PLACES(state)
    heads, pairs = state["lambda_imag_v"].shape
    for name, tensor in ours.items():
        if "_proj." in name and name != "out_proj.bias":
            # theirs: the real parts of all heads, then the imaginary ones; ours: both parts of a head
            axis = 1 if name == "out_proj.weight" else 0
            ours[name] = tensor.unflatten(axis, (2, heads, -1)).transpose(axis, axis + 1).flatten(axis, axis + 2)
        elif "norm." in name or name.startswith("gate_"):
            ours[name] = tensor.reshape(heads, -1)
        elif name in ("temperature", "robustness"):
            ours[name] = tensor.flatten()
    # a recording without gate has no gate tensors
    return {name: torch.zeros(heads, 2 * pairs) for name in ("gate_scale", "gate_prior")} | ours


def _run(module: AdaptiveFilterAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BNC = inputs["x"][:, 0]
    B, N, _ = x_BNC.shape
    one_of_each = torch.eye(N).expand(B, module.num_heads, N, N)
    z_BHNE = module.estimate(x_BNC)[0]
    return {
        "y": module(x_BNC, sample=bool(args.get("add_gaussian_noise")))[:, None],
        "attn": module.mix(x_BNC, one_of_each, decay=False).permute(0, 2, 3, 1),
        "est_latent": z_BHNE.transpose(1, 2).unflatten(-1, (2, -1)).mT,
    }


# The claim: on measurements of a noisy damped oscillator the filter predicts better than attention of its size.


def _claim(lab: Lab) -> ClaimResult:
    batch, dim = lab.size((32, 32), (2, 16))
    duration = lab.size(10.0, 1.0)
    length = round(duration * 10) + 1
    transition = torch.tensor([[-0.1, -2.0], [2.0, -0.1]])  # eigenvalues -0.1 +- 2i

    def systems(generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
        start = 2.0 * torch.randn(number, 2, generator=generator)
        return simulate(transition, start, process_noise=0.1, key_noise=1.0, generator=generator, duration=duration)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield systems(generator, batch)

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(pair[1][:, :-1]), pair[1][:, 1:])

    from saccade.layers.softmax_attention import SoftmaxAttention

    ways: dict[str, Callable[[int], nn.Module]] = {
        "filter": lambda dim: AdaptiveFilterAttention(dim, 2, seq_len=length),
        "softmax": lambda dim: SoftmaxAttention(dim, 2, causal=True, qkv_bias=True, proj_bias=True),
    }
    states, measurements = systems(torch.Generator().manual_seed(10**6 + lab.seed), lab.size(256, 2))
    errors: dict[str, float] = {}
    for name, attention in ways.items():
        with lab.seeded():
            model = AdaptiveFilterNetwork(2, dim, attention=attention)
        lab.train(model, batches(), loss, 300, lr=3e-3, description=name)
        with torch.no_grad():
            errors[name] = F.mse_loss(model.eval()(measurements[:, :-1]), states[:, 1:]).item()
    last = F.mse_loss(measurements[:, :-1], states[:, 1:]).item()
    return ClaimResult(
        {
            "filter_error_of_next_state_mse": errors["filter"],
            "softmax_error_of_next_state_mse": errors["softmax"],
            "last_measurement_error_of_next_state_mse": last,
        },
        holds=errors["filter"] < errors["softmax"] < last,
        note=f"error of the filter over softmax's: {errors['filter'] / errors['softmax']:.2f}",
    )


register(
    "adaptive-filter",
    kind="sequence",
    summary="Causal attention as a learned filter: keys decay, turn and grow uncertain with age; misfits lose weight.",
    supports=("causal", "padding", "decoding", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="isotropic: time O(N^2 D), memory O(N D) by tiles; tensor: N^2 D operations that are no matrix product",
    note="the radial-tangential variant of the paper's later versions is not specified on the card",
    invariants=(
        "without decay and process noise, exponential weights are complex softmax attention with rotary phases",
        "the propagated variance solves V' = 2 mu V + sigma^2, also as mu -> 0",
        "the factorised residual equals |q - E e^(i omega tau) k|^2",
        "rows of A sum to 1; shifting all times changes nothing",
        "robustness -> infinity leaves weights of the lag alone; an outlier gets less weight than its precision",
        "the tensor form with equal channels is the isotropic form",
        "values scaled by exp(-mu t) equal two passes",
    ),
    build=AdaptiveFilterAttention,
    example={"dim": 16, "num_heads": 2, "seq_len": 32},
    ports=tuple(AuthorsPort(f"isotropic_afa{number}", _build, _convert, _run) for number in range(3)),
    claim=Claim(
        paper="a one-layer filter predicts noisy linear systems better than attention of the same size",
        expected="on a damped oscillator measured with noise: a lower error of the next state than rotary softmax "
        "attention in the same network after the same 300 steps, and both below repeating the last measurement",
        run=_claim,
    ),
)
