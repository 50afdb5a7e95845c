"""CNNtention: self-attention, many-headed self-attention or CBAM after each stage of a ResNet-20.

Glattki et al., "CNNtention: Can CNNs do better with Attention?", arXiv 2412.11657.

    self:        A = softmax(q^T k) over positions,  y = gamma v A^T + x             no 1 / sqrt(d); gamma starts at 0
    multi-head:  A_h = softmax(k_h^T q_h / sqrt(d)), y = gamma linear(v A^T) + x     rows are k's positions, as coded
    cbam:        f = channel gate(x) x,  y = spatial gate(f) f + x                   no batch norm, with a residual

q, k, v are 1 x 1 convolutions with bias of the map (B, C, H, W), S = H W positions. The original CBAM is
`saccade.vision.cbam`. What the code leaves open is an option: `scaled` divides the logits of "self" by sqrt(C).
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.cnntention.gate import (
    Form,
    MultiHeadAttention2d,
    ResidualCBAM,
    ResNet20,
    SelfAttention2d,
    cnntention,
)

__all__ = ["Form", "MultiHeadAttention2d", "ResNet20", "ResidualCBAM", "SelfAttention2d", "cnntention"]


register(
    "cnntention",
    kind="gate",
    summary="Self-attention, many-headed self-attention or a residual CBAM after the stages of a small ResNet.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    complexity="self-attention: time O(S^2 C), memory O(S C) in S positions; CBAM: O(S C)",
    invariants=(
        "gamma 0 is the identity, so the network starts as the plain one",
        "zero keys give everywhere the mean of v; one head with an identity last layer is self-attention, scaled",
        "attention commutes with any order of the positions",
        "CBAM lies between x and 2 x; with all gates at a half it is 1.25 x",
        "parameters: 269,722 plain, 286,189 self, 291,677 multi-head, 271,363 CBAM",
    ),
    build=cnntention,
    passes=(MultiHeadAttention2d, ResidualCBAM),
    example={"channels": 8, "form": "self"},
)
