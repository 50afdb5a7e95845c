"""The forces to come, by diffusion, and the guide that the fusion gets.

Shape letters: B batch, N steps of an episode, K steps to come, S observation steps, F numbers of a force, D of a
condition, C channels, T times of the diffusion.
"""

from __future__ import annotations

from functools import partial
from math import log

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.fusion.visuo_tactile.attention import AttentionLayer
from saccade.layers.constants import Constants
from saccade.ops.diffusion import cosine_alphas, ddim_step, noised

#: what the guide holds: the forces that were felt, those to come, or both
GUIDES = ("both", "observed", "predicted")


def guide(observed_BSF: Tensor, predicted_BKF: Tensor | None, kind: str = "both") -> Tensor:
    """g, (B, (S + K) F): the forces side by side.

    Args:
        observed_BSF: felt.
        predicted_BKF: to come; None where they are not predicted.
        kind: of `GUIDES`.

    Raises:
        ValueError: if the kind is not offered, or predictions are asked for that there are not.
    """
    if kind not in GUIDES:
        raise ValueError(f"kind must be one of {', '.join(GUIDES)}, got {kind!r}")
    if kind == "predicted" and predicted_BKF is None:
        raise ValueError("kind 'predicted' needs predictions, got None")
    parts = {"both": (observed_BSF, predicted_BKF), "observed": (observed_BSF,), "predicted": (predicted_BKF,)}[kind]
    return torch.cat([part.flatten(1) for part in parts if part is not None], 1)


def force_targets(forces_NF: Tensor, horizon: int) -> Tensor:
    """Of each step of an episode the forces of the steps that follow, (N, K, F); the last one stands for what follows
    the end.

    Args:
        forces_NF: of N steps.
        horizon: K.
    """
    steps = torch.arange(len(forces_NF), device=forces_NF.device)[:, None] + torch.arange(1, horizon + 1)
    return forces_NF[steps.to(forces_NF.device).clamp(max=len(forces_NF) - 1)]


def scaled_force(force: Tensor, scale: float = 5.0) -> Tensor:
    """Net forces over a scale; from a scale of 5 on cut off at 1, as the authors'.

    Args:
        force: of any shape.
        scale: positive.
    """
    return (force / scale).clamp(-1, 1) if scale >= 5 else force / scale


def prediction_weight(progress: float, begins: float = 0.5, full: float = 0.75) -> float:
    """w: how much the loss of the predicted forces counts; it rises from 0 to 1.

    >>> [prediction_weight(share) for share in (0.0, 0.5, 0.625, 0.9)]
    [0.0, 0.0, 0.5, 1.0]

    Args:
        progress: the epoch over all epochs.
        begins, full: where it is still 0, and where it is 1.
    """
    return min(1.0, max(0.0, (progress - begins) / (full - begins)))


def training_loss(action: Tensor, force: Tensor, weight: float = 1.0, alpha: float = 10.0) -> Tensor:
    """L = L_action + alpha w L_force.

    Args:
        action: the policy's loss.
        force: of `ForcePredictor.loss`.
        weight: w, see `prediction_weight`.
        alpha: 10 in the paper.
    """
    return action + alpha * weight * force


