"""SUM's blocks: selective scans of a map in four directions, modulated by a prompt, and maps made larger.

Maps are (B, H, W, C), channels last.

Shape letters: B batch, H height, W width, L = H W pixels, C channels, E channels of a scan, R rank of the steps,
N states, K = 4 directions, P prompts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.drop_path import DropPath
from saccade.ops.selective_scan import selective_scan

#: row by row, column by column, and both from the end
DIRECTIONS = 4


class Modulation(NamedTuple):
    """The scalars of a block, (B, 1, 1, 1) each, in the order of the authors' MLP."""

    shift_in: Tensor
    scale_in: Tensor
    shift_out: Tensor
    scale_out: Tensor
    scale_sum: Tensor


class SS2D(nn.Module):
    """Selective scans of a map in four directions, summed and gated: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: C.
        states: N.
        expand: E / C.
        kernel_size: of the depthwise convolution, odd.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, dim: int, *, states: int = 16, expand: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        if min(dim, states, expand) < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"dim, states and expand must be positive and kernel_size odd, got {dim}, {states}, {expand} and "
                f"{kernel_size}"
            )
        inner, self.rank, self.states = expand * dim, math.ceil(dim / 16), states
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner)
        self.read_proj = nn.Parameter(torch.empty(DIRECTIONS, self.rank + 2 * states, inner))
        self.step_proj = nn.Parameter(torch.empty(DIRECTIONS, inner, self.rank))
        self.step_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.log_decay = nn.Parameter(torch.empty(DIRECTIONS * inner, states))
        self.skip = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._start()

    def _start(self) -> None:
        """Mamba's: decays 1 .. N, steps log-uniform in [1e-3, 0.1]."""
        rank, inner = self.rank, self.step_bias.shape[1]
        nn.init.uniform_(self.read_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.step_proj, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            step = torch.empty_like(self.step_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.step_bias.copy_(step + (-(-step).expm1()).log())  # softplus of it is the step
            self.log_decay.copy_(torch.arange(1.0, self.states + 1).log().expand_as(self.log_decay))

    def scanned(self, u_BHWE: Tensor) -> Tensor:
        """The sum of the scans in all directions, (B, H, W, E)."""
        B, H, W, E = u_BHWE.shape
        rows_BLE, columns_BLE = u_BHWE.flatten(1, 2), u_BHWE.transpose(1, 2).flatten(1, 2)
        u_BLKE = torch.stack([rows_BLE, columns_BLE, rows_BLE.flip(1), columns_BLE.flip(1)], 2)
        read = torch.einsum("blke,kfe->blkf", u_BLKE, self.read_proj)
        step_BLKR, b_BLKN, c_BLKN = read.split([self.rank, self.states, self.states], 3)
        step_BLKE = F.softplus(torch.einsum("blkr,ker->blke", step_BLKR, self.step_proj) + self.step_bias)
        decay = -self.log_decay.to(torch.promote_types(torch.float32, self.log_decay.dtype)).exp()
        y = selective_scan(u_BLKE.flatten(2), step_BLKE.flatten(2), decay, b_BLKN, c_BLKN, self.skip)
        y_BLKE = y.view(B, H * W, DIRECTIONS, E)
        rows_BLE, columns_BLE = (y_BLKE[:, :, k] + y_BLKE[:, :, k + 2].flip(1) for k in (0, 1))
        return rows_BLE.view(B, H, W, E) + columns_BLE.view(B, W, H, E).transpose(1, 2)

    def forward(self, x_BHWC: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is not None:
            x_BHWC = x_BHWC * (1 + modulation.scale_in) + modulation.shift_in
        u_BHWE, gate_BHWE = self.in_proj(x_BHWC).chunk(2, 3)
        y_BHWE = self.scanned(F.silu(self.conv(u_BHWE.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        if modulation is not None:
            y_BHWE = y_BHWE * (1 + modulation.scale_sum)
        y_BHWE = self.norm(y_BHWE)
        if modulation is not None:
            y_BHWE = y_BHWE * (1 + modulation.scale_out) + modulation.shift_out
        return self.out_proj(y_BHWE * F.silu(gate_BHWE))


class VSSBlock(nn.Module):
    """x + DropPath(SS2D(LN x)), of which a prompt for the condition modulates the SS2D.

    Args:
        dim: C.
        conditions: P; 0 has no modulation.
        prompt_dim: width of a prompt; that of its MLP is as wide, then half of it, then 5.
        drop_path: rate.
        **options: of `SS2D`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, dim: int, conditions: int = 0, *, prompt_dim: int = 128, drop_path: float = 0.0, **options: int
    ) -> None:
        super().__init__()
        if conditions < 0 or prompt_dim < 2:
            raise ValueError(f"conditions must be 0 or more, prompt_dim 2 or more, got {conditions} and {prompt_dim}")
        self.norm, self.scan, self.drop_path = nn.LayerNorm(dim), SS2D(dim, **options), DropPath(drop_path)
        self.prompts, self.mlp = None, None
        if conditions:
            self.prompts = nn.Parameter(torch.randn(conditions, prompt_dim))
            self.mlp = nn.Sequential(
                nn.Linear(prompt_dim, prompt_dim),
                nn.GELU(),
                nn.Linear(prompt_dim, prompt_dim // 2),
                nn.GELU(),
                nn.Linear(prompt_dim // 2, len(Modulation._fields)),
            )

    def modulation(self, condition_B: Tensor) -> Modulation:
        """The scalars of each image.

        Args:
            condition_B: numbers of conditions.
        """
        assert self.prompts is not None and self.mlp is not None, "a block without conditions has no modulation"
        scalars = self.mlp(self.prompts)[condition_B]
        return Modulation(*(scalar[:, None, None, None] for scalar in scalars.unbind(1)))

    def forward(self, x_BHWC: Tensor, condition_B: Tensor | None = None) -> Tensor:
        modulation = None if condition_B is None or self.prompts is None else self.modulation(condition_B)
        return x_BHWC + self.drop_path(self.scan(self.norm(x_BHWC), modulation))


class Expand(nn.Module):
    """A map `factor` times as high and as wide with C / factor channels: linear, pixels beside each other, norm.

    Args:
        dim: C.
        factor: of the sides.

    Raises:
        ValueError: if the channels do not divide.
    """

    def __init__(self, dim: int, factor: int = 2) -> None:
        super().__init__()
        if factor < 1 or dim % factor:
            raise ValueError(f"dim must be a multiple of factor, got {dim} and {factor}")
        self.factor = factor
        self.expand, self.norm = nn.Linear(dim, factor * dim, bias=False), nn.LayerNorm(dim // factor)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        f = self.factor
        apart = self.expand(x_BHWC).view(B, H, W, f, f, C // f)
        return self.norm(apart.transpose(2, 3).reshape(B, f * H, f * W, C // f))
