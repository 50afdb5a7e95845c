"""Sequential Attention: features are chosen one after another while a network trains once.

Yasuda, Bateni, Chen, Fahrbach, Fu, Mirrokni, "Sequential Attention for Feature Selection", ICLR 2023, arXiv 2209.14881.

    m_i = 1 for i in S,      m_i = s(w)_i over the rest for i not in S,      y = x * m
    at the end of each of n phases  S <- S + argmax_{i not in S} w_i,        w is drawn anew

| here            | paper, authors' code            | default |
|-----------------|---------------------------------|---------|
| `channels`      | d candidates: features or channels of a map | |
| `select`        | k                               |         |
| `per_step`      | b, chosen at once               | 1       |
| `start`, `stop` | share of training that the phases take | 0.1, 1 |
| `reset`         | `reset_weights`                 | True    |
| `score`         | s: softmax, or a form of Hoff's | softmax |
| `advance(p)`    | the state's change in a call    | called by the training loop, p the progress in [0, 1] |

Source of what the paper leaves open: the authors' code, but for two things. It chooses at the start of a phase, the
first time when w has not learned yet, and with b > 1 compares phases with features, so that it stops early:
`timing="released"` does that, the default chooses at a phase's end, as the paper says. And its state changes in every
call, in evaluation too; here `advance` changes it. The maximum that a softmax takes off is that of the candidates.
Once all k are chosen the others are 0; there the authors' code lets them share 1 still (`timing="released"`).

In a linear model with squares of w and beta in the loss this is Sequential LASSO, which is Orthogonal Matching Pursuit:
`linear_loss`.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.sequential_attention.gate import SCORES, TIMINGS, SequentialAttention, linear_loss

__all__ = ["SCORES", "TIMINGS", "SequentialAttention", "linear_loss"]

register(
    "sequential-attention",
    kind="gate",
    summary="Chooses k of d features or channels while the network trains: the best candidate of each phase stays.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="O(C) beside the product, parameters C",
    invariants=(
        "what is chosen passes as it is, candidates share a weight of 1, and before the first phase all passes",
        "what is chosen never goes back, and there are k of it at the end",
        "of two equal features one is chosen, and then another that says something new",
        "in a linear model it chooses what Orthogonal Matching Pursuit chooses, in its order",
    ),
    build=SequentialAttention,
    example={"channels": 8, "select": 3, "start": 0.0},
)
