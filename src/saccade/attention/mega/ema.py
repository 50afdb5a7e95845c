"""The multi-dimensional damped moving average, learned: whole, or a few tokens after a state.

Shape letters: B batch, N tokens, C channels; h averages per channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.ema import ema, ema_step


class DampedEMA(nn.Module):
    """SiLU(EMA(x) + omega x) with p = sigmoid(delta), a = sigmoid(alpha), q = 1 - p a:

        s_t = p beta x_t + q s_{t-1},   EMA(x)_t = sum_n gamma_n s_tn / sqrt(h)

    Args:
        dim: channels; ema_dim: h, averages per channel.
        bidirectional: a second bank runs backwards; both see the current token.
        truncation: taps of the kernel, all where None.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self, dim: int, ema_dim: int = 16, *, bidirectional: bool = False, truncation: int | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or ema_dim < 1:
            raise ValueError(f"dim and ema_dim must be positive, got {dim} and {ema_dim}")
        if truncation is not None and truncation < 1:
            raise ValueError(f"truncation must be at least 1, got {truncation}")
        self.dim, self.ema_dim, self.bidirectional, self.truncation = dim, ema_dim, bidirectional, truncation
        rows = 2 * dim if bidirectional else dim
        self.delta = nn.Parameter(0.2 * torch.randn(rows, ema_dim, 1))
        self.alpha = nn.Parameter(0.2 * torch.randn(rows, ema_dim, 1))
        signs = 1.0 - 2.0 * (torch.arange(ema_dim) % 2)
        self.beta = nn.Parameter(signs[:, None] + 0.02 * torch.randn(rows, ema_dim, 1))
        self.gamma = nn.Parameter(torch.randn(rows, ema_dim))
        self.omega = nn.Parameter(torch.randn(dim))

    def forward(self, x_BNC: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """SiLU(EMA(x) + omega x), of the shape of x.

        Args:
            valid_BN: True = real token; others enter the average as 0.
        """
        given = x_BNC if valid_BN is None else x_BNC * valid_BN[..., None]
        if self.bidirectional:
            both = ema(torch.cat([given, given], -1), *self.coefficients(), taps=self.truncation, backwards=self.dim)
            y = both[..., : self.dim] + both[..., self.dim :]
        else:
            y = ema(given, *self.coefficients(), taps=self.truncation)
        return F.silu(y + self.omega * x_BNC)

    def decode(self, x_BNC: Tensor, state: Tensor | None, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens after `state`, and the state after them: s (B, C, h), or, where the kernel is cut, the
        inputs (B, < truncation, C) that it still reaches."""
        given = x_BNC if valid_BN is None else x_BNC * valid_BN[..., None]
        if self.truncation is not None:
            held = given if state is None else torch.cat([state, given], 1)
            y = ema(held, *self.coefficients(), taps=self.truncation)[:, held.shape[1] - given.shape[1] :]
            state = held[:, max(0, held.shape[1] - self.truncation + 1) :]
        elif given.shape[1] == 1:
            y, state = ema_step(given, *self.coefficients(), state)
        else:
            y, state = ema(given, *self.coefficients(), state=state, return_state=True)
        assert state is not None
        return F.silu(y + self.omega * x_BNC), state

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay q, weight p beta and mix gamma / sqrt(h) of `ops.ema`."""
        wide = torch.promote_types(self.delta.dtype, torch.float32)
        p, a, beta = self.delta.to(wide).sigmoid(), self.alpha.to(wide).sigmoid(), self.beta.to(wide)
        return (1.0 - p * a).squeeze(-1), (p * beta).squeeze(-1), self.gamma.to(wide) / math.sqrt(self.ema_dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, ema_dim={self.ema_dim}, bidirectional={self.bidirectional}, truncation={self.truncation}"
