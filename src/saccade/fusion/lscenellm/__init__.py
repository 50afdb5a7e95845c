"""LSceneLLM: text that reads a scene by a few coarse tokens looks closer at those to which it just attended.

Zhi et al., "LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences", CVPR 2025, arXiv
2412.01292.

    g_tv = sum_h a_htv                          layer l's attention of text row t to coarse token v
    S_l  = 255 (g - min_v g) / (max_v g - min_v g) > tau       each coarse token has n fine ones
    y    = softmax(q [k; K']^T) [v; V']         layer l + 1: ordinary keys, and fine ones where S_l
    K'   = rope(W_k' F, place of the coarse token),   V' = W_v' F,   F the projected fine tokens, the same in all layers

| here        | paper, authors' code   | default                                                    |
|-------------|------------------------|------------------------------------------------------------|
| `start`     | START                  | 8 of 32: the first layer that selects, the next one reads  |
| `threshold` | tau                    | 96 of 255; from 255 on nothing is selected, below 0 all    |
| `share`     | alpha, warm-up         | 1; training may raise it: (1 - alpha) ordinary + alpha y   |
| `per_token` | n                      | 4; as many as `fine_BVnC` has in `MagnifiedDecoder`        |
| `scene_tokens` | the tokenisers      | 128 means over 384 points, 4 x 375 of 1500 under each      |

`MagnifiedDecoder` is a decoder of its own; `SceneMagnifier` is put on any decoder of transformers whose attention is
LLaMA's, images too: `with SceneMagnifier.of(model)(model, fine, scene): model.generate(...)`. No matrix of all pairs is
made: what rows read of fine tokens is merged with their ordinary attention by log-sum-exp. Rows before the text are as
they were, and so are rows that select nothing, bit for bit. Selection has no gradient.

As the code, not the paper: heads are summed, each row and layer has its own threshold, and fine tokens have no
positions in space of their own. Beyond the code (inferred): keys that several heads share, and projections that start
as the model's own. Points' features (OpenScene's, 768 channels) are the user's; training is cross-entropy on answers,
Adam at 1e-5, all weights, cosine.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.fusion.lscenellm.around import MagnifierReport, SceneMagnifier
from saccade.fusion.lscenellm.decoder import MagnifiedDecoder
from saccade.fusion.lscenellm.layer import MagnifierAttention, Scene
from saccade.fusion.lscenellm.scenes import PromptTokens, SceneProjector, farthest_points, neighbours, scene_tokens
from saccade.fusion.lscenellm.selection import coarse_shares, magnify, select_fine
from saccade.layers.qkv_attention import QKVAttention

__all__ = [
    "MagnifiedDecoder",
    "MagnifierAttention",
    "MagnifierReport",
    "PromptTokens",
    "Scene",
    "SceneMagnifier",
    "SceneProjector",
    "coarse_shares",
    "farthest_points",
    "magnify",
    "neighbours",
    "scene_tokens",
    "select_fine",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, 16), torch.randn(2, 5, 3, 16), torch.randn(2, size, 16)


register(
    "lscenellm",
    kind="fusion",
    summary="Text reads the fine tokens under those coarse ones that the layer before found important.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="2 V n C^2 a layer and scene, and O(T V n C) for T rows of text",
    invariants=(
        "tau >= 255 is the plain decoder; tau < 0 shows all fine tokens to text alone",
        "what is attended to most is selected, with exactly n fine tokens; scaling a row's attention changes nothing",
        "rows before the text never change",
        "fine values of 0 shrink a row by the softmax mass that goes to fine tokens",
        "later rows do not change earlier ones",
    ),
    build=MagnifiedDecoder,
    passes=(QKVAttention,),
    example={"dim": 16, "num_heads": 2, "layers": 3, "start": 0},
    inputs=_inputs,
)
