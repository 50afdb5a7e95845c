"""GRF's attention over views: what several views say of a point becomes one vector.

Shape letters: N points, V views, C channels of a view, E of the point, D of a value, S slots.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.export import exporting

#: Keras' layers: slope of LeakyReLU, epsilon of LayerNormalization
LEAKY_SLOPE, NORM_EPS = 0.3, 1e-3
#: added to a slot's weights before they are divided by their sum
_SLOT_EPS = 1e-8
_GOLDEN = 0.6180339887498949


class AttSets(nn.Module):
    """A softmax over views for each channel: out = W sum_v y_v m_v, m = softmax_v(W' y), y of a small MLP.

    A mask leaves views out; a point without views gives W's bias.

    Args:
        in_channels: C.
        point_channels: E.
        hidden: width of the MLP.
        dim: D, of the output too.
        weigh: False: all views weigh the same, mean pooling.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(
        self, in_channels: int, point_channels: int, hidden: int = 256, dim: int = 512, *, weigh: bool = True
    ) -> None:
        super().__init__()
        if min(in_channels, hidden, dim) < 1 or point_channels < 0:
            raise ValueError(f"channels must be positive, got {in_channels}, {point_channels}, {hidden} and {dim}")
        width = in_channels + point_channels
        self.out_channels = dim
        self.layers = nn.ModuleList(nn.Linear(i, hidden) for i in (width, hidden, hidden))
        self.value = nn.Linear(hidden + width, dim)
        self.score = nn.Linear(dim, dim) if weigh else None
        self.out = nn.Linear(dim, dim)

    def weights(self, y_NVD: Tensor, mask_NV: Tensor | None = None) -> Tensor:
        """m, (N, V, D); they sum to 1 over views, to 0 where all are masked."""
        score_NVD = torch.zeros_like(y_NVD) if self.score is None else self.score(y_NVD)
        if mask_NV is None:
            return score_NVD.softmax(-2)
        hidden = ~mask_NV[..., None]
        return score_NVD.masked_fill(hidden, torch.finfo(score_NVD.dtype).min).softmax(-2).masked_fill(hidden, 0.0)

    def values(self, x_NVC: Tensor, points_NVE: Tensor) -> Tensor:
        """y, (N, V, D)."""
        first = h = torch.cat([x_NVC, points_NVE], -1)
        for layer in self.layers:
            h = F.relu(layer(h))
        return F.leaky_relu(self.value(torch.cat([h, first], -1)), LEAKY_SLOPE)

    def forward(
        self, x_NVC: Tensor, points_NVE: Tensor, mask_NV: Tensor | None = None, slots_NSD: Tensor | None = None
    ) -> Tensor:
        """(N, D) of views and points; any axes may stand before. `slots` is for `SlotFusion`."""
        y_NVD = self.values(x_NVC, points_NVE)
        return self.out((y_NVD * self.weights(y_NVD, mask_NV)).sum(-2))


class SlotFusion(nn.Module):
    """Slot attention over views: slots compete for each view, a GRU takes in what they get, a few times over.

        A = softmax over slots of q k^T / sqrt(D) + 1e-8, divided by its sum over views
        s <- GRU(A v, s);   s <- s + MLP(LN s)

    Slots begin as mu + sigma noise, a draw for each point; in evaluation the draw is the same for all points, so that
    what comes out is a function of what goes in.

    Args:
        in_channels: C.
        point_channels: E.
        num_slots: S.
        dim: D; S D numbers come out.
        iters: rounds.
        hidden: of the slots' MLP, D at least.
        widths: of the layers that condense a view before its value is made.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        point_channels: int,
        num_slots: int = 2,
        dim: int = 128,
        iters: int = 2,
        hidden: int = 128,
        widths: tuple[int, ...] = (64, 32, 32, 32, 32, 32),
    ) -> None:
        super().__init__()
        if min(in_channels, num_slots, dim, iters, hidden, *widths) < 1 or not widths or point_channels < 0:
            raise ValueError(f"slots, dim, iters, hidden and widths must be positive, got {num_slots}, {dim}, {iters}")
        self.num_slots, self.dim, self.iters, self.out_channels = num_slots, dim, iters, num_slots * dim
        self.mu, self.sigma = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 1, dim))
        self.condense = nn.ModuleList(nn.Linear(i, o) for i, o in zip((in_channels, *widths), widths))
        self.value = nn.Linear(in_channels + point_channels + widths[-1], dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        nn.init.orthogonal_(self.gru.weight_hh)
        self.norm_input, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim, NORM_EPS) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, max(dim, hidden)), nn.Linear(max(dim, hidden), dim)

    def weights(self, slots_NSD: Tensor, keys_NVD: Tensor, mask_NV: Tensor | None = None) -> Tensor:
        """A, (N, S, V); each slot's weights sum to 1 over views, to 0 where all are masked."""
        share_NSV = (self.to_q(self.norm_slots(slots_NSD)) @ keys_NVD.mT * self.dim**-0.5).softmax(-2) + _SLOT_EPS
        if mask_NV is not None:
            share_NSV = share_NSV * mask_NV[..., None, :]
        return share_NSV / share_NSV.sum(-1, keepdim=True).clamp(min=_SLOT_EPS / 2)

    def seen(self, x_NVC: Tensor, points_NVE: Tensor) -> Tensor:
        """The views as keys and values are made of them, (N, V, D)."""
        r = x_NVC
        for number, layer in enumerate(self.condense, 1):
            r = layer(r) if number == len(self.condense) else F.relu(layer(r))
        x_NVD = F.leaky_relu(self.value(torch.cat([x_NVC, points_NVE, r], -1)), LEAKY_SLOPE)
        return self.norm_input(x_NVD)

    def forward(
        self, x_NVC: Tensor, points_NVE: Tensor, mask_NV: Tensor | None = None, slots_NSD: Tensor | None = None
    ) -> Tensor:
        """(N, S D) of views and points; any axes may stand before. `slots`: at the start, drawn where None."""
        x_NVD = self.seen(x_NVC, points_NVE)
        keys, values, shape = self.to_k(x_NVD), self.to_v(x_NVD), (*x_NVD.shape[:-2], self.num_slots, self.dim)
        slots = self.start(shape) if slots_NSD is None else slots_NSD
        for _ in range(self.iters):
            taken = self.weights(slots, keys, mask_NV) @ values
            slots = self.gru(taken.reshape(-1, self.dim), slots.reshape(-1, self.dim).to(taken.dtype)).view(shape)
            slots = slots + self.fc2(F.relu(self.fc1(self.norm_mlp(slots))))
        return slots.flatten(-2)

    def start(self, shape: tuple[int, ...]) -> Tensor:
        """mu + sigma noise, (..., S, D): a draw for each in training, in evaluation the same for all."""
        device = self.mu.device
        noise_NSD = torch.randn(shape, device=device) if self.training else self._even(device).expand(shape)
        return (self.mu + self.sigma * noise_NSD.to(self.mu.dtype)).view(shape)

    def _even(self, device: torch.device) -> Tensor:
        """S D numbers that are spread as normal draws are: quantiles at the multiples of the golden section."""
        places = range(1, self.num_slots * self.dim + 1)
        if exporting():  # exporters do not know the inverse of the error function
            values = torch.tensor([NormalDist().inv_cdf(place * _GOLDEN % 1) for place in places], device=device)
        else:
            quantile = (torch.arange(1, len(places) + 1, device=device, dtype=torch.float32) * _GOLDEN).frac()
            values = torch.erfinv(2 * quantile - 1) * math.sqrt(2)
        return values.view(self.num_slots, self.dim)
