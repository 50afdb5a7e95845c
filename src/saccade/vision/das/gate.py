"""DAS attention on feature maps: the bottleneck, the deformable gate, and the map times it.

Shape letters: B batch, C channels of the map, m channels of the bottleneck, E channels of the gate (C or m), H height,
W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.deformable import deformable_conv
from saccade.ops.feature_maps import check_map

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "none": lambda x: x}


class DAS(nn.Module):
    """The map times its deformable gate; x (B, C, H, W) -> y, any H and W, memory format kept.

    Args:
        channels: C.
        alpha: compression of the bottleneck, in (0, 1]; the paper's gain saturates near 0.1 to 0.2.
        kernel_size: of the depthwise and the deformable convolution, odd.
        act: "gelu", "relu" or "none".
        norm_dims: "C" or "CHW".
        gate_on: "input", or "bottleneck": X_c is gated and comes out, with m channels (`out_channels`).
        residual: add what was gated.

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        alpha: float = 0.2,
        kernel_size: int = 3,
        act: str = "gelu",
        norm_dims: str = "C",
        gate_on: str = "input",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        for name, value, allowed in (
            ("act", act, tuple(ACTIVATIONS)),
            ("norm_dims", norm_dims, ("C", "CHW")),
            ("gate_on", gate_on, ("input", "bottleneck")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        width = max(1, round(alpha * channels))
        self.channels, self.act, self.norm_dims, self.residual = channels, act, norm_dims, residual
        self.gate_on, self.out_channels = gate_on, channels if gate_on == "input" else width
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.pointwise = nn.Conv2d(channels, width, 1)
        self.offset = nn.Conv2d(width, 2 * kernel_size**2, 3, padding=1)
        self.conv = nn.Conv2d(width, self.out_channels, kernel_size, padding=kernel_size // 2)  # weights of the taps
        self.norm = nn.LayerNorm(channels if gate_on == "input" else width, eps=1e-5)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def bottleneck(self, x_BCHW: Tensor) -> Tensor:
        """X_c, (B, m, H, W), channels-last: the deformable convolution reads all channels of a pixel."""
        u_BmHW = self.pointwise(self.depthwise(x_BCHW))
        # a group per channel is the instance norm, which PyTorch refuses on single pixels
        normed_BmHW = torch.group_norm(u_BmHW, u_BmHW.shape[1])
        return ACTIVATIONS[self.act](normed_BmHW).contiguous(memory_format=torch.channels_last)

    def logits(self, c_BmHW: Tensor) -> Tensor:
        """Norm(D) of X_c, (B, E, H, W)."""
        d_BEHW = deformable_conv(
            c_BmHW, self.offset(c_BmHW), self.conv.weight, self.conv.bias, padding=self.conv.kernel_size[0] // 2
        )
        if self.norm_dims == "CHW":
            return F.group_norm(d_BEHW, 1, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.norm(d_BEHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """A, (B, E, H, W); what `attention_map` shows."""
        self._check(x_BCHW)
        return self.logits(self.bottleneck(x_BCHW)).sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check(x_BCHW)
        c_BmHW = self.bottleneck(x_BCHW)
        gate_BEHW = self.logits(c_BmHW).sigmoid()
        gated_BEHW = x_BCHW if self.gate_on == "input" else c_BmHW
        if x_BCHW.is_contiguous():
            gate_BEHW, gated_BEHW = gate_BEHW.contiguous(), gated_BEHW.contiguous()
        return gated_BEHW * (gate_BEHW + 1 if self.residual else gate_BEHW)

    def _check(self, x_BCHW: Tensor) -> None:
        check_map(x_BCHW, self.channels)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, norm_dims={self.norm_dims!r}, gate_on={self.gate_on!r}, residual={self.residual}"
