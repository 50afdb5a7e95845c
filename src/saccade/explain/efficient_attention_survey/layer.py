"""The survey's linear recurrences as one causal layer.

Shape letters: B batch, H heads, N tokens, M those of a context (there is none), C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.efficient_attention_survey.features import elu_features
from saccade.explain.efficient_attention_survey.operator import Update, delta_attend, implicit_rate
from saccade.layers.cache import StateCache
from saccade.layers.constants import Constants
from saccade.ops.linear import linear_attend, retention_decay
from saccade.ops.pattern import GivenMask, Pattern


class RecurrentAttention(Constants):
    """The survey's linear recurrences as one causal layer with a state of constant size.

    Args:
        dim: channels.
        num_heads: H, a divisor of `dim`.
        causal: must be True.
        update: which recurrence, see the table on the paper's page.
        chunk_size: tokens of a chunk in the parallel form.

    Raises:
        ValueError: if `causal` is False, heads do not divide, or the update is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        update: Update = "gated-delta",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("a recurrence is causal; got causal=False")
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        names = ("kernel", "decay", "gated", "gated-channel", "delta", "gated-delta", "longhorn")
        if update not in names:
            raise ValueError(f"update must be one of {', '.join(names)}, got {update!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.dim, self.num_heads, self.causal, self.update, self.chunk_size = dim, num_heads, causal, update, chunk_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        width = dim if update == "gated-channel" else num_heads
        self.gate = nn.Linear(dim, width) if update in ("gated", "gated-channel", "gated-delta") else None
        self.rate = nn.Linear(dim, num_heads) if update in ("delta", "gated-delta", "longhorn") else None
        self.constant("decay", partial(retention_decay, num_heads) if update == "decay" else None)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """`x_BNC` after what `cache` has seen; `mask` (B, N), True = real token: padding is not written.

        Raises:
            ValueError: if shapes do not fit, or there is a context.
        """
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        if context_BMC is not None:
            raise ValueError("a recurrence takes no context")
        B, N = x_BNC.shape[:2]
        real_BN = Pattern.of(mask, B, N, N, causal=True).only(("padding",), "a recurrence").real_keys(B)
        q, k, v = (self._heads(p(x_BNC)) for p in (self.q_proj, self.k_proj, self.v_proj))
        state = None if cache is None else cache.state
        out, state = self._run(x_BNC, q, k, v, real_BN, state)
        if cache is not None:
            cache.state, cache.length = _detached(state), cache.length + x_BNC.shape[1]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty state."""
        return StateCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, update={self.update!r}"

    def _run(
        self, x_BNC: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        real = None if mask is None else mask[:, None]
        plain: dict[str, Any] = {"state": state, "return_state": True}
        gate = None if self.gate is None else F.logsigmoid(self.gate(x_BNC)) / 16
        if real is not None:
            v = v * real[..., None]
        if self.update == "kernel":
            # written after the feature map, which gives padding weight too
            q, k = elu_features(q), elu_features(k)
            k = k if real is None else k * real[..., None]
            return linear_attend(q, k, v, normalize=True, chunk_size=self.chunk_size, **plain)
        if self.update in ("delta", "gated-delta", "longhorn"):
            assert self.rate is not None
            rate = self.rate(x_BNC).sigmoid().transpose(1, 2)
            if self.update == "longhorn":
                rate = implicit_rate(rate, k)
            log_decay = None if gate is None else gate.transpose(1, 2)
            if real is not None:
                rate, log_decay = rate * real, None if log_decay is None else log_decay * real
            q, k = (q, k) if self.update == "longhorn" else (F.normalize(x, dim=-1) for x in (q, k))
            return delta_attend(q, k, v, rate, log_decay, chunk_size=self.chunk_size, **plain)
        decay: Tensor | None = self.decay if isinstance(self.decay, Tensor) else None
        if real is not None and decay is not None:
            decay = torch.where(real, decay[:, None], 1.0)
        if gate is not None:
            gate = self._heads(gate) if self.update == "gated-channel" else gate.transpose(1, 2)
            if real is not None:
                gate = gate * (real[..., None] if gate.ndim == 4 else real)
            decay = gate.exp().to(q.dtype)
        return linear_attend(q * q.shape[-1] ** -0.5, k, v, decay=decay, chunk_size=self.chunk_size, **plain)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else type(state)(*(part.detach() for part in state))
