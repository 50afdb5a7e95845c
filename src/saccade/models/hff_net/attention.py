"""What works on frequencies inside the network: the adaptive Laplacian convolution, and attention over the spectrum.

Shape letters: B batch, C channels, D slices (depth), H height, W width, R rank.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.ops.frequency import consolidated, elastic_penalty, laplacian_kernel, on_spectrum
from saccade.ops.statistics import channel_gate, channel_statistics, spatial_gate

Reading = Literal["attention", "code"]
Draws = Literal["training", "always", "never"]
#: the normal draws of one slice attention: e1 (B, rank) and e2 (B, D)
Noise = tuple[Tensor, Tensor]

#: the order in which the statistics are summed up and stacked
_STATISTICS = ("max", "avg")


class AdaptiveLaplacian(nn.Module):
    """ALC: y = x + conv(x), a 3 x 3 x 3 kernel that starts as the Laplacian, for each pair of channels.

    Args:
        channels: C.

    Attributes:
        held: bool, of the weight's shape: the taps that stay at the Laplacian (elastic consolidation); none at first.

    Raises:
        ValueError: if there are no channels, or the input has another number of them.
    """

    held: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.channels = channels
        self.weight = nn.Parameter(laplacian_kernel(3).repeat(channels, channels, 1, 1, 1))
        self.register_buffer("held", torch.zeros(self.weight.shape, dtype=torch.bool))

    def hold(self, taps: Tensor) -> None:
        """Keep these taps at the Laplacian from now on.

        Args:
            taps: bool, (C, C, 3, 3, 3).
        """
        self.held.copy_(taps)

    def kernel(self) -> Tensor:
        """The weight that convolves: the Laplacian where it is held."""
        return consolidated(self.weight, laplacian_kernel(3, self.weight.device), self.held)

    def penalty(self) -> Tensor:
        """The sum of squared distances of the kernel from the Laplacian."""
        return elastic_penalty(self.kernel(), laplacian_kernel(3, self.weight.device))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        check_volume(x_BCDHW, self.channels)
        return x_BCDHW + F.conv3d(x_BCDHW, self.kernel(), padding=1)


class SliceAttention(nn.Module):
    """A number in (0, 1) for each slice, drawn from a normal distribution of low rank whose parameters the slices give.

        u = MLP(max) + MLP(mean);   t = ReLU(u)
        z = W_mu t + F e1 + sqrt(d) e2,   d = softplus(exp(W_d t)) + 1,   F = W_f t        e1, e2 standard normal
        a = sigmoid(z), or sigmoid(u) without uncertainty

    Args:
        slices: D.
        rate: the MLP is rate * D wide.
        rank: of F.
        uncertainty: False is the deterministic form.
        draws: when z is drawn; else it is its mean.
        reparameterised: False lets no gradient through a drawn z, so that nothing here learns.
    """

    def __init__(
        self,
        slices: int,
        rate: int = 4,
        rank: int = 5,
        *,
        uncertainty: bool = True,
        draws: Draws = "training",
        reparameterised: bool = True,
    ) -> None:
        super().__init__()
        self.slices, self.rank, self.draws, self.reparameterised = slices, rank, draws, reparameterised
        self.mlp = MLP(slices, rate * slices, activation="relu")
        self.mean = nn.Linear(slices, slices) if uncertainty else None
        self.log_diagonal = nn.Linear(slices, slices) if uncertainty else None
        self.factor = nn.Linear(slices, slices * rank) if uncertainty else None

    def forward(self, x_BCDHW: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, 1, D, 1, 1), of the real part of a spectrum; `noise` in the place of what would be drawn."""
        u_BD = self.mlp(channel_statistics(x_BCDHW.transpose(1, 2), _STATISTICS)).sum(0)
        if self.mean is not None:
            u_BD = self._drawn(F.relu(u_BD), noise)
        return u_BD.sigmoid()[:, None, :, None, None]

    def _drawn(self, t_BD: Tensor, noise: Noise | None) -> Tensor:
        assert self.mean is not None and self.log_diagonal is not None and self.factor is not None
        mean_BD = self.mean(t_BD)
        if noise is None:
            if self.draws == "never" or (self.draws == "training" and not self.training):
                return mean_BD
            noise = torch.randn_like(mean_BD[:, :1].expand(-1, self.rank)), torch.randn_like(mean_BD)
        diagonal_BD = F.softplus(self.log_diagonal(t_BD).exp()) + 1
        factor_BDR = self.factor(t_BD).unflatten(-1, (self.slices, self.rank))
        z_BD = mean_BD + (factor_BDR @ noise[0][..., None])[..., 0] + diagonal_BD.sqrt() * noise[1]
        return z_BD if self.reparameterised else z_BD.detach()


