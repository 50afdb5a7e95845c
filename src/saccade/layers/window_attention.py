"""Attention inside the windows of a map, shifted or not, with a bias by relative position (Swin: Liu et al., arXiv
2103.14030).

    y = concat_h( softmax(q_h k_h^T / sqrt(D) + bias_h + mask) v_h ) Wo     in each window, (q, k, v) = x Wqkv

Shape letters: B batch, N tokens, C channels, H heads, D head dim, E width of given values; W windows, T tokens of a
window, P masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.ops.heads import check_heads
from saccade.ops.partitions import on_filled, packed_window_attend, window_attend, window_bias
from saccade.ops.sharding import in_force, whole


class WindowAttention(nn.Module):
    """Attention inside the windows of a map, shifted or not, with a bias by relative position (Swin's layer).

    Args:
        dim: channels C.
        num_heads: H, a divisor of C.
        causal: there is no causal form; must be False.
        window_size: an int for maps of two axes, or one per axis (one to three).
        shift: 0 <= shift < window_size, for all axes or one per axis; `True` is half a window, rounded down.
        bias: learn a bias by relative position, truncated normal 0.02 at the start.
        border: where the window does not divide the map: "zeros" (zero tokens join, as in Swin) or "cut".
        scale: D ** -0.5 where None.
        qkv_bias, proj_bias: biases of the projections.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: if the arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        causal: bool = False,
        *,
        window_size: int | Sequence[int] = 7,
        shift: int | bool | Sequence[int] = 0,
        bias: bool = True,
        border: str = "zeros",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if causal:
            raise ValueError("window attention has no causal form, got causal=True")
        window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if not 1 <= len(window) <= 3 or min(window) < 1:
            raise ValueError(f"window_size must be one to three positive lengths, got {window_size}")
        if shift is True:
            shift = [w // 2 for w in window]
        shifts = (int(shift),) * len(window) if isinstance(shift, int) else tuple(shift)
        if len(shifts) != len(window) or not all(0 <= s < w for s, w in zip(shifts, window)):
            raise ValueError(f"shift must be at least 0 and below the window ({window}), got {shift}")
        if border not in ("zeros", "cut"):
            raise ValueError(f"border must be 'zeros' or 'cut', got {border!r}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.shift, self.border, self.scale = window, shifts, border, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        if bias:
            # row (dy + w_y - 1) (2 w_x - 1) + dx + w_x - 1 for query minus key, as in Swin's checkpoints
            table = torch.empty(prod(2 * w - 1 for w in window), num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor, size: int | Sequence[int] | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Attend inside the windows of a map, or inside windows that are cut out already.

        Under `saccade.parallel` a rank holds whole rows of the map, whose `size` is that of the whole.

        Args:
            x: a map (B, *size, C); or its tokens in row-major order (B, N, C) with `size`; or windows (W, T, C), as
                Swin's layer takes them, without (a window of one axis takes any N tokens as a map of one axis).
            size: the map of a (B, N, C) input.
            mask: (P, T, T), added to the scores of windows; window i takes mask i mod P.

        Returns:
            The shape of `x`.

        Raises:
            ValueError: if the shapes do not fit.
        """
        grid = self.grid(x, size)
        if mask is not None and grid != self.window_size:
            raise ValueError(f"mask is for windows of {prod(self.window_size)} tokens; a map's shift has its own")
        full = self.full(grid)

        def attend(y_BNC: Tensor) -> Tensor:
            qkv = self.qkv(y_BNC).unflatten(-1, (3, self.num_heads, self.head_dim))
            options: dict[str, Any] = {"mask": mask, "scale": self.scale}
            out = packed_window_attend(qkv, full, self.window_size, self.shift, self.position_bias(), **options)
            return out.transpose(1, 2).flatten(2)

        out = on_filled(attend, x.flatten(1, -2), grid, full)
        return self.proj_drop(self.proj(out)).view(x.shape)

    def mix(
        self,
        x: Tensor,
        values_BHNE: Tensor,
        *,
        size: int | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """This layer's weights on `x`, applied to given values (B, H, N, E); what `attention_map` calls. Zero tokens
        at the border have a share of the weights and no values."""
        grid = self.grid(x, size)
        full, H = self.full(grid), values_BHNE.shape[1]

        def attend(y_BNC: Tensor) -> Tensor:
            x_BNC, values = y_BNC.split([self.dim, y_BNC.shape[2] - self.dim], 2)
            q, k, _ = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in (q, k, values.unflatten(2, (H, -1))))
            options: dict[str, Any] = {"mask": mask, "scale": self.scale}
            out: Tensor = window_attend(q, k, v, full, self.window_size, self.shift, self.position_bias(), **options)
            return out.transpose(1, 2).flatten(2)

        both = torch.cat([x.flatten(1, -2), values_BHNE.transpose(1, 2).flatten(2)], 2)
        return on_filled(attend, both, grid, full).unflatten(2, (H, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}, border={self.border!r}"

    def grid(self, x: Tensor, size: int | Sequence[int] | None) -> tuple[int, ...]:
        """The lengths of the map that `x` is, with `size` or without.

        Raises:
            ValueError: if `x` is no map, tokens of one, or windows.
        """
        axes = len(self.window_size)
        if x.shape[-1] != self.dim or x.ndim not in (3, axes + 2):
            raise ValueError(
                f"x must be (batch, tokens, {self.dim}) or (batch, {axes} axes, {self.dim}), got {tuple(x.shape)}"
            )
        tokens = whole(prod(x.shape[1:-1]))
        if x.ndim == axes + 2 and (axes > 1 or size is None):
            grid = (tokens // max(1, prod(x.shape[2:-1])), *x.shape[2:-1]) if in_force() else tuple(x.shape[1:-1])
            if size is not None:
                raise ValueError(f"size is for tokens in a row, x is a map of {grid} already")
            return grid
        if size is None:
            if tokens != prod(self.window_size):
                raise ValueError(
                    f"size must be given for {tokens} tokens in a row, which are no window of {self.window_size}"
                )
            return self.window_size
        grid = (size,) if isinstance(size, int) else tuple(size)
        if len(grid) != axes or prod(grid) != tokens:
            raise ValueError(f"size must be {axes} lengths with a product of {tokens} tokens, got {size}")
        return grid

    def position_bias(self) -> Tensor | None:
        """By tokens of a window, (H, T, T)."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        widths = [2 * w - 1 for w in self.window_size]
        # key minus query is the other way round
        return window_bias(table.T.flip(1).unflatten(1, widths), self.window_size)

    def full(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The lengths of a map with the zero tokens at its end."""
        return tuple(n + (-n % w if self.border == "zeros" else 0) for n, w in zip(grid, self.window_size))
