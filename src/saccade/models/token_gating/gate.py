"""The gate between text and image, and what may change either before they meet.

Shape letters: B batch, L tokens, M tokens of the image, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: channel attention's inner width is the width over this
_SQUEEZE = 16


class DynamicGate(nn.Module):
    """LN(z y + (1 - z) c) with z = sigmoid(W [y; c] + b), or z a draw of two classes.

    Args:
        dim: D.
        per: "feature" or "token".
        hard: z is the first of two by a Gumbel softmax at `temperature`: soft in training, 0 or 1 in evaluation.
        noisy: noise is drawn in evaluation too.
        dropout: of the mixture.

    Attributes:
        temperature: of hard gates; see `saccade.models.token_gating.training`.

    Raises:
        ValueError: if `per` is something else.
    """

    def __init__(
        self, dim: int, *, per: str = "feature", hard: bool = False, noisy: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if per not in ("feature", "token"):
            raise ValueError(f"per must be feature or token, got {per!r}")
        self.hard, self.noisy, self.temperature = hard, noisy, 1.0
        width = dim if per == "feature" else 1
        self.weigh, self.norm = nn.Linear(2 * dim, 2 * width if hard else width), nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, text_BLD: Tensor, image_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the stream (B, L, D), and z, (B, L, D) or (B, L, 1).

        Args:
            text_BLD: y.
            image_BLD: c, what each token attends to.
        """
        z = self.gate(torch.cat([text_BLD, image_BLD], 2))
        return self.norm(self.drop(z * text_BLD + (1 - z) * image_BLD)), z

    def gate(self, both: Tensor) -> Tensor:
        """z of [y; c]."""
        logits = self.weigh(both)
        if not self.hard:
            return logits.sigmoid()
        pairs = logits.unflatten(-1, (-1, 2))
        if self.training or self.noisy:
            return F.gumbel_softmax(pairs, self.temperature, hard=not self.training)[..., 0]
        return (pairs[..., 0] >= pairs[..., 1]).to(pairs.dtype)


class FiLM(nn.Module):
    """x (W_g cond + b_g) + W_b cond + b_b (Perez et al., arXiv 1709.07871).

    Args:
        dim: D, of both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, condition_B1D: Tensor) -> Tensor:
        return x_BLD * self.gamma(condition_B1D) + self.beta(condition_B1D)


class DyIntra(nn.Module):
    """x (1 + sigmoid(W cond + b)).

    Args:
        dim: D, of both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, condition_B1D: Tensor) -> Tensor:
        return x_BLD * (1 + self.weigh(condition_B1D).sigmoid())


class ChannelAttention(nn.Module):
    """Squeeze and excitation of the image's tokens: m sigmoid(W_2 relu(W_1 mean m)).

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(1, dim // _SQUEEZE)
        self.down, self.up = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, image_BMD: Tensor) -> Tensor:
        return image_BMD * self.up(self.down(image_BMD.mean(1, keepdim=True)).relu()).sigmoid()
