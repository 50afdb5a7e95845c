"""LKCA as a layer: its kernel, what is done to it (`normalize`, `causal`), and the mixing of a map or of tokens.

Shape letters: B batch, C channels, h heads, H, W height and width, N = H W tokens, k kernel rows, l kernel columns,
E channels of given values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.layers.placement import check_placed
from saccade.ops.feature_maps import check_map
from saccade.vision.lkca.operator import IMPLEMENTATIONS, attention_matrix, mix


class LKCA(nn.Module):
    """Large kernel convolutional attention; x (B, C, H, W) -> y of the same shape and memory format, any H and W.

    `tokens` is the same on a sequence, for a transformer's block.

    Args:
        channels: C.
        size: the token grid, H or (H, W), for which K is made; 8 in the setting of the paper's data sets.
        kernel_size: k or (k, l), odd; 2 size - 1 where None: every token sees every other.
        num_heads: h, kernels; divides C.
        v_proj, out_proj: linear layers around the mixing.
        bias: one number per channel after the mixing.
        normalize: softmax over each row of A (not in the sources).
        causal: no token sees a later one in raster order (an extension).
        implementation: of `IMPLEMENTATIONS`; the fastest one expected where None.
        identity_init: start at y = x exactly: K one at its centre and zero elsewhere, the layers the identity.

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int] = 8,
        kernel_size: int | tuple[int, int] | None = None,
        num_heads: int = 1,
        v_proj: bool = True,
        out_proj: bool = True,
        bias: bool = False,
        normalize: bool = False,
        causal: bool = False,
        implementation: str | None = None,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide the channels ({channels}), got {num_heads}")
        grid = (size, size) if isinstance(size, int) else tuple(size)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"size must be the height and width of a grid, got {size}")
        full = (2 * grid[0] - 1, 2 * grid[1] - 1)
        given = full if kernel_size is None else kernel_size
        kernel = (given, given) if isinstance(given, int) else tuple(given)
        largest = full if kernel_size is None else (max(full), max(full))
        if len(kernel) != 2 or any(k % 2 == 0 or not 1 <= k <= most for k, most in zip(kernel, largest, strict=True)):
            raise ValueError(f"kernel_size must be odd and between 1 and {largest[0]}, got {kernel_size}")
        if implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
            )
        if identity_init and normalize:
            raise ValueError("identity_init needs normalize=False: a softmax is positive everywhere")
        self.channels, self.num_heads, self.implementation = channels, num_heads, implementation
        self.normalize, self.causal = normalize, causal
        self.kernel = nn.Parameter(torch.empty(num_heads, *kernel))
        self.v_proj = nn.Linear(channels, channels) if v_proj else None
        self.out_proj = nn.Linear(channels, channels) if out_proj else None
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.trunc_normal_(self.kernel, std=0.02)
        for layer in (self.v_proj, self.out_proj):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
                if identity_init:
                    nn.init.eye_(layer.weight)
        if identity_init:
            with torch.no_grad():
                self.kernel.zero_()[:, kernel[0] // 2, kernel[1] // 2] = 1

    def taps(self) -> Tensor:
        """The kernel that is applied, (h, k, l): K, exp(K) for rows of a softmax; zero on taps ahead if causal."""
        taps_hkl: Tensor = self.kernel
        if self.normalize:
            taps_hkl = (taps_hkl - taps_hkl.amax((1, 2), keepdim=True)).exp()
        if self.causal:
            k, l = taps_hkl.shape[1:]
            behind = torch.arange(k * l, device=taps_hkl.device).view(k, l) <= k * l // 2
            taps_hkl = taps_hkl * behind
        return taps_hkl

    def matrix(self, H: int, W: int) -> Tensor:
        """A for a grid of H x W, (h, N, N)."""
        matrix_hNN = attention_matrix(self.taps(), H, W)
        return matrix_hNN / matrix_hNN.sum(2, keepdim=True) if self.normalize else matrix_hNN

    def mix(self, x_BCHW: Tensor, values_BhNE: Tensor) -> Tensor:
        """A of the map's grid, applied to given values (B, h, N, E); what `attention_map` shows."""
        return self.matrix(x_BCHW.shape[2], x_BCHW.shape[3]) @ values_BhNE

    def tokens(
        self, x_BNC: Tensor, size: tuple[int, int], *, mask: Tensor | None = None, class_token: bool = False
    ) -> Tensor:
        """The same on tokens in raster order, (B, N, C), of a grid `size`.

        Args:
            mask: (B, N), True = a real token; the others are seen by none.
            class_token: x has one token more, at its front: it takes the mean of V over the real tokens of the grid,
                and the grid does not see it.

        Raises:
            ValueError: if shapes do not fit.
        """
        H, W = size
        N = H * W
        if x_BNC.ndim != 3 or x_BNC.shape[1:] != (N + class_token, self.channels) or N < 1:
            raise ValueError(f"x must be (batch, {N + class_token}, {self.channels}), got {tuple(x_BNC.shape)}")
        if mask is not None and (mask.shape != (x_BNC.shape[0], N) or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool ({x_BNC.shape[0]}, {N}), got {mask.dtype} {tuple(mask.shape)}")
        v_BNC = x_BNC if self.v_proj is None else self.v_proj(x_BNC)
        v_BNC = v_BNC[:, int(class_token) :]
        if mask is not None:
            v_BNC = v_BNC * mask[..., None]
        taps_hkl = self.taps().to(v_BNC.dtype)
        o_BNC = mix(v_BNC, taps_hkl, H, W, self.implementation)
        if self.normalize:
            # the sums of the rows: the same mixing of ones, a channel a head
            real_BNh = v_BNC.new_ones(1, N, self.num_heads) if mask is None else mask[..., None].to(v_BNC.dtype)
            real_BNh = real_BNh.expand(-1, -1, self.num_heads)
            sums_BNh = mix(real_BNh, taps_hkl, H, W, self.implementation).clamp(min=torch.finfo(v_BNC.dtype).tiny)
            o_BNC = (o_BNC.unflatten(2, (self.num_heads, -1)) / sums_BNh[..., None]).flatten(2)
        if class_token:
            count = N if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
            o_BNC = torch.cat([v_BNC.sum(1, keepdim=True) / count, o_BNC], 1)
        if self.bias is not None:
            o_BNC = o_BNC + self.bias
        return o_BNC if self.out_proj is None else self.out_proj(o_BNC)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: (B, H, W), True = a real position."""
        check_map(x_BCHW, self.channels)
        check_placed(self, "x", x_BCHW)
        H, W = x_BCHW.shape[2:]
        flat = None if mask is None else mask.flatten(1)
        y_BNC = self.tokens(x_BCHW.flatten(2).transpose(1, 2), (H, W), mask=flat)
        y_BCHW = y_BNC.transpose(1, 2).unflatten(2, (H, W))
        return y_BCHW.contiguous() if x_BCHW.is_contiguous() else y_BCHW

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel={tuple(self.kernel.shape)}, causal={self.causal}"
