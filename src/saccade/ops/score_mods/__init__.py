"""Modifications of scores by name: what becomes of a score before the softmax.

    s'_ij = mod(s_ij, b, h, i, j)           with FlexAttention's signature (score, b, h, q_idx, kv_idx) -> score

Each is a callable of that signature, on broadcastable index tensors, so that it runs wherever a function of the user's
runs. Being known by name it also runs in C, forward and backward, together with any mask (`saccade.plan` says when).
Tensors that it is made of (slopes, tables, biases) receive their gradients on every path, and it can be pickled.

    alibi(slopes)           s + m_h (j - i)                            Press et al., arXiv 2108.12409
    soft_cap(c)             c tanh(s / c)                              Gemma 2, arXiv 2408.00118
    relative_bias(table)    s + table[h, clamp(j - i)]                 Shaw et al., arXiv 1803.02155; Swin in 1-D
    bucketed_bias(table)    s + table[h, bucket(j - i)]                T5, arXiv 1910.10683
    bias(table)             s + table[b, h, i, j]
    grid_bias(table, mask)  s + table[h, j' - i'] on a grid            Swin, NAT
    compose(first, ...)     one after the other

Positions count from 0 for queries and keys alike; `shifted(mod, offset)` is for queries that begin at `offset`, as in
decoding with a cache.

>>> import torch, saccade
>>> from saccade import score_mods
>>> q = k = v = torch.randn(1, 2, 8, 4)
>>> capped = score_mods.compose(score_mods.soft_cap(30.0), score_mods.alibi(2))
>>> saccade.attend(q, k, v, mask=saccade.masks.causal(), score_mod=capped).shape
torch.Size([1, 2, 8, 4])
"""

from saccade.ops.score_mods.makers import (
    alibi,
    bias,
    bucketed_bias,
    compose,
    grid_bias,
    relative_bias,
    shifted,
    soft_cap,
)
from saccade.ops.score_mods.modifications import (
    Added,
    Alibi,
    Bias,
    BucketedBias,
    ByDistance,
    Composed,
    GridBias,
    Modification,
    RelativeBias,
    ScoreMod,
    Shifted,
    SoftCap,
    steps,
)

__all__ = [
    "Added",
    "Alibi",
    "Bias",
    "BucketedBias",
    "ByDistance",
    "Composed",
    "GridBias",
    "Modification",
    "RelativeBias",
    "ScoreMod",
    "Shifted",
    "SoftCap",
    "alibi",
    "bias",
    "bucketed_bias",
    "compose",
    "grid_bias",
    "relative_bias",
    "shifted",
    "soft_cap",
    "steps",
]
