"""Mega: gated attention whose queries and keys come from a moving average of the input.

Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655 (ICLR 2023). f = SiLU.

    X' = SiLU(EMA(X) + omega X)                         damped, h dimensions per channel (`ops.ema`)
    V  = f(X W_v)                                       from X, not from X'
    [u | z r | h] = X' W_mx;   u = sigmoid(u),  z, r = SiLU(z r)
    Q, K = z gamma_0 + beta_0,  z gamma_1 + beta_1
    H  = f(h + (A V * r) W_h),   Y = X + u (H - X)      the layer has its own, gated residual
    A  = softmax(Q K^T / sqrt(Z) + B),   or phi(Q K^T / n + B),  n the number of keys that the query may see

    phi laplace: (1 + erf((s - mu) / (sigma sqrt 2))) / 2,   relu2: relu(s)^2;   mu = sqrt(1/2), sigma = sqrt(1/(4 pi))

Mega-chunk attends inside chunks of C tokens, at a cost linear in N; the average carries what crosses them.

| paper | here |
|---|---|
| damping delta, alpha of the EMA | sigmoid of the raw `alpha`, `delta`: the code's names, swapped against the paper's |
| EMA beta, eta | `beta`, `gamma` / sqrt(h); the 1 / sqrt(h) is the code's only |
| z, v, h (Z, V in costs) | key_dim, value_dim, ema_dim |
| phi | `attention`: "softmax", "laplace", "relu2" |
| b_rel | `position`: "simple", one learned number per distance up to max_positions (the chunk size), or "rotary" |

The rotary bias is the product of two learned vectors, each rotated to its place: further channels of Q and K.

What the paper leaves open: padded tokens enter the average as 0 and are no keys; a query without keys gets A V = 0 (the
authors unmask a row that is padding throughout; nothing real depends on it). More than one head is not in the paper:
z and v are split over heads, each with its own part of Q, K, gamma and beta. The default position is rotary.
"""

from __future__ import annotations

from saccade.attention.mega.attention import MegaAttention, MegaCache, Norm
from saccade.attention.mega.block import MegaBlock, NormalizedFeedForward
from saccade.attention.mega.cross_attention import MegaCrossAttention
from saccade.attention.mega.ema import DampedEMA
from saccade.attention.mega.operator import (
    Attention,
    Laplace,
    RotaryBias,
    SimpleBias,
    SquaredRelu,
    laplace,
    mega_attend,
)
from saccade.catalogue import register

__all__ = [
    "Attention",
    "DampedEMA",
    "Laplace",
    "MegaAttention",
    "MegaBlock",
    "MegaCache",
    "MegaCrossAttention",
    "Norm",
    "NormalizedFeedForward",
    "RotaryBias",
    "SimpleBias",
    "SquaredRelu",
    "laplace",
    "mega_attend",
]

register(
    "mega",
    kind="sequence",
    summary="Gated attention whose queries and keys come from a moving average of the input; linear where chunked.",
    supports=("causal", "bidirectional", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/decay/data-independent",
    complexity="time O(N^2 (Z + V)), or O(N C (Z + V)) in chunks of C; the average O(N h D); state O(h D + C (Z + V))",
    note="Has its own gated residual. Cross-attention, feed-forward network, block and the models' configurations are "
    "in saccade.attention.mega: MegaCrossAttention, NormalizedFeedForward, MegaBlock. More than one head is not in "
    "the paper.",
    invariants=(
        "the average by chunks, by FFT, step by step and as a Toeplitz matrix is one, in both directions",
        "p = 0: the average is 0 and its module gives SiLU(omega x); a = 0: a cumulative sum",
        "update gate 0: the identity; a chunk as long as the sequence: full attention",
        "laplace and relu2 agree in value (1/2) and slope (sqrt 2) at mu",
        "the past does not see the future; information crosses chunks, through the average only",
        "step by step equals the parallel form; the cache of a chunked layer stays bounded",
    ),
    build=MegaAttention,
    example={"dim": 16, "ema_dim": 4, "chunk_size": 8},
)
