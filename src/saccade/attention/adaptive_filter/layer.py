"""`AdaptiveFilterAttention`: projections and learned dynamics around the filter, the gate, the step ahead.

Shape letters: B batch, H heads, N queries, M keys, C channels, D head dim of q and k (real), d = D / 2, E of values,
X all heads side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.adaptive_filter.dynamics import ComplexRMSNorm, LinearDynamics
from saccade.attention.adaptive_filter.operator import (
    Bias,
    InnerResidual,
    Rotation,
    Weighting,
    check_times,
    common_frame,
    filter_in_common_frame,
    with_times,
)
from saccade.layers.cache import KVCache
from saccade.layers.pretrained import read_softmax
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.autocast import working_dtype
from saccade.ops.pattern import GivenMask, Pattern

if TYPE_CHECKING:
    from typing_extensions import Self


class AdaptiveFilterAttention(QKVAttention):
    """Causal attention as a learned filter; real in, real out, complex inside.

    `forward` is its own: the mechanism gives e and log P beside z, and the step after it reads them.

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

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: Any = None,
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
        return self.out(z_BHNE.to(x_BNC.dtype))

    def estimate(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: KVCache | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z before its norm and the prediction, e (B, H, N, E; halves real and imaginary), log P; as `forward`."""
        self.check(x_BNC, context_BMC, cache)
        pattern = self.pattern(mask, x_BNC, None, cache)
        wide = working_dtype(x_BNC.dtype)
        start = 0 if cache is None else cache.length
        v_BHNE = self._split(self.v_proj(x_BNC)).to(wide)
        q, k, times_BN = self._in_common_frame(x_BNC, start, times)
        values = self.dynamics()
        v = common_frame(self.v_norm(v_BHNE), None if self.rotate_values is None else values.frequency, times_BN)
        if cache is not None:
            k, v = cache.append(k, v)
        e, log_precision = self._filter(q, k, v, pattern, times)
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

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        if context_BMC is not None:
            raise ValueError("a filter takes no context")
        super().check(x_BNC, context_BMC, cache)

    def mix(
        self,
        x_BNC: Tensor,
        values_BHME: Tensor,
        *,
        context: Tensor | None = None,
        mask: GivenMask = None,
        decay: bool = True,
    ) -> Tensor:
        """A E applied to given values; with `decay=False` A alone. The tensor form has no one matrix for a head."""
        if self.form == "tensor":
            raise ValueError("in the tensor form each channel has its own weights: there is no matrix of a head")
        self.check(x_BNC, context, None)
        pattern = self.pattern(mask, x_BNC, None, None)
        q, k, _ = self._in_common_frame(x_BNC, 0, None)
        return self._filter(q, k, values_BHME.to(q.dtype), pattern, None, decay_values=decay)[0].to(x_BNC.dtype)

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
        pattern: Pattern,
        times: Tensor | None,
        decay_values: bool = True,
    ) -> tuple[Tensor, Tensor]:
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
            pattern.mask,
            decay_values=decay_values,
            separable=times is None and self.dynamics.largest_rate * k.shape[2] < -self.weighting.exponents[0],
        )

    def _in_common_frame(self, x_BNC: Tensor, start: int, times: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, turned queries and keys that carry their times, and the times."""
        wide = working_dtype(x_BNC.dtype)
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
