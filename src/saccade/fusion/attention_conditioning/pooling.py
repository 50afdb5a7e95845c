"""Attention over tokens, conditioned on features of them.

Shape letters: B batch, L tokens, D width of a token, F features of a token, S width of what is scored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

CONDITIONINGS = ("concat", "gate", "affine", "non-linear-affine")


class Pooled(NamedTuple):
    """What a sequence is in one vector.

    Attributes:
        features: r, (B, D).
        weights: a, (B, L).
    """

    features: Tensor
    weights: Tensor


class ConditionedPooling(nn.Module):
    """r = sum_i softmax_i(v . f(h_i, c_i) + b) h_i.

    Args:
        dim: D.
        features: F.
        conditioning: f, of `CONDITIONINGS`; None for h alone.
        layers: 1, or 2 with a hidden layer of the width of f, tanh and dropout before the energy.
        dropout: of the hidden layer.

    Raises:
        ValueError: if a number is not positive, or there is no such conditioning.

    >>> pooled = ConditionedPooling(8, 3)(torch.randn(2, 5, 8), torch.randn(2, 5, 3))
    >>> pooled.features.shape, pooled.weights.shape
    (torch.Size([2, 8]), torch.Size([2, 5]))
    """

    def __init__(
        self, dim: int, features: int, conditioning: str | None = "gate", *, layers: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if conditioning not in (None, *CONDITIONINGS):
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)} or None, got {conditioning!r}")
        if min(dim, features) < 1 or layers not in (1, 2):
            raise ValueError(f"dim and features must be positive, layers 1 or 2, got {dim}, {features} and {layers}")
        self.dim, self.features, self.conditioning = dim, features, conditioning
        self.gate = nn.Linear(features, dim) if conditioning == "gate" else None
        moved = conditioning in ("affine", "non-linear-affine")
        self.scale, self.shift = (nn.Linear(features, dim) if moved else None for _ in range(2))
        scored = dim + features * (conditioning == "concat")
        self.hidden = nn.Sequential(nn.Linear(scored, scored), nn.Tanh(), nn.Dropout(dropout)) if layers == 2 else None
        self.energy = nn.Linear(scored, 1)

    def condition(self, h_BLD: Tensor, c_BLF: Tensor) -> Tensor:
        """f(h, c), (B, L, S)."""
        if self.conditioning == "concat":
            return torch.cat([h_BLD, c_BLF], -1)
        if self.gate is not None:
            return self.gate(c_BLF).sigmoid() * h_BLD
        if self.scale is not None and self.shift is not None:
            moved_BLD = self.scale(c_BLF) * h_BLD + self.shift(c_BLF)
            return moved_BLD.tanh() if self.conditioning == "non-linear-affine" else moved_BLD
        return h_BLD

    def forward(
        self,
        h_BLD: Tensor,
        c_BLF: Tensor | None = None,
        *,
        masks: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Pooled:
        """
        Args:
            h_BLD: hidden states of tokens.
            c_BLF: what is known of them; None, or a row of zeros, where nothing is.
            masks: of tokens (B, L), False is padding, and of features (B, L), False is a token without any.

        Returns:
            r and a; both 0 of a row without tokens.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if h_BLD.ndim != 3 or h_BLD.shape[2] != self.dim:
            raise ValueError(f"tokens must be (batch, tokens, {self.dim}), got {tuple(h_BLD.shape)}")
        if c_BLF is None:
            c_BLF = h_BLD.new_zeros(*h_BLD.shape[:2], self.features)
        if c_BLF.shape != (*h_BLD.shape[:2], self.features):
            wanted = (*h_BLD.shape[:2], self.features)
            raise ValueError(f"features must be {wanted}, got {tuple(c_BLF.shape)}")
        real_BL, known_BL = masks or (None, None)
        for name, mask_BL in (("tokens", real_BL), ("features", known_BL)):
            if mask_BL is not None and (mask_BL.shape != h_BLD.shape[:2] or mask_BL.dtype != torch.bool):
                wanted = tuple(h_BLD.shape[:2])
                raise ValueError(
                    f"the mask of {name} must be bool {wanted}, got {mask_BL.dtype} {tuple(mask_BL.shape)}"
                )
        if known_BL is not None:
            c_BLF = c_BLF * known_BL[..., None]
        f_BLS = self.condition(h_BLD, c_BLF)
        energy_BL = self.energy(f_BLS if self.hidden is None else self.hidden(f_BLS))[..., 0]
        wide = torch.promote_types(energy_BL.dtype, torch.float32)
        if real_BL is not None:
            energy_BL = energy_BL.masked_fill(~real_BL, torch.finfo(energy_BL.dtype).min)
        weight_BL = energy_BL.softmax(-1, dtype=wide)
        if real_BL is not None:
            weight_BL = weight_BL * real_BL
        weight_BL = weight_BL.to(h_BLD.dtype)
        return Pooled((weight_BL[:, None] @ h_BLD)[:, 0], weight_BL)
