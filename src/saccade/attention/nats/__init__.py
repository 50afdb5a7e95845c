"""NAtS: each token learns how long it stays in the KV cache: for ever, until the next such token, or for a window.

Deng and Lindauer, "Neural Attention Search", arXiv 2502.13251.

    L_j = W_r x_j                                       role logits per key head; mean over chunks of c tokens
    a_j = (G_j, L_j, S_j) = one-hot of L_j              Gumbel-softmax, straight-through, in training; arg-max else
    e_j = the first n >= j with G_n = 1, else the last chunk
    M_ij = G_j + L_j prod_{n=j+1}^{i-1} (1 - G_n) + S_j [i - j <= W]        = [i <= end of life of j],   i >= j
    o_i = sum_j M_ij exp(q_i . k_j / sqrt(D)) v_j / sum_j M_ij exp(q_i . k_j / sqrt(D))

With chunks of c tokens the product runs over chunk numbers; a Sliding J is seen by i <= J c + W + c - 1, a Local by
i < (e_J + 1) c.

| here         | paper   | meaning                                           | from scratch | LLM adaptation |
|--------------|---------|---------------------------------------------------|--------------|----------------|
| `window`     | W       | following queries that see a Sliding token        | 16           | 256            |
| `chunk_size` | c       | tokens per role                                   | 8            | 1              |
| `penalty`    | lambda  | weight of sum_j [G_j (n - j) + L_j (e_j - j)] / n | 5e-7         | 5e-7           |
| `tau`        | tau     | temperature of the Gumbel-softmax                 | 1            | 1              |

Gradients of the roles are those of the product form at the one-hot roles (t_ij = P_ij (<dO_i, v_j> - <dO_i, O_i>), also
where M_ij = 0, with the authors' clamp P_ij <= 1), in closed form: M_ij changes with G_n where n ends, or would end, a
Local. The layer divides them by c and adds the penalty's derivative, as the authors' kernel does (e_j held fixed).

Choices that the paper leaves open: the first chunk is Global always; forcing the last one in training changes no
output, so it is not done; a chunk that is not complete has no role yet and is seen; padding is seen by none and is not
in a chunk's mean, the first chunk is the first that has a real token, and a chunk of padding ends no Local. The
penalty is a loss of its own: it reaches the roles of all tokens, whichever outputs are trained. `from_softmax` starts
with W_r = 0: arg-max ties are Global, so that the layer equals the softmax layer, while training draws roles evenly.
Long sequences read keys by how long they live, long-lived ones first, so that blocks of short-lived keys far behind a
query are skipped.
"""

from __future__ import annotations

from saccade.attention.nats.layer import NAtS, NAtSCache
from saccade.attention.nats.operator import (
    GLOBAL,
    LOCAL,
    SLIDING,
    end_index,
    lifetimes,
    live_share,
    nats_attend,
    nats_attend_reference,
    nats_mask,
)
from saccade.catalogue import register
from saccade.ops.masks import Lifetimes

__all__ = [
    "GLOBAL",
    "LOCAL",
    "SLIDING",
    "Lifetimes",
    "NAtS",
    "NAtSCache",
    "end_index",
    "lifetimes",
    "live_share",
    "nats_attend",
    "nats_attend_reference",
    "nats_mask",
]


register(
    "nats",
    kind="sequence",
    summary="Each token learns its role in the KV cache: kept for ever, until the next such token, or for a window.",
    supports=("causal", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/token/trained-routing",
    complexity="time O(N s D) and cache O(s D) with s live tokens; training O(N^2 D), linear memory",
    invariants=(
        "all Global, or all Local without a later Global, is causal attention",
        "all Sliding is a window of W + 1 keys and the first token",
        "the closed gradient of the roles is that of the product form",
        "roles after a query do not change it; a Global still sees the Locals that it ends",
        "decoding with the cache that forgets equals the parallel form",
        "starts equal to the softmax layer that it came from",
    ),
    build=NAtS,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "window": 3, "chunk_size": 2},
    at_length=lambda length: {"window": min(16, max(1, length // 8)), "chunk_size": 1 if length < 512 else 8},
)
