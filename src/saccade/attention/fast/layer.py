"""`FastmaxAttention`: projections around `fastmax_attend`, and a cache of one size.

Shape letters: B batch, H heads, K key heads, N queries, M keys, D head dim, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.fast.operator import NORMALIZATIONS, Normalization, fastmax_attend
from saccade.layers.cache import StateCache
from saccade.layers.state_attention import StateAttention


class FastmaxAttention(StateAttention):
    """Multi-head or grouped-query Fastmax; projections, positions and call as in `QKVAttention`.

    Args:
        dim, num_heads, causal: as there.
        degree, temperature, coefficients, limit, norm_bound, dropout: as in `fastmax_attend`.
        normalization: None: "standardized" where causal, else "centered".
        projections: `QKVAttention`'s other arguments.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        degree: int = 2,
        normalization: Normalization | None = None,
        temperature: float | None = None,
        coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
        limit: float = 1.0,
        norm_bound: float | None = None,
        dropout: float = 0.0,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if normalization is None:
            normalization = "standardized" if causal else "centered"
        if degree not in (1, 2):
            raise ValueError(f"degree must be 1 or 2, got {degree}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        for name, value in (("temperature", temperature), ("limit", limit), ("norm_bound", norm_bound)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        a0, a1, a2 = coefficients
        if degree == 2 and not (a2 > 0 and a1 * a1 <= 4 * a0 * a2):
            raise ValueError(
                f"coefficients need a2 > 0 and a1^2 <= 4 a0 a2 to keep weights positive, got {coefficients}"
            )
        self.dropout, self.normalization = dropout, normalization
        # where no statistics are taken over tokens, and no features are drawn
        of_each_token = normalization in ("plain", "standardized") or (normalization == "limited" and norm_bound)
        self.takes_parts = bool(of_each_token) and not dropout
        self.options: dict[str, Any] = {
            "degree": degree,
            "normalization": normalization,
            "temperature": temperature,
            "coefficients": coefficients,
            "limit": limit,
            "norm_bound": norm_bound,
        }

    def aggregate(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, **call: Any) -> Any:
        dropout = self.dropout if self.training and not call.get("return_state") else 0.0
        return fastmax_attend(q_BHND, k_BKMD, v_BKME, **call, **self.options, dropout=dropout)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty cache; its state has (1 + D + D (D + 1) / 2) (D + 1) numbers a head.

        Raises:
            ValueError: if the normalisation depends on tokens still to come.
        """
        if self.normalization == "centered" or (self.normalization == "limited" and not self.options["norm_bound"]):
            raise ValueError(
                f"normalization {self.normalization!r} looks at all tokens and cannot decode: use 'standardized', "
                "'plain', or 'limited' with norm_bound"
            )
        return super().new_cache(batch_size, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.options['degree']}, normalization={self.normalization!r}"
