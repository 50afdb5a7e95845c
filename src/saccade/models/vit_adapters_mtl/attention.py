"""Window attention with a bias that the task gives, and the block around it.

Shape letters: B batch, D width of a task's embedding, N tokens of a map, T tokens of a window, H heads, E head dim,
C channels, W windows, P masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.drop_path import DropPath
from saccade.layers.mlp import MLP
from saccade.layers.window_attention import WindowAttention
from saccade.models.vit_adapters_mtl.adapters import TaskBias, TaskScaledNorm
from saccade.ops.partitions import on_filled, window_attend
from saccade.ops.sharding import places


class TaskAdaptedAttention(WindowAttention):
    """Swin's attention with the task's matrix on the scores: softmax(q k^T scale + bias + A'(omega) + mask) v.

    A' rides on the product: a query brings its row of A', a key the place that it has in its window, so that shifted
    windows stay as cheap as without it and no score is kept.

    Args:
        dim: C.
        num_heads: H.
        condition: D.
        window: side of a window.
        arguments: of `WindowAttention`.

    Raises:
        ValueError: if the arguments do not fit together.
    """

    def __init__(self, dim: int, num_heads: int, condition: int, window: int = 7, **arguments: Any) -> None:
        super().__init__(dim, num_heads, window_size=window, **arguments)
        self.task_bias = TaskBias(condition, prod(self.window_size))

    def forward(  # type: ignore[override]
        self, x: Tensor, omega_BD: Tensor, size: int | Sequence[int] | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: as `WindowAttention` takes it; windows of one image stand together.
            omega_BD: what the task is, of each image.
            size, mask: as there.

        Raises:
            ValueError: if the shapes do not fit.
        """
        return self.proj_drop(self.proj(self.mix(x, None, omega_BD, size=size, mask=mask))).view(x.shape)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        values_BHNE: Tensor | None,
        omega_BD: Tensor,
        *,
        size: int | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """This layer's weights on given values (B, H, N, E); where None on its own, with the heads joined (B, N, C)."""
        grid, images = self.grid(x, size), len(omega_BD)
        if not images or len(x) % images:
            raise ValueError(f"omega must be one for each image, got {images} for {len(x)} maps or windows")
        full, H, T = self.full(grid), self.num_heads, prod(self.window_size)
        tokens = x.flatten(1, -2)
        if values_BHNE is not None:
            tokens = torch.cat([tokens, values_BHNE.transpose(1, 2).flatten(2)], 2)

        def attend(y_BNC: Tensor) -> Tensor:
            x_BNC, values = y_BNC.split([self.dim, y_BNC.shape[2] - self.dim], 2)
            qkv = self.qkv(x_BNC).unflatten(-1, (3, H, self.head_dim)).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in qkv)
            if values_BHNE is not None:
                v = values.unflatten(2, (H, -1)).transpose(1, 2)
            place_N = self._places(full, x.device)[places(x_BNC.shape[1], x.device)]
            rows_BNT = self.task_bias(omega_BD)[:, place_N].repeat_interleave(len(x) // images, 0)
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            q = torch.cat([q * scale, rows_BNT.to(q)[:, None].expand(-1, H, -1, -1)], -1)
            k = torch.cat([k, F.one_hot(place_N, T).to(k).expand(*k.shape[:2], -1, -1)], -1)
            bias = self.position_bias()
            out: Tensor = window_attend(q, k, v, full, self.window_size, self.shift, bias, mask=mask, scale=1.0)
            return out.transpose(1, 2).flatten(2)

        out_BNC = on_filled(attend, tokens, grid, full)
        return out_BNC if values_BHNE is None else out_BNC.unflatten(2, (H, -1)).transpose(1, 2)

    def _places(self, full: tuple[int, ...], device: torch.device) -> Tensor:
        """Which token of its window each token of the map is; an axis of one window is not shifted."""
        place = torch.zeros((), dtype=torch.long, device=device)
        for n, w, s in zip(full, self.window_size, self.shift):
            at = torch.arange(n, device=device)
            place = place[..., None] * w + (at if n <= w else (at - s) % w)
        return place.flatten()


class AdaptedBlock(nn.Module):
    """A pre-norm block whose attention, and norms too where they are task-scaled, read the task; maps (B, H, W, C).

    Args:
        dim: C.
        num_heads: of the attention.
        condition: D.
        hidden: inner width of the MLP.
        task_scaled_norm: False has plain layer norms.
        drop, drop_path: dropout of both branches, and how often one is left out.
        arguments: of `TaskAdaptedAttention`.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        condition: int,
        hidden: int,
        *,
        task_scaled_norm: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            TaskScaledNorm(dim, condition) if task_scaled_norm else nn.LayerNorm(dim) for _ in range(2)
        )
        self.attention = TaskAdaptedAttention(dim, num_heads, condition, proj_drop=drop, **arguments)
        self.mlp, self.drop_path = MLP(dim, hidden, drop=drop), DropPath(drop_path)

    def forward(self, x_BHWC: Tensor, omega_BD: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attention(_normed(self.norm1, x_BHWC, omega_BD), omega_BD))
        return x_BHWC + self.drop_path(self.mlp(_normed(self.norm2, x_BHWC, omega_BD)))


def _normed(norm: nn.Module, x: Tensor, omega_BD: Tensor) -> Tensor:
    return norm(x, omega_BD) if isinstance(norm, TaskScaledNorm) else norm(x)
