"""CCA: one vision transformer with an embedding space for each attribute, switched by a conditional last block.

Song, Hwang, Yoon, Choi, Gu, "Conditional Cross Attention Network for Multi-Space Embedding without Entanglement in Only
a SINGLE Network", ICCV 2023, arXiv 2307.13254.

    X = tokens of an image after 11 blocks,   e_c a query for attribute c
    y = W_o softmax((W_q e_c) (W_k LN(X))^T / sqrt(D_h)) W_v LN(X),   Z = X + y,   out = Z + MLP(LN(Z))
    f_c = W_e LN(out_class) / ||.||

All rows of the paper's repeated condition are alike, so one query for an image and an attribute is computed, at the
class token alone; all K of an image share backbone, keys and values.

| here            | paper                                   | default                                |
|-----------------|-----------------------------------------|----------------------------------------|
| `placement`     | where the conditional block stands      | "replace" the last (also "append")     |
| `condition`     | e_c                                     | "table" (also "mlp", "mask")           |
| `embedding_dim` | width of f_c                            | 340                                    |
| `projection`    | W_e for all or one for each             | "singleton" (also "branch")            |
| `dropout`       | in the block                            | 0.1                                    |

No code of the authors is known. A runnable implementation by others fixes query, keys, residual and norms; it appends
a block where a summary of the paper says that the last becomes the conditional one. The table starts at a deviation of
1, as layer norms give. Training: `triplet_loss` by the protocol of the benchmark (cosine, margin 0.2, 100,000 triplets
an epoch, batches of 16, 1e-4 with a factor of 0.985 an epoch), or `AttributeLoss` as in that implementation. `from_vit`
puts it on a trained vision transformer.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.conditional_cross_attention.head import (
    CONDITIONS,
    PROJECTIONS,
    ConditionalBlock,
    ConditionalHead,
    Conditions,
)
from saccade.models.conditional_cross_attention.losses import AttributeLoss, semi_hard_loss, triplet_loss
from saccade.models.conditional_cross_attention.network import PLACEMENTS, ConditionalViT

__all__ = [
    "CONDITIONS",
    "PLACEMENTS",
    "PROJECTIONS",
    "AttributeLoss",
    "ConditionalBlock",
    "ConditionalHead",
    "ConditionalViT",
    "Conditions",
    "semi_hard_loss",
    "triplet_loss",
]


register(
    "conditional-cross-attention",
    kind="model",
    summary="One vision transformer, an embedding space for each attribute: its last block's query is the attribute.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="the backbone once, and K queries in one block: O(K N D)",
    invariants=(
        "K queries in one call are K calls; the class row is that of the whole sequence",
        "equal queries give equal embeddings, of unit length; y is the same at all positions",
        "patches in another order, with their positions, change nothing",
        "with W_q LN(x_class) for the query a replaced block gives the ViT's own class token",
        "the gradient of one condition leaves the rows of others alone",
    ),
    build=ConditionalViT,
    example={
        "num_attributes": 3,
        "embedding_dim": 6,
        "image_size": 8,
        "patch": 4,
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "dropout": 0.0,
    },
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    tasks={
        "recognise": {
            "num_attributes": 2,
            "embedding_dim": 64,
            "image_size": 32,
            "patch": 4,
            "dim": 64,
            "depth": 3,
            "num_heads": 4,
            "dropout": 0.0,
        }
    },
)
