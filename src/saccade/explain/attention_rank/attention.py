"""Attention whose rank and number of heads are independent of each other, and what is known to solve the task exactly.

Shape letters: B batch, D width of points, N points (keys and values), Q queries, H heads, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.ops.attend import attend


def logits(x_BDN: Tensor, y_BDQ: Tensor, q_HRD: Tensor, k_HRD: Tensor) -> Tensor:
    """(Q_h y_q) . (K_h x_k) / sqrt(R), (B, Q, H, N).

    Args:
        x_BDN: points, in columns.
        y_BDQ: queries, likewise.
        q_HRD, k_HRD: of each head.
    """
    y_BHQR, x_BHNR = _projected(y_BDQ, q_HRD), _projected(x_BDN, k_HRD)
    return (y_BHQR @ x_BHNR.mT * q_HRD.shape[1] ** -0.5).transpose(1, 2)


def gathered(x_BDN: Tensor, y_BDQ: Tensor, q_HRD: Tensor, k_HRD: Tensor, *, hard: bool = False) -> Tensor:
    """What each head gathers of the points, before VO, (B, H, Q, D).

    Args:
        x_BDN, y_BDQ, q_HRD, k_HRD: as of `logits`.
        hard: the point of the largest logit alone, the first of equal ones.
    """
    if hard:
        index_BHQ = logits(x_BDN, y_BDQ, q_HRD, k_HRD).argmax(-1).transpose(1, 2)
        return _picked(x_BDN, index_BHQ.flatten(1)).mT.unflatten(1, index_BHQ.shape[1:])
    values_BHND = x_BDN.mT[:, None].expand(-1, len(q_HRD), -1, -1)
    return attend(_projected(y_BDQ, q_HRD), _projected(x_BDN, k_HRD), values_BHND)


def rank_attend(
    x_BDN: Tensor, y_BDQ: Tensor, q_HRD: Tensor, k_HRD: Tensor, vo_HDD: Tensor, *, hard: bool = False
) -> Tensor:
    """sum_h VO_h^T sum_k a_qhk x_k, (B, D, Q).

    Args:
        x_BDN, y_BDQ, q_HRD, k_HRD, hard: as of `gathered`.
        vo_HDD: values and output in one; rows are coordinates of the points.
    """
    return torch.einsum("bhqd,hde->beq", gathered(x_BDN, y_BDQ, q_HRD, k_HRD, hard=hard), vo_HDD)


def nearest(x_BDN: Tensor, y_BDQ: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The target: of each query the point of the largest <x_j, y> + b_j, (B, D, Q).

    Args:
        x_BDN: points.
        y_BDQ: queries.
        bias_N: b, of the biased target; none where None.
    """
    score_BNQ = x_BDN.mT @ y_BDQ
    return _picked(x_BDN, (score_BNQ if bias_N is None else score_BNQ + bias_N[:, None]).argmax(1))


def farthest(x_BDN: Tensor, y_BDQ: Tensor | None = None) -> Tensor:
    """The target of self-attention, where the nearest point is the query itself: that of the least <x_j, y>, (B, D, Q).

    Args:
        x_BDN: points.
        y_BDQ: queries; the points where None.
    """
    return nearest(x_BDN, -(x_BDN if y_BDQ is None else y_BDQ))


