"""Adaptive attention: a decoder that may look at nothing, but at a sentinel that stands for what it remembers.

Lu et al., "Knowing When to Look: Adaptive Attention via A Visual Sentinel for Image Captioning", arXiv 1612.01887
(CVPR 2017).

    h_t, m_t = LSTM([w_t; v_g]),   s_t = sigmoid(W_x x_t + W_h h_{t-1}) * tanh(m_t)
    z_t = w^T tanh(W_v V + W_g h_t),   xi_t = w^T tanh(W_s s_t + W_g h_t),   [a_t; beta_t] = softmax([z_t; xi_t])
    c_t = sum_i a_ti v_i + beta_t s_t,   p(y_t) = softmax(W_p (c_t + h_t))

| here | paper | default |
|---|---|---|
| `dim`, `word_dim` | d and e: of regions and the LSTM, and of words | 512, 512 |
| `attention_dim` | rows of W_v, W_g and W_s; the paper takes as many as there are regions, k | 49 |
| `channels` | of the maps A that regions are made of, v_i = ReLU(W_a A_i) and v_g = ReLU(W_b mean A) | 2048 |
| `attention` of the output | alpha, the softmax of z alone; a_ti = (1 - beta) alpha_ti | |
| `looks` of the output | 1 - beta | |

`variant="released"` is the authors' own Lua code: the sentinel goes through a ReLU layer and h_t through a tanh one
before they are used, regions, sentinel and h_t each through a linear layer of width d before the tanh of scores, the
sentinel's gate sees word, image and state through layers with biases, and a tanh layer stands before W_p.
`sentinel=False` is plain spatial attention. `resnet=152` is the encoder of released checkpoints.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.visual_sentinel.attention import AdaptiveAttention, ReleasedAttention, SentinelGate, adaptive
from saccade.models.visual_sentinel.network import VisualSentinel
from saccade.models.visual_sentinel.training import learning_rate, optimisers

__all__ = [
    "AdaptiveAttention",
    "ReleasedAttention",
    "SentinelGate",
    "VisualSentinel",
    "adaptive",
    "learning_rate",
    "optimisers",
]

register(
    "visual-sentinel",
    kind="model",
    summary="A captioner whose attention may rest on a gated memory in place of the image, word by word.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="words x (regions x D x attention width + LSTM); the sentinel adds 2 D E + D^2 + D x attention width",
    invariants=(
        "the attention of regions sums to 1, and so does that of regions and sentinel together",
        "regions weigh (1 - beta) of what they would without a sentinel",
        "a sentinel that scores -inf leaves spatial attention",
        "what is seen lies between the regions and the sentinel",
        "permuted regions permute the attention and leave the words",
    ),
    build=VisualSentinel,
    example={"vocab_size": 11, "dim": 16, "word_dim": 8, "attention_dim": 5, "channels": 12},
    inputs=lambda module, size: (torch.randn(2, max(1, size), 12), torch.randint(11, (2, 4))),
    tasks={"caption": {"stem": (32, 64, 64), "dim": 128, "word_dim": 64, "attention_dim": 49, "dropout": 0.0}},
)
