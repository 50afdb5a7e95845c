"""Visual tokens in, fewer out: the clusters' means, and the methods with which the paper compares them.

Shape letters: B images, N tokens of one, m tokens that come out, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.compress.token_compression import grouping
from saccade.ops.autocast import exact

METHODS = ("cluster", "random", "spatial", "pool", "saliency", "merging", "saliency-cluster")
CLUSTERS = ("k-means", "density-peaks", "agglomerative")


@dataclass(frozen=True)
class Compressed:
    """What is left of the images' tokens.

    Attributes:
        tokens: (B, m, D).
        indices: (B, m), the place of each: the mean index of its members (`order="mean"`), or the smallest.
        weights: (B, m), how many tokens each stands for.
        groups: (B, N), which of the m each token went into; -1 where it was dropped.
    """

    tokens: Tensor
    indices: Tensor
    weights: Tensor
    groups: Tensor

    @property
    def dropped(self) -> Tensor:
        """(B,), tokens that are in none of those that are left."""
        return (self.groups < 0).sum(1)


class TokenCompression(nn.Module):
    """Fewer visual tokens, for a language model to read.

        X in R^{N x D} -> clusters c = 1 ... m,     t_c = (1 / N_c) sum_{j in c} x_j,     by rising mean index

    Args:
        tokens: m; an image that has fewer keeps all. 64 where neither it nor `share` is given.
        share: m / N instead.
        method: one of `METHODS`; "saliency-cluster" keeps the best `salient` and clusters the rest.
        cluster: "k-means", "density-peaks" or "agglomerative".
        distance: "euclidean", or "cosine": rows are normalised before they are grouped, and averaged as they are.
        start, iterations: of k-means: "k-means++" or "strided".
        neighbours: of density peaks.
        salient: share of m that "saliency-cluster" keeps as they are.
        order: tokens by the "mean" index of their members, or by the "first".
        seed: of "random" and of k-means++.

    Raises:
        ValueError: if an option is out of its range.

    >>> compressor = TokenCompression(tokens=2, start="strided")
    >>> found = compressor(torch.tensor([[[0.0], [10.0], [0.2], [9.8]]]))
    >>> found.tokens.flatten().tolist(), found.groups.tolist()
    ([0.10000000149011612, 9.899999618530273], [[0, 1, 0, 1]])
    """

    def __init__(
        self,
        tokens: int | None = None,
        share: float | None = None,
        *,
        method: str = "cluster",
        cluster: str = "k-means",
        distance: str = "euclidean",
        start: str = "k-means++",
        iterations: int = 20,
        neighbours: int = 5,
        salient: float = 0.8,
        order: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokens is not None and share is not None:
            raise ValueError(f"give tokens or share, not both: got {tokens} and {share}")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        for name, value, among in (
            ("method", method, METHODS),
            ("cluster", cluster, CLUSTERS),
            ("distance", distance, ("euclidean", "cosine")),
            ("start", start, ("k-means++", "strided")),
            ("order", order, ("mean", "first")),
        ):
            if value not in among:
                raise ValueError(f"{name} must be {', '.join(among[:-1])} or {among[-1]}, got {value!r}")
        if iterations < 1 or neighbours < 1:
            raise ValueError(f"iterations and neighbours must be at least 1, got {iterations} and {neighbours}")
        if not 0 <= salient <= 1:
            raise ValueError(f"salient must be between 0 and 1, got {salient}")
        self.tokens, self.share = (64 if tokens is None and share is None else tokens), share
        self.method, self.cluster, self.distance, self.start = method, cluster, distance, start
        self.iterations, self.neighbours, self.salient, self.order = iterations, neighbours, salient, order
        self.seed = seed

    @property
    def needs_scores(self) -> bool:
        """Whether the call must be given the tokens' saliency."""
        return self.method.startswith("saliency")

    def budget(self, tokens: int) -> int:
        """m.

        Args:
            tokens: N.
        """
        if self.tokens is not None:
            return min(self.tokens, tokens)
        assert self.share is not None
        return max(1, math.floor(self.share * tokens + 0.5))

    def forward(self, x_BND: Tensor, scores: Tensor | None = None) -> Compressed:
        """
        Args:
            x_BND: the tokens of B images, for which each is compressed alone.
            scores: (B, N), of each token, for the methods of saliency.

        Raises:
            ValueError: if the tokens are not of three axes, or the scores are missing or of another shape.
        """
        if x_BND.ndim != 3 or not x_BND.shape[1]:
            raise ValueError(f"tokens must be (images, tokens, channels), got {tuple(x_BND.shape)}")
        if self.needs_scores and (scores is None or scores.shape != x_BND.shape[:2]):
            shape = None if scores is None else tuple(scores.shape)
            raise ValueError(f"{self.method} needs scores {tuple(x_BND.shape[:2])} of the tokens, got {shape}")
        m = self.budget(x_BND.shape[1])
        groups, indices = self._ordered(self.group(x_BND, m, scores), m)
        tokens, weights = grouping.group_means(x_BND, groups, m)
        return Compressed(tokens, indices, weights, groups)

    @exact
    def group(self, x_BND: Tensor, count: int, scores: Tensor | None = None) -> Tensor:
        """The group (B, N) of each token before the groups are put in order; -1 where a token is dropped.

        Args:
            x_BND: tokens.
            count: m.
            scores: (B, N), for the methods of saliency.
        """
        (B, N, _), device = x_BND.shape, x_BND.device
        if self.method == "cluster":
            return self._clustered(x_BND, count)
        if self.method == "merging":
            return grouping.merge_in_pairs(x_BND, count)
        if self.method == "pool":
            return grouping.blocks(count, N, device).expand(B, -1)
        if self.method == "spatial":
            return grouping.alone(grouping.spread(count, N, device).expand(B, -1), N)
        if self.method == "random":
            generator = torch.Generator("cpu").manual_seed(self.seed)
            scores = torch.rand(N, generator=generator, device="cpu").to(device).expand(B, -1)
        assert scores is not None
        if self.method != "saliency-cluster":
            return grouping.alone(grouping.best(scores.detach(), count), N)
        kept = min(count - 1, round(self.salient * count)) if count < N else count
        index = grouping.best(scores.detach(), kept)
        group = grouping.alone(index, N)
        if kept == count:
            return group
        rest = (group < 0).nonzero()[:, 1].view(B, N - kept)
        others = self._clustered(x_BND.gather(1, rest[..., None].expand(-1, -1, x_BND.shape[2])), count - kept)
        return group.scatter(1, rest, others + kept)

    def _clustered(self, x_BND: Tensor, count: int) -> Tensor:
        x = F.normalize(x_BND.detach().float(), dim=-1) if self.distance == "cosine" else x_BND
        if self.cluster == "k-means":
            return grouping.k_means(x, count, iterations=self.iterations, start=self.start, seed=self.seed)
        if self.cluster == "density-peaks":
            return grouping.density_peaks(x, count, neighbours=self.neighbours)
        return grouping.agglomerate(x, count)

    def _ordered(self, group_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The groups numbered by their place, and the place (B, m) of each."""
        B, N = group_BN.shape
        place_BN = torch.arange(N, device=group_BN.device, dtype=torch.float32).expand(B, -1)
        index_Bm = grouping.group_means(place_BN[..., None], group_BN, count)[0][..., 0]
        if self.order == "first":
            member = torch.where(group_BN < 0, count, group_BN)
            index_Bm = place_BN.new_full((B, count + 1), N).scatter_reduce(1, member, place_BN, "amin")[:, :count]
        index_Bm, order = index_Bm.sort(stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand(B, -1))
        return torch.where(group_BN < 0, -1, rank.gather(1, group_BN.clamp_min(0))), index_Bm

    def extra_repr(self) -> str:
        budget = f"tokens={self.tokens}" if self.share is None else f"share={self.share}"
        return f"{budget}, method={self.method!r}"
