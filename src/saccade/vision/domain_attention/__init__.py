"""Domain attention: a bank of squeeze-and-excitation adapters, mixed by domains that nobody named.

Wang, Cai, Gao, Vasconcelos, "Towards Universal Object Detection by Domain Attention", CVPR 2019, arXiv 1904.04402.

    s   = mean over positions of x
    u_i = W2_i ReLU(W1_i s + b1_i) + b2_i,   i = 1 .. N              the universal bank; no sigmoid here
    w   = softmax(W_DA s + b_DA)                                      which domain the map looks like
    y   = x sigmoid(sum_i w_i u_i)                                    one gate per channel

Symbols: N `num_adapters`, r `reduction`: W1_i is (C/r, C), W2_i (C, C/r). The mixture is taken before the sigmoid. The
domains of w are learned without labels. N = 1 is one SE layer, with no assignment, as in the authors' "fixed" blocks.
`domain` switches by a label instead: the bank of domain-specific adapters that the paper compares with.

It stands where SE stands: on the residual branch, after its last norm (`DomainAttentionResNet`, the C4 detector's
shared trunk and heads; `UniversalHeads`, its layers of each data set). Not here: anchors, the choice of proposals and
the pooling of regions, for which the paper has no method of its own; the training script's frozen norms
(`module.eval()` of the norms) and its separate norms per domain.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.domain_attention.gate import (
    DomainAttention,
    DomainAttentionResNet,
    UniversalHeads,
    adapters_of_blocks,
)

__all__ = ["DomainAttention", "DomainAttentionResNet", "UniversalHeads", "adapters_of_blocks"]


register(
    "domain-attention",
    kind="gate",
    summary="A bank of squeeze-and-excitation adapters, mixed by a softmax over domains learned without labels.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(N C^2 / r + C H W), parameters N (2 C^2 / r + C / r + C) + N (C + 1)",
    invariants=(
        "one adapter is squeeze-and-excitation; equal adapters are too, whatever the assignment",
        "a large bias in the assignment leaves the adapter of that number alone, as a label does",
        "the assignment sums to 1, the gate lies between 0 and 1, so no magnitude grows",
        "adapters are mixed before the sigmoid, not after",
        "a zero assignment takes the plain mean of the bank",
    ),
    build=DomainAttention,
    example={"channels": 8, "num_adapters": 3, "reduction": 4},
)
