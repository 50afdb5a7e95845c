"""RT-DETRv2: a real-time detector whose queries are a map's best cells, and whose boxes need no suppression.

"RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer", arXiv 2407.17140.

    maps      backbone at strides 8, 16, 32
    encoder   attention in the coarsest map (AIFI), convolutions among the maps (CCFM)
    queries   the N cells whose best class is surest;  box = anchor + head(cell), as logits
    layer     x = LN(x + A(x));  x = LN(x + D(x, box));  x = LN(x + MLP(x));   box = sigmoid(head(x) + logit(box))
    D         y = Wo concat_m( sum_p a_mp V_m[ centre + offset_mp / n_l size / 2 ] ),   a = softmax over all P points

New against RT-DETR: levels have numbers of points of their own (n_l); points may be whole pixels, trunc(location (W, H)
+ 1/2), for hardware that knows no bilinear sampling; augmentation ends before training does; each backbone has a
learning rate of its own.

| here                          | paper, or the authors' code          | default                        |
|-------------------------------|--------------------------------------|--------------------------------|
| `num_points`                  | sampling points of each level        | 4 (each)                       |
| `sampling`                    | cross_attn_method, default, discrete | "bilinear"                     |
| `num_queries`, `eval_layer`   | N, eval_idx                          | 300, the last                  |
| `encoder_dim`, `dim`          | C of encoder and decoder             | 256, 256                       |
| `expansion`, `layers`         | of CSPRep, of the decoder            | 0.5, 3 (RT-DETRv2-S)           |
| `selection`                   | query_select_method                  | "default"                      |
| `label_noise`, `box_noise`    | label_noise_ratio, box_noise_scale   | 0.5, 1.0                       |

Source of what the paper leaves open: the authors' code, through the card. Discrete points are kept inside the map on
either axis, where the authors' code cuts both at the height (the same on square maps). The sine code of places follows
their axes, see `sine_code`. Maps of odd sizes are joined at the finer one's size, so that images need not be multiples
of 32; with fewer cells than `num_queries` all cells are queries. Gradients stop at queries and boxes in training only.
The encoder's loss of `selection="agnostic"` is matched without classes too, where the authors match it with them.

Training: `RTDETRv2(...)(images, targets)`, `Criterion()(output, targets)`, `parameter_groups`, `warm_up`,
`average_decay`. `RTDETRv2.load` takes released files of the authors and of transformers, `from_transformers` a model.
"""

import torch

from saccade.catalogue import Published, register
from saccade.layers.deformable_attention import MSDeformableAttention
from saccade.models.rt_detrv2.backbones import HGNetV2, ResNetVD
from saccade.models.rt_detrv2.decoder import Decoder
from saccade.models.rt_detrv2.denoising import contrastive_queries
from saccade.models.rt_detrv2.encoder import CSPRep, HybridEncoder, RepVGG, sine_code
from saccade.models.rt_detrv2.losses import (
    Criterion,
    HungarianMatcher,
    average_decay,
    parameter_groups,
    varifocal_loss,
    warm_up,
)
from saccade.models.rt_detrv2.network import RTDETRv2, Trained

__all__ = [
    "CSPRep",
    "Criterion",
    "Decoder",
    "HGNetV2",
    "HungarianMatcher",
    "HybridEncoder",
    "MSDeformableAttention",
    "RTDETRv2",
    "RepVGG",
    "ResNetVD",
    "Trained",
    "average_decay",
    "contrastive_queries",
    "parameter_groups",
    "sine_code",
    "varifocal_loss",
    "warm_up",
]

_CUT = "the table gives whole millions, cut off"

register(
    "rt-detrv2",
    kind="model",
    summary="Detection without suppression: a map's best cells are queries, which deformable attention moves to boxes.",
    supports=(),
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "local",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="deformable attention: time and memory O(N P C) for N queries of P points; AIFI: O((H W / 1024)^2)",
    invariants=(
        "equal numbers of points are multi-scale deformable attention with 0.5 / n of the box as unit",
        "a constant map gives Wo Wv of the constant, a masked one the bias of Wo",
        "discrete and bilinear points agree on constant maps; no gradient reaches discrete places",
        "a decoder that ends early is a shorter decoder; it does not know the order of its queries",
        "a fused network is the same function",
        "queries of denoising do not change the others",
    ),
    build=RTDETRv2,
    example={
        "num_classes": 3,
        "backbone_width": 4,
        "backbone_blocks": (1, 1, 1, 1),
        "encoder_dim": 8,
        "encoder_hidden": 12,
        "depth": 0.34,
        "dim": 8,
        "hidden": 12,
        "layers": 2,
        "num_heads": 2,
        "num_queries": 5,
        "num_points": (3, 2, 1),
        "num_denoising": 0,
    },
    tasks={
        "detect": {
            "backbone_width": 16,
            "backbone_blocks": (1, 1, 1, 1),
            "encoder_dim": 64,
            "encoder_hidden": 128,
            "depth": 0.34,
            "dim": 64,
            "hidden": 128,
            "layers": 2,
            "num_heads": 4,
            "num_queries": 30,
            "num_denoising": 20,
        }
    },
    inputs=lambda module, size: (torch.rand(2, 3, 32 + size, 30 + size),),
    published=(
        Published("RT-DETRv2-S", {}, 20, inputs={"pixel_values": (1, 3, 640, 640)}, tolerance=0.01, note=_CUT),
        Published(
            "RT-DETRv2-M*",
            {"backbone": "R34", "layers": 4},
            31,
            inputs={"pixel_values": (1, 3, 640, 640)},
            tolerance=0.015,
            note=_CUT,
        ),
        Published(
            "RT-DETRv2-M",
            {"backbone": "R50", "layers": 6, "eval_layer": 2},
            36,
            inputs={"pixel_values": (1, 3, 640, 640)},
            tolerance=0.017,
            note=_CUT,
        ),
        Published(
            "RT-DETRv2-L",
            {"backbone": "R50", "layers": 6, "expansion": 1.0},
            42,
            inputs={"pixel_values": (1, 3, 640, 640)},
            tolerance=0.022,
            note=_CUT,
        ),
        Published(
            "RT-DETRv2-X",
            {"backbone": "R101", "layers": 6, "expansion": 1.0, "encoder_dim": 384, "encoder_hidden": 2048},
            76,
            inputs={"pixel_values": (1, 3, 640, 640)},
            note=_CUT,
        ),
    ),
)
