"""Diffusion by a cosine schedule, and DDIM's way back: what its users share; tensors of any shape.

    x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps
    eps = (x_t / sqrt(alpha_t) - x0) / sqrt(1 / alpha_t - 1),   x_s = sqrt(alpha_s) x0 + c eps + sigma z
    sigma^2 = eta^2 (1 - alpha_t / alpha_s) (1 - alpha_s) / (1 - alpha_t),   c^2 = 1 - alpha_s - sigma^2

alpha is the cumulated product of the schedule (Nichol and Dhariwal, arXiv 2102.09672); DDIM: Song et al., arXiv
2010.02502.

Shape letters: T times.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor


def cosine_alphas(times: int, offset: float = 0.008) -> Tensor:
    """alpha_t of the cosine schedule, (T,), in double precision.

    Args:
        times: T.
        offset: s of the schedule.
    """
    share = torch.linspace(0, times, times + 1, dtype=torch.float64) / times
    alphas = torch.cos((share + offset) / (1 + offset) * pi / 2).square()
    betas = (1 - alphas[1:] / alphas[:-1]).clamp(0, 0.999)
    return (1 - betas).cumprod(0)


def noised(start: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t of x0.

    Args:
        start: x0.
        noise: eps, of its shape.
        alpha: alpha_t, of a shape that goes with both.
    """
    return alpha.sqrt() * start + (1 - alpha).sqrt() * noise


def ddim_step(
    x: Tensor, start: Tensor, now: Tensor, then: Tensor, noise: Tensor | None = None, eta: float = 0.0
) -> Tensor:
    """x_s, one step back from x_t.

    Args:
        x: x_t.
        start: x0 as the network has it.
        now, then: alpha_t and alpha_s, the latter the larger one.
        noise: z; not needed where eta is 0.
        eta: 0 is deterministic, 1 as much noise as the process itself adds.
    """
    now, then = now.to(x.dtype), then.to(x.dtype)
    eps = (x / now.sqrt() - start) / (1 / now - 1).sqrt()
    if noise is None or eta == 0:
        return then.sqrt() * start + (1 - then).sqrt() * eps
    sigma = eta * ((1 - now / then) * (1 - then) / (1 - now)).clamp(min=0).sqrt()
    return then.sqrt() * start + (1 - then - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
