"""MRA: softmax attention in several resolutions. Blocks that matter are exact, the others are one number each.

Zeng et al., "Multi Resolution Analysis (MRA) for Approximate Self-Attention", arXiv 2207.10284.

    A         = exp(scale Q K^T),  approximated tile by tile; the tiles cover every pair exactly once
    S^s_xy    = scale <qbar^s_x, kbar^s_y>        means over blocks of s tokens;   mu^s_xy = exp(S^s_xy) <= mean of A
    J_0       = all tiles of s_0;   J_i = J_{i-1}, its m_i tiles of scale s_{i-1} with the largest mu cut into tiles s_i
    Ahat      = sum over the tiles of J of mu on the tile;          out = D^-1 Ahat V,   D = row sums of Ahat

MRA-2 is R = {32, 1}: the chosen 32 x 32 blocks are exact attention, the rest is attention over block means in which
block y counts c_y times, and the two are merged by their log-sum-exp. MRA-2-s keeps the exact part alone.

| here              | paper, code                        | meaning                                    | default    |
|-------------------|------------------------------------|--------------------------------------------|------------|
| `resolutions`     | R = {s_0 > ... > s_k}              | scales, each a multiple of the next        | (32, 1)    |
| `num_blocks`      | m_i, `num_block`                   | tiles cut at each scale, per head          | from below |
| `blocks_per_row`  | `block_per_row`                    | m_i / (blocks of s_{i-1} in the sequence)  | 8          |
| `mode`            | `approx_mode`                      | "full" (MRA-2), "sparse" (MRA-2-s)         | "full"     |
| `first_blocks`    | `initial_prior_first_n_blocks`     | always exact: first block rows and columns | 0          |
| `diagonal_blocks` | `initial_prior_diagonal_n_blocks`  | always exact: band of |x - y| <= half of it | 0          |

Choices that the paper leaves open: tiles are ranked by S less its row's largest value, one ranking for the whole
matrix, as in the released MRA-2 (the paper ranks by mu); deeper scales take off the same row value. With padding, a
sequence gets the tiles that it would get alone. The code's 1e-6 in the denominators is left out (weights sum to 1).
`released_ranking` has two peculiarities of the code. Tiles that tie with the last chosen one are in neither part, and
their mass is lost: each row's largest value is exactly 0, in the priors' tiles as well, so that it happens where fewer
tiles are chosen than there are rows and forced tiles together (a fifth of random small cases), never with more. And
row maxima are taken over padding too, which changes the choice where there is some. The recordings have neither.
"""

from __future__ import annotations

from saccade.attention.mra.layer import MRA
from saccade.attention.mra.operator import mra_attend, mra_pairs, patch_order
from saccade.catalogue import Replacement, register

__all__ = ["MRA", "mra_attend", "mra_pairs", "patch_order"]


register(
    "mra",
    kind="sequence",
    summary="Softmax attention at two or more resolutions: important blocks exact, the others by their means.",
    supports=("bidirectional", "cross", "padding", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="sparse/block/training-free",
    complexity="time O(N r b D + N^2 D / b^2) with r exact blocks of b tokens per row, memory O(N D + N^2 / b^2 bits)",
    invariants=(
        "all blocks chosen: both modes equal dense softmax attention",
        "blocks of equal queries and keys: the full mode equals dense attention for any choice",
        "weights are positive and sum to 1; constant values come out",
        "the sparse mode with the diagonal alone is block-diagonal attention",
        "permuting the tokens of a block permutes the outputs",
        "mu <= mean of A over the block <= (1 + C_r) mu",
    ),
    build=MRA,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "resolutions": (4, 1), "blocks_per_row": 2},
    at_length=lambda length: {
        "resolutions": (min(32, max(4, length // 16)), 1),
        "blocks_per_row": 8 if length >= 1024 else 4,
    },
    data_dependent=True,
    replaces=Replacement(
        mra_attend,
        causal=False,
        kept=mra_pairs,
        # the paper's 32, smaller where that would leave few blocks
        settings=lambda context: [
            {"resolutions": (min(32, max(4, 1 << max(1, context // 16).bit_length() - 1)), 1), "blocks_per_row": rows}
            for rows in (2, 4, 8, 16)
        ],
    ),
)
