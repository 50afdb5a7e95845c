"""Rectified SpaAttn: block-sparse attention, corrected by what a pooled attention map says of the blocks left out.

Liu et al., "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", arXiv 2511.19835.

A softmax over few blocks gives each of them too much. The pooled map P says how much: the sparse output is scaled down
to the weight that its blocks have in P (isolated-pooling aware reallocation, IPAR), and the rest of the weight goes to
the pooled values of the other blocks, where pooling gains more than it errs (gain-aware pooling rectification, GAPR).

    A_ij  = <qbar_i, kbar_j>                                             means over the b tokens of a block
    P_ij  = b exp(s A_ij) / (sum_j b exp(s A_ij) + sum_t exp(s <qbar_i, k_t>))    s the scale, t the real text keys
    P_i,T = the text's share, 1 - sum_j P_ij                             (0 without text: P is the softmax of s A)
    G_ij  = |A_ij| > |<dq_i, kbar_j>| + |<qbar_i, dk_j>|                 dx_i = mean of |x - xbar_i| over the block
    C_i   = the max(#{c <= p} + 1, top_k) blocks of greatest P_i (the text counts as one), c = sums in falling order;
            and the block's neighbours on the grid, and among the first F blocks all of them
    K     = C or not G                     R_i = sum_j P_ij K_ij + P_i,T
    O_i   = R_i softmax attention over the blocks of C_i and all text + sum_j P_ij (1 - K_ij) vbar_j

Text comes after the visual tokens; its queries attend to everything. The weights of each row sum to one.

| here                 | paper / code       | meaning                                        | default |
|----------------------|--------------------|------------------------------------------------|---------|
| `drop_rate`          | sa_drop_rate       | top_k = int((1 - rate) N), N visual blocks     | 0.8     |
| `top_k`              | top_k              | instead of it, the number of blocks            | none    |
| `cdf_threshold`      | p, p_remain_rates  | pooled weight after which blocks stop          | 0.3     |
| `block_q`, `block_k` | b, block_size_M, N | tokens per block                               | 128     |
| `first_frame_blocks` | F                  | Wan: N // frames; 0 elsewhere                  | 0       |
| `neighbors`          | block_neighbors    | blocks that touch in the grid, `neighbor_blocks` | none  |
| `ipar`, `gapr`       |                    | the two corrections                            | both    |
| `tail`               |                    | missing tokens of the last block are zeros, or left out | "zeros" |

The authors' drop rates: 0.8 HunyuanVideo; 0.75 Wan 2.1, Wan 2.2 TI2V, CogVideoX I2V; 0.85 Wan 2.2 A14B, CogVideoX T2V;
0.9 Flux. Wan T2V is dense in layers 0 and 1 and in the first five steps, Flux in layers 37 to 56.

Choices that the paper leaves open. Missing tokens of a short last block count as zeros in its means and it weighs as a
whole block, as in the authors' code; `tail="real"` takes means over its tokens and weighs it by their number, which
makes the identities below exact there too. Blocks without a real token have no share. The ablations are ours: IPAR
alone is R_i O_sparse with K = C, GAPR alone is O_sparse plus the pooled term; without both it is plain block-sparse
attention. The pooled map and its softmax are computed in float32 (in the authors' code in the input's type).
"""

from __future__ import annotations

from saccade.attention.rectified_spaattn.layer import RectifiedSpaAttention
from saccade.attention.rectified_spaattn.operator import (
    RectifiedBlocks,
    RectifiedMap,
    Tail,
    rectified_map,
    rectified_spaattn_attend,
)
from saccade.catalogue import Replacement, register
from saccade.ops.blocks import block_sizes

__all__ = [
    "RectifiedBlocks",
    "RectifiedMap",
    "RectifiedSpaAttention",
    "Tail",
    "rectified_map",
    "rectified_spaattn_attend",
]


register(
    "rectified-spaattn",
    kind="sequence",
    summary="Training-free block-sparse attention for video and text, corrected by a pooled map of what it left out.",
    supports=("bidirectional", "padding", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "hard", "representations": "single"},
    efficiency="sparse/block/training-free",
    complexity="time O(density N^2 D + N^2 D / (b_q b_k)), memory O(N D + N^2 / (b_q b_k))",
    invariants=(
        "top_k of all blocks is dense attention",
        "each row's weights sum to one: constant values are returned as they are",
        "blocks of identical rows: dense attention, whatever blocks are critical",
        "the gain test does not change when q or k is scaled",
        "permuting tokens inside a block permutes the output",
        "the curve over the grid is a permutation that leaves dense attention unchanged",
    ),
    build=RectifiedSpaAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "block_q": 8, "block_k": 4, "top_k": 2, "rope": True},
    at_length=lambda length: {"block_q": min(128, max(4, length // 16)), "block_k": min(128, max(4, length // 16))},
    data_dependent=True,
    replaces=Replacement(
        rectified_spaattn_attend,
        causal=False,
        settings=lambda context: [
            {"drop_rate": rate, **dict.fromkeys(("block_q", "block_k"), block_sizes(context)["block_q"])}
            for rate in (0.9, 0.8, 0.65, 0.5)
        ],
    ),
)
