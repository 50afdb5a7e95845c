"""What `device.py` measures: mechanisms at a length, their FLOPs, the mask with which FlexAttention does the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

import saccade
from saccade import masks

#: why FlexAttention is not in a row
NO_FLEX = {
    "moba": "each query has blocks of its own, and FlexAttention skips what no query of 128 wants",
    "lightning": "no softmax",
}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One mechanism at one length.

    Attributes:
        run: it, on q, k and v.
        path: the backend that it takes for them.
        flops: forward, of all heads.
        backward: FLOPs of the backward pass for one forward.
        causal: which dense attention stands beside it.
        flex: the mask with which FlexAttention does the same, where it can.
    """

    run: Attention
    path: Callable[[Tensor, Tensor, Tensor], str]
    flops: float
    backward: float = 2.5
    causal: bool = True
    flex: masks.Mask | None = None


@dataclass(frozen=True)
class Size:
    """Tokens, heads, width and where: what a case is made for."""

    tokens: int
    heads: int
    width: int
    device: torch.device

    def of_pairs(self, pairs: float) -> float:
        """FLOPs forward of so many pairs a head."""
        return 4.0 * self.width * self.heads * pairs


def attending(mask: masks.Mask, pairs: float, size: Size, causal: bool) -> Case:
    """Masked attention of so many pairs a head, with its rival in FlexAttention."""
    return Case(
        lambda q, k, v: saccade.attend(q, k, v, mask=mask),
        lambda q, k, v: saccade.plan(q, k, v, mask=mask).backend,
        size.of_pairs(pairs),
        causal=causal,
        flex=mask,
    )


def block_sparse(size: Size) -> Case:
    """A twentieth of the blocks of 128 tokens, and the diagonal; for each head others."""
    n = max(1, size.tokens // 128)
    keep = torch.rand(1, size.heads, n, n, generator=torch.Generator().manual_seed(0)) < 0.05
    keep |= torch.eye(n, dtype=torch.bool)
    pairs = keep.float().mean().item() * size.tokens**2
    mask = masks.blocks(keep.to(size.device), -(-size.tokens // n))
    return attending(mask, pairs, size, causal=False)


def window(size: Size) -> Case:
    """The last 1,024 tokens of each, itself among them."""
    width = min(1024, size.tokens)
    pairs = width * (width + 1) / 2 + (size.tokens - width) * width
    mask = masks.window(width - 1)
    return attending(mask, pairs, size, causal=True)


def neighbourhood(size: Size) -> Case:
    """The 31 x 31 places around each of a picture."""
    high = next(side for side in range(isqrt(size.tokens), 0, -1) if size.tokens % side == 0)
    shape = (high, size.tokens // high)
    kernel = tuple(min(31, side - 1 + side % 2) for side in shape)
    mask = masks.neighborhood(shape, kernel).to(size.device)
    return attending(mask, size.tokens * kernel[0] * kernel[1], size, causal=False)


def moba(size: Size) -> Case:
    """Blocks of 512, the own one and seven more."""
    from saccade.attention.moba import moba_attend
    from saccade.ops.triton.routed import runs_in_triton

    block, top_k = min(512, max(1, size.tokens // 16)), 8
    past = (torch.arange(size.tokens) // block).clamp(max=top_k - 1).sum().item() * block
    own = size.tokens * (block + 1) / 2
    return Case(
        lambda q, k, v: moba_attend(q, k, v, block_size=block, top_k=top_k),
        lambda q, k, v: "triton" if runs_in_triton(q) else "tiles",
        size.of_pairs(past + own),
    )


def lightning(size: Size) -> Case:
    """A fixed decay for each head."""
    from saccade.attention.lightning import decay_slopes

    decay = (-torch.tensor(decay_slopes(size.heads, 0, 2), device=size.device)).exp()
    return Case(
        lambda q, k, v: saccade.linear_attend(q, k, v, decay=decay),
        lambda q, k, v: saccade.linear_plan(q, k, v, decay=decay).backend,
        4.0 * size.width**2 * size.tokens * size.heads,
        backward=2.0,
    )


CASES: Mapping[str, Callable[[Size], Case]] = {
    "block-sparse": block_sparse,
    "window": window,
    "neighbourhood": neighbourhood,
    "moba": moba,
    "lightning": lightning,
}
