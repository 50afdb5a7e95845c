"""Neighbourhood attention in 1-D, 2-D and 3-D: each token attends a window of fixed size around itself.

Hassani, Hwu, Shi, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
arXiv 2403.04690.

On every axis, position i of n, with dilation d, i' = i // d and n' = ceil((n - i mod d) / d) positions like it:

    leader  i* = min(i' // g * g + g // 2, n' - 1)          window  s = clamp(i* - w // 2, 0, n' - w),  s .. s + w - 1
    causal  i* = min(i' // g * g + g - 1,  n' - 1)          window  max(i* - w + 1, 0) .. i'

    j is a neighbour of i  iff  on every axis  j mod d = i mod d  and  j // d lies in the window
    out_i = sum_j softmax_j(scale q_i . k_j + bias[h, j' - i' + w - 1]) v_j          over neighbours and extra keys

At borders the window is moved inwards, so that there are always prod(w) neighbours (on causal axes, fewer at the
start). The paper's fused kernels are flash attention over tiles of queries and the box of keys that a tile needs; here
that is `saccade.ops.windows`, on which `attend` runs `masks.neighborhood`. The paper's unfused form, scores of the
window as a tensor, is `neighborhood_scores` and `neighborhood_sum`.

| here          | paper | meaning                                                                    | default |
|---------------|-------|----------------------------------------------------------------------------|---------|
| kernel_size   | w     | neighbours per axis; even ones look one further to the left                | 7 (NAT) |
| dilation      | d     | step between neighbours per axis; prod(d) independent grids                | 1       |
| stride        | g     | queries that share a window (authors' later code); g = w: Swin's partition | 1       |
| causal        | c     | per axis, no neighbour after the query                                     | False   |
| relative_bias | RPB   | table (H, 2 w - 1, ...) added to the scores (NAT; later dropped)           | False   |

Choices that the paper leaves open: a causal axis may be shorter than w d, its windows are then as far as there are
tokens (the authors refuse; decoding needs it). The layer, not the function, fits other axes that are too short:
dilation first (DiNAT: at most n // w), then the kernel. Padding, which the kernels do not know, hides keys and leaves
the windows where they are. Only stride 1 decodes: the last leader of a longer stride depends on the length to come.
"""

from __future__ import annotations

from saccade.attention.neighborhood.layer import NeighborhoodAttention, RollingCache
from saccade.attention.neighborhood.operator import neighborhood_attend, neighborhood_scores, neighborhood_sum
from saccade.catalogue import register

__all__ = ["NeighborhoodAttention", "RollingCache", "neighborhood_attend", "neighborhood_scores", "neighborhood_sum"]


register(
    "neighborhood",
    kind="sequence",
    summary="Each token attends a window around itself on a 1-D, 2-D or 3-D grid, dilated, strided, causal per axis.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "local", "representations": "single"},
    efficiency="sparse/fixed/window",
    complexity="time O(N prod(w) D), memory O(N D), cache O(w d D)",
    invariants=(
        "a window of the whole grid is full attention, a window of one gives the value",
        "prod(w) neighbours for every query wherever no axis is causal",
        "1-D causal is the band 0 <= i - j < w",
        "dilation is each residue class by itself",
        "stride = kernel is attention inside non-overlapping windows",
        "the mask is the product of its axes' masks",
        "the fused form equals the unfused one, forward and backward",
        "extra keys equal one softmax over the union, forward and backward",
        "decoding with a cache of (w - 1) d tokens equals the parallel form",
    ),
    build=NeighborhoodAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True, "kernel_size": 3, "dilation": 2},
    at_length=lambda length: {"kernel_size": min(256, max(4, length // 8)), "rope": True},
)
