"""CAFace's aggregator: style of an image, clusters of a set, and one template of the clusters.

Shape letters: B batch, N images, M centres, L images and centres together, C channels of a feature, S channels of
statistics, D width of the style and norm of an image together, K weights of a cluster (C or 1), H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.initialization import start_transformer
from saccade.layers.mlp import MLP
from saccade.layers.positions import sinusoids
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.constants import at_home
from saccade.ops.summary import Summary, merged, summarise

#: norms beyond so many deviations are alike; steps for each deviation
CLIP, STEPS = 3, 10


def style_statistics(maps: Sequence[Tensor]) -> Tensor:
    """Mean and (unbiased) deviation over positions of all channels of all maps, (B, S, 2).

    Args:
        maps: (B, C, H, W) each; of a single position the deviation is 0.
    """
    found = []
    for x_BCHW in maps:
        x_BCN = x_BCHW.flatten(2)
        off = x_BCN - x_BCN.mean(2, keepdim=True)
        variance = off.square().sum(2) / max(1, x_BCN.shape[2] - 1)
        found.append(torch.stack([x_BCN.mean(2), variance.clamp(min=1e-12).sqrt()], -1))
    return torch.cat(found, 1)


class StyleMaker(nn.Module):
    """SIM: statistics (B, N, S, 2) to a style (B, N, D).

    Args:
        channels: S.
        dim: of the style.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.statistic_weight = nn.Parameter(torch.zeros(channels, 2))
        self.activation = nn.PReLU()
        self.linear = nn.Linear(channels, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, statistics_BNS2: Tensor) -> Tensor:
        style_BND = self.linear(self.activation((statistics_BNS2 * self.statistic_weight).sum(-1)))
        return self.norm(style_BND.flatten(0, 1)).unflatten(0, style_BND.shape[:2])


class NormEmbedding(nn.Module):
    """The length of a feature, among all lengths, as sinusoids of a whole number of steps: (B, N, 1) to (B, N, D).

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, norm_BN1: Tensor) -> Tensor:
        deviation_BN = self.norm(norm_BN1.flatten(0, 1)).view(norm_BN1.shape[:2]).detach()
        step_BN = (deviation_BN.clamp(-CLIP, CLIP) * STEPS).trunc() + CLIP * STEPS
        with at_home(norm_BN1):
            table_ND = sinusoids(step_BN.flatten().float(), self.dim)
        return self.scale * table_ND.to(norm_BN1.dtype).view(*step_BN.shape, self.dim)


class ClusterNetwork(nn.Module):
    """CN: the share of each image in each centre.

    Args:
        dim: D.
        num_centres: M.
        depth: blocks in which images and centres see each other.
        num_heads: of their attention.
        drop_path: of the last block, rising from 0.
    """

    def __init__(self, dim: int, num_centres: int, depth: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.empty(1, num_centres, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True), dim, drop_path=rate
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm_centres, self.norm_images = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.apply(start_transformer)
        nn.init.orthogonal_(self.centres[0])

    def forward(self, style_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A (B, M, N), softmax over M, and what is kept of the styles (B, N, D).

        Args:
            mask_BN: bool, False is padding; its shares are 0.
        """
        B, N = style_BND.shape[:2]
        M = self.centres.shape[1]
        centres_BMD = self.centres.expand(B, -1, -1)
        x_BLD = torch.cat([style_BND, centres_BMD], 1)
        seen_BL = None if mask_BN is None else torch.cat([mask_BN, mask_BN.new_ones(B, M)], 1)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask=seen_BL)
        style_BND = self.norm_images(x_BLD[:, :N])
        q_BMD, k_BND = self.q_proj(self.norm_centres(centres_BMD)), self.k_proj(style_BND)
        share_BMN = (q_BMD @ k_BND.mT * q_BMD.shape[-1] ** -0.5).softmax(1)
        return share_BMN if mask_BN is None else share_BMN * mask_BN[:, None], style_BND


