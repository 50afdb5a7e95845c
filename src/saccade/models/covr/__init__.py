"""CoVR with dense modifications: a video, what describes it and what is to change in it, as one vector.

Thawakar et al., "Beyond Simple Edits: Composed Video Retrieval with Dense Modifications", ICCV 2025, arXiv 2508.14039.

    p   = W_p BERT(description)_0
    h   = BERT(modification text, each block looking at I + p)
    z_q = W_t h_0 / ||W_t h_0||,   z_v = W_v CLS / ||W_v CLS||      I, CLS: tokens of a frame by BLIP's ViT
    L   = mean_i log sum_j w_ij e^(s_ij) - s_ii, over queries and over targets;   s = z_q . z_v / T

| here            | paper, authors' code              | default                                     |
|-----------------|-----------------------------------|---------------------------------------------|
| `prompt_proj`   | description to image width        | new, as torch starts it                     |
| `encode_token`  | [ENC], first where it looks       | 30523, BLIP's last word (inferred)          |
| `encode_description` | the same in descriptions     | False: [CLS], as in training; tests have [ENC] |
| `frozen`        | ViT and W_v are not trained       | True                                        |
| `temperature`, `alpha`, `beta` | of HN-NCE          | 0.07, 1, 0.5                                |
| `column_denominator` | the sum in w by queries is of row j | True, as the code has it; False as printed |

The paper describes one grounded encoder that fuses all three; the authors' code, which is followed, adds the
description to the image tokens. A video as reference is its middle frame; as a target it is several frames, whose mean
`video_scores` weighs by the query. Its temperature is not said; 0.1 is ours. Training: AdamW at 1e-5, weight decay
0.05, cosine, texts of 35 words (64 in tests), BLIP-large fine-tuned on COCO to start from: `CoVR.from_blip`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.covr.losses import hard_negative_nce
from saccade.models.covr.network import ComposedQuery, CoVR, video_scores

__all__ = ["CoVR", "ComposedQuery", "hard_negative_nce", "video_scores"]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    words, description = torch.randint(11, (2, 6)), torch.randint(11, (2, 5))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return torch.randn(2, 3, size, size + 2), words, mask, description, torch.ones(2, 5, dtype=torch.bool)


register(
    "covr",
    kind="model",
    summary="A reference's image tokens, shifted by its description, are looked at by what the text wants changed.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="one pass of BERT for a description, one with cross attention for a query: O(L (L + P) C) each block",
    invariants=(
        "with prompt_proj = 0 a query is BLIP's image-grounded encoding",
        "a description changes all image tokens by one vector",
        "padding changes nothing",
        "HN-NCE at alpha 1 and beta 0 is InfoNCE of rows plus that of columns",
        "queries and targets have unit length",
    ),
    build=CoVR,
    passes=(ComposedQuery,),
    example={
        "vocabulary": 12,
        "dim": 12,
        "depth": 2,
        "num_heads": 3,
        "hidden": 16,
        "positions": 8,
        "vision_dim": 8,
        "vision_depth": 1,
        "vision_heads": 2,
        "image_size": 16,
        "patch": 8,
        "embed_dim": 6,
        "encode_token": 11,
    },
    inputs=_inputs,
    tasks={
        "retrieve": {
            "vision_dim": 64,
            "vision_depth": 2,
            "vision_heads": 4,
            "patch": 8,
            "dim": 64,
            "depth": 2,
            "num_heads": 4,
            "hidden": 128,
            "embed_dim": 32,
            "encode_token": None,
            "drop": 0.0,
            "frozen": False,
        }
    },
)
