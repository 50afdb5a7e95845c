"""AdapTac: the force that is felt, and the one to come, asks sight and touch which of them to believe.

"Adaptive Visuo-Tactile Fusion with Predictive Force Attention for Dexterous Manipulation", IROS 2025, arXiv 2505.13982.

    e_F = MLP(g),   e_pc = MLP(Z_pc),   e_tac = MLP(Z_tac),    g = [F_observed; F_predicted]
    Z   = softmax(e_F W_Q ([e_pc, e_tac] W_K)^T / sqrt(d)) [e_pc, e_tac] W_V
    F_predicted: the net forces of the next K steps, by diffusion from [Z_pc; Z_tac]; x0 is predicted, DDIM samples
    L   = L_action + 10 w(epoch) L_force

| here                              | paper, authors' code            | default                       |
|-----------------------------------|---------------------------------|-------------------------------|
| `ForceGuidedFusion`               | force-guided attention          | form "attention", the paper's |
| `form="decoder"`                  | `ForceGuidedCrossAttention`     | 8 heads                       |
| `ForceDenoiser`, `ForcePredictor` | `TransformerForDiffusion`, DDIM | 8 layers, 100 and 20 steps    |
| `guide`                           | `obs_net_force` ...             | both                          |
| `scaled_force`                    | `net_force_scale`               | 5, cut off at 1               |
| `prediction_weight`               | w                               | 0 until half, 1 from 3/4      |

Source of what the paper leaves open: the authors' code. Its fusion is a whole layer of a decoder with linear
projections, the paper's one head of attention between MLPs; the recordings pin the code's, the default is the paper's.
In training the denoiser's x0 at a random time guides, afterwards what is sampled. A missing modality is masked, so that
the other has all the weight (inferred). The encoders of points and taxels and the policy that acts stand on either side
of this block and are not part of it.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.fusion.visuo_tactile.attention import AttentionLayer, WeightedAttention
from saccade.fusion.visuo_tactile.force import (
    ForceDenoiser,
    ForcePredictor,
    force_targets,
    guide,
    prediction_weight,
    scaled_force,
    training_loss,
)
from saccade.fusion.visuo_tactile.fusion import (
    CrossAttentionFusion,
    ForceFused,
    ForceGuidedFusion,
    SelfAttentionFusion,
)

__all__ = [
    "AttentionLayer",
    "CrossAttentionFusion",
    "ForceDenoiser",
    "ForceFused",
    "ForceGuidedFusion",
    "ForcePredictor",
    "SelfAttentionFusion",
    "WeightedAttention",
    "force_targets",
    "guide",
    "prediction_weight",
    "scaled_force",
    "training_loss",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2 * size, 5), torch.randn(2 * size, 7), torch.randn(size, 6)


register(
    "visuo-tactile",
    kind="fusion",
    summary="The contact force, felt and predicted, is the query by which sight and touch are weighed.",
    supports=("missing-modality",),
    taxonomy={"sequences": "co-attention", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(C^2) a row: three tokens",
    invariants=(
        "the weights of sight and touch sum to 1; of a missing one it is 0",
        "swapped modalities with swapped projections leave the result",
        "with equal tokens the weights are a half each, and the result does not depend on the force",
        "a predicted force does not depend on later ones that are noised",
        "the weight of the prediction is 0 until half the epochs, 1 from three quarters",
    ),
    build=ForceGuidedFusion,
    example={"dim": 8, "visual": 5, "tactile": 7, "force": 6},
    inputs=_inputs,
)
