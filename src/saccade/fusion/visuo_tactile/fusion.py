"""Sight and touch, weighed by the force: the paper's form and the authors', and what it is compared with.

Shape letters: B batch, R = B times observation steps, V, T, F widths of what is seen, touched and felt, H heads,
C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.fusion.visuo_tactile.attention import AttentionLayer, WeightedAttention
from saccade.ops.export import output

#: the paper's, and that of the authors' code
FORMS = ("attention", "decoder")


@output
@dataclass
class ForceFused:
    """What a fusion gives.

    Attributes:
        features: (R, C).
        weights: (R, H, 2) of sight and touch, which sum to 1.
    """

    features: Tensor
    weights: Tensor


class ForceGuidedFusion(nn.Module):
    """The force asks, sight and touch answer.

        "attention":  e_F = MLP(g), e_pc = MLP(Z_pc), e_tac = MLP(Z_tac)
                      weights = softmax(e_F W_Q ([e_pc, e_tac] W_K)^T / sqrt(C)),    Z = weights [e_pc, e_tac] W_V
        "decoder":    a layer of a transformer's decoder, whose only query is a linear map of g, and whose memory are
                      linear maps of the two

    Args:
        dim: C.
        visual, tactile, force: V, T, F.
        num_heads: H of the "decoder"; the "attention" has one.
        form: "attention", or "decoder" as in the authors' code.
        drop: dropout of the "decoder".

    Raises:
        ValueError: if the form is not offered, or a number is out of range.
    """

    def __init__(
        self,
        dim: int = 512,
        visual: int = 512,
        tactile: int = 512,
        force: int = 3,
        *,
        num_heads: int = 8,
        form: str = "attention",
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if min(dim, visual, tactile, force) < 1:
            raise ValueError(f"widths must be positive, got {dim}, {visual}, {tactile} and {force}")
        self.widths = (visual, tactile, force)
        self.visual_proj, self.tactile_proj, self.force_proj = (
            nn.Linear(width, dim)
            if form == "decoder"
            else nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))
            for width in self.widths
        )
        self.layer: nn.Module = (
            AttentionLayer(dim, num_heads, dim, drop=drop)
            if form == "decoder"
            else WeightedAttention(dim, 1, bias=False, out=False)
        )

    def forward(
        self,
        visual: Tensor | None,
        tactile: Tensor | None,
        force: Tensor,
        *,
        masks: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> ForceFused:
        """
        Args:
            visual, tactile: (R, V) and (R, T); None is missing in all rows.
            force: g, (B, F); each stands for R / B rows that follow each other.
            masks: bool (R,) of sight and of touch, True = there, or None. Rows with neither get zeros from both.

        Raises:
            ValueError: if both are missing, or they do not fit together.
        """
        given = [x for x in (visual, tactile) if x is not None]
        rows = len(given[0]) if given else 0
        for name, x, width in zip(("visual", "tactile"), (visual, tactile), self.widths):
            if x is not None and x.shape != (rows, width):
                raise ValueError(f"{name} must be (rows, {width}), got {tuple(x.shape)} beside {rows} rows")
        if not given or force.shape[1:] != (self.widths[2],) or not len(force) or rows % len(force):
            raise ValueError(
                f"force must be (batch, {self.widths[2]}) with a batch that divides the {rows} rows of sight and "
                f"touch, of which one must be there, got {tuple(force.shape)}"
            )
        query = self.force_proj(force).repeat_interleave(rows // len(force), 0)[:, None]
        nothing = torch.zeros_like(query[:, 0])
        projected = [
            nothing if x is None else proj(x) for x, proj in ((visual, self.visual_proj), (tactile, self.tactile_proj))
        ]
        features, weights = self._met(query, torch.stack(projected, 1), self._there(visual, tactile, masks, rows))
        return ForceFused(features[:, 0], weights[:, :, 0])

    def _met(self, query: Tensor, memory: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.layer, AttentionLayer):
            return self.layer(query, memory, memory_mask=there)
        return self.layer(query, memory, there)

    @staticmethod
    def _there(
        visual: Tensor | None,
        tactile: Tensor | None,
        masks: tuple[Tensor | None, Tensor | None] | None,
        rows: int,
    ) -> Tensor | None:
        """Bool (R, 1, 1, 2), None where all are there."""
        if masks is None and visual is not None and tactile is not None:
            return None
        device = (tactile if visual is None else visual).device  # type: ignore[union-attr]
        columns = []
        for x, mask in zip((visual, tactile), (None, None) if masks is None else masks):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows,)):
                raise ValueError(f"masks must be bool ({rows},), got {mask.dtype} {tuple(mask.shape)}")
            known = torch.full((rows,), x is not None, device=device)
            columns.append(known if mask is None else known & mask)
        return torch.stack(columns, 1)[:, None, None]


class SelfAttentionFusion(nn.Module):
    """The comparison: both as tokens in a layer of a transformer's encoder; (R, V), (R, T) -> (R, 2, C).

    Args:
        dim: C.
        visual, tactile: V, T.
        num_heads: of the attention.
        drop: dropout.
    """

    def __init__(
        self, dim: int = 512, visual: int = 512, tactile: int = 512, *, num_heads: int = 8, drop: float = 0.1
    ) -> None:
        super().__init__()
        self.visual_proj, self.tactile_proj = nn.Linear(visual, dim), nn.Linear(tactile, dim)
        self.layer = AttentionLayer(dim, num_heads, dim, memory=False, drop=drop)

    def forward(self, visual: Tensor, tactile: Tensor) -> Tensor:
        return self.layer(torch.stack([self.visual_proj(visual), self.tactile_proj(tactile)], 1))[0]


class CrossAttentionFusion(nn.Module):
    """The comparison: touch asks, sight answers; (B, N, C), (B, M, C) -> (B, M, C).

    Args:
        dim: C.
        num_heads: of the attention.
        hidden: inner width of the MLP.
        drop: dropout.
    """

    def __init__(self, dim: int = 512, *, num_heads: int = 8, hidden: int = 2048, drop: float = 0.1) -> None:
        super().__init__()
        self.layer = AttentionLayer(dim, num_heads, hidden, drop=drop)

    def forward(self, visual: Tensor, tactile: Tensor) -> Tensor:
        return self.layer(tactile, visual)[0]
