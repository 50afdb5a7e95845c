"""Show, Attend and Tell: an LSTM that looks at one place of the image, or a blend of all, before each word.

Xu et al., "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention", arXiv 1502.03044 (ICML 2015).

    e_i = U^T tanh(W_a a_i + W_h h_{t-1}),   alpha = softmax(e),   z = sum_i alpha_i a_i   or   z = a_s, s ~ alpha
    h_t = LSTM(E y_{t-1}, beta z, h_{t-1}),  beta = sigmoid(w . h_{t-1})
    p(y_t) = softmax(W_p tanh(W_o h_t + E y_{t-1} + W_z beta z))

| here | paper | default |
|---|---|---|
| `dim` | D, width of annotation vectors a_i | 512 |
| `word_dim`, `hidden` | m and n, of words and of the LSTM | 512, 1800 |
| `attention` | "soft" or "hard" | soft |
| `deep` | further layers over W_a a before the tanh | 1 |
| `initial`, `final` | further layers before the first state, and before W_p | 1, 0 |
| `alpha_c` | lambda of (1 - sum_t alpha_ti)^2, the doubly stochastic penalty | 1 |
| `semi_sampling`, `temperature` | how often hard attention draws; what scores are multiplied by | 0.5, 1 |

The defaults are those of COCO. The equation is the released code's; the paper writes the output without the tanh and
the map after it. Nothing stands before the first word (`begin` = -1), a caption ends with word 0. Dropout is as in the
code: half of the numbers in training, all of them times 1/2 else; without it in the paper's terms, `dropout=False`.

Hard attention draws one region for each word in training, and takes alpha in evaluation. With probability
1 - `semi_sampling` a whole batch takes alpha in training, too. What alpha learns then comes from `reinforced` alone
(the score function), with the moving baseline of `Baseline`. The authors' code divides its reward by 10.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.show_attend_tell.attention import RegionAttention, draw_region
from saccade.models.show_attend_tell.losses import Baseline, doubly_stochastic, reinforced, word_costs
from saccade.models.show_attend_tell.network import HalvingDropout, ShowAttendTell

__all__ = [
    "Baseline",
    "HalvingDropout",
    "RegionAttention",
    "ShowAttendTell",
    "doubly_stochastic",
    "draw_region",
    "reinforced",
    "word_costs",
]

register(
    "show-attend-tell",
    kind="model",
    summary="A captioner whose LSTM blends, or draws, one region of the image for each word.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="regions x D^2 once an image, then words x (regions x D + LSTM)",
    invariants=(
        "scores of weight 0 attend to all regions alike",
        "permuted regions permute the attention and leave the words",
        "a drawn region weighs as soft attention of that one-hot weight; the mean over draws tends to the soft one",
        "a selector of 0 removes the image after the first state",
        "masked steps leave the state and the cost as they are",
        "later words change nothing before",
    ),
    build=ShowAttendTell,
    example={"dim": 12, "word_dim": 8, "hidden": 16, "vocab_size": 11},
    inputs=lambda module, size: (torch.randn(2, max(1, size), 12), torch.randint(11, (2, 4))),
    tasks={
        "caption": {
            "stem": (32, 64, 64),
            "dim": 64,
            "word_dim": 64,
            "hidden": 128,
            "begin": -1,
            "alpha_c": 0.0,
            "dropout": False,
        },
    },
)
