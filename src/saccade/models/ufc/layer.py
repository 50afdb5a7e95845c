"""The layer of UFC: one attention map for features and costs, then attention whose logits are the costs.

Shape letters: B batch, C channels, G heads of D = C / G channels, H, W cells of the cost volume's source, Y, X of its
target, T = Y X, N positions of a map with height h and width w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.models.ufc.volumes import VolumeEncoder, correlation, resize_source, transposed
from saccade.ops.linear import elu_plus_one, linear_attend

#: added to the sum of linear attention's weights
_EPS = 1e-6
#: inner width of the costs' MLPs, in heads
_EXPAND = 4
PATHS = ("features", "cost")


class MapMLP(nn.Module):
    """C -> F -> C with a depthwise 3 x 3 convolution of the map in between, and GELU after it.

    Args:
        dim: C.
        hidden: F.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.conv, self.fc2 = nn.Linear(dim, hidden), depthwise(hidden, 3), nn.Linear(hidden, dim)

    def forward(self, x_BNC: Tensor, size: Sequence[int]) -> Tensor:
        hidden = self.fc1(x_BNC).mT.unflatten(2, tuple(size))
        return self.fc2(F.gelu(self.conv(hidden)).flatten(2).mT)


class UFCLayer(nn.Module):
    """Features (B, N, C) of source and target, and their costs (B, G, H, W, Y, X), to the same shapes.

    Args:
        dim: C.
        num_heads: G, also the channels of the costs.
        cost_size: (H, W), of source and target alike.
        size: (h, w) of the maps, a whole number of times the cost volume's.
        expand: inner width of the features' MLPs over that of their input.
        kernel_size: of the convolution from features' to costs' size.
        last: leave out what follows the last change of the features, as nothing reads it.
        paths: of `PATHS`; what a layer refines by its attention, both as published.

    Raises:
        ValueError: if a number does not fit, or a path is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cost_size: tuple[int, int],
        size: tuple[int, int],
        *,
        expand: float = 4.0,
        kernel_size: int = 3,
        last: bool = False,
        paths: Sequence[str] = PATHS,
    ) -> None:
        super().__init__()
        stride = size[0] // max(cost_size[0], 1)
        if num_heads < 1 or dim % num_heads or (stride * cost_size[0], stride * cost_size[1]) != tuple(size):
            raise ValueError(
                "num_heads must divide dim and size be a whole number of times cost_size, got "
                f"{num_heads}, {dim}, {tuple(size)} and {tuple(cost_size)}"
            )
        if not paths or not set(paths) <= set(PATHS):
            raise ValueError(f"paths must be some of {', '.join(PATHS)}, got {tuple(paths)}")
        self.num_heads, self.size, self.cost_size, self.paths = num_heads, size, cost_size, tuple(paths)
        wide = (num_heads, _EXPAND * num_heads, num_heads)
        cells = cost_size[0] * cost_size[1]
        self.q_proj, self.k_proj = (nn.Linear(dim + num_heads * cells, dim) for _ in range(2))
        self.v_proj, self.v_cost = nn.Linear(dim, dim), VolumeEncoder((num_heads, num_heads))
        self.position = nn.Parameter(torch.empty(1, size[0] * size[1], 1, dim // num_heads))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.norm1, self.norm2, self.norm_cross1, self.norm_cross2 = (nn.LayerNorm(dim) for _ in range(4))
        self.mlp, self.mlp_cross = (MapMLP(dim, int(dim * expand)) for _ in range(2))
        self.mlp_cost, self.refine1 = VolumeEncoder(wide), VolumeEncoder(wide)
        self.v_cross = nn.Linear(dim, dim)
        self.from_features1 = VolumeEncoder((1, num_heads), kernel_size, stride)
        self.refine2 = None if last else VolumeEncoder(wide)
        self.from_features2 = None if last else VolumeEncoder((1, num_heads), kernel_size, stride)

    def forward(self, cost_BGHWYX: Tensor, source_BNC: Tensor, target_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Raises:
            ValueError: if costs or features have other shapes.
        """
        self._check(cost_BGHWYX, source_BNC, target_BNC)
        of_source, source_BNC = self.integrate(cost_BGHWYX, source_BNC)
        of_target, target_BNC = self.integrate(transposed(cost_BGHWYX), target_BNC)
        cost = of_source + transposed(of_target) + self.from_features1(self.correlation(source_BNC, target_BNC))
        cost = cost + self.refine1(cost)
        source_BNC, target_BNC = self.cross(cost, source_BNC, target_BNC)
        if self.refine2 is not None and self.from_features2 is not None:
            cost = cost + self.from_features2(self.correlation(source_BNC, target_BNC))
            cost = cost + self.refine2(cost)
        return cost, source_BNC, target_BNC

    def integrate(self, cost_BGHWYX: Tensor, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Costs and features of one image after attention with the same weights for both, and after their MLPs."""
        normed_BNC = self.norm1(x_BNC)
        z_BNC = torch.cat([self.as_tokens(cost_BGHWYX).flatten(2), normed_BNC], -1)
        q, k = (self.heads(proj(z_BNC)) + self.position.transpose(1, 2) for proj in (self.q_proj, self.k_proj))
        q, k = elu_plus_one(q), elu_plus_one(k)
        v = self.heads(self.v_proj(normed_BNC))
        v_cost = self.as_tokens(self.v_cost(cost_BGHWYX)).transpose(1, 2)
        both = linear_attend(q, k, torch.cat([v, v_cost], -1), causal=False, normalize=True, eps=_EPS)
        message, of_cost = both.split([v.shape[-1], v_cost.shape[-1]], -1)
        if "features" in self.paths:
            x_BNC = x_BNC + message.transpose(1, 2).flatten(2)
        if "cost" in self.paths:
            cost_BGHWYX = cost_BGHWYX + self.as_volume(of_cost)
        x_BNC = x_BNC + self.mlp(self.norm2(x_BNC), self.size)
        return cost_BGHWYX + self.mlp_cost(cost_BGHWYX), x_BNC

    def cross(self, cost_BGHWYX: Tensor, source_BNC: Tensor, target_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Features after attention to the other image whose logits are the costs, and after their MLP."""
        logits = cost_BGHWYX.flatten(4).flatten(2, 3)
        v = [self.heads(self.v_cross(self.norm_cross1(self.pooled(x)))) for x in (source_BNC, target_BNC)]
        to_source, to_target = logits.softmax(-1) @ v[1], logits.mT.softmax(-1) @ v[0]
        out = []
        for x_BNC, message in ((source_BNC, to_source), (target_BNC, to_target)):
            x_BNC = x_BNC + self.repeated(message.transpose(1, 2).flatten(2))
            out.append(x_BNC + self.mlp_cross(self.norm_cross2(x_BNC), self.size))
        return out[0], out[1]

    def correlation(self, source_BNC: Tensor, target_BNC: Tensor) -> Tensor:
        return correlation(*(x.mT.unflatten(2, self.size) for x in (source_BNC, target_BNC)))

    def heads(self, x_BNC: Tensor) -> Tensor:
        """(B, G, N, D)."""
        return x_BNC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def as_tokens(self, cost_BGHWYX: Tensor) -> Tensor:
        """Costs at the size of the features: (B, N, G, T)."""
        return resize_source(cost_BGHWYX, self.size).flatten(4).flatten(2, 3).transpose(1, 2)

    def as_volume(self, x_BGNT: Tensor) -> Tensor:
        """The other way."""
        volume = x_BGNT.unflatten(3, self.cost_size).unflatten(2, self.size)
        return resize_source(volume, self.cost_size)

    def pooled(self, x_BNC: Tensor) -> Tensor:
        """Features in the mean over each cell of the costs, as tokens."""
        if self.size == self.cost_size:
            return x_BNC
        return F.adaptive_avg_pool2d(x_BNC.mT.unflatten(2, self.size), self.cost_size).flatten(2).mT

    def repeated(self, x_BTC: Tensor) -> Tensor:
        """What is said of cells, to each of their positions."""
        if self.size == self.cost_size:
            return x_BTC
        return F.interpolate(x_BTC.mT.unflatten(2, self.cost_size), self.size, mode="nearest").flatten(2).mT

    def _check(self, cost: Tensor, source: Tensor, target: Tensor) -> None:
        tokens, dim = self.size[0] * self.size[1], self.v_proj.in_features
        expected = (len(source), self.num_heads, *self.cost_size, *self.cost_size)
        if source.shape[1:] != (tokens, dim) or target.shape != source.shape or cost.shape != expected:
            raise ValueError(
                f"features must be (batch, {tokens}, {dim}) and costs {expected}, got {tuple(source.shape)}, "
                f"{tuple(target.shape)} and {tuple(cost.shape)}"
            )
