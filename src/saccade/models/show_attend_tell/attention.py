"""Which region of an image comes next: scores by a tanh of both, their softmax, and what is drawn of it.

Shape letters: B images, R regions, D width of regions, H width of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RegionAttention(nn.Module):
    """alpha = softmax(T (U^T tanh(p_i + W_h h) + c)) over regions, p_i of their annotation vectors.

    Any memory of vectors can be attended to in this way.

    Args:
        dim: D.
        hidden: H.
        deep: further layers p <- tanh(W p + b) before the state comes in.
        temperature: T; the larger, the nearer to the best region alone.
    """

    def __init__(self, dim: int, hidden: int, *, deep: int = 0, temperature: float = 1.0) -> None:
        super().__init__()
        self.of_region, self.of_state = nn.Linear(dim, dim), nn.Linear(hidden, dim, bias=False)
        self.deeper = nn.ModuleList(nn.Linear(dim, dim) for _ in range(deep))
        self.score, self.temperature = nn.Linear(dim, 1), temperature

    def prepare(self, regions_BRD: Tensor) -> Tensor:
        """p, (B, R, D), once for all words."""
        p_BRD = self.of_region(regions_BRD)
        for layer in self.deeper:
            p_BRD = layer(p_BRD).tanh()
        return p_BRD

    def forward(self, p_BRD: Tensor, state_BH: Tensor, present_BR: Tensor | None = None) -> Tensor:
        """alpha (B, R), with sum 1.

        Args:
            p_BRD: of `prepare`.
            state_BH: h.
            present_BR: bool, which regions there are; all where None.
        """
        score_BR = self.temperature * self.score((p_BRD + self.of_state(state_BH)[:, None]).tanh())[..., 0]
        if present_BR is not None:
            score_BR = score_BR.masked_fill(~present_BR, -torch.inf)
        return score_BR.softmax(1)


def draw_region(alpha_BR: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One region of each image, drawn by its attention, as 1 among zeros (B, R).

    Args:
        alpha_BR: with sum 1.
        generator: of the draw.
    """
    index_B1 = torch.multinomial(alpha_BR.detach().float(), 1, generator=generator)
    return torch.zeros_like(alpha_BR).scatter_(1, index_B1, 1.0)