class FrequencyCrossAttention(nn.Module):
    """FDCA: three attentions over the spectrum of a volume, one after the other, each from the real part as it is then.

        X = F x;    X <- X a  (reading "attention"),   X <- X (Re X) a  (reading "code");    y = Re F^-1 X

    with a in (0, 1) per channel, then per row and column, then per slice.

    Args:
        channels: C.
        slices: D, fixed by the slice attention.
        reduction: the channels' MLP is C // reduction wide.
        rate, rank, uncertainty, draws, reparameterised: see `SliceAttention`.
        reading: "attention" multiplies the spectrum by the attention, "code" by the map that is attended to, as the
            authors' code does.

    Raises:
        ValueError: if an argument is out of range, or the input has another number of channels or slices.
    """

    def __init__(
        self,
        channels: int,
        slices: int,
        *,
        reduction: int = 16,
        rate: int = 4,
        rank: int = 5,
        uncertainty: bool = True,
        reading: Reading = "attention",
        draws: Draws = "training",
        reparameterised: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        if min(slices, rate, rank) < 1:
            raise ValueError(f"slices, rate and rank must be positive, got {slices}, {rate} and {rank}")
        for name, value, known in (("reading", reading, Reading), ("draws", draws, Draws)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        self.channels, self.slices, self.reading = channels, slices, reading
        self.semantic = MLP(channels, channels // reduction, activation="relu")
        self.positional = nn.Conv3d(2, 1, 3, padding=1)
        self.slice = SliceAttention(
            slices, rate, rank, uncertainty=uncertainty, draws=draws, reparameterised=reparameterised
        )

    def attentions(self, x_BCDHW: Tensor, noise: Noise | None = None) -> Tensor:
        """The spectrum after the three attentions, of a complex spectrum."""
        dtype = self.positional.weight.dtype
        for attend in (self._channels, self._places, lambda real: self.slice(real, noise)):
            real = x_BCDHW.real
            a = attend(real.to(dtype)).to(real.dtype)
            x_BCDHW = x_BCDHW * (a if self.reading == "attention" else a * real)
        return x_BCDHW

    def _channels(self, x_BCDHW: Tensor) -> Tensor:
        return channel_gate(x_BCDHW, self.semantic, _STATISTICS)

    def _places(self, x_BCDHW: Tensor) -> Tensor:
        return spatial_gate(x_BCDHW.flatten(1, 2), lambda maps: self.positional(maps[:, :, None]), _STATISTICS)

    def forward(self, x_BCDHW: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, C, D, H, W) to the same; `noise` in the place of what would be drawn."""
        check_volume(x_BCDHW, self.channels, self.slices)
        return on_spectrum(x_BCDHW, lambda spectrum: self.attentions(spectrum, noise), (2, 3, 4))


def check_volume(x_BCDHW: Tensor, channels: int, slices: int | None = None, name: str = "x") -> None:
    """Raise ValueError unless `x` is (B, channels, slices, H, W), with a voxel; any slices where None."""
    shape = x_BCDHW.shape
    if len(shape) != 5 or shape[1] != channels or 0 in shape[2:] or slices not in (None, shape[2]):
        wanted = f"(batch, {channels}, {'depth' if slices is None else slices}, height, width)"
        raise ValueError(f"{name} must be {wanted}, got {tuple(shape)}")
