"""The decoder's three parts: adaptive cross-fusion of directions, triple feature fusion, structural masked skips.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act, depthwise
from saccade.layers.gates import ChannelGate, SpatialGate
from saccade.layers.norms import ChannelNorm
from saccade.ops.feature_maps import check_map
from saccade.ops.frequency import spectral_filter

GateOf = Literal["branch", "channel"]
MaskAxis = Literal["channel", "space"]
Activation = Literal["silu", "relu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
#: groups of the norm in SMMM
_GROUPS = 4


class ACFA(nn.Module):
    """Two gates, then a quarter of the channels each: planar, vertical and horizontal guidance, and context.

        X1 = X sigmoid(MLP(mean) + MLP(max)),    X2 = X1 sigmoid(conv([mean; max] of X1))
        o1 = x1 DW(GELU(PW(T_HW))),  o2 = x2 DW(GELU(PW(T_H))),  o3 = x3 DW(GELU(PW(T_W))),  o4 = PW(GELU(DW(x4)))
        Y  = conv_1x1(GELU(conv_3x3(LN[o1; o2; o3; o4])))

    T are learned, drawn from U(0, 1); on maps of another size they are read at their places, linearly.

    Args:
        channels: C, a multiple of 4.
        height, width: of the map for which the guidance is made.
        reduction: the gate's MLP is max(C // reduction, 4) wide.
        kernel_size: of the spatial gate, odd.
        sequential: False lets the spatial gate look at X, not X1.
        residual: adds X to Y.

    Raises:
        ValueError: if a number is out of range, or the input has other channels.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        sequential: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a multiple of 4, got {channels}")
        if min(height, width, reduction) < 1:
            raise ValueError(f"height, width and reduction must be positive, got {height}, {width} and {reduction}")
        self.channels, self.sequential, self.residual = channels, sequential, residual
        quarter, statistics = channels // 4, ("avg", "max")
        hidden = max(channels // reduction, 4)
        self.channel_gate = ChannelGate(channels, hidden, statistics=statistics, activation="gelu", bias=False)
        self.spatial_gate = SpatialGate(kernel_size, statistics=statistics)
        self.plane = nn.Parameter(torch.rand(1, quarter, height, width))
        self.column = nn.Parameter(torch.rand(1, quarter, height, 1))
        self.row = nn.Parameter(torch.rand(1, quarter, 1, width))
        self.plane_mix, self.plane_spread = _pointwise(quarter), depthwise(quarter, 3, bias=False)
        self.column_mix, self.column_spread = _pointwise(quarter), depthwise(quarter, (3, 1), bias=False)
        self.row_mix, self.row_spread = _pointwise(quarter), depthwise(quarter, (1, 3), bias=False)
        self.context_spread, self.context_mix = depthwise(quarter, 3, bias=False), _pointwise(quarter)
        self.norm = ChannelNorm(channels, eps=1e-6)
        self.fuse = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GELU(), _pointwise(channels)
        )

    def guidance(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of a map of this size: (1, C/4, H, W), (1, C/4, H, 1) and (1, C/4, 1, W)."""
        return (
            self.plane_spread(F.gelu(self.plane_mix(_at(self.plane, height, width)))),
            self.column_spread(F.gelu(self.column_mix(_at(self.column, height, 1)))),
            self.row_spread(F.gelu(self.row_mix(_at(self.row, 1, width)))),
        )

    def gated(self, x_BCHW: Tensor) -> Tensor:
        """X2."""
        once_BCHW = self.channel_gate(x_BCHW)
        return once_BCHW * self.spatial_gate.gate(once_BCHW if self.sequential else x_BCHW)

    def branches(self, x_BCHW: Tensor) -> list[Tensor]:
        """o1 to o4, (B, C/4, H, W) each, of X2."""
        parts = x_BCHW.chunk(4, 1)
        guided = [part * factor for part, factor in zip(parts, self.guidance(*x_BCHW.shape[2:]))]
        return [*guided, self.context_mix(F.gelu(self.context_spread(parts[3])))]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels)
        y_BCHW = self.fuse(self.norm(torch.cat(self.branches(self.gated(x_BCHW)), 1)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


def gaussian_slope(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """psi = -(1 / sqrt(a)) z exp(-z^2 / 2), z = (x - b) / a: the paper's "DoG", a Gaussian's first derivative.

    Args:
        x: values.
        scale, shift: a > 0 and b.
    """
    z = (x - shift) / scale
    return -z * torch.exp(-z * z / 2) / scale.sqrt()


def mexican_hat(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """psi = 2 / (sqrt(3 a) pi^(1/4)) (1 - z^2) exp(-z^2 / 2), z = (x - b) / a.

    Args:
        x: values.
        scale, shift: a > 0 and b.
    """
    z = (x - shift) / scale
    return 2 / (math.pi**0.25 * (3 * scale).sqrt()) * (1 - z * z) * torch.exp(-z * z / 2)


class TFFA(nn.Module):
    """Three branches, mixed by weights that sum to 1 at each position.

        S = conv_1x1(X);   F = F^-1(W_f . F X);   W = conv_1x1(psi_DoG) + conv_1x1(psi_hat), of normalised values of X
        g = softmax over branches of conv_1x1([S; F; W]);   Y = ReLU(BN(g_S S + g_F F + g_W W))

    W_f is a complex number per channel and frequency, 1 at first, made for maps of `height` x `width` and read at the
    same frequencies on others. Normalised is by batch norm; a and b are learned per channel, a by its softplus.

    Args:
        channels: C.
        height, width: of the maps for which W_f is made.
        gate: "branch" has one weight for all channels of a branch, "channel" one for each.

    Raises:
        ValueError: if a number is not positive, the gate is unknown, or the input has other channels.
    """

    def __init__(self, channels: int, height: int, width: int, *, gate: GateOf = "branch") -> None:
        super().__init__()
        if min(channels, height, width) < 1:
            raise ValueError(f"channels, height and width must be positive, got {channels}, {height} and {width}")
        if gate not in get_args(GateOf):
            raise ValueError(f"gate must be one of {', '.join(get_args(GateOf))}, got {gate!r}")
        self.channels, self.size = channels, (height, width)
        self.spatial = nn.Conv2d(channels, channels, 1)
        one = torch.tensor([1.0, 0.0]).expand(channels, height, width // 2 + 1, 2)
        self.spectrum = nn.Parameter(one.clone())
        self.values = nn.BatchNorm2d(channels, affine=False)
        self.raw_scale = nn.Parameter(torch.full((channels, 1, 1), math.log(math.e - 1)))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.slope_mix, self.hat_mix = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.weigh = nn.Conv2d(3 * channels, 3 if gate == "branch" else 3 * channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def branches(self, x_BCHW: Tensor) -> list[Tensor]:
        """S, F and W."""
        scale, values = F.softplus(self.raw_scale), self.values(x_BCHW)
        waves = self.slope_mix(gaussian_slope(values, scale, self.shift))
        waves = waves + self.hat_mix(mexican_hat(values, scale, self.shift))
        return [self.spatial(x_BCHW), spectral_filter(x_BCHW, self.spectrum, self.size), waves]

    def weights(self, branches: list[Tensor]) -> Tensor:
        """g, (B, 3, 1 or C, H, W), sums to 1 over the branches."""
        return self.weigh(torch.cat(branches, 1)).unflatten(1, (3, -1)).softmax(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels)
        branches = self.branches(x_BCHW)
        mixed = sum(g * branch for g, branch in zip(self.weights(branches).unbind(1), branches))
        return F.relu(self.norm(mixed))


class MultiScale(nn.Module):
    """M of SMMM: 3 x 3 and 5 x 5 kernels per channel, the two side by side, twice; then a 1 x 1 convolution.

    Args:
        channels: C.
        activation: behind each batch norm.
    """

    def __init__(self, channels: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.norm, act = ChannelNorm(channels), _ACTIVATIONS[activation]
        self.first = nn.ModuleList(
            conv_norm_act(channels, channels, k, groups=channels, activation=act) for k in (3, 5)
        )
        self.second = nn.ModuleList(
            conv_norm_act(2 * channels, channels, k, groups=channels, activation=act) for k in (3, 5)
        )
        self.fuse = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.norm(x_BCHW)
        for stage in (self.first, self.second):
            x_BCHW = torch.cat([convolution(x_BCHW) for convolution in stage], 1)
        return self.fuse(x_BCHW)


class SMMM(nn.Module):
    """A skip connection: encoder and decoder map, each masked by what stands out at several scales, then fused.

        e = conv_1x1(E), d = conv_1x1(D);   mask(z) = z softmax(DW_1(z) + DW_3(z) + DW_5(z))
        y = conv_1x1(GN(conv_3x3(mask(M(e)) + mask(M(d)))))            the 3 x 3 convolution dilated by 2

    M and the masks' kernels are the same for both.

    Args:
        channels: C, a multiple of 4.
        act: of M: "silu", or "relu" as the paper names it.
        mask_axis: the softmax is over channels, or over positions ("space").

    Raises:
        ValueError: if an argument is out of range, or the maps do not fit the channels or each other.
    """

    def __init__(self, channels: int, *, act: Activation = "silu", mask_axis: MaskAxis = "channel") -> None:
        super().__init__()
        if channels < _GROUPS or channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS}, got {channels}")
        for name, value, known in (("act", act, Activation), ("mask_axis", mask_axis, MaskAxis)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        self.channels, self.mask_axis = channels, mask_axis
        self.encoder_in, self.decoder_in = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.scales = MultiScale(channels, act)
        self.masks = nn.ModuleList(depthwise(channels, k) for k in (1, 3, 5))
        self.fuse = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.out = nn.Conv2d(channels, channels, 1)

    def mask(self, z_BCHW: Tensor) -> Tensor:
        """The factors, (B, C, H, W); they sum to 1 over channels, or over positions."""
        scores = torch.stack([convolution(z_BCHW) for convolution in self.masks]).sum(0)
        if self.mask_axis == "channel":
            return scores.softmax(1)
        return scores.flatten(2).softmax(-1).view_as(scores)

    def forward(self, encoder_BCHW: Tensor, decoder_BCHW: Tensor) -> Tensor:
        check_map(encoder_BCHW, self.channels)
        if decoder_BCHW.shape != encoder_BCHW.shape:
            raise ValueError(
                f"both maps must have one shape, got {tuple(encoder_BCHW.shape)} and {tuple(decoder_BCHW.shape)}"
            )
        seen = [self.scales(z) for z in (self.encoder_in(encoder_BCHW), self.decoder_in(decoder_BCHW))]
        masked = [z * self.mask(z) for z in seen]
        return self.out(self.norm(self.fuse(masked[0] + masked[1])))


def _pointwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 1, bias=False)


def _at(guide_1CHW: Tensor, height: int, width: int) -> Tensor:
    if guide_1CHW.shape[2:] == (height, width):
        return guide_1CHW
    return F.interpolate(guide_1CHW, (height, width), mode="bilinear", align_corners=False)
