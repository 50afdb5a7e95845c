"""Which tokens become one: k-means, density peaks, agglomeration, bipartite merging; and which are kept alone.

All give the group (B, N) of each token, 0 to m - 1, or -1 where it is left out.

Shape letters: B images, N tokens of one, m groups, D channels.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def strided(count: int, total: int, device: torch.device | None = None) -> Tensor:
    """floor((i + 1/2) total / count), i = 0 ... count - 1: evenly spread indices.

    Args:
        count: how many.
        total: of how many.
        device: of the indices.

    >>> strided(3, 9).tolist()
    [1, 4, 7]
    """
    return (torch.arange(count, device=device) * 2 + 1) * total // (2 * count)


def squared_distances(x_BND: Tensor, centre_BmD: Tensor) -> Tensor:
    """|x|^2 - 2 x c + |c|^2 in fp32, at least 0, (B, N, m).

    Args:
        x_BND: tokens.
        centre_BmD: what they are compared with.
    """
    x, c = x_BND.float(), centre_BmD.float()
    return (x.square().sum(-1)[..., None] - 2 * x @ c.mT + c.square().sum(-1)[:, None]).clamp_min(0)


def group_means(x_BND: Tensor, group_BN: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The mean (B, m, D) of each group, accumulated in fp32 at least, and the number (B, m) of its members.

    Args:
        x_BND: tokens.
        group_BN: of each token; -1 belongs to none.
        groups: m.
    """
    wide = x_BND if x_BND.dtype == torch.float64 else x_BND.float()
    place_BN = torch.where(group_BN < 0, groups, group_BN)
    sums = wide.new_zeros(x_BND.shape[0], groups + 1, x_BND.shape[2])
    sums = sums.scatter_add(1, place_BN[..., None].expand_as(wide), wide)[:, :groups]
    counts = wide.new_zeros(x_BND.shape[0], groups + 1).scatter_add(1, place_BN, torch.ones_like(wide[..., 0]))
    counts = counts[:, :groups]
    return (sums / counts.clamp_min(1)[..., None]).to(x_BND.dtype), counts


def k_means(
    x_BND: Tensor, groups: int, *, iterations: int = 20, start: str | Tensor = "k-means++", seed: int = 0
) -> Tensor:
    """Lloyd's iterations on squared distance, until nothing moves.

    An empty group is given the token that lies farthest from its centre, of those that are not alone.

    Args:
        x_BND: tokens.
        groups: m, at most N.
        iterations: at most so many.
        start: "k-means++", "strided", or indices (B, m) of tokens that are the first centres.
        seed: of k-means++.

    Raises:
        ValueError: if the start is none of these.
    """
    x = x_BND.detach().float()
    if isinstance(start, Tensor):
        index_Bm = start
    elif start == "strided":
        index_Bm = strided(groups, x.shape[1], x.device).expand(len(x), -1)
    elif start == "k-means++":
        index_Bm = _spread_start(x, groups, seed)
    else:
        raise ValueError(f"start must be k-means++, strided or indices, got {start!r}")
    centre_BmD = _rows(x, index_Bm)
    group_BN = torch.full(x.shape[:2], -1, device=x.device)
    for _ in range(iterations):
        distance_BN, nearest_BN = squared_distances(x, centre_BmD).min(-1)
        nearest_BN = _fill_empty(nearest_BN, distance_BN, groups)
        if torch.equal(nearest_BN, group_BN):
            break
        group_BN = nearest_BN
        centre_BmD = group_means(x, group_BN, groups)[0]
    return group_BN