class RankAttention(nn.Module):
    """H heads of rank R, their output matrices of full rank: `rank_attend` with weights of its own.

    Args:
        dim: D.
        rank: R; D where None.
        num_heads: H.
        hard: the largest logit takes all.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, dim: int, rank: int | None = None, num_heads: int = 1, *, hard: bool = False) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        if min(dim, rank, num_heads) < 1:
            raise ValueError(f"dim, rank and num_heads must be positive, got {dim}, {rank} and {num_heads}")
        self.dim, self.rank, self.num_heads, self.hard = dim, rank, num_heads, hard
        self.query, self.key = (nn.Parameter(torch.empty(num_heads, rank, dim)) for _ in range(2))
        self.output = nn.Parameter(torch.empty(num_heads, dim, dim))
        for weight, fan in ((self.query, rank + dim), (self.key, rank + dim), (self.output, (num_heads + 1) * dim)):
            nn.init.uniform_(weight, -math.sqrt(6 / fan), math.sqrt(6 / fan))

    def forward(self, x_BDN: Tensor, y_BDQ: Tensor) -> Tensor:
        """
        Args:
            x_BDN: points, in columns.
            y_BDQ: queries, likewise.

        Returns:
            (B, D, Q).

        Raises:
            ValueError: if the shapes do not fit.
        """
        check(x_BDN, y_BDQ, self.dim)
        return rank_attend(x_BDN, y_BDQ, self.query, self.key, self.output, hard=self.hard)

    def gathered(self, x_BDN: Tensor, y_BDQ: Tensor) -> Tensor:
        """What each head gathers, (B, H, Q, D); arguments and errors as of a call."""
        check(x_BDN, y_BDQ, self.dim)
        return gathered(x_BDN, y_BDQ, self.query, self.key, hard=self.hard)

    @torch.no_grad()
    def weigh(self, weight_H: Tensor) -> RankAttention:
        """VO_h = a_h I in place.

        Args:
            weight_H: a.
        """
        self.output.copy_(weight_H[:, None, None] * torch.eye(self.dim).to(self.output))
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}, num_heads={self.num_heads}, hard={self.hard}"


def full_rank(dim: int, *, sharpness: float = 1.0, hard: bool = True) -> RankAttention:
    """One head that solves the task: Q = tau I, K = VO = I. Hard it is exact; soft it is as tau grows.

    Args:
        dim: D.
        sharpness: tau.
        hard: see `RankAttention`.
    """
    whole = torch.eye(dim)[None]
    return _made(sharpness * whole, whole, hard).weigh(torch.ones(1))


def random_subspaces(
    dim: int,
    rank: int,
    num_heads: int,
    *,
    sharpness: float = 1.0,
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> RankAttention:
    """Heads that each look at a random subspace: Q_h = tau U_h, K_h = U_h, VO_h = I / H.

    Args:
        dim, rank, num_heads: D, R and H.
        sharpness: tau.
        hard: see `RankAttention`.
        generator: of the subspaces.

    Raises:
        ValueError: if the rank is above the width.
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be between 1 and dim ({dim}), got {rank}")
    directions = torch.randn(num_heads, dim, rank, generator=generator, dtype=torch.double)
    rows = torch.linalg.qr(directions)[0].mT.float()
    return _made(sharpness * rows, rows, hard).weigh(torch.full((num_heads,), 1 / num_heads))


def equally_spaced(num_heads: int, *, hard: bool = True) -> RankAttention:
    """In the plane: heads of rank 1 at the angles pi h / H, Q_h = K_h, VO_h = I / H.

    Args:
        num_heads: H.
        hard: see `RankAttention`.
    """
    angle_H = torch.arange(num_heads) * (math.pi / num_heads)
    rows = torch.stack([angle_H.cos(), angle_H.sin()], -1)[:, None]
    return _made(rows, rows, hard).weigh(torch.full((num_heads,), 1 / num_heads))


def least_squares(
    layer: RankAttention,
    x_BDN: Tensor,
    y_BDQ: Tensor,
    target: Callable[[Tensor, Tensor], Tensor] = nearest,
) -> Tensor:
    """The weights a (H,) of VO_h = a_h I that are best on these very queries: what they reach is a lower estimate.

    Args:
        layer: its queries and keys count.
        x_BDN, y_BDQ: points and queries.
        target: of (points, queries).
    """
    with torch.no_grad():
        heads_H = layer.gathered(x_BDN, y_BDQ).transpose(0, 1).mT.flatten(1).double()
        wanted = target(x_BDN, y_BDQ).flatten().double()
        return torch.linalg.lstsq(heads_H.T, wanted[:, None], driver="gelsd").solution[:, 0].to(x_BDN.dtype)


def check(x_BDN: Tensor, y_BDQ: Tensor, dim: int) -> None:
    """
    Raises:
        ValueError: if these are no points and queries of that width.
    """
    if x_BDN.ndim != 3 or y_BDQ.ndim != 3 or {x_BDN.shape[1], y_BDQ.shape[1]} != {dim} or len(x_BDN) != len(y_BDQ):
        raise ValueError(
            f"points and queries must be (batch, {dim}, number), got {tuple(x_BDN.shape)} and {tuple(y_BDQ.shape)}"
        )
    if not x_BDN.shape[2]:
        raise ValueError("there must be a point at least, got none")


def _projected(x_BDN: Tensor, weight_HRD: Tensor) -> Tensor:
    """(B, H, N, R)."""
    return torch.einsum("bdn,hrd->bhnr", x_BDN, weight_HRD)


def _picked(x_BDN: Tensor, index_BQ: Tensor) -> Tensor:
    """The points of these numbers, (B, D, Q)."""
    return x_BDN.gather(2, index_BQ[:, None].expand(-1, x_BDN.shape[1], -1))


def _made(q_HRD: Tensor, k_HRD: Tensor, hard: bool) -> RankAttention:
    H, R, D = q_HRD.shape
    layer = RankAttention(D, R, H, hard=hard)
    with torch.no_grad():
        layer.query.copy_(q_HRD)
        layer.key.copy_(k_HRD)
    return layer
