"""C-DiffDet+: a DiffusionDet detector whose proposals also see the whole scene.

Sellam, Benaissa, Bekhouche, Hadid, Reno, Distante, "C-DiffDet+: Fusing Global Scene Context with Generative Denoising
for High-Fidelity Object Detection", arXiv 2509.00578.

    g   = mean over positions of (three convolutions of the image + a linear map of it)                      (GCE)
    Q  <- LN(Q + SelfAttention(Q));   Q <- LN(Q + MHA(Q, g, g))                                              (CAF)
    Q  <- LN(Q + W [ReLU LN (ReLU LN (F W1(Q))) W2(Q)]);   Q <- LN(Q + FFN(Q))        F: the box's cells of the maps
    classes, deltas = towers(Q (1 + scale(t)) + shift(t))                             six such stages
    x  <- x sigmoid(W2 ReLU(W1 mean_L x))       on the tokens of the backbone's last stage                   (ACE)
    loss = 2 focal + 5 L1 + 2 GIoU + 1 focal EIoU       in each stage

Boxes are denoised: in training the objects' boxes, filled up with Gaussian ones, are noised to a random time and the
decoder says what they were; a detection starts from noise (DDIM).

| here                     | paper, authors' code    | default       |
|--------------------------|-------------------------|---------------|
| `GlobalContextEncoder`   | GCE, `ImageEncoder`     | 256 channels  |
| `ContextFusion`          | CAF, `CrossAttention`   | 8 heads       |
| `ACEBlock`               | ACE                     | reduction 16  |
| `proposals`              | N                       | 500           |
| `scale`                  | SNR scale               | 2             |
| `inner`                  | `DIM_DYNAMIC`           | 64            |
| `steps`                  | sampling steps          | 1             |

With g one token, as in the authors' code, CAF adds the same vector to all proposals of an image; the paper speaks of
comprehensive context, so `pooled_context=False` lets them attend to a map of it. ACE stands behind the backbone's last
stage only, as in the code (`gate_last_stage` puts it into transformers' Swin). Renewal of boxes is by image (the
authors', on a batch's first alone). Where card and paper are silent: L1 is of (x, y, width, height) in shares of the
image, terms are divided by the number of matched proposals. Images come in [0, 1]; ImageNet's mean and deviation are
taken out inside.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.context_aware_fusion.context import ACEBlock, ContextFusion, GlobalContextEncoder, gate_last_stage
from saccade.models.context_aware_fusion.diffusion import BoxDiffusion, fill
from saccade.models.context_aware_fusion.head import (
    Decoded,
    DecoderStage,
    DiffusionHead,
    DynamicInteraction,
    apply_deltas,
)
from saccade.models.context_aware_fusion.losses import Objects, detection_loss, focal_eiou_loss, focal_loss, match
from saccade.models.context_aware_fusion.network import BoxOutput, CDiffDet, FeaturePyramid
from saccade.ops.diffusion import cosine_alphas

__all__ = [
    "ACEBlock",
    "BoxDiffusion",
    "BoxOutput",
    "CDiffDet",
    "ContextFusion",
    "Decoded",
    "DecoderStage",
    "DiffusionHead",
    "DynamicInteraction",
    "FeaturePyramid",
    "GlobalContextEncoder",
    "Objects",
    "apply_deltas",
    "cosine_alphas",
    "detection_loss",
    "fill",
    "focal_eiou_loss",
    "focal_loss",
    "gate_last_stage",
    "match",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.rand(2, 3, size, size + 2), 0.2 + 0.6 * torch.rand(2, 5, 4), torch.tensor([3, 700])


register(
    "context-aware-fusion",
    kind="model",
    summary="A diffusion detector whose proposals read one vector of the whole scene by cross attention in each stage.",
    taxonomy={"sequences": "distinctive", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="GCE 0.37 M parameters, CAF 4 C^2 a stage; with one token of context O(B C^2) beside the proposals' "
    "self-attention O(N^2 C) and dynamic interaction O(N 49 C D)",
    invariants=(
        "with one token of context CAF adds the same vector to all proposals, whatever W_q and W_k",
        "with W_o and b_o zero CAF is LN(Q); without context the stage is DiffusionDet's",
        "permuted proposals give permuted results",
        "ACE commutes with the order of tokens; zero weights give x / 2",
        "the focal EIoU loss of equal and of disjoint boxes is 0",
        "noise at t = 0 leaves x0, at T - 1 nothing of it; sampling from one seed repeats itself",
    ),
    build=CDiffDet,
    example={
        "num_classes": 3,
        "proposals": 5,
        "depth": 18,
        "width": 4,
        "levels": 2,
        "dim": 8,
        "stages": 2,
        "hidden": 12,
        "num_heads": 2,
        "inner": 4,
        "pooled": 2,
        "detach": False,
    },
    inputs=_inputs,
    tasks={
        "detect": {
            "proposals": 40,
            "depth": 18,
            "width": 16,
            "dim": 64,
            "stages": 2,
            "hidden": 128,
            "num_heads": 4,
            "inner": 16,
            "pooled": 5,
        }
    },
)
