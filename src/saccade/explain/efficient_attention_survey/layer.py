"""The survey's linear recurrences as one causal layer.

Shape letters: B batch, H heads, N tokens, M those of a context (there is none), C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.efficient_attention_survey.features import elu_features
from saccade.explain.efficient_attention_survey.least_squares import mesa_attend
from saccade.explain.efficient_attention_survey.memories import memory_attend
from saccade.explain.efficient_attention_survey.operator import (
    Update,
    delta_attend,
    generalised_delta_attend,
    implicit_rate,
)
from saccade.layers.cache import StateCache
from saccade.layers.constants import Constants
from saccade.ops.linear import linear_attend, retention_decay
from saccade.ops.pattern import GivenMask, Pattern

_GATED = ("gated", "gated-channel", "gated-delta", "rwkv7", "titans", "mesa")
_RATED = ("delta", "gated-delta", "longhorn", "rwkv7", "ttt", "ttt-mlp", "titans", "mesa")


class RecurrentAttention(Constants):
    """The survey's linear recurrences as one causal layer with a state of constant size.

    Args:
        dim: channels.
        num_heads: H, a divisor of `dim`.
        causal: must be True.
        update: which recurrence, see the table on the paper's page.
        chunk_size: tokens of a chunk in the parallel form.
        batch_size: of ttt, ttt-mlp and titans, the tokens whose gradients are taken at the same weights.
        hidden: of ttt-mlp and titans, the width of the memory; four times the head dim where None.

    Raises:
        ValueError: if `causal` is False, heads do not divide, the update is unknown, or a size is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        update: Update = "gated-delta",
        chunk_size: int = 64,
        batch_size: int = 16,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("a recurrence is causal; got causal=False")
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if update not in get_args(Update):
            raise ValueError(f"update must be one of {', '.join(get_args(Update))}, got {update!r}")
        hidden = 4 * dim // num_heads if hidden is None else hidden
        for name, size in (("chunk_size", chunk_size), ("batch_size", batch_size), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dim, self.num_heads, self.causal, self.update, self.chunk_size = dim, num_heads, causal, update, chunk_size
        self.batch_size = batch_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        width = dim if update in ("gated-channel", "rwkv7") else num_heads
        self.gate = nn.Linear(dim, width) if update in _GATED else None
        self.rate = nn.Linear(dim, dim if update == "rwkv7" else num_heads) if update in _RATED else None
        self.momentum = nn.Linear(dim, num_heads) if update == "titans" else None
        self.memory = nn.ParameterList(_memory(update, num_heads, dim // num_heads, hidden))
        self.ridge = nn.Parameter(torch.zeros(num_heads, dim // num_heads)) if update == "mesa" else None
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
        if self.rate is not None:
            return self._learned(q, k, v, self.rate(x_BNC).sigmoid(), gate, x_BNC, real, plain)
        decay: Tensor | None = self.decay if isinstance(self.decay, Tensor) else None
        if real is not None and decay is not None:
            decay = torch.where(real, decay[:, None], 1.0)
        if gate is not None:
            gate = self._heads(gate) if self.update == "gated-channel" else gate.transpose(1, 2)
            if real is not None:
                gate = gate * (real[..., None] if gate.ndim == 4 else real)
            decay = gate.exp().to(q.dtype)
        return linear_attend(q * q.shape[-1] ** -0.5, k, v, decay=decay, chunk_size=self.chunk_size, **plain)

    def _learned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate_BNC: Tensor,
        gate_BNC: Tensor | None,
        x_BNC: Tensor,
        real: Tensor | None,
        plain: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """Of the updates that have a rate: the delta rules, memories that learn, and least squares."""
        if self.update == "rwkv7":
            assert gate_BNC is not None
            log_w, kappa = self._heads(gate_BNC), F.normalize(k, dim=-1)
            write = -self._heads(rate_BNC) * kappa
            if real is not None:
                log_w, write = log_w * real[..., None], write * real[..., None]
            size = min(self.chunk_size, 16)
            return generalised_delta_attend(
                q * q.shape[-1] ** -0.5, k, v, kappa, write, log_w, chunk_size=size, **plain
            )
        rate = rate_BNC.transpose(1, 2)
        gate = None if gate_BNC is None else gate_BNC.transpose(1, 2)
        if self.update == "longhorn":
            rate = implicit_rate(rate, k)
        else:
            q, k = (F.normalize(x, dim=-1) for x in (q, k))
        if self.memory:
            log = None if self.momentum is None else F.logsigmoid(self.momentum(x_BNC)).transpose(1, 2)
            given: dict[str, Any] = {"log_keep_BHN": gate, "log_momentum_BHN": log, "batch_size": self.batch_size}
            real_BN = None if real is None else real[:, 0]
            return memory_attend(q, k, v, rate, list(self.memory), real_BN=real_BN, **given, **plain)
        if real is not None:
            rate, gate = rate * real, None if gate is None else gate * real
        if self.ridge is not None:
            return mesa_attend(
                q, k, v, rate, F.softplus(self.ridge), gate, chunk_size=min(self.chunk_size, 16), **plain
            )
        return delta_attend(q, k, v, rate, gate, chunk_size=self.chunk_size, **plain)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _memory(update: Update, heads: int, width: int, hidden: int) -> list[Tensor]:
    """Matrices of a memory before the first token; one alone begins empty."""
    if update == "ttt":
        return [torch.zeros(heads, width, width)]
    if update in ("ttt-mlp", "titans"):
        return [torch.randn(heads, a, b) / a**0.5 for a, b in ((width, hidden), (hidden, width))]
    return []


def _detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    parts = [_detached(part) for part in state]
    return tuple(parts) if type(state) is tuple else type(state)(*parts)
