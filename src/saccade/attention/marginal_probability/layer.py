"""Layers: any mechanism of the framework read along paths, the expanding window, and the head of the experiments.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, C channels, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.marginal_probability.extensions import MEAN, along_paths, expanding_attend, expanding_windows
from saccade.attention.marginal_probability.framework import Mechanism
from saccade.layers.cache import NamedCache
from saccade.layers.placement import check_placed
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import GivenMask, Pattern


class MarginalAttention(QKVAttention):
    """sum_r w_r A^r V between projections: A by a mechanism, the value of a node the mean over paths from it.

    Decoding keeps keys and, of each length of path but the last, what earlier tokens read: one set of values more for
    each edge of the longest path.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        hops: w_r of paths of length 0, 1, ...; (0, 1) is the mechanism alone, and may cross to a context.
        learned_hops: the weights are parameters that start there.
        hop_values: values of its own for each length of path.
        mechanism: of whose posterior A consists; softmax attention where None.

    Raises:
        ValueError: if there are no weights, or the mechanism is none of a layer: in which keys choose, or with a mask
            in its prior, which belongs into the call.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        hops: tuple[float, ...] = MEAN,
        learned_hops: bool = False,
        hop_values: bool = False,
        mechanism: Mechanism | None = None,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if not hops:
            raise ValueError("hops must be one weight or more, got none")
        self.mechanism = Mechanism() if mechanism is None else mechanism
        if self.mechanism.over != "keys":
            raise ValueError("in a layer each query chooses a key, got a mechanism over queries")
        if self.mechanism.prior.mask is not None:
            raise ValueError(f"the mask belongs into the call, got {self.mechanism.prior.mask!r} in the prior")
        self.plain = self.mechanism == Mechanism()
        self.takes_parts = self.plain
        # a potential that learns is a part of the layer
        self.potential = self.mechanism.potential if isinstance(self.mechanism.potential, nn.Module) else None
        self.hops = tuple(map(float, hops))
        self.hop_weights = nn.Parameter(torch.tensor(self.hops)) if learned_hops else None
        width = self.num_kv_heads * self.head_dim
        bias = self.v_proj.bias is not None
        more = len(self.hops) - 1 if hop_values else 0
        self.hop_projections = nn.ModuleList(nn.Linear(dim, width, bias=bias) for _ in range(more))

    @property
    def crosses(self) -> bool:
        """Whether paths may lead to other tokens than they begin at: where no other length than 1 counts."""
        return self.hops == (0.0, 1.0) and self.hop_weights is None

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        super().check(x_BNC, context_BMC, cache)
        if context_BMC is not None and not self.crosses:
            raise ValueError(f"only with hops (0, 1) is there a context, got hops {self.hops}")

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys, values; and the values of the longer paths, where they have their own."""
        source_BMC = x_BNC if context_BMC is None else context_BMC
        more = (self.split_heads(each(source_BMC), self.num_kv_heads) for each in self.hop_projections)
        return *super().project(x_BNC, context_BMC, positions), *more

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, *more: Tensor) -> Tensor:
        k_BHMD = repeat_heads(k_BKMD, self.num_heads)
        return self._along(q_BHND, k_BHMD, (v_BKME, *more), pattern, None)

    def remember(
        self,
        cache: NamedCache,
        q_BHND: Tensor,
        k_BKND: Tensor,
        v_BKNE: Tensor,
        pattern: Pattern,
        *more: Tensor,
    ) -> Tensor:
        k_BHMD = repeat_heads(cache.append("key", k_BKND), self.num_heads)
        return self._along(q_BHND, k_BHMD, (v_BKNE, *more), pattern, cache)

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor | None = None, mask: GivenMask = None
    ) -> Tensor:
        """The weights of paths on given values, the same for all lengths."""
        self.check(x_BNC, context, None)
        pattern = self.pattern(mask, x_BNC, context, None)
        q_BHND, k_BKMD = self.project(x_BNC, context, self.positions(x_BNC, context, 0))[:2]
        more = [values_BHME] * len(self.hop_projections)
        return self.attend(q_BHND, k_BKMD, values_BHME, pattern, *more)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NamedCache:
        return NamedCache()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hops={self.hops}"

    def _along(
        self,
        q_BHND: Tensor,
        k_BHMD: Tensor,
        values: tuple[Tensor, ...],
        pattern: Pattern,
        cache: NamedCache | None,
    ) -> Tensor:
        values = tuple(repeat_heads(each, self.num_heads) for each in values)
        values = values * len(self.hops) if len(values) == 1 else values
        level = 0

        def step(x_BHNE: Tensor) -> Tensor:
            nonlocal level
            x_BHME = x_BHNE if cache is None else cache.append(f"value {level}", x_BHNE)
            level += 1
            return self._read(q_BHND, k_BHMD, x_BHME, pattern)

        if self.crosses:
            return step(values[-1])
        weights = self.hops if self.hop_weights is None else self.hop_weights.to(q_BHND.dtype)
        return along_paths(step, values, weights)

    def _read(self, q_BHND: Tensor, k_BHMD: Tensor, x_BHME: Tensor, pattern: Pattern) -> Tensor:
        if self.plain:  # the engine's own fast door
            return attend(q_BHND, k_BHMD, x_BHME, mask=pattern.mask)
        return self.mechanism(q_BHND, k_BHMD, x_BHME, mask=pattern, offset=pattern.offset).out


class ExpandingAttention(QKVAttention):
    """`expanding_attend` between projections; always causal, and a token does not read itself.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: True; there is no other form.
        alpha, beta: of the hyper-prior, kept with the weights; nothing gives them a gradient.
        slope: "code" or "exact", see `expanding_attend`.

    Raises:
        ValueError: if the layer is not to be causal, or an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        alpha: float = 0.1,
        beta: float = 0.9,
        slope: Literal["code", "exact"] = "code",
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if not causal:
            raise ValueError("an expanding window looks back only: causal must be True")
        _check_expanding(alpha, beta, slope)
        self.slope = slope
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        form: dict[str, Any] = {"alpha": self.alpha, "beta": self.beta, "slope": self.slope, "mask": pattern}
        return expanding_attend(q_BHND, k_BKMD, v_BKME, **form)


