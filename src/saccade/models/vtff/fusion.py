"""Attentional selective fusion: two maps of the same things, mixed at each place and in each channel.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.ops.feature_maps import check_map

#: how the maps are mixed by GL; the card's A, B and C
MIXES = ("convex", "linear", "sigmoids")


class SelectiveFusion(nn.Module):
    """ASF: X_rgb and X_lbp, (B, C, H, W) both, to one map of that shape.

        U  = W_c X_rgb + W_l X_lbp
        G  = sigmoid(BN(V2 ReLU(BN(V1 mean(U)))))     (B, C, 1, 1)
        L  = sigmoid(BN(P2 ReLU(BN(P1 U))))           (B, 1, H, W)
        convex    X = X_rgb sigmoid(G + L) + X_lbp (1 - sigmoid(G + L))
        linear    X = X_rgb (G + L) + X_lbp (1 - G - L)
        sigmoids  X = X_rgb sigmoid(G + L) + X_lbp sigmoid(1 - G - L),  and sigmoid in the place of ReLU above

    In training the global path's norms see maps of 1 x 1, so that a batch needs two images.

    Args:
        channels: C.
        reduction: r; V1 and P1 give C // r channels.
        mix: "convex", "linear" or "sigmoids".
        bias: of W_c and W_l.

    Raises:
        ValueError: if a number is out of range, or the mix is unknown.
    """

    def __init__(self, channels: int, reduction: int = 8, *, mix: str = "convex", bias: bool = False) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
        self.channels, self.mix = channels, mix
        self.rgb_proj, self.lbp_proj = (nn.Conv2d(channels, channels, 1, bias=bias) for _ in range(2))
        inner = channels // reduction
        unit = partial(conv_norm_act, kernel_size=1, bias=True)
        activation = nn.Sigmoid if mix == "sigmoids" else nn.ReLU
        self.global_path, self.local_path = (
            nn.Sequential(unit(channels, inner, activation=activation), unit(inner, out, activation=nn.Sigmoid))
            for out in (channels, 1)
        )

    def gates(self, rgb_BCHW: Tensor, lbp_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """G (B, C, 1, 1) and L (B, 1, H, W)."""
        both_BCHW = self.rgb_proj(rgb_BCHW) + self.lbp_proj(lbp_BCHW)
        return self.global_path(both_BCHW.mean((2, 3), keepdim=True)), self.local_path(both_BCHW)

    def forward(self, rgb_BCHW: Tensor, lbp_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if the maps are not (B, C, H, W) of one shape.
        """
        check_map(rgb_BCHW, self.channels)
        if rgb_BCHW.shape != lbp_BCHW.shape:
            raise ValueError(f"both maps must have one shape, got {tuple(rgb_BCHW.shape)} and {tuple(lbp_BCHW.shape)}")
        global_BC11, local_B1HW = self.gates(rgb_BCHW, lbp_BCHW)
        return mixed(rgb_BCHW, lbp_BCHW, global_BC11 + local_B1HW, self.mix)


def mixed(rgb_BCHW: Tensor, lbp_BCHW: Tensor, gate_BCHW: Tensor, mix: str = "convex") -> Tensor:
    """X, of the two maps and GL = G + L.

    Args:
        rgb_BCHW, lbp_BCHW: the maps.
        gate_BCHW: GL.
        mix: see `SelectiveFusion`.
    """
    if mix == "linear":
        return rgb_BCHW * gate_BCHW + lbp_BCHW * (1 - gate_BCHW)
    weight_BCHW = gate_BCHW.sigmoid()
    other_BCHW = 1 - weight_BCHW if mix == "convex" else (1 - gate_BCHW).sigmoid()
    return rgb_BCHW * weight_BCHW + lbp_BCHW * other_BCHW