class GatedMixer(nn.Module):
    """g x + T(LN(x)) over centres, and the same plus C(LN(.)) over channels; one layer norm for both.

    Args:
        tokens: M.
        dim: channels.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.LayerNorm(dim)
        self.tokens, self.channels = MLP(tokens, 2 * tokens), MLP(dim, dim // 2)

    def forward(self, x_BMC: Tensor) -> Tensor:
        x_BMC = self.gate * x_BMC + self.tokens(self.norm(x_BMC).mT).mT
        return x_BMC + self.channels(self.norm(x_BMC))


class AggregationNetwork(nn.Module):
    """AGN: weights of the clusters (B, M, K), softmax over M, of the centres and the clusters' styles.

    Args:
        dim: D.
        num_centres: M.
        depth: of the mixers.
        weights: K.
    """

    def __init__(self, dim: int, num_centres: int, depth: int, weights: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(GatedMixer(num_centres, 2 * dim) for _ in range(depth)))
        self.fc1, self.fc2 = nn.Linear(2 * dim, 2 * dim), nn.Linear(2 * dim, weights)
        self.apply(start_transformer)

    def forward(self, centres_1MD: Tensor, style_BMD: Tensor) -> Tensor:
        x_BMC = torch.cat([centres_1MD.expand(len(style_BMD), -1, -1), style_BMD], -1)
        return self.fc2(nn.functional.gelu(self.fc1(self.blocks(x_BMC)))).softmax(1)


class ClusterAggregate(nn.Module):
    """The whole of it: features of any frozen network and statistics of its maps, to one template of the set.

    Args:
        dim: C.
        style_channels: S.
        style_dim, norm_dim: of the style, and of what the feature's length becomes; D is their sum.
        num_centres: M.
        depth: of the blocks in CN and of the mixers in AGN.
        num_heads: of CN.
        per_channel: K = C weights of a cluster, or one.
        drop_path: of the last block.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        dim: int = 512,
        style_channels: int = 384,
        *,
        style_dim: int = 64,
        norm_dim: int = 64,
        num_centres: int = 4,
        depth: int = 2,
        num_heads: int = 8,
        per_channel: bool = True,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if min(dim, style_channels, style_dim, norm_dim, num_centres) < 1 or depth < 0:
            raise ValueError(
                "dim, style_channels, style_dim, norm_dim and num_centres must be positive and depth not negative, got "
                f"{dim}, {style_channels}, {style_dim}, {norm_dim}, {num_centres} and {depth}"
            )
        self.dim, width = dim, style_dim + norm_dim
        self.style = StyleMaker(style_channels, style_dim)
        self.norm_embedding = NormEmbedding(norm_dim)
        self.cluster = ClusterNetwork(width, num_centres, depth, num_heads, drop_path)
        self.aggregate = AggregationNetwork(width, num_centres, depth, dim if per_channel else 1)

    def assign(
        self, features_BNC: Tensor, style_BND: Tensor, mask_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shares (B, M, N) of the images, their features of unit length (B, N, C), and their styles.

        Args:
            features_BNC: as the network gives them, not normalised.
            style_BND: what `style` makes of the statistics.
            mask_BN: bool, False is padding.
        """
        norm_BN1 = torch.linalg.vector_norm(features_BNC, dim=-1, keepdim=True)
        style_BND = torch.cat([style_BND, self.norm_embedding(norm_BN1).to(style_BND.dtype)], -1)
        share_BMN, style_BND = self.cluster(style_BND, mask_BN)
        return share_BMN, features_BNC / (norm_BN1 + 1e-5), style_BND

    def summarise(
        self,
        features_BNC: Tensor,
        statistics_BNS2: Tensor,
        *,
        mask: Tensor | None = None,
        summary: Summary | None = None,
    ) -> Summary:
        """The clusters of these images, and of all that `summary` holds: mass, and means of features and styles.

        Args:
            features_BNC: not normalised.
            statistics_BNS2: of `style_statistics`.
            mask: bool (B, N), False is padding.
            summary: of the images so far; its size does not depend on how many they are.

        Raises:
            ValueError: if features, statistics, mask and summary do not fit together.
        """
        self._check(features_BNC, statistics_BNS2, mask)
        share_BMN, unit_BNC, style_BND = self.assign(features_BNC, self.style(statistics_BNS2), mask)
        new = summarise(share_BMN, (unit_BNC, style_BND), least=1.0)
        return new if summary is None else merged(summary, new)

    def weights(self, summary: Summary) -> Tensor:
        """W (B, M, K): what a cluster counts for in the template."""
        centres_1MD = self.cluster.centres
        return self.aggregate(centres_1MD, summary.means[1].to(centres_1MD.dtype))

    def template(self, summary: Summary) -> Tensor:
        """sum_m W_m F_m, (B, C)."""
        weights_BMK = self.weights(summary)
        return (weights_BMK * summary.means[0].to(weights_BMK.dtype)).sum(1)

    def forward(self, features_BNC: Tensor, statistics_BNS2: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The template (B, C) of whole sets, which has not unit length. Arguments and errors as for `summarise`."""
        return self.template(self.summarise(features_BNC, statistics_BNS2, mask=mask))

    def _check(self, features_BNC: Tensor, statistics_BNS2: Tensor, mask: Tensor | None) -> None:
        if features_BNC.ndim != 3 or features_BNC.shape[2] != self.dim or not features_BNC.shape[1]:
            raise ValueError(
                f"features must be (batch, images, {self.dim}) of one image at least, got {tuple(features_BNC.shape)}"
            )
        expected = (*features_BNC.shape[:2], len(self.style.statistic_weight), 2)
        if statistics_BNS2.shape != expected:
            raise ValueError(f"statistics must be {expected}, got {tuple(statistics_BNS2.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != features_BNC.shape[:2]):
            raise ValueError(f"mask must be bool {tuple(features_BNC.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
