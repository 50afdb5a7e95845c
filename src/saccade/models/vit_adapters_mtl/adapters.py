"""What a task does to a frozen network: a bias of its attention, the weights of its norms, and a side stream.

Shape letters: B batch, D width of a task's embedding, N tokens of a window, K columns of A, M blocks, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block_diagonal(x_BNK: Tensor, blocks: int) -> Tensor:
    """The rows cut into M blocks, which stand on the diagonal of (B, N, N); what sticks out is cut off.

    >>> block_diagonal(torch.tensor([[[1, 2], [3, 4], [5, 6]]]), 2)[0].tolist()
    [[1, 2, 0], [3, 4, 0], [0, 0, 5]]

    Args:
        x_BNK: with at least N / M columns.
        blocks: M.
    """
    N, K = x_BNK.shape[1:]
    at = torch.arange(N, device=x_BNK.device)
    column_NN = at - K * (at // -(-N // blocks))[:, None]
    inside_NN = (column_NN >= 0) & (column_NN < K)
    return x_BNK.gather(2, column_NN.clamp(0, K - 1).expand(len(x_BNK), -1, -1)) * inside_NN


class FiLM(nn.Module):
    """(1 + gamma) x + beta with [gamma; beta] = W omega + b of each image (Perez et al., arXiv 1709.07871).

    Args:
        condition: D.
        channels: C.
    """

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 2 * channels)
        nn.init.trunc_normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, omega_BD: Tensor) -> Tensor:
        """Of each image its own x: (B, ..., C) -> the same."""
        gamma, beta = self._parts(omega_BD, x.ndim - 2)
        return (1 + gamma) * x + beta

    def shared(self, x: Tensor, omega_BD: Tensor) -> Tensor:
        """Of one x for all images: (..., C) -> (B, ..., C)."""
        gamma, beta = self._parts(omega_BD, x.ndim - 1)
        return (1 + gamma) * x + beta

    def _parts(self, omega_BD: Tensor, axes: int) -> tuple[Tensor, Tensor]:
        gamma, beta = self.modulation(omega_BD).view(len(omega_BD), *(1,) * axes, -1).chunk(2, -1)
        return gamma, beta


class TaskBias(nn.Module):
    """A'(omega), what is added to the scores of all windows and heads of an image: (B, N, N), blocks on the diagonal.

    A learned matrix A (N, K), 0 at first, goes through FiLM and is cut into M = D // N blocks of K = N / M, rounded up.

    Args:
        condition: D.
        tokens: N.

    Raises:
        ValueError: if there is no block: D is below N.
    """

    def __init__(self, condition: int, tokens: int) -> None:
        super().__init__()
        self.blocks = condition // tokens
        if not self.blocks:
            raise ValueError(f"condition must be at least the {tokens} tokens of a window, got {condition}")
        columns = -(-tokens // self.blocks)
        self.matrix, self.film = nn.Parameter(torch.zeros(tokens, columns)), FiLM(condition, columns)

    def forward(self, omega_BD: Tensor) -> Tensor:
        return block_diagonal(self.film.shared(self.matrix, omega_BD), self.blocks)


class TaskScaledNorm(nn.LayerNorm):
    """Layer norm whose weight goes through FiLM: (x - mean) / sqrt(var + eps) FiLM(weight, omega) + bias.

    Args:
        dim: C.
        condition: D.
    """

    def __init__(self, dim: int, condition: int) -> None:
        super().__init__(dim)
        self.film = FiLM(condition, dim)

    def forward(self, x: Tensor, omega_BD: Tensor) -> Tensor:  # type: ignore[override]
        """(B, ..., C) -> the same."""
        return scaled_norm(x, self, self.film, omega_BD)


def scaled_norm(x: Tensor, norm: nn.LayerNorm, film: FiLM, omega_BD: Tensor) -> Tensor:
    """A layer norm's output had its weight gone through FiLM.

    Args:
        x: (B, ..., C).
        norm: of C channels.
        film: of its weight.
        omega_BD: what the task is, of each image.
    """
    weight_BC = film.shared(norm.weight, omega_BD)
    plain = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return plain * weight_BC.view(len(weight_BC), *(1,) * (x.ndim - 2), -1) + norm.bias


class Bottleneck(nn.Module):
    """Up(Down(FiLM(x, W omega))): a step of the side stream; no activation, and no way around it.

    Args:
        condition: D.
        dim: C; a third of it is what passes.
    """

    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        inner = max(1, dim // 3)
        self.embed, self.film = nn.Linear(condition, condition), FiLM(condition, dim)
        self.down, self.up = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor, omega_BD: Tensor) -> Tensor:
        """(B, ..., C) -> the same."""
        return self.up(self.down(self.film(x, self.embed(omega_BD))))
