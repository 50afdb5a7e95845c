"""Block-sparse global attention for multi-view transformers (VGGT, pi^3): patches see few blocks of patches.

Wang et al., "Faster VGGT with Block-Sparse Global Attention", arXiv 2509.07120.

The tokens are frames side by side, each with S special tokens (camera, registers) before its patches.

    O_special = dense attention of the special queries over all keys
    P         = softmax_j(<qbar_i, kbar_j> / sqrt(D))      block means of the patches' q (b_q tokens) and k (b_k tokens)
    n_i       = #{j : c_j <= tau + 1e-5},  c = sums of P_i in falling order          (cdf_threshold)
              = int(T_k (1 - rho)),  T_k the number of key blocks                    (sparse_ratio)
              = the larger of both, where both are given;  at least 1
    O_patch   = softmax attention over the first n_i key blocks of the row, and over all special keys

| here                 | paper / code | meaning                                              | default    |
|----------------------|--------------|------------------------------------------------------|------------|
| `special_tokens`     | S            | tokens before the patches of each frame              | 5          |
| `cdf_threshold`      | tau          | pooled weight kept; lower is sparser                 | 0.97       |
| `sparse_ratio`       | rho          | share of key blocks that may be dropped, at most     | none       |
| `top_k`              | topk         | instead of both: key blocks per row                  | none       |
| `block_q`, `block_k` | b_q, b_k     | patches per block                                    | 128, 64    |
| `pool`               | pool_mode    | mean or max of a block                               | mean       |
| `order`              | use_hilbert  | order of a frame's patches, such as a Hilbert curve  | row by row |

Choices that the paper leaves open: where nothing is given tau is 0.97, of the authors' example (they ask for one).
Special keys are seen always; in the authors' kernel the first of them share a block with the last patches where the
number of patches is no multiple of b_k, and are seen where that block is chosen (`packed=True` does that). The number
of frames is an argument; the authors infer it from the positions, as the layer here does where it is told nothing
else. The curve is `hilbert_order`'s. The rotary base is open: 10000 here, or a retrofitted layer's own.
"""

from __future__ import annotations

from saccade.attention.block_sparse_vggt.layer import (
    BlockSparseGlobalAttention,
    GlobalAttention,
    GridRotary,
    retrofit_global_attention,
)
from saccade.attention.block_sparse_vggt.operator import FrameBlocks, block_sparse_vggt_attend, vggt_block_map
from saccade.catalogue import Replacement, register
from saccade.ops.blocks import block_sizes

__all__ = [
    "BlockSparseGlobalAttention",
    "FrameBlocks",
    "GlobalAttention",
    "GridRotary",
    "block_sparse_vggt_attend",
    "retrofit_global_attention",
    "vggt_block_map",
]


register(
    "block-sparse-vggt",
    kind="sequence",
    summary="Training-free global attention over frames: patches see few blocks of patches, special tokens see all.",
    supports=("bidirectional", "training-free"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/block/training-free",
    complexity="time O(density N^2 D + N^2 D / (b_q b_k)), memory O(N D + N^2 / (b_q b_k))",
    invariants=(
        "tau = 1, and rho = 0, are dense attention",
        "special tokens' rows are those of dense attention",
        "patches see all special keys",
        "a larger tau keeps a superset; with rho too, a superset of each alone",
        "frames of whole blocks: permuting them permutes the output",
        "the Hilbert order of patches is a permutation that leaves special tokens alone",
    ),
    build=BlockSparseGlobalAttention,
    example={"dim": 16, "num_heads": 4, "num_special_tokens": 1, "block_q": 8, "block_k": 4, "top_k": 2},
    at_length=lambda length: {"block_q": min(128, max(4, length // 8)), "block_k": min(64, max(2, length // 16))},
    data_dependent=True,
    replaces=Replacement(
        block_sparse_vggt_attend,
        causal=False,
        settings=lambda context: [{"cdf_threshold": tau, **block_sizes(context)} for tau in (0.6, 0.8, 0.9, 0.97)],
        per_head={"cdf_threshold": 1.0},
    ),
)
