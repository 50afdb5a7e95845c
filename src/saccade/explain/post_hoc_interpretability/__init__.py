"""An attention classifier whose explanations have closed forms: attention, gradients and LIME beside each other.

Lopardo, Precioso, Garreau, "Attention Meets Post-hoc Interpretability: A Mathematical Perspective", ICML 2024,
arXiv 2402.03485.

    alpha_t = softmax_t(q . k_t / sqrt(d_att)),   q of the class token,   f = mean_i W_l sum_t alpha_t v_t
    grad_t  = mean_i alpha_t (W_v^T w + (w . v_t - w . sum_s alpha_s v_s) W_k^T q / sqrt(d_att))
    beta_j ~= 3/2 mean_i sum_{t: x_t = j} w . (alpha_t v_t - alpha_t,unk v_t,unk)       (LIME's, of a word)

| here                    | paper, authors' code         | default |
|-------------------------|------------------------------|---------|
| `AttentionClassifier`   | `MultiHead`                  | K 6, d_e 128, d_att and d_out 64, T 256 |
| `Explained`             | alpha-avg, alpha-max, G-avg, G-l1, G-l2, G x I | of class 1 |
| `lime_limit`, `factor`  | Eq. (19), 3/2                | 3/2     |
| `lime`                  | LIME for text                | 5000 samples, bandwidth 0.25, ridge 1 |

What it shows: attention has no sign and does not know the classifier; the gradient has attention as a factor; LIME is
a difference of attention-weighted values. The closed gradient of the authors leaves out the query's term at the class
token; here it is in, and `query_term=False` is theirs. The factor 3/2 orders words as LIME does, and is 3/2 too large
where attention is near uniform (a simulation of our source, and a test here).
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.post_hoc_interpretability.classifier import AttentionClassifier, Explained
from saccade.explain.post_hoc_interpretability.lime import lime

__all__ = ["AttentionClassifier", "Explained", "lime"]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(12, (2, size)),)


register(
    "post-hoc-interpretability",
    kind="analysis",
    summary="A class-token attention classifier with closed forms of its attention, gradient and LIME explanations.",
    supports=("bidirectional",),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(T d), one pass for all explanations",
    invariants=(
        "the closed gradient is autograd's, at the class token too",
        "attention explanations are not negative and do not change with values and classifier",
        "gradients and LIME change their sign with the classifier",
        "with uniform attention LIME is the mean of what words are worth",
        "LIME is additive over heads",
    ),
    build=AttentionClassifier,
    example={"vocabulary": 12, "dim": 8, "head_dim": 5, "value_dim": 6, "num_heads": 3, "max_length": 64},
    inputs=_inputs,
)