class ToyHead(nn.Module):
    """The layer of the successor's experiments: one head, values of their own width, nothing after it.

    Args:
        dim: C.
        value_dim: E.
        structure: "edge" (ordinary attention), "paths" (of length 0 to 2), or "window" (expanding, for the last token).
        alpha, beta: of the window's hyper-prior.

    Raises:
        ValueError: if the structure is unknown, or a number is not positive.
    """

    def __init__(
        self,
        dim: int,
        value_dim: int = 1,
        structure: Literal["edge", "paths", "window"] = "paths",
        *,
        alpha: float = 0.1,
        beta: float = 0.9,
    ) -> None:
        super().__init__()
        if structure not in ("edge", "paths", "window"):
            raise ValueError(f"structure must be 'edge', 'paths' or 'window', got {structure!r}")
        if dim < 1 or value_dim < 1:
            raise ValueError(f"dim and value_dim must be positive, got {dim} and {value_dim}")
        _check_expanding(alpha, beta, "code")
        self.alpha: Tensor
        self.beta: Tensor
        self.dim, self.value_dim, self.structure = dim, value_dim, structure
        self.qkv = nn.Linear(dim, 2 * dim + value_dim, bias=False)
        if structure == "window":
            self.register_buffer("alpha", torch.tensor(float(alpha)))
            self.register_buffer("beta", torch.tensor(float(beta)))

    def project(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one head."""
        q, k, v = self.qkv(x_BNC)[:, None].split((self.dim, self.dim, self.value_dim), -1)
        return q, k, v

    def windows(self, x_BNC: Tensor) -> Any:
        """What the last token found, as `Windows`."""
        q_B1NC, k_B1NC, _ = self.project(x_BNC)
        return expanding_windows(q_B1NC[:, :, -1:], k_B1NC, alpha=self.alpha, beta=self.beta)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Outputs (B, N, E); of a window for the last token only, (B, 1, E).

        Raises:
            ValueError: if x has another form.
        """
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        check_placed(self, "x", x_BNC)
        q, k, v = self.project(x_BNC)
        if self.structure == "window":
            found = expanding_attend(q[:, :, -1:], k, v, alpha=self.alpha, beta=self.beta)
        else:
            weights = MEAN if self.structure == "paths" else (0.0, 1.0)
            found = along_paths(lambda x: attend(q, k, x), [v] * len(weights), weights)
        return found[:, 0]


def _check_expanding(alpha: float, beta: float, slope: str) -> None:
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha and beta must be positive, got {alpha} and {beta}")
    if slope not in ("code", "exact"):
        raise ValueError(f"slope must be 'code' or 'exact', got {slope!r}")
