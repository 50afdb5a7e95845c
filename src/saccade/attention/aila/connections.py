"""What a layer takes from all earlier ones: attention over depth, and the plainer forms beside which it is judged.

Shape letters: ... any leading axes, J earlier outputs, C width, H heads, D = C / H.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Variant = Literal["attention", "gated", "concat", "scalar", "sum", "plain"]


def depth_softmax(scores_HJ: Tensor) -> Tensor:
    """Weights (..., H, J) over earlier layers, in float32 at least."""
    return scores_HJ.to(torch.promote_types(scores_HJ.dtype, torch.float32)).softmax(-1)


def depth_attend(q_HD: Tensor, k_JHD: Tensor, v_JHD: Tensor) -> tuple[Tensor, Tensor]:
    """One query a position over its earlier layers: out (..., H, D) and the weights (..., H, J).

    a_j = softmax_j(q . k_j / sqrt(D)),   out = sum_j a_j v_j

    Args:
        q_HD: the query, (..., H, D).
        k_JHD, v_JHD: keys and values of the earlier layers, (..., J, H, D).

    >>> q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 3, 4, 8)
    >>> out, weights = depth_attend(q, k, k)
    >>> out.shape, weights.shape
    (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 4, 3]))
    """
    wide = torch.promote_types(q_HD.dtype, torch.float32)
    scores_HJ = torch.einsum("...hd,...jhd->...hj", q_HD.to(wide) * q_HD.shape[-1] ** -0.5, k_JHD.to(wide))
    weights_HJ = depth_softmax(scores_HJ)
    return torch.einsum("...hj,...jhd->...hd", weights_HJ.to(v_JHD.dtype), v_JHD), weights_HJ


class Connection(nn.Module):
    """Earlier outputs (..., J, C) -> c (..., C); a subclass gives `mix`."""

    def mix(self, h_JC: Tensor) -> tuple[Tensor, Tensor | None]:
        """c, and the weights (..., H, J) with which it was made, None where there are none."""
        raise NotImplementedError

    def forward(self, h_JC: Tensor) -> Tensor:
        return self.mix(h_JC)[0]

    def weights(self, h_JC: Tensor) -> Tensor:
        """The weights over earlier outputs, (..., H, J).

        Raises:
            ValueError: if this connection has none.
        """
        weights_HJ = self.mix(h_JC)[1]
        if weights_HJ is None:
            raise ValueError(f"{type(self).__name__} has no weights over earlier layers")
        return weights_HJ


class GatedConnection(Connection):
    """Architecture 1, gated: H input-dependent weighted means of J earlier outputs, and a linear layer over them.

    Args:
        dim, num_heads, sources: C, H and J.
    """

    def __init__(self, dim: int, num_heads: int, sources: int) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(num_heads, dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, sources))
        self.out = nn.Linear(num_heads * dim, dim)

    def mix(self, h_JC: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h_JC.dtype, torch.float32)
        weights_HJ = depth_softmax((h_JC.to(wide) @ self.score.to(wide).mT).mT + self.bias)
        return self.out((weights_HJ.to(h_JC.dtype) @ h_JC).flatten(-2)), weights_HJ


class ConcatConnection(Connection):
    """Architecture 1, plainest: one linear layer over J earlier outputs.

    Args:
        dim, sources: C and J.
        warm: start at c = h_{l-1}.
    """

    def __init__(self, dim: int, sources: int, *, warm: bool = False) -> None:
        super().__init__()
        self.out = nn.Linear(sources * dim, dim)
        if warm:
            with torch.no_grad():
                self.out.weight.zero_()[:, -dim:] = torch.eye(dim)
        nn.init.zeros_(self.out.bias)

    def mix(self, h_JC: Tensor) -> tuple[Tensor, None]:
        return self.out(h_JC.flatten(-2)), None


class ScalarConnection(Connection):
    """Architecture 1, cheapest: one learned weight for each of J earlier outputs.

    Args:
        dim, sources: C and J.
        project: a linear map of each output before they are added.
    """

    def __init__(self, dim: int, sources: int, *, project: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sources))
        self.maps = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(sources)) if project else None

    def mix(self, h_JC: Tensor) -> tuple[Tensor, Tensor]:
        weights_J = depth_softmax(self.logits)
        if self.maps is not None:
            h_JC = torch.stack([u(h) for u, h in zip(self.maps, h_JC.unbind(-2))], -2)
        return weights_J.to(h_JC.dtype) @ h_JC, weights_J.expand(*h_JC.shape[:-2], 1, -1)


class SumConnection(Connection):
    """The ablation without weights: the sum of all earlier outputs, or with `last` the newest alone."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__()
        self.last = last

    def mix(self, h_JC: Tensor) -> tuple[Tensor, None]:
        return (h_JC[..., -1, :] if self.last else h_JC.sum(-2)), None


class AttentionConnection(Connection):
    """Architecture 2: multi-head attention from the newest output, or a learned query, to all earlier ones.

    Args:
        dim, num_heads: C and H, a divisor of C.
        query: "newest" or "learned".
        targets: layers that share these projections; a learned query has a row for each.

    Raises:
        ValueError: if the heads do not divide C, or the query is of another kind.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, *, query: Literal["newest", "learned"] = "newest", targets: int = 1
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if query not in ("newest", "learned"):
            raise ValueError(f"query must be 'newest' or 'learned', got {query!r}")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(targets, num_heads, dim // num_heads)) if query == "learned" else None
        self.q_proj = nn.Linear(dim, dim, bias=False) if query == "newest" else None
        self.k_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, h_JC: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(h_JC[..., -1, :], *self.project(h_JC))

    def project(self, h_C: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (..., H, D), of any outputs."""
        k, v = (p(h_C).unflatten(-1, (self.num_heads, -1)) for p in (self.k_proj, self.v_proj))
        return k, v

    def attend(self, newest_C: Tensor, k_JHD: Tensor, v_JHD: Tensor, target: int = 0) -> tuple[Tensor, Tensor]:
        """c and the weights for layer number `target` of those that share these projections."""
        if self.q_proj is not None:
            q_HD = self.q_proj(newest_C).unflatten(-1, (self.num_heads, -1))
        else:
            assert self.query is not None
            q_HD = self.query[target].expand(*newest_C.shape[:-1], -1, -1)
        out_HD, weights_HJ = depth_attend(q_HD, k_JHD, v_JHD)
        return self.out_proj(out_HD.flatten(-2)), weights_HJ
