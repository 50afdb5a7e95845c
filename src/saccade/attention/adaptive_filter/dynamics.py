"""The linear dynamics whose noise the filter knows, and the norm of complex channels.

Shape letters: B batch, H heads, N tokens, E real numbers of a head, d complex channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.adaptive_filter.operator import Dynamics, Rotation


class LinearDynamics(nn.Module):
    """Learned `Dynamics`: decay (sigmoid(raw) - 1) s_r - 1e-5 and noises softplus(raw), all of a head or each channel.

    s_r = 10 / (2 seq_len). Raw parameters stay where their quantity is switched off, as in the authors' checkpoints,
    and are not trained.

    Args:
        heads: H.
        channels: d.
        seq_len: L_max, the length to which decay and frequencies are scaled.
        each_channel: parameters (H, d), for the tensor form; else (H,).
        rotation: frequencies "learned" or "fixed" (in conjugate pairs, times 2 pi s_r), "rope" (unscaled) or "none".
        rope_base: base of "fixed" and "rope".
        decay, process_noise, key_noise: False sets mu, sigma, eta to exactly 0.

    Raises:
        ValueError: if the rotation is unknown, or an odd number of channels is to turn in pairs.
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
    """z <- z rsqrt(mean(z^2 over channels, real and imaginary) + 1e-6) weight, a weight for each complex channel.

    Args:
        heads: H.
        channels: d.
    """

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))

    def forward(self, z_BHNE: Tensor) -> Tensor:
        weight = self.weight.to(z_BHNE.dtype)[:, None].repeat(1, 1, 2)
        return z_BHNE * (z_BHNE.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