class ForceDenoiser(nn.Module):
    """What the forces were before they were noised: a transformer's decoder that reads the time and the observations.

    Step t of the forces sees those up to t, and of what was observed what is not later than t: the time, and steps up
    to t.

    Args:
        force: F.
        condition: D.
        horizon: K.
        observations: S.
        dim: C.
        depth, num_heads: of the decoder.
        drop: dropout of its layers.
        embedding_drop: dropout of its input.
        causal: False lets all see all.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        force: int = 3,
        condition: int = 1024,
        horizon: int = 4,
        observations: int = 1,
        *,
        dim: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        drop: float = 0.3,
        embedding_drop: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if min(force, condition, horizon, observations, depth) < 1 or dim < 4 or dim % 2:
            raise ValueError("widths, horizon, observations and depth must be positive, and dim even and at least 4")
        self.force, self.condition, self.horizon, self.observations = force, condition, horizon, observations
        self.causal = causal
        self.input, self.observed = nn.Linear(force, dim), nn.Linear(condition, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, horizon, dim))
        self.condition_positions = nn.Parameter(0.02 * torch.randn(1, observations + 1, dim))
        self.encoder = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.layers = nn.ModuleList(
            AttentionLayer(dim, num_heads, 4 * dim, norm_first=True, activation="gelu", drop=drop) for _ in range(depth)
        )
        self.drop, self.norm, self.head = nn.Dropout(embedding_drop), nn.LayerNorm(dim), nn.Linear(dim, force)

    def forward(self, noisy_BKF: Tensor, times_B: Tensor, condition_BSD: Tensor) -> Tensor:
        """x0, (B, K, F).

        Args:
            noisy_BKF: x_t.
            times_B: t of each row.
            condition_BSD: what is seen and touched at each observation step.

        Raises:
            ValueError: if the shapes do not fit.
        """
        B, shape = len(noisy_BKF), (self.horizon, self.force)
        if noisy_BKF.shape[1:] != shape or condition_BSD.shape != (B, self.observations, self.condition):
            raise ValueError(
                f"noisy and condition must be (batch, {shape[0]}, {shape[1]}) and (batch, {self.observations}, "
                f"{self.condition}), got {tuple(noisy_BKF.shape)} and {tuple(condition_BSD.shape)}"
            )
        at_BC = time_embedding(times_B, self.positions.shape[2]).to(noisy_BKF.dtype)
        tokens = torch.cat([at_BC[:, None], self.observed(condition_BSD)], 1) + self.condition_positions
        memory = self.encoder(self.drop(tokens))
        x_BKC = self.drop(self.input(noisy_BKF) + self.positions)
        mask = memory_mask = None
        if self.causal:
            t = torch.arange(self.horizon, device=noisy_BKF.device)[:, None]
            mask = t >= t.T
            memory_mask = t >= torch.arange(self.observations + 1, device=noisy_BKF.device) - 1
        for layer in self.layers:
            x_BKC = layer(x_BKC, memory, mask, memory_mask)[0]
        return self.head(self.norm(x_BKC))


def time_embedding(times_B: Tensor, dim: int) -> Tensor:
    """[sin, cos] of t exp(-k ln(10000) / (dim / 2 - 1)), k = 0 .. dim / 2 - 1: (B, dim).

    Args:
        times_B: t.
        dim: even, at least 4.
    """
    rates = torch.exp(torch.arange(dim // 2, device=times_B.device) * (-log(10000) / (dim // 2 - 1)))
    angles = times_B[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class ForcePredictor(Constants):
    """The forces of the next K steps, by diffusion: x0 is predicted, and DDIM leads from noise to it.

    Args:
        denoiser: (x_t, t, condition) -> x0.
        times: of training.
        steps: of sampling, a divisor of them.
        bound: x0 is cut off there in sampling; None leaves it.

    Raises:
        ValueError: if the steps do not divide the times.
    """

    alphas_T: Tensor

    def __init__(self, denoiser: ForceDenoiser, times: int = 100, steps: int = 20, bound: float | None = 1.0) -> None:
        super().__init__()
        if times < 1 or steps < 1 or times % steps:
            raise ValueError(f"steps must be a divisor of times, got {steps} and {times}")
        self.denoiser, self.times, self.steps, self.bound = denoiser, times, steps, bound
        self.constant("alphas_T", partial(cosine_alphas, times))

    def loss(
        self, forces_BKF: Tensor, condition_BSD: Tensor, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean square error of x0 at a random time of each row, and x0, which guides the fusion in training.

        Args:
            forces_BKF: what came.
            condition_BSD: see `ForceDenoiser`.
            generator: of time and noise.

        Raises:
            ValueError: as there.
        """
        times_B = torch.randint(self.times, forces_BKF.shape[:1], generator=generator).to(forces_BKF.device)
        noise = torch.randn(forces_BKF.shape, generator=generator).to(forces_BKF)
        alpha = self.alphas_T[times_B].to(forces_BKF.dtype)[:, None, None]
        start = self.denoiser(noised(forces_BKF, noise, alpha), times_B, condition_BSD)
        return F.mse_loss(start, forces_BKF), start

    @torch.no_grad()
    def sample(self, condition_BSD: Tensor, *, generator: Generator | None = None) -> Tensor:
        """(B, K, F) from noise, without randomness on the way.

        Args:
            condition_BSD: see `ForceDenoiser`.
            generator: of the noise.

        Raises:
            ValueError: as there.
        """
        shape = (len(condition_BSD), self.denoiser.horizon, self.denoiser.force)
        x_BKF, stride = torch.randn(shape, generator=generator).to(condition_BSD), self.times // self.steps
        end = torch.ones((), device=condition_BSD.device)
        for time in range(self.times - stride, -1, -stride):
            times_B = torch.full((len(condition_BSD),), time, device=condition_BSD.device)
            start = self.denoiser(x_BKF, times_B, condition_BSD)
            if self.bound is not None:
                start = start.clamp(-self.bound, self.bound)
            then = self.alphas_T[time - stride] if time >= stride else end
            x_BKF = ddim_step(x_BKF, start, self.alphas_T[time], then)
        return x_BKF

    def forward(self, condition_BSD: Tensor) -> Tensor:
        return self.sample(condition_BSD)
