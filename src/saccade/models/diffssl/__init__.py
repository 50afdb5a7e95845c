"""DifFormer and DifFeed: a frozen diffusion U-Net tells classes, by its maps at several blocks and noise steps.

Mukhopadhyay, Gwilliam, Yamaguchi, Agarwal, Swaminathan, Zhou, Ohya, Shrivastava, "Do text-free diffusion models learn
discriminative visual representations?", ECCV 2024, arXiv 2311.17921.

    x_t       = sqrt(abar_t) x + sqrt(1 - abar_t) noise,     f_tb: what block b of the U-Net gives on x_t
    tokens    = W norm(pool(f_tb)) of all blocks b that are read, a class token before them
    z_t       = class token after pre-norm blocks,     logits = W [z_t1; z_t2; ..]                            DifFormer
    second    h_i <- h_i + resize(phi_b(f_tb)),  b = N + 1 - i,  on the way down of another pass on x_t         DifFeed

| here                           | paper, or the authors' code                | default                       |
|--------------------------------|--------------------------------------------|-------------------------------|
| `times`                        | t_list                                     | 90, 150, 300 (DifFormer)      |
| `first_blocks`, `second_blocks` | first_fw_b_list, second_fw_b_list         | 19, 24, 30; none              |
| `feedback`                     | feedback_b_list                            | none; DifFeed 21, 24 .. 36    |
| `pool`                         | pre_pool_size                              | 16; 2 with a linear head      |
| `dim`, `num_heads`, `depth`    | of the transformer                         | 1024, 8, 2                    |
| `norm`, `layout`               | norm_type, C_B_R ...                       | "layer", "C_B_R"              |

The best single map is b = 24 at t = 150. Blocks are numbered from 1, N = 37 in the U-Net of 256 pixels. A U-Net of
diffusers (`UNet2DModel`, unconditional) is read by the same numbers; the one here is for training small ones by
`saccade.models.diffusion.Diffusion`, and has no names for released files, which nobody has recorded. Maps of odd sizes
are joined at the size of the way down.

Noise is drawn anew for every image and step in training; in evaluation it is always the same, so that an answer can be
repeated. Training is cross-entropy, SGD without momentum, a tenth after each 7 of 28 epochs, at 1e-2 (linear head),
5e-2 (attention) and 1e-2 (DifFeed); the U-Net stays as it is.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.catalogue.cards import Published
from saccade.models.diffssl.fusion import AttentionFusion, FeedbackLayer, FeedbackResidual, PooledHead, TokenMap
from saccade.models.diffssl.network import DiffusionClassifier
from saccade.models.diffssl.unet import DiffusersUNet, UNet

__all__ = [
    "AttentionFusion",
    "DiffusersUNet",
    "DiffusionClassifier",
    "FeedbackLayer",
    "FeedbackResidual",
    "PooledHead",
    "TokenMap",
    "UNet",
]


register(
    "diffssl",
    kind="model",
    summary="A frozen diffusion U-Net as image features: attention over blocks and noise steps, and feedback.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="",
    complexity="T passes of the U-Net, twice as many with feedback; attention among all tokens of a noise step",
    invariants=(
        "the order of tokens does not matter: maps whose pixels are shuffled alike give the same logits",
        "with feedback that gives zero the second pass is the first",
        "feedback leads from block b to block N + 1 - b; a map of the same size is not resized",
        "the same noise gives the same maps; at t = 0 the image is almost clean",
        "no gradient reaches the U-Net; those of the feedback come by the second pass alone",
    ),
    build=DiffusionClassifier,
    example={
        "num_classes": 5,
        "unet_sizes": {"width": 8, "factors": (1, 2), "depth": 1, "attention": (1,), "head_dim": 8},
        "times": (90, 150),
        "first_blocks": (5, 7),
        "second_blocks": (7,),
        "feedback": (6, 7, 8),
        "dim": 16,
        "num_heads": 4,
        "depth": 1,
        "image_size": 16,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 2), torch.randn(2, 2, 3, size, size + 2)),
    published=(
        Published(
            "DifFormer",
            {},
            inputs={"pixel_values": (1, 3, 256, 256)},
            note="the card gives neither parameters nor operations",
        ),
        Published(
            "DifFeed",
            {"times": (150,), "first_blocks": (), "second_blocks": (24,), "feedback": (21, 24, 27, 30, 33, 36)},
            inputs={"pixel_values": (1, 3, 256, 256)},
            note="the card gives neither parameters nor operations",
        ),
    ),
)
