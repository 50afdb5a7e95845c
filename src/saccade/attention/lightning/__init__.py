"""Lightning attention: causal linear attention with a fixed decay per head, and the TransNormerLLM made of it.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", arXiv 2405.17381;
TransNormerLLM, arXiv 2307.14995.

    o_i = sum_{j<=i} lambda_h^(i-j) (q_i . k_j) v_j,   lambda_h = exp(-s_h)                  no scale, no normaliser

Block by block: inside a block [(Q K^T) * M] V with M_ij = lambda^(i-j), from earlier blocks the state KV (D x E), so
that time per token does not depend on the length, and decoding keeps one state per head.

| paper | here |
|---|---|
| s_h, lambda_h | `slope`; decay = exp(-slope) |
| B, block | `block_size`; the result does not depend on it |
| KV | the state, (B, H, D, E) in float32 |
| GLA, SGLU, SRMSNorm, LRPE | `LightningAttention(form="transnormer")`, `SGLU`, `SimpleRMSNorm` of `layers`, `LRPE` |

Where paper and code differ:
- slopes: the code's rule (ALiBi's slopes times 1 - l / (L - 1) + 1e-5; 1 where L = 1); `rule="paper"` is the papers'.
- two layers are published. `form="transnormer"` (the released weights): q, k = SiLU, v linear, SRMSNorm, gate u as it
  is. `form="gated"` (the kernel repository's example): q, k, v = SiLU, LayerNorm, gate sigmoid(W_b W_a x).
- LRPE: in layer 0 alone, as in the released models. Positions are absolute and go on from the cache's length.
"""

from __future__ import annotations

from saccade.attention.lightning.layer import (
    LRPE,
    SGLU,
    LightningAttention,
    LightningCache,
    TransNormerBlock,
    TransNormerCache,
    TransNormerLM,
)
from saccade.attention.lightning.operator import Form, Norm, TransNormerOutput, decay_slopes, lightning_attend
from saccade.catalogue import register

__all__ = [
    "LRPE",
    "SGLU",
    "Form",
    "LightningAttention",
    "LightningCache",
    "Norm",
    "TransNormerBlock",
    "TransNormerCache",
    "TransNormerLM",
    "TransNormerOutput",
    "decay_slopes",
    "lightning_attend",
]


register(
    "lightning",
    kind="sequence",
    summary="Causal linear attention with a fixed decay per head: constant speed at any length, constant-size state.",
    supports=("causal", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/decay/data-independent",
    complexity="time O(N D (E + block)), state O(H D E) whatever the length",
    invariants=(
        "block form, dense masked form and recurrence are equal, for any block size and length",
        "slope 0 is causal linear attention without decay; slope infinity leaves (q_i . k_i) v_i",
        "a prompt's state followed by steps equals one full pass",
        "the manual backward of the paper equals autograd of the dense form",
        "splitting the head dimension and summing the outputs changes nothing",
        "strong decay over long sequences stays finite in float32",
    ),
    build=LightningAttention,
    example={"dim": 16, "num_heads": 4},
)
