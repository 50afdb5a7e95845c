"""Neighbourhood attention as a layer for sequences, images and videos, and the cache of its last window.

Shape letters: B batch, H query heads, K key heads, N tokens of the grid in row-major order, M keys (or tokens of a
context), C channels, D head dim of q and k, E of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.neighborhood.operator import Axes, neighborhood_attend, on_axis
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import GivenMask, Said
from saccade.ops.sharding import whole


class RollingCache(KVCache):
    """The last `room` tokens' keys and values: constant memory.

    Args:
        room: tokens held at most, (w - 1) d.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k_BKND: Tensor, v_BKNE: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns those that were held, followed by the new ones."""
        if self._held is not None:
            if self._held[0].shape[0] != k_BKND.shape[0]:
                raise ValueError(f"the cache holds {self._held[0].shape[0]} sequences, got {k_BKND.shape[0]}")
            k_BKND, v_BKNE = (torch.cat(pair, 2) for pair in zip(self._held, (k_BKND, v_BKNE)))
        self.length += k_BKND.shape[2] - self.held
        drop = max(0, k_BKND.shape[2] - self.room)
        # a view would keep what it is a part of
        self._held = k_BKND[:, :, drop:].detach().clone(), v_BKNE[:, :, drop:].detach().clone()
        return k_BKND, v_BKNE

    @property
    def held(self) -> int:
        return 0 if self._held is None else self._held[0].shape[2]

    @property
    def nbytes(self) -> int:
        return 0 if self._held is None else sum(x.numel() * x.element_size() for x in self._held)


class NeighborhoodAttention(QKVAttention):
    """Projections around `neighborhood_attend`, for sequences, images (B, H, W, C) and videos (B, T, H, W, C).

    `forward` is its own: it takes grids, and a context's keys come beside the tokens', not in their place.

    Args:
        dim, num_heads, num_kv_heads, head_dim, qkv_bias, proj_bias: as in `QKVAttention`.
        causal: for all axes, or per axis (causal in time, free in space: `(True, False, False)`).
        kernel_size, dilation, stride: for all axes, or per axis.
        relative_bias: learn a table of biases by relative position, zero at the start; kernel_size must be per axis.
        rope: rotary positions, sequences only (not of the paper).
        rope_base: of the rotary positions.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: if an option is out of its range.
    """

    takes: tuple[Said, ...] = ("padding",)
    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool | Sequence[bool] = False,
        *,
        kernel_size: Axes = 7,
        dilation: Axes = 1,
        stride: Axes = 1,
        relative_bias: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = False,
        rope_base: float = 10000.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        everywhere = causal if isinstance(causal, bool) else all(causal)
        super().__init__(
            dim, num_heads, everywhere, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base,
            qkv_bias=qkv_bias, proj_bias=proj_bias,
        )  # fmt: skip
        given = [len(x) for x in (kernel_size, dilation, stride, causal) if not isinstance(x, int)]
        if len(set(given)) > 1 or any(axes not in (1, 2, 3) for axes in given):
            raise ValueError(f"options per axis must be for the same one to three axes, got {given} entries")
        #: axes that the options are for, None where for any
        self.axes = given[0] if given else None
        self.kernel_size, self.dilation, self.stride, self.causal_axes = kernel_size, dilation, stride, causal
        for w, g, d in (
            (on_axis(kernel_size, a), on_axis(stride, a), on_axis(dilation, a)) for a in range(self.axes or 1)
        ):
            if w < 1 or d < 1 or not 1 <= g <= w:
                raise ValueError(
                    f"kernel_size and dilation must be at least 1, stride between 1 and kernel_size, got {w}, {d}, {g}"
                )
        if rope and self.axes not in (None, 1):
            raise ValueError(f"rotary positions are for sequences, got options for {self.axes} axes")
        self.bias: nn.Parameter | None = None
        if relative_bias:
            if isinstance(kernel_size, int):
                raise ValueError(f"relative_bias needs the kernel_size of each axis, got {kernel_size}")
            self.bias = nn.Parameter(torch.zeros(num_heads, *(2 * w - 1 for w in kernel_size)))
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: Any = None,
        size: Axes | None = None,
    ) -> Tensor:
        """Attend from every token to its neighbours.

        Args:
            x_BNC: (B, N, C), or a grid (B, H, W, C) or (B, T, H, W, C).
            context_BMC: tokens that every query attends to besides its neighbours (the authors' additional keys).
            size: the grid of a (B, N, C) input, row-major; one axis of N where None.
            mask: bool (B, N), True = real token. With a cache, of all tokens so far.
            cache: of `new_cache`; 1-D, causal and stride 1 only.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        if x_BNC.ndim in (4, 5) and size is None and cache is None:
            row = prod(x_BNC.shape[2:-1])  # which a sequence in parts is cut by
            grid = (whole(x_BNC.shape[1] * row) // max(1, row), *x_BNC.shape[2:-1])
            if isinstance(mask, Tensor) and mask.shape == x_BNC.shape[:-1]:
                mask = mask.flatten(1)
            out_BNC = self.forward(x_BNC.flatten(1, -2), context_BMC, size=grid, mask=mask)
            return out_BNC.unflatten(1, x_BNC.shape[1:-1])
        self.check(x_BNC, None, None)
        grid = self._grid(x_BNC, size)
        self._check_context(x_BNC, context_BMC, cache)
        pattern = self.pattern(mask, x_BNC, None, cache)
        q, k, v = self.project(x_BNC, None, self.positions(x_BNC, None, pattern.offset))
        extra = None
        if context_BMC is not None:
            extra = tuple(self.split_heads(p(context_BMC), self.num_kv_heads) for p in (self.k_proj, self.v_proj))
        if cache is None:
            return self.out(self._mixed(q, k, v, grid, pattern.valid_BM, extra))
        k, v = cache.append(k, v)
        real_BM = pattern.real_keys(x_BNC.shape[0])
        return self.out(self._step(q, k, v, None if real_BM is None else real_BM[:, -k.shape[2] :], extra))

    def out(self, out_BHNE: Tensor) -> Tensor:
        return self.proj_drop(super().out(out_BHNE))

    def mix(
        self,
        x_BNC: Tensor,
        values_BHME: Tensor,
        *,
        context: Tensor | None = None,
        mask: GivenMask = None,
        size: Axes | None = None,
    ) -> Tensor:
        """This layer's weights on its own tokens, applied to given values (B, H, M, E); what `attention_map` calls."""
        if context is not None:
            raise ValueError("the weights on further keys are not those of the neighbours: there is no map of both")
        if x_BNC.ndim in (4, 5):
            x_BNC, size = x_BNC.flatten(1, -2), x_BNC.shape[1:-1]
        valid_BM = self.pattern(mask, x_BNC, None, None).valid_BM
        q, k, _ = self.project(x_BNC, None, self.positions(x_BNC, None, 0))
        k = repeat_heads(k, self.num_heads)
        return self._mixed(q, k, values_BHME, self._grid(x_BNC, size), valid_BM, None)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RollingCache:
        """An empty cache of the last (w - 1) d tokens."""
        return RollingCache((on_axis(self.kernel_size, 0) - 1) * on_axis(self.dilation, 0))

    def extra_repr(self) -> str:
        options = f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
        return f"{super().extra_repr()}, causal_axes={self.causal_axes}, {options}"

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], mask: Tensor | None, extra: Any) -> Tensor:
        kernel, dilation, stride, bias = self._fitted(grid)
        return neighborhood_attend(
            q, k, v, grid, kernel, dilation=dilation, stride=stride, causal=self.causal_axes, bias=bias, mask=mask,
            extra=extra,
        )  # fmt: skip

    def _step(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: Any) -> Tensor:
        """The last tokens' rows from the keys held and their own."""
        held = k.shape[2] - q.shape[2]
        if q.shape[2] == 1 and self.bias is None and extra is None:
            near = slice(held % on_axis(self.dilation, 0), None, on_axis(self.dilation, 0))
            real = None if mask is None else masks.padding(mask[:, near])
            return attend(q, k[:, :, near], v[:, :, near], mask=real)
        # a window depends on differences of positions only, so the first key held may stand at 0
        return self._mixed(F.pad(q, (0, 0, held, 0)), k, v, (k.shape[2],), mask, extra)[:, :, held:]

    def _fitted(self, grid: tuple[int, ...]) -> tuple[Any, Any, Any, Tensor | None]:
        """Kernel, dilation and stride per axis, smaller where an axis that is not causal is too short; the bias."""
        kernel, dilation, stride, kept = [], [], [], [slice(None)]
        for axis, n in enumerate(grid):
            w, d, g = (on_axis(option, axis) for option in (self.kernel_size, self.dilation, self.stride))
            middle = w - 1
            if not on_axis(self.causal_axes, axis):
                w = min(w, n)
                d, g = min(d, n // w), min(g, w)
            kernel.append(w)
            dilation.append(d)
            stride.append(g)
            kept.append(slice(middle - w + 1, middle + w))
        return kernel, dilation, stride, None if self.bias is None else self.bias[tuple(kept)]

    def _grid(self, x: Tensor, size: Axes | None) -> tuple[int, ...]:
        tokens = whole(x.shape[1])
        grid = (tokens,) if size is None else (size,) if isinstance(size, int) else tuple(size)
        if self.axes is not None and len(grid) != self.axes:
            raise ValueError(f"x must be a grid of {self.axes} axes, or size must be given; got a size of {grid}")
        if prod(grid) != tokens or not 1 <= len(grid) <= 3:
            raise ValueError(f"size must be one to three axes of {tokens} tokens, got {grid}")
        if self.rope and len(grid) > 1:
            raise ValueError(f"rotary positions are for sequences, got a grid of {grid}")
        return grid

    def _check_context(self, x: Tensor, context: Tensor | None, cache: KVCache | None) -> None:
        if context is not None:
            if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.dim:
                raise ValueError(f"context must be ({x.shape[0]}, tokens, {self.dim}), got {tuple(context.shape)}")
            if self.rope:
                raise ValueError("extra tokens have no place among rotary positions; build with rope=False")
        if cache is not None:
            if self.axes not in (None, 1) or not self.causal or on_axis(self.stride, 0) != 1:
                raise ValueError("only a causal 1-D layer of stride 1 decodes with a cache")
