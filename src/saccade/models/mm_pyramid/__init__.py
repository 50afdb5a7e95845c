"""MM-Pyramid: sound and picture step by step, in windows that double from level to level, and a sum over the levels.

"MM-Pyramid: Multimodal Pyramid Attentional Network for Audio-Visual Event Localization and Video Parsing", ACM MM 2022,
arXiv 2111.12374.

    T(q, kv)  = x + FFN(LN x),   x = q + MHA_r(LN q, kv, kv),   |i - j| <= r       keys and values without a norm
    v', a'    = s(L1 [S; X]) S + s(L2 [S; X]) X,   S = T_v(v, v),  X = T_c(v, a),   r = 2^i      one T_c both ways
    v, a      = relu(conv1(relu(conv3(v'; dilation 2^i))) + v')
    out_t     = sum_l s(w . z_l) z_l,   z = T(u, u) over the L levels u of a step
    p = s(W x),   at a time: A_t = softmax_t(U x);  in a stream: sum_t A_t p;  at all: sum_t sum_m A_t B_m p

| here                    | paper, or the authors' code              | default     |
|-------------------------|------------------------------------------|-------------|
| `levels`                | units of the pyramid                     | 4           |
| `hidden`, `feedforward` | C, width of FFN                          | 512, 512    |
| `num_heads`             | of each attention                        | 8           |
| `drop`, `attention_drop` | of branches and FFN, of weights         | 0.2, 0.1    |
| `frames`                | frames of a second, which are averaged   | 8           |
| `head`                  | "parse" (LLP), "localise" (AVE)          | "parse"     |

A step sees 2 (2^L - 1) steps to either side, by attention and convolution alike. The number of steps is free (10 in the
code), and a mask leaves out padding: of all attention, of the convolutions, and of the weights over time. The products
A_t B_m, each a softmax of its own, do not sum to 1: `whole` is no mean of p, and may pass 1 a little; losses clamp it.

Where paper and code differ: the code calls the output of the video stream "audio" and the other way round, here streams
have their own names (the port gives the code's back). The head for localisation is not in the code: `LocalisationHead`
follows the usual protocol, one class or none for each step, from both streams beside each other.

Training: `parsing_loss` on what is known of whole videos, audio labels smoothed by 1.0 and video labels by 0.9; Adam at
1e-4, a tenth after each 10 of 40 epochs, 16 videos a batch. A step counts where p >= 0.5 and the class is at all.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.catalogue.cards import Published
from saccade.models.mm_pyramid.losses import localisation_loss, parsing_loss
from saccade.models.mm_pyramid.network import LocalisationHead, MMPyramid, ParsingHead
from saccade.models.mm_pyramid.pyramid import IntegrateBlock, LevelFusion, Pyramid, TemporalBlock, WindowLayer

__all__ = [
    "IntegrateBlock",
    "LevelFusion",
    "LocalisationHead",
    "MMPyramid",
    "ParsingHead",
    "Pyramid",
    "TemporalBlock",
    "WindowLayer",
    "localisation_loss",
    "parsing_loss",
]


register(
    "mm-pyramid",
    kind="model",
    summary="Which events are heard and seen when: self and cross attention in doubling windows, fused over levels.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "local", "representations": "single"},
    efficiency="",
    complexity="time O(L T (w C + C^2)) of L levels and windows w, a stream; memory O(L T C)",
    invariants=(
        "with L levels a step depends on 2 (2^L - 1) steps to either side and no others",
        "a window as long as the stream is no window",
        "gates of (1, 0) leave self attention, of (0, 1) attention to the other stream",
        "exchanged streams with exchanged parameters give exchanged outputs",
        "weights over time and over streams sum to 1; in a stream nothing is surer than at its surest step",
        "padding changes nothing",
    ),
    build=MMPyramid,
    example={
        "num_classes": 5, "hidden": 8, "audio_dim": 6, "video_dim": 9, "motion_dim": 7, "frames": 2, "num_heads": 2,
        "feedforward": 12, "levels": 2,
    },
    inputs=lambda module, size: (
        torch.randn(2, size, 6), torch.randn(2, size * module.frames, 9), torch.randn(2, size, 7)
    ),
    tasks={"localise": {"motion_dim": 0, "frames": 1, "hidden": 32, "feedforward": 32, "num_heads": 4, "levels": 4}},
    published=(
        Published(
            "LLP",
            {},
            inputs={"audio": (1, 10, 128), "video": (1, 80, 2048), "motion": (1, 10, 512)},
            note="the paper's tables give neither parameters nor operations",
        ),
    ),
)  # fmt: skip
