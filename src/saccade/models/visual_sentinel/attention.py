"""The sentinel, and the softmax in which it stands beside the regions.

Shape letters: B images, R regions, S = R + 1 with the sentinel, D width of regions, state and sentinel, K width of
attention, X input of the LSTM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Adaptive(NamedTuple):
    """What adaptive attention gives.

    Attributes:
        seen: (B, D), c.
        alpha: (B, R), the softmax over regions alone.
        beta: (B,), the weight of the sentinel; 0 where there is none.
    """

    seen: Tensor
    alpha: Tensor
    beta: Tensor


def adaptive(
    scores_BR: Tensor, regions_BRD: Tensor, sentinel_score_B: Tensor | None, sentinel_BD: Tensor | None
) -> Adaptive:
    """c = sum_i a_i v_i + beta s with [a; beta] = softmax([z; xi]).

    Args:
        scores_BR: z; -inf for regions that are not there.
        regions_BRD: v.
        sentinel_score_B, sentinel_BD: xi and s; None for attention to regions alone.
    """
    alpha_BR = scores_BR.softmax(1)
    if sentinel_score_B is None or sentinel_BD is None:
        return Adaptive((alpha_BR[:, None] @ regions_BRD)[:, 0], alpha_BR, torch.zeros_like(alpha_BR[:, 0]))
    both_BS = torch.cat([scores_BR, sentinel_score_B[:, None]], 1).softmax(1)
    beta_B1 = both_BS[:, -1:]
    seen_BD = (both_BS[:, None, :-1] @ regions_BRD)[:, 0] + beta_B1 * sentinel_BD
    return Adaptive(seen_BD, alpha_BR, beta_B1[:, 0])


class SentinelGate(nn.Module):
    """s = sigmoid(W_x x + W_h h) * tanh(m): what the memory says by itself.

    Args:
        inputs: X.
        dim: D.
        bias: of both layers.
        dropout: of both inputs.
    """

    def __init__(self, inputs: int, dim: int, *, bias: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(inputs, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BX: Tensor, before_BD: Tensor, memory_BD: Tensor) -> Tensor:
        """
        Args:
            x_BX: input of the LSTM.
            before_BD: its state before, h_{t-1}.
            memory_BD: its memory after, m_t.
        """
        gate_BD = (self.of_input(self.drop(x_BX)) + self.of_state(self.drop(before_BD))).sigmoid()
        return gate_BD * memory_BD.tanh()


class AdaptiveAttention(nn.Module):
    """Attention as the paper writes it; W_g and w are shared by regions and sentinel, nothing has a bias.

    Args:
        dim: D.
        width: K.
        sentinel: whether there is one.
        dropout: of what goes into each layer.
    """

    def __init__(self, dim: int, width: int, *, sentinel: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        self.of_region, self.of_state = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.of_sentinel = nn.Linear(dim, width, bias=False) if sentinel else None
        self.score, self.drop = nn.Linear(width, 1, bias=False), nn.Dropout(dropout)

    def prepare(self, regions_BRD: Tensor) -> Tensor:
        """W_v V, (B, R, K), once for all words."""
        return self.of_region(self.drop(regions_BRD))

    def forward(
        self,
        regions_BRD: Tensor,
        prepared_BRK: Tensor,
        state_BD: Tensor,
        sentinel_BD: Tensor | None,
        present_BR: Tensor | None = None,
    ) -> tuple[Adaptive, Tensor]:
        """What is seen, and the state with which it is added up: h itself.

        Args:
            regions_BRD: V.
            prepared_BRK: of `prepare`.
            state_BD: h_t.
            sentinel_BD: s_t, None without.
            present_BR: bool, which regions there are; all where None.
        """
        of_state_BK = self.of_state(self.drop(state_BD))
        scores_BR = _scored(self.score, prepared_BRK + of_state_BK[:, None], present_BR)
        xi_B = None
        if self.of_sentinel is not None and sentinel_BD is not None:
            xi_B = _scored(self.score, self.of_sentinel(self.drop(sentinel_BD)) + of_state_BK)
        return adaptive(scores_BR, regions_BRD, xi_B, sentinel_BD), state_BD


class ReleasedAttention(nn.Module):
    """Attention of the authors' Lua code; arguments and calls are those of `AdaptiveAttention`, K is D.

    The state with which what is seen is added up is tanh(W h), and the sentinel in it is ReLU(W s).

    Args:
        dim: D.
        sentinel: whether there is one.
        dropout: of what goes into each layer.
    """

    def __init__(self, dim: int, *, sentinel: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        self.state_map, self.drop = nn.Linear(dim, dim), nn.Dropout(dropout)
        self.sentinel_map = nn.Linear(dim, dim) if sentinel else None
        self.of_region, self.of_state = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.of_sentinel = nn.Linear(dim, dim) if sentinel else None
        self.score = nn.Linear(dim, 1)

    def prepare(self, regions_BRD: Tensor) -> Tensor:
        """The regions' embeddings, (B, R, D), once for all words."""
        return self.of_region(self.drop(regions_BRD))

    def forward(
        self,
        regions_BRD: Tensor,
        prepared_BRK: Tensor,
        state_BD: Tensor,
        sentinel_BD: Tensor | None,
        present_BR: Tensor | None = None,
    ) -> tuple[Adaptive, Tensor]:
        """As `AdaptiveAttention.forward`."""
        mapped_BD = self.state_map(self.drop(state_BD)).tanh()
        of_state_BK = self.of_state(self.drop(mapped_BD))
        scores_BR = _scored(self.score, prepared_BRK + of_state_BK[:, None], present_BR)
        xi_B = fake_BD = None
        if self.sentinel_map is not None and self.of_sentinel is not None and sentinel_BD is not None:
            fake_BD = self.sentinel_map(self.drop(sentinel_BD)).relu()
            xi_B = _scored(self.score, self.of_sentinel(self.drop(fake_BD)) + of_state_BK)
        return adaptive(scores_BR, regions_BRD, xi_B, fake_BD), mapped_BD


def _scored(score: nn.Module, sum_BRK: Tensor, present_BR: Tensor | None = None) -> Tensor:
    scores = score(sum_BRK.tanh())[..., 0]
    return scores if present_BR is None else scores.masked_fill(~present_BR, -torch.inf)
