"""Flash Window Attention as a layer.

Shape letters: B batch, N tokens, C channels, H heads, D head dim; W windows, T tokens of a window, P masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.pretrained import copy_affine, read_softmax
from saccade.ops.partitions import packed_window_attend, window_attend, window_bias


def flash_window_attend(
    q_WHTD: Tensor,
    k_WHTD: Tensor,
    v_WHTE: Tensor,
    bias_HTT: Tensor | None = None,
    *,
    mask_PTT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias + mask) v of windows that are cut out already.

    Memory beyond the output is a piece of some windows; the backward pass keeps q, k, v, the output and a number per
    row. `saccade.ops.partitions.window_attend` does the same on a whole map, and cuts and shifts on the way.

    Args:
        q_WHTD, k_WHTD, v_WHTE: any number of tokens T and any widths.
        bias_HTT: (H, T, T) or (1, T, T); gradients reach it.
        mask_PTT: numbers to add; window i takes mask i mod P. No gradient.
        scale: D ** -0.5 where None.

    Returns:
        (W, H, T, E).

    Raises:
        ValueError: if shapes do not fit.

    >>> q = k = v = torch.randn(6, 2, 49, 32)
    >>> flash_window_attend(q, k, v, torch.zeros(2, 49, 49)).shape
    torch.Size([6, 2, 49, 32])
    """
    T = q_WHTD.shape[2] if q_WHTD.ndim == 4 else 1
    return window_attend(q_WHTD, k_WHTD, v_WHTE, T, T, 0, bias_HTT, mask=mask_PTT, scale=scale)


