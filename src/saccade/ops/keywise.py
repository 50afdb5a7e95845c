"""Key-wise attention between two maps: every position attends to a few keys, never to all positions of the other map.

A map is cut into p x p regions. Two forms, each for every head by itself:

    distributed      one representative of each region of the other map is attended to
        c = mean_y k_y,  s_y = sigmoid(beta + alpha c . k_y),  r_k = (sum_y s_y k_y + c) / (n + 1)       of n positions
        out_i = sum_z softmax_z(q_i . r_k,z) r_v,z                                           r_v with the same s
    progressive      a region of the other map is chosen for each region, and attended to inside
        z(x) = argmax_z sum_y q_(x,y) . k_(z,y)                               the same place y of both regions
        out_(x,y) = sum_y' softmax_y'(q_(x,y) . k_(z(x),y')) v_(z(x),y')

(A2K: Zhu et al., arXiv 2212.04105.) With N and M positions this is O(N M / p^2) and O(N p^2) products, and no N x M
tensor. The choice of a region has no gradient. Maps may differ in size and end inside a region: what is missing there
is in no sum, and nobody attends to it.

Shape letters: B batch, C channels of queries and keys, E of values, H height, W width, h heads, d and e channels of a
head, n regions of the queries' map, m of the keys', r = p p positions of a region.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.attend import attend

__all__ = [
    "block",
    "choose_regions",
    "distributed_attention",
    "distributed_reference",
    "progressive_attention",
    "progressive_reference",
    "representatives",
    "unblock",
]

#: scores of regions that are compared at once
_TILE = 1 << 22


def block(x_BCHW: Tensor, region: int) -> Tensor:
    """Regions of a map, (B, C, n, r), row by row, and their positions row by row; zeros where the map has ended.

    Args:
        x_BCHW: a map.
        region: p.

    >>> block(torch.arange(16.0).view(1, 1, 4, 4), 2)[0, 0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    B, C, H, W = x_BCHW.shape
    down, right = -H % region, -W % region
    if down or right:
        x_BCHW = F.pad(x_BCHW, (0, right, 0, down))
    x = x_BCHW.unflatten(3, (-1, region)).unflatten(2, (-1, region))
    return x.transpose(3, 4).reshape(B, C, -1, region * region)


def unblock(x_BCnr: Tensor, region: int, size: tuple[int, int]) -> Tensor:
    """The map of this height and width of which these are the regions; what `block` filled up falls away.

    Args:
        x_BCnr: regions.
        region: p.
        size: height and width of the map.
    """
    (B, C), (H, W) = x_BCnr.shape[:2], size
    rows, columns = -(-H // region), -(-W // region)
    x = x_BCnr.reshape(B, C, rows, columns, region, region).transpose(3, 4)
    return x.reshape(B, C, rows * region, columns * region)[:, :, :H, :W]


def distributed_attention(
    q_BCHW: Tensor,
    k_BCHW: Tensor,
    v_BEHW: Tensor,
    *,
    region: int,
    num_heads: int = 1,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
) -> Tensor:
    """Attention to a representative of each region, (B, E, H, W) of the queries' size.

    Args:
        q_BCHW: queries.
        k_BCHW, v_BEHW: keys and values, of one size, which may be another.
        region: p.
        num_heads: divides C and E.
        alpha, beta: scale and offset of the similarity to the centre.

    Raises:
        ValueError: if the maps do not go together.

    >>> q, k = torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 2, 4)
    >>> distributed_attention(q, k, torch.ones(1, 1, 2, 4), region=2).shape
    torch.Size([1, 1, 1, 3])
    """
    _check(q_BCHW, k_BCHW, v_BEHW, region, num_heads)
    k_Bhmd, v_Bhme = representatives(k_BCHW, v_BEHW, region=region, num_heads=num_heads, alpha=alpha, beta=beta)
    out = attend(_tokens(q_BCHW, num_heads), k_Bhmd.to(q_BCHW.dtype), v_Bhme.to(q_BCHW.dtype), scale=1.0)
    return out.mT.reshape(q_BCHW.shape[0], v_BEHW.shape[1], *q_BCHW.shape[2:])


def representatives(
    k_BCHW: Tensor,
    v_BEHW: Tensor,
    *,
    region: int,
    num_heads: int = 1,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """r_k and r_v of each region: (B, h, m, d) and (B, h, m, E / h).

    Args:
        k_BCHW, v_BEHW, region, num_heads, alpha, beta: as in `distributed_attention`.
    """
    k_Bhdmr, v_Bhemr = (_heads(block(x, region), num_heads) for x in (k_BCHW, v_BEHW))
    real = _real(k_BCHW, region)
    counts = float(region * region) if real is None else real.sum(-1).to(k_BCHW.dtype)
    k_centre, v_centre = k_Bhdmr.sum(-1) / counts, v_Bhemr.sum(-1) / counts
    similar_Bhmr = (beta + alpha * (k_centre[..., None] * k_Bhdmr).sum(2)).sigmoid()
    pairs = ((k_Bhdmr, k_centre), (v_Bhemr, v_centre))  # zeros beyond the map add nothing to either sum
    k, v = (((similar_Bhmr[:, :, None] * x).sum(-1) + centre) / (counts + 1) for x, centre in pairs)
    return k.mT, v.mT


def progressive_attention(
    q_BCHW: Tensor, k_BCHW: Tensor, v_BEHW: Tensor, *, region: int, num_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention inside the best region for each region of queries.

    Args:
        q_BCHW: queries.
        k_BCHW, v_BEHW: keys and values, of one size, which may be another.
        region: p.
        num_heads: divides C and E.

    Returns:
        out (B, E, H, W) of the queries' size, and the regions chosen, (B, h, n).

    Raises:
        ValueError: if the maps do not go together.
    """
    _check(q_BCHW, k_BCHW, v_BEHW, region, num_heads)
    B, h, r = q_BCHW.shape[0], num_heads, region * region
    q_Bhnrd, k_Bhmrd, v_Bhmre = (_regions(x, region, h) for x in (q_BCHW, k_BCHW, v_BEHW))
    chosen_Bhn = _choose(q_Bhnrd, k_Bhmrd)
    regions = k_Bhmrd.shape[2]
    first_Bh1 = torch.arange(0, B * h * regions, regions, device=q_BCHW.device).view(B, h, 1)
    row = (first_Bh1 + chosen_Bhn).flatten()
    k, v = (x.flatten(0, 2).index_select(0, row).view(B, -1, r, x.shape[-1]) for x in (k_Bhmrd, v_Bhmre))
    real = _real(k_BCHW, region)
    mask = None if real is None else real[chosen_Bhn].flatten(1, 2)[:, :, None].expand(-1, -1, r, r)
    out = attend(q_Bhnrd.flatten(1, 2), k, v, mask=mask, scale=1.0)
    out_BEnr = out.unflatten(1, (h, -1)).movedim(-1, 2).flatten(1, 2)
    return unblock(out_BEnr, region, (q_BCHW.shape[2], q_BCHW.shape[3])), chosen_Bhn


def choose_regions(q_BCHW: Tensor, k_BCHW: Tensor, *, region: int, num_heads: int = 1) -> Tensor:
    """z(x), for each region of queries the number of the best of the other map, (B, h, n); without gradient.

    Args:
        q_BCHW, k_BCHW: queries and keys.
        region: p.
        num_heads: divides C.
    """
    return _choose(_regions(q_BCHW, region, num_heads), _regions(k_BCHW, region, num_heads))


def _choose(q_Bhnrd: Tensor, k_Bhmrd: Tensor) -> Tensor:
    with torch.no_grad():
        q, k = q_Bhnrd.flatten(3), k_Bhmrd.flatten(3)
        rows = max(1, _TILE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
        return torch.cat([(part @ k.mT).argmax(-1) for part in q.split(rows, 2)], 2)


def distributed_reference(
    q_BCHW: Tensor,
    k_BCHW: Tensor,
    v_BEHW: Tensor,
    *,
    region: int,
    num_heads: int = 1,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
) -> Tensor:
    """`distributed_attention`, slow and obvious: region after region. The oracle of the tests.

    Args:
        q_BCHW, k_BCHW, v_BEHW, region, num_heads, alpha, beta: as in `distributed_attention`.

    Raises:
        ValueError: as `distributed_attention`.
    """
    _check(q_BCHW, k_BCHW, v_BEHW, region, num_heads)
    heads = []
    for q, k, v in zip(*(x.chunk(num_heads, 1) for x in (q_BCHW, k_BCHW, v_BEHW)), strict=True):
        keys, values = [], []
        for box in _boxes(k, region):
            k_Bdr, v_Ber = k[box].flatten(2), v[box].flatten(2)
            centre, count = k_Bdr.mean(-1, keepdim=True), k_Bdr.shape[2]
            similar_B1r = (beta + alpha * (centre * k_Bdr).sum(1, keepdim=True)).sigmoid()
            keys.append(((similar_B1r * k_Bdr).sum(-1) + centre[..., 0]) / (count + 1))
            values.append(((similar_B1r * v_Ber).sum(-1) + v_Ber.mean(-1)) / (count + 1))
        weights_BmHW = torch.einsum("bdhw,mbd->bmhw", q, torch.stack(keys)).softmax(1)
        heads.append(torch.einsum("bmhw,mbe->behw", weights_BmHW, torch.stack(values)))
    return torch.cat(heads, 1)


def progressive_reference(
    q_BCHW: Tensor, k_BCHW: Tensor, v_BEHW: Tensor, *, region: int, num_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """`progressive_attention`, slow and obvious: region after region. The oracle of the tests.

    Args:
        q_BCHW, k_BCHW, v_BEHW, region, num_heads: as in `progressive_attention`.

    Raises:
        ValueError: as `progressive_attention`.
    """
    _check(q_BCHW, k_BCHW, v_BEHW, region, num_heads)
    outs, chosen = [], []
    for q, k, v in zip(*(x.unbind() for x in (q_BCHW, k_BCHW, v_BEHW)), strict=True):
        for q_h, k_h, v_h in zip(*(x.chunk(num_heads) for x in (q, k, v)), strict=True):
            out = v_h.new_zeros(v_h.shape[0], *q_h.shape[1:])
            for box in _boxes(q_h, region):
                parts = [(k_h[other], v_h[other]) for other in _boxes(k_h, region)]
                best = max(range(len(parts)), key=lambda z: _aligned(q_h[box], parts[z][0]).item())
                keys, values = (x.flatten(1) for x in parts[best])
                weights = (q_h[box].flatten(1).mT @ keys).softmax(-1)
                out[box] = (weights @ values.mT).mT.view_as(out[box])
                chosen.append(best)
            outs.append(out)
    index = torch.tensor(chosen, device=q_BCHW.device).view(q_BCHW.shape[0], num_heads, -1)
    return torch.stack(outs).unflatten(0, (-1, num_heads)).flatten(1, 2), index


def _boxes(x: Tensor, region: int) -> list[tuple[object, slice, slice]]:
    """Where the regions of a map lie, row by row."""
    rows, columns = ([slice(i, i + region) for i in range(0, size, region)] for size in x.shape[-2:])
    return [(..., row, column) for row in rows for column in columns]


def _aligned(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two regions at the places that both have."""
    rows, columns = (min(sizes) for sizes in zip(a.shape[-2:], b.shape[-2:], strict=True))
    return (a[..., :rows, :columns] * b[..., :rows, :columns]).sum()


def _heads(x_BCnr: Tensor, num_heads: int) -> Tensor:
    return x_BCnr.unflatten(1, (num_heads, -1))


def _regions(x_BCHW: Tensor, region: int, num_heads: int) -> Tensor:
    """`block`, the channels of each head last: (B, h, n, r, d)."""
    return _heads(block(x_BCHW, region), num_heads).movedim(2, -1).contiguous()


def _tokens(x_BCHW: Tensor, num_heads: int) -> Tensor:
    """(B, h, H W, d)."""
    return x_BCHW.flatten(2).unflatten(1, (num_heads, -1)).mT


def _real(x_BCHW: Tensor, region: int) -> Tensor | None:
    """Which positions of the regions (m, r) lie on the map; None where all do."""
    H, W = x_BCHW.shape[2:]
    if H % region == 0 and W % region == 0:
        return None
    return block(torch.ones(1, 1, H, W, dtype=torch.bool, device=x_BCHW.device), region)[0, 0]


def _check(q: Tensor, k: Tensor, v: Tensor, region: int, num_heads: int) -> None:
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(
            f"q, k and v must be maps (B, C, H, W), got {', '.join(str(tuple(x.shape)) for x in (q, k, v))}"
        )
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(f"q and k must agree in batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[0] != v.shape[0] or k.shape[2:] != v.shape[2:]:
        raise ValueError(f"k and v must agree in batch and size, got {tuple(k.shape)} and {tuple(v.shape)}")
    if 0 in (*q.shape[2:], *k.shape[2:]):
        raise ValueError(f"maps must have positions, got {tuple(q.shape)} and {tuple(k.shape)}")
    if region < 1:
        raise ValueError(f"region must be at least 1, got {region}")
    if num_heads < 1 or q.shape[1] % num_heads or v.shape[1] % num_heads:
        raise ValueError(f"num_heads must divide {q.shape[1]} and {v.shape[1]} channels, got {num_heads}")
