"""ACD-CLIP: a frozen CLIP finds flaws in things that it was not trained on, by adapters of both its towers.

"Architectural Co-Design for Zero-Shot Anomaly Detection: Decoupling Representation and Dynamically Fusing Features
in CLIP", arXiv 2508.07819.

    a    = join_k [alpha / sqrt(r) s_c conv_k(conv_k(t A_k)) B_k]                  Conv-LoRA on patches, kernels 3 and 5
    t   <- (1 - w) t + w a |t| / |a|                                 after each of G image levels; texts: LoRA, as well
    v_g  = LN(MLP_map(t)) / |.|,    u_g = mean_n LN(MLP_image(t)) / |.|,    T_g: of both states, from the end tokens
    T~_i = sum_g softmax_g(W2 gelu(W1 mean_n v_i))_g T_g                                      Dynamic Fusion Gateway
    map  = softmax over states of the mean over i of up(10 v_i T~_i),      image = softmax of mean_g u_g T_g

| here                    | paper       | default                                                               |
|-------------------------|-------------|-----------------------------------------------------------------------|
| `levels`                | G           | 4: after blocks 6, 12, 18, 24 of images and 3, 6, 9, 12 of texts      |
| `rank`, `alpha`         | r, alpha    | 16, 2                                                                 |
| `conv_rank`, `conv_alpha` | r_c, alpha_c | 8, 2                                                                |
| `kernels`               | k           | 3, 5                                                                  |
| `weight`                | w           | 0.2, learned for each channel                                         |
| `domain`                |             | "industrial": blur 7, sigma 1, 0.9 p + 0.1 max; "medical": 9, 1.5, half |

Source of all of it: the authors' code. In the text both heads fuse; in the code the map's alone does, as here. The blur
is of evaluation. `zsad(model, processor)` stands on a CLIP of transformers, whose tensors it shares and never changes.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.zsad_codesign.adapters import ConvLoRA, ConvLoRABlock, LoRA, mixed
from saccade.models.zsad_codesign.gateway import DOMAINS, Domain, DynamicFusionGateway, blurred, state_maps
from saccade.models.zsad_codesign.losses import anomaly_loss, cut, dice, focal, groups, map_loss
from saccade.models.zsad_codesign.network import ACDCLIP, ImageSide, TextSide, zsad
from saccade.models.zsad_codesign.sentences import sentences

__all__ = [
    "ACDCLIP",
    "DOMAINS",
    "ConvLoRA",
    "ConvLoRABlock",
    "Domain",
    "DynamicFusionGateway",
    "ImageSide",
    "LoRA",
    "TextSide",
    "anomaly_loss",
    "blurred",
    "cut",
    "dice",
    "focal",
    "groups",
    "map_loss",
    "mixed",
    "sentences",
    "state_maps",
    "zsad",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, size, size + 2), torch.randint(0, 20, (2, 3, 7))


register(
    "zsad-codesign",
    kind="model",
    summary="Frozen CLIP with convolutional low-rank adapters and gated text levels: flaws of unseen things, mapped.",
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="CLIP's; a level adds (2 C r + 2 k^2 r r_c) N and 2 C^2 N of the joining map; texts once for a class",
    invariants=(
        "w = 0 leaves CLIP's tokens as they are, bit for bit",
        "an adapted token has the length of its token; the size of what is adapted does not matter",
        "kernel 1 and convolutions that do nothing are LoRA",
        "an impulse reaches 5 x 5 patches with kernel 3, and 9 x 9 with kernel 5",
        "gates sum up to 1 over levels; equal text levels make a fixed text head",
        "both states' probabilities sum up to 1",
    ),
    build=ACDCLIP,
    example={
        "image_size": 28,
        "patch": 7,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "text_dim": 12,
        "text_depth": 2,
        "text_heads": 2,
        "vocabulary": 20,
        "context": 9,
        "hidden": (24, 24),
        "levels": 2,
        "head_dim": 6,
        "rank": 4,
        "conv_rank": 3,
    },
    inputs=_inputs,
)