class FlashWindowAttention(nn.Module):
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
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide dim ({dim}), got {num_heads}")
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
        grid = self._grid(x, size)
        if mask is not None and grid != self.window_size:
            raise ValueError(f"mask is for windows of {prod(self.window_size)} tokens; a map's shift has its own")
        y, full = self._fill(x.reshape(x.shape[0], *grid, self.dim))
        qkv = self.qkv(y.flatten(1, -2)).unflatten(-1, (3, self.num_heads, self.head_dim))
        out = packed_window_attend(qkv, full, self.window_size, self.shift, self._bias(), mask=mask, scale=self.scale)
        out = self._crop(out.transpose(1, 2).flatten(2), full, grid)
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
        grid = self._grid(x, size)
        y, full = self._fill(x.reshape(x.shape[0], *grid, self.dim))
        q, k, _ = self.qkv(y.flatten(1, -2)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        values, _ = self._fill(values_BHNE.flatten(0, 1).unflatten(1, grid))
        values = values.flatten(1, -2).unflatten(0, values_BHNE.shape[:2])
        out: Tensor = window_attend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            values,
            full,
            self.window_size,
            self.shift,
            self._bias(),
            mask=mask,
            scale=self.scale,
        )
        return self._crop(out.flatten(0, 1), full, grid).unflatten(0, values_BHNE.shape[:2])

    @classmethod
    def from_swin(cls, module: nn.Module, **arguments: Any) -> Self:
        """This layer with the weights of a trained Swin attention: transformers' SwinAttention, or any layer with
        projections that `saccade.layers.pretrained` knows and a `relative_position_bias_table` of square windows.

        Args:
            arguments: `shift` and `border` as the model around the layer has them.

        Raises:
            ValueError: if the layer is none of those, or drops weights out.
        """
        layer = read_softmax(module)
        tables = [p for name, p in module.named_parameters() if name.split(".")[-1] == "relative_position_bias_table"]
        if len(tables) != 1:
            raise ValueError(f"{type(module).__name__} has {len(tables)} tables of relative positions, expected one")
        drop = getattr(module, "attention_dropout", 0.0)
        if isinstance(drop, float) and drop > 0:
            raise ValueError(f"the layer drops {drop} of the weights out, which no fused window attention does")
        side = round(tables[0].shape[0] ** 0.5)
        if "window_size" not in arguments and side * side != tables[0].shape[0]:
            raise ValueError(f"a table of {tables[0].shape[0]} rows is for no square window; give window_size")
        theirs = {"window_size": (side + 1) // 2, "qkv_bias": layer.qkv_bias, "proj_bias": layer.proj_bias}
        new = cls(layer.dim, layer.num_heads, **{**theirs, **arguments})
        projections = (layer.q, layer.k, layer.v)
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in projections]
        weight = torch.cat([weight for weight, _ in projections])
        copy_affine(new.qkv, (weight, torch.cat(biases) if layer.qkv_bias else None))
        copy_affine(new.proj, layer.out)
        table = new.relative_position_bias_table
        if table is None or table.shape != tables[0].shape:
            raise ValueError(f"a table of {tuple(tables[0].shape)} does not fit windows of {new.window_size}")
        with torch.no_grad():
            table.copy_(tables[0])
        return new.to(device=layer.q[0].device, dtype=layer.q[0].dtype).train(module.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}, border={self.border!r}"

    def _grid(self, x: Tensor, size: int | Sequence[int] | None) -> tuple[int, ...]:
        axes = len(self.window_size)
        if x.shape[-1] != self.dim or x.ndim not in (3, axes + 2):
            raise ValueError(
                f"x must be (batch, tokens, {self.dim}) or (batch, {axes} axes, {self.dim}), got {tuple(x.shape)}"
            )
        if x.ndim == axes + 2 and (axes > 1 or size is None):
            grid = tuple(x.shape[1:-1])
            if size is not None:
                raise ValueError(f"size is for tokens in a row, x is a map of {grid} already")
            return grid
        if size is None:
            if x.shape[1] != prod(self.window_size):
                raise ValueError(
                    f"size must be given for {x.shape[1]} tokens in a row, which are no window of {self.window_size}"
                )
            return self.window_size
        grid = (size,) if isinstance(size, int) else tuple(size)
        if len(grid) != axes or prod(grid) != x.shape[1]:
            raise ValueError(f"size must be {axes} lengths with a product of {x.shape[1]} tokens, got {size}")
        return grid

    def _bias(self) -> Tensor | None:
        table = self.relative_position_bias_table
        if table is None:
            return None
        widths = [2 * w - 1 for w in self.window_size]
        # key minus query is the other way round
        return window_bias(table.T.flip(1).unflatten(1, widths), self.window_size)

    def _fill(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The map (B, *grid, C) with zero tokens at its end, and its lengths."""
        grid = tuple(x.shape[1:-1])
        pad = [-n % w if self.border == "zeros" else 0 for n, w in zip(grid, self.window_size)]
        if any(pad):
            x = F.pad(x, (0, 0, *(side for p in reversed(pad) for side in (0, p))))
        return x, tuple(n + p for n, p in zip(grid, pad))

    def _crop(self, x_BNC: Tensor, full: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        if full == grid:
            return x_BNC
        return x_BNC.unflatten(1, full)[(slice(None), *(slice(n) for n in grid))].flatten(1, -2)


class _SwinAttention(FlashWindowAttention):
    """The same with the call of transformers' SwinAttention."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        if options.get("output_attentions"):
            raise ValueError("output_attentions must be False: fused attention has no weights to give out")
        return super().forward(hidden_states, mask=attention_mask), None


def retrofit_swin(model: nn.Module) -> dict[str, nn.Module]:
    """Put this attention in the place of the attention of a transformers Swin model, over the same weights.

    Args:
        model: SwinModel, SwinForImageClassification ...; changed in place.

    Returns:
        The layers that were replaced, by path; `model.set_submodule(path, layer)` puts one back.

    Raises:
        ValueError: if the model has no SwinAttention.
    """
    found = {path: module for path, module in model.named_modules() if type(module).__name__ == "SwinAttention"}
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer of type SwinAttention")
    layers = {path: _SwinAttention.from_swin(module) for path, module in found.items()}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return found
