"""ADEM-VL: a frozen language model takes of an image beside each feed-forward network, without softmax or projections.

Hao, Guo, Shen, Xu, Wang, Hu, "ADEM-VL: Adaptive and Embedded Fusion for Efficient Vision-Language Tuning", arXiv
2410.17779.

    u     = norm(h'),     h' = h + attention(norm(h))                             the blocks of a language model
    A     = silu(u) silu(K)^T,    A_ts <- 0 where A_ts < tau_t,    tau_t the value at floor(gamma S) of a sorted row
    h''   = h' + feed_forward(u) + alpha A V
    K, V  = v + e1, v + e2,       v = beta z (W2 silu(W1 c + b1) + b2),     c = CLIP's patches at several scales

| here           | paper, authors' code | default                                            |
|----------------|----------------------|----------------------------------------------------|
| `alpha`        | s                    | 0.1                                                |
| `beta`         | beta                 | 0.01; of projected patches, not of e1 and e2       |
| `drop_ratio`   | gamma                | 0.1: so many of a token's lowest scores are 0      |
| `scales`       | down_sample_num      | 256, 64 tokens; means over blocks of patches       |
| `projector_dim`| hidden_proj          | 128                                                |
| `adapter_dim`  | adapter_dim          | 12, as the published commands (8 in the code)      |
| `class_prompt` | with_cls             | True: the class token stands behind the first word |
| `present`      | z, the indicators    | 1 where a text has an image                        |

Nothing of a block is learned: projectors, e1, e2 (one pair for all blocks) and the adapters in CLIP are, and nothing
else (`ADEMVL.freeze`). Text is not lengthened by patches; K and V are the same in every block and step, and there is no
cache of them to grow. `fused(model, fusion, memory)` puts the fusion on a language model of transformers.

Where paper and code differ, as the code: no 1 / sqrt(D); what is dropped are the lowest scores, negative ones first;
CLIP's last block is left out, and its last norm is applied to all tokens. Texts without an image still see e1 and e2.
Training (`ADEMVL.read` gives the loss): AdamW, 9e-3 times the batch over 256, weight decay 0.02, batch 32, cosine.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.adem_vl.fusion import (
    Projector,
    SharedEmbeddings,
    VisualFusion,
    VisualMemory,
    fused,
    multiscale,
    silu_fusion,
)
from saccade.models.adem_vl.network import ADEMVL, AdaptedMLP, FusedBlock

__all__ = [
    "ADEMVL",
    "AdaptedMLP",
    "FusedBlock",
    "Projector",
    "SharedEmbeddings",
    "VisualFusion",
    "VisualMemory",
    "fused",
    "multiscale",
    "silu_fusion",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, size, size), torch.randint(3, 15, (2, 5))


register(
    "adem-vl",
    kind="model",
    summary="A frozen language model sees by softmax-free fusion beside its feed-forward networks, without parameters.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(T S D) a block, no projections; self-attention stays O(T^2): the image has no positions",
    invariants=(
        "alpha = 0 is the language model bit for bit; so are e2 = 0 and no image",
        "nothing dropped: silu(u) (silu(K)^T V), in either order",
        "floor(gamma S) scores of each token are 0, and they are the lowest",
        "one scale of all patches is the patches; 1 x 1 is their mean",
        "tokens of the image that move together with e1 and e2 change nothing",
        "word after word equals the whole pass",
    ),
    build=ADEMVL,
    example={
        "vocab_size": 15,
        "dim": 16,
        "layers": 1,
        "num_heads": 2,
        "hidden": 24,
        "image_size": 16,
        "patch": 4,
        "clip_dim": 12,
        "clip_layers": 2,
        "clip_heads": 2,
        "adapter_dim": 3,
        "projector_dim": 6,
        "scales": (16, 4),
        "alpha": 0.5,
        "beta": 0.5,
    },
    inputs=_inputs,
    tasks={
        "caption": {
            "dim": 96,
            "layers": 3,
            "num_heads": 4,
            "hidden": 256,
            "image_size": 32,
            "patch": 4,
            "clip_dim": 96,
            "clip_layers": 4,
            "clip_heads": 4,
            "adapter_dim": 0,
            "scales": (64, 16),
            "alpha": 1.0,
            "beta": 1.0,
        }
    },
    published=tuple(
        Published(
            name,
            arguments,
            inputs={"pixel_values": (1, 3, 224, 224), "captions": (1, 8)},
            integers=("captions",),
            note="a caption of 8 words",
        )
        for name, arguments in (
            ("ADEM-VL-7B", {}),
            ("ADEM-VL-13B", {"dim": 5120, "layers": 40, "num_heads": 40, "hidden": 13824}),
        )
    ),
)
