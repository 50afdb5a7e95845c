"""Features of clips and words brought to one width, and clips refined by the words.

Shape letters: B batch, L clips, W words, T clips or words, C channels, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: log of the smallest float32 above 0, which the code adds to a mask before its log
LOG_NOTHING = -103.27892990343185


class Projection(nn.Module):
    """Layers of norm, dropout and linear map, a ReLU between them.

    Args:
        in_dim: C.
        dim: D.
        layers: how many.
        drop: before each map.

    Raises:
        ValueError: if there is no layer.
    """

    def __init__(self, in_dim: int, dim: int, layers: int = 2, drop: float = 0.5) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be positive, got {layers}")
        widths = [in_dim, *[dim] * layers]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[:-1])
        self.maps = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths, widths[1:]))
        self.drop = nn.Dropout(drop)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, D)."""
        for number, (norm, linear) in enumerate(zip(self.norms, self.maps)):
            x_BTC = linear(self.drop(norm(x_BTC if number == 0 else F.relu(x_BTC))))
        return x_BTC


class FeatureRefinement(nn.Module):
    """v' = relu(W [v; cos(v, s) u; s; K]), s the words' sentence, K their correlation with clips.

    Args:
        dim: D.
        drop: of each of the four, and of the result.
        constant_correlation: K = c_q c_v, the same for each clip, as the code's correlation comes to; False: P^T t,
            each clip's own mean of words.
    """

    def __init__(self, dim: int, drop: float = 0.1, *, constant_correlation: bool = True) -> None:
        super().__init__()
        self.pool = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1)))
        self.likeness = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1)))
        self.clip_factor = self.word_factor = None
        if constant_correlation:
            self.clip_factor = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
            self.word_factor = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1)))
        self.mix, self.drop = nn.Linear(4 * dim, dim), nn.Dropout(drop)

    def correlation(self, clips_BLD: Tensor, words_BWD: Tensor, words_BW: Tensor | None = None) -> Tensor:
        """K, (B, L, D): the words that each clip is like, or what that comes to in the code.

        The shares of words sum to 1 and all have one value in the code, so K is that value.

        Args:
            clips_BLD, words_BWD: clips and words.
            words_BW: bool, False is padding.
        """
        if self.word_factor is not None and self.clip_factor is not None:
            return (self.word_factor * self.clip_factor).expand(*clips_BLD.shape[:2], -1)
        scores_BLW = clips_BLD @ words_BWD.mT
        if words_BW is not None:
            scores_BLW = scores_BLW.masked_fill(~words_BW[:, None], torch.finfo(scores_BLW.dtype).min)
        return scores_BLW.softmax(-1) @ words_BWD

    def forward(
        self, clips_BLD: Tensor, words_BWD: Tensor, clips_BL: Tensor | None = None, words_BW: Tensor | None = None
    ) -> Tensor:
        """(B, L, D).

        Args:
            clips_BLD, words_BWD: clips and words.
            clips_BL, words_BW: bool, False is padding.
        """
        weight_BW1 = words_BWD @ self.pool
        if words_BW is not None:
            weight_BW1 = weight_BW1.masked_fill(~words_BW[..., None], torch.finfo(weight_BW1.dtype).min)
        sentence_B1D = (weight_BW1.softmax(1) * words_BWD).sum(1, keepdim=True)
        like_BL = F.cosine_similarity(clips_BLD, sentence_B1D, dim=-1)
        if clips_BL is not None:
            like_BL = torch.where(clips_BL, like_BL, like_BL + LOG_NOTHING)
        parts = (
            clips_BLD,
            like_BL[..., None] * self.likeness[:, 0],
            sentence_B1D.expand_as(clips_BLD),
            self.correlation(clips_BLD, words_BWD, words_BW),
        )
        return self.drop(F.relu(self.mix(torch.cat([self.drop(part) for part in parts], -1))))