def _spread_start(x: Tensor, groups: int, seed: int) -> Tensor:
    """k-means++: each next centre is drawn with a chance that grows with the squared distance to those there are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = (
        torch.rand(groups, 1, generator=generator, device="cpu").to(x.device).expand(-1, len(x))
    )  # images stay alone
    chosen = [(draws[0] * x.shape[1]).long()]
    nearest = torch.full(x.shape[:2], torch.inf, device=x.device)
    taken = torch.zeros_like(nearest)
    for draw in draws[1:]:
        last = chosen[-1][:, None]
        taken = taken.scatter(1, last, 1.0)
        nearest = torch.minimum(nearest, squared_distances(x, _rows(x, last))[..., 0])
        # where all distances are 0, any token that is not yet a centre
        weight = torch.where(nearest.sum(1, keepdim=True) > 0, nearest, 1 - taken) * (1 - taken)
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1 - taken).double().cumsum(1)
        pick = torch.searchsorted(weight, draw[:, None].double() * weight[:, -1:], right=True)
        chosen.append(pick[:, 0].clamp_max(x.shape[1] - 1))
    return torch.stack(chosen, 1)


def _fill_empty(group_BN: Tensor, distance_BN: Tensor, groups: int) -> Tensor:
    while True:
        counts = torch.zeros(len(group_BN), groups, device=group_BN.device)
        counts = counts.scatter_add(1, group_BN, torch.ones_like(distance_BN))
        empty_Bm = counts == 0
        rows = empty_Bm.any(1)
        if not rows.any():
            return group_BN
        alone = counts.gather(1, group_BN) <= 1
        farthest = distance_BN.masked_fill(alone, -1.0).argmax(1)[rows]
        group_BN, distance_BN = group_BN.clone(), distance_BN.clone()
        group_BN[rows, farthest] = empty_Bm.int().argmax(1)[rows]
        distance_BN[rows, farthest] = 0.0


def density_peaks(x_BND: Tensor, groups: int, *, neighbours: int = 5) -> Tensor:
    """Centres are tokens of high density rho that lie far (delta) from any denser one; the others join the nearest.

    rho = exp(-mean of the `neighbours` smallest squared distances to others / D); of equally dense tokens the earlier
    counts as denser; delta of the densest is the largest distance that there is. Top m of rho delta.

    Args:
        x_BND: tokens.
        groups: m, at most N.
        neighbours: of the density.
    """
    x = x_BND.detach().float()
    B, N, D = x.shape
    squares = squared_distances(x, x)
    squares.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    near = min(neighbours, N - 1)
    mean = squares.topk(near, largest=False).values.mean(-1) if near else x.new_zeros(B, N)
    order = mean.sort(stable=True).indices  # densest first
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=x.device).expand(B, -1))
    denser = rank[:, None] < rank[..., None]
    distances = squares.diagonal_scatter(x.new_zeros(B, N), dim1=1, dim2=2).sqrt()
    delta = distances.masked_fill(~denser, torch.inf).amin(-1)
    delta = torch.where(delta.isinf(), distances.amax((1, 2))[:, None], delta)
    centres = ((-mean / D).exp() * delta).sort(descending=True, stable=True).indices[:, :groups].sort(-1).values
    group = distances.gather(2, centres[:, None].expand(-1, N, -1)).argmin(-1)
    return group.scatter(1, centres, torch.arange(groups, device=x.device).expand(B, -1))


def agglomerate(x_BND: Tensor, groups: int) -> Tensor:
    """The two groups whose means are most alike (cosine) become one, until m are left: N - m steps.

    Args:
        x_BND: tokens.
        groups: m, at most N.
    """
    x = x_BND.detach().float()
    B, N, _ = x.shape
    rows = torch.arange(B, device=x.device)
    means, sizes = x.clone(), x.new_ones(B, N)
    group = torch.arange(N, device=x.device).expand(B, -1).clone()
    unit = F.normalize(means, dim=-1)
    alike = (unit @ unit.mT).masked_fill(torch.ones(N, N, dtype=torch.bool, device=x.device).tril(), -torch.inf)
    for _ in range(N - groups):
        pair = alike.flatten(1).argmax(1)
        first, second = pair // N, pair % N
        both = sizes[rows, first] + sizes[rows, second]
        mean = means[rows, first] * (sizes[rows, first] / both)[:, None]
        mean = mean + means[rows, second] * (sizes[rows, second] / both)[:, None]
        means[rows, first], sizes[rows, first], sizes[rows, second] = mean, both, 0.0
        group = torch.where(group == second[:, None], first[:, None], group)
        alike[rows, second], alike[rows, :, second] = -torch.inf, -torch.inf
        near = (F.normalize(means, dim=-1) @ F.normalize(mean, dim=-1)[..., None])[..., 0]
        near = near.masked_fill(sizes == 0, -torch.inf)
        place = torch.arange(N, device=x.device)
        alike[rows, first] = near.masked_fill(place <= first[:, None], -torch.inf)
        alike[rows, :, first] = near.masked_fill(place >= first[:, None], -torch.inf)
    return _renumbered(group)


def merge_in_pairs(x_BND: Tensor, groups: int) -> Tensor:
    """ToMe's bipartite matching: of tokens in turn put into two halves, those of the first half that are most like one
    of the second join it, half of all tokens at most; again, until m are left.

    Args:
        x_BND: tokens.
        groups: m, at most N.
    """
    x = x_BND.detach().float()
    B, N, _ = x.shape
    group = torch.arange(N, device=x.device).expand(B, -1)
    left = N
    while left > groups:
        means = group_means(x, group, left)[0]
        unit = F.normalize(means, dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        go = best.sort(descending=True, stable=True).indices[:, : min(left - groups, best.shape[1])]
        target = torch.arange(left, device=x.device).expand(B, -1)
        target = target.scatter(1, 2 * go, 2 * partner.gather(1, go) + 1)
        group = _renumbered(target.gather(1, group))
        left -= go.shape[1]
    return group


def alone(index_Bm: Tensor, tokens: int) -> Tensor:
    """The groups of a choice: each chosen token is one, the others are left out.

    Args:
        index_Bm: of the chosen tokens, in rising order.
        tokens: N.
    """
    places = torch.arange(index_Bm.shape[1], device=index_Bm.device).expand_as(index_Bm)
    none = torch.full((len(index_Bm), tokens), -1, device=index_Bm.device)
    return none.scatter(1, index_Bm, places)


def spread(groups: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """Indices (m,) of tokens evenly spread over a square map where m is a square too, else over the raster.

    Args:
        groups: m.
        tokens: N.
        device: of the indices.
    """
    side, small = isqrt(tokens), isqrt(groups)
    if side * side == tokens and small * small == groups:
        line = strided(small, side, device)
        return (line[:, None] * side + line).flatten()
    return strided(groups, tokens, device)


def blocks(groups: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """Groups (N,) that are blocks of a square map where m is a square too, else pieces of the raster.

    Args:
        groups: m.
        tokens: N.
        device: of the groups.
    """
    side, small = isqrt(tokens), isqrt(groups)
    if side * side == tokens and small * small == groups:
        line = torch.arange(side, device=device) * small // side
        return (line[:, None] * small + line).flatten()
    return torch.arange(tokens, device=device) * groups // tokens


def best(score_BN: Tensor, count: int) -> Tensor:
    """Indices (B, m) of the highest scores, the earlier of equal ones, in rising order.

    Args:
        score_BN: of each token.
        count: m.
    """
    return score_BN.sort(descending=True, stable=True).indices[:, :count].sort(-1).values


def _rows(x_BND: Tensor, index_Bm: Tensor) -> Tensor:
    return x_BND.gather(1, index_Bm[..., None].expand(-1, -1, x_BND.shape[-1]))


def _renumbered(group_BN: Tensor) -> Tensor:
    """The same groups, numbered without gaps in the order of their numbers."""
    used = torch.zeros_like(group_BN).scatter(1, group_BN, 1)
    return (used.cumsum(1) - 1).gather(1, group_BN)
