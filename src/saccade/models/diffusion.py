"""What diffusion networks share: their output, the schedule of the noise, the loss and sampling.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,   t = 0 .. steps - 1,   abar_t = prod_{s <= t} (1 - beta_s)

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, with the learned variances of Nichol and
Dhariwal, arXiv 2102.09672: log variance = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2, v the network's.

Shape letters: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from saccade.ops.export import output


@output
@dataclass
class Denoised:
    """What a denoising network says of x_t.

    Attributes:
        noise: the noise in it, of its shape.
        variance: v, of the same shape; None where the network learns no variance.
    """

    noise: Tensor
    variance: Tensor | None = None


Network = Callable[[Tensor, Tensor], Denoised]


class Diffusion:
    """The schedule: betas rise linearly.

    Args:
        steps: of training.
        first, last: betas.

    Raises:
        ValueError: if there are no steps or the betas are not between 0 and 1.
    """

    def __init__(self, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> None:
        if steps < 1 or not 0 < first <= last < 1:
            raise ValueError(f"steps must be positive and 0 < first <= last < 1, got {steps}, {first} and {last}")
        self.steps = steps
        self.kept = (1 - torch.linspace(first, last, steps, dtype=torch.float64)).cumprod(0)

    def noised(self, x: Tensor, noise: Tensor, step_B: Tensor) -> Tensor:
        """x_t of x_0.

        Args:
            x: x_0, (B, ...).
            noise: of its shape.
            step_B: t for each row.
        """
        kept = self._at(self.kept, step_B, x)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def cleaned(self, x: Tensor, noise: Tensor, step_B: Tensor) -> Tensor:
        """x_0 of x_t, where this is the noise in it.

        Args:
            x: x_t, (B, ...).
            noise: of its shape.
            step_B: t for each row.
        """
        kept = self._at(self.kept, step_B, x)
        return (x - (1 - kept).sqrt() * noise) / kept.sqrt()

    def loss(
        self, network: Network, x: Tensor, step_B: Tensor, noise: Tensor, *, bound: float = 1e-3
    ) -> dict[str, Tensor]:
        """The mean square error of the noise, and the variational bound, from which the variances alone learn.

        Args:
            network: called with x_t and t.
            x: x_0, (B, ...).
            step_B: t for each row.
            noise: of x's shape.
            bound: weight of the variational bound (Nichol and Dhariwal's lambda).

        Returns:
            "mse", "bound" in bits for each number (0 without variances), and "loss", (B,) each.
        """
        noisy = self.noised(x, noise, step_B)
        said = network(noisy, step_B)
        mse = (said.noise - noise).square().flatten(1).mean(1)
        if said.variance is None:
            return {"mse": mse, "bound": torch.zeros_like(mse), "loss": mse}
        true, log_true, log_beta = self._posterior(noisy, x, step_B, step_B - 1)
        mean = self._posterior(noisy, self.cleaned(noisy, said.noise.detach(), step_B), step_B, step_B - 1)[0]
        log_variance = _between(said.variance, log_true, log_beta)
        divergence = log_variance - log_true - 1 + (log_true - log_variance).exp()
        divergence = 0.5 * (divergence + (true - mean).square() * (-log_variance).exp())
        # no posterior stands before x_0: there it is the density of x_0 itself
        likelihood = 0.5 * (log(2 * pi) + log_variance + (x - mean).square() * (-log_variance).exp())
        first = (step_B == 0).view(-1, *[1] * (x.ndim - 1))
        bits = torch.where(first, likelihood, divergence).flatten(1).mean(1) / log(2)
        return {"mse": mse, "bound": bits, "loss": mse + bound * bits}

    @torch.no_grad()
    def sample(
        self, network: Network, start: Tensor, *, steps: int = 250, generator: torch.Generator | None = None
    ) -> Tensor:
        """x_0 from noise, by as many steps back, evenly spaced among those of training.

        Args:
            network: called with x_t and t.
            start: normal noise of the shape that is wanted.
            steps: at most those of training.
            generator: of the noise on the way.

        Raises:
            ValueError: if `steps` is out of range.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be between 1 and {self.steps}, got {steps}")
        times = torch.linspace(0, self.steps - 1, steps).round().long().tolist() if steps > 1 else [self.steps - 1]
        x = start
        for step, before in zip(reversed(times), [*reversed(times[:-1]), -1], strict=True):
            step_B, before_B = (torch.full((len(x),), t, device=x.device) for t in (step, before))
            said = network(x, step_B)
            x, log_true, log_beta = self._posterior(x, self.cleaned(x, said.noise, step_B), step_B, before_B)
            if before >= 0:
                log_variance = log_true if said.variance is None else _between(said.variance, log_true, log_beta)
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = x + (0.5 * log_variance).exp() * noise
        return x

    def _posterior(self, noisy: Tensor, clean: Tensor, step_B: Tensor, before_B: Tensor) -> tuple[Tensor, ...]:
        """q(x_before | x_t, x_0): its mean, and the logarithms of beta~ and beta.

        beta~ of the first step is 0 and has no logarithm: that of the second stands for it.
        """
        kept, earlier = self._at(self.kept, step_B, noisy), self._at(self.kept, before_B, noisy)
        share = (1 - earlier) / (1 - kept)
        mean = earlier.sqrt() * (1 - kept / earlier) / (1 - kept) * clean + (kept / earlier).sqrt() * share * noisy
        second, least = step_B.clamp(min=1), before_B.clamp(min=0)
        kept_2, earlier_1 = self._at(self.kept, second, noisy), self._at(self.kept, least, noisy)
        log_true = ((1 - earlier_1) / (1 - kept_2) * (1 - kept_2 / earlier_1)).log()
        return mean, log_true, (1 - kept / earlier).log()

    def _at(self, table: Tensor, step_B: Tensor, like: Tensor) -> Tensor:
        """A number for each row, to be multiplied with `like`; 1 before the first step."""
        table = torch.cat([table, torch.ones(1, dtype=table.dtype)]).to(like.device)
        return table[step_B].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _between(variance: Tensor, log_true: Tensor, log_beta: Tensor) -> Tensor:
    """log variance: between those of beta~ and beta, by v from -1 to 1."""
    share = (variance + 1) / 2
    return share * log_beta + (1 - share) * log_true
