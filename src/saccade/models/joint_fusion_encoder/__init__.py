"""JFE: instruction, images and text in one sequence, through one transformer, to one vector.

Huang, Wu, Miao, Yamasaki, "Joint Fusion and Encoding: Advancing Multimodal Retrieval from the Ground Up", arXiv
2502.20008.

    H = Tower([instruction; images; text]),   z = norm(H_last),   s(q, c) = z_q . z_c / T
    L = mean_i -log softmax_j(s(q_i, c_j))_(i m)

| here               | what                                         | default                           |
|--------------------|----------------------------------------------|-----------------------------------|
| `backbone`         | a vision-language model of transformers      | None: a small tower of our own    |
| `pooling`          | last real token, or mean                     | "last"                            |
| `attention`        | causal, or bidirectional                     | "causal": no mask is retrained    |
| `embed_dim`        | a linear map at the end                      | None                              |
| `temperature`      | T                                            | 0.02                              |
| `cached_backward`  | gradient caching, chunk by chunk             |                                   |
| `LateFusion`       | score and feature fusion of CLIP's towers    |                                   |

No code of the authors is known, and of the paper what its abstract says. What it leaves open is VLM2Vec's (pooling,
temperature, loss, gradient caching; arXiv 2410.05160), the baselines and the benchmark are UniIR's. Training as there:
AdamW at 5e-5, linear decay after 100 steps of warm-up, 5000 steps, batches of 1024 in chunks of 8, low-rank adapters of
rank 16 on the backbone; first captions and texts without instructions, then tasks with them (inferred). Negatives of
other devices come by a differentiable `all_gather`. Feature fusion's two blocks are ours, with rotary positions, in the
place of T5's; missing modalities are left out of it. UniIR's slip with hard negatives is `own_positive=True`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.joint_fusion_encoder.baselines import LateFusion, ScoreFusion
from saccade.models.joint_fusion_encoder.benchmark import CATEGORIES, KINDS, SETS, by_category, headline
from saccade.models.joint_fusion_encoder.losses import cached_backward, late_fusion_loss, retrieval_loss
from saccade.models.joint_fusion_encoder.network import JointFusionEncoder, JointTower, templated
from saccade.models.joint_fusion_encoder.pooling import last_state, mean_state, packed

__all__ = [
    "CATEGORIES",
    "KINDS",
    "SETS",
    "JointFusionEncoder",
    "JointTower",
    "LateFusion",
    "ScoreFusion",
    "by_category",
    "cached_backward",
    "headline",
    "last_state",
    "late_fusion_loss",
    "mean_state",
    "packed",
    "retrieval_loss",
    "templated",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return torch.randn(2, 3, size, size + 2), torch.randint(11, (2, 6)), mask


register(
    "joint-fusion-encoder",
    kind="model",
    summary="Instruction, images and text go through one transformer as one sequence; its last state is the vector.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="one pass over visual tokens and words; retrieval is an inner product",
    invariants=(
        "a vector has unit length and depends neither on the batch nor on side or amount of padding",
        "the mixed second difference over two images and two texts is 0 for score fusion, not for the joint encoder",
        "score fusion of a text alone is the text tower",
        "gradients by chunks are those of the whole batch",
        "an earlier token changes the vector, one after the pooled does not",
    ),
    build=JointFusionEncoder,
    example={
        "vocabulary": 12,
        "dim": 12,
        "depth": 2,
        "num_heads": 3,
        "hidden": 16,
        "image_size": 16,
        "patch": 8,
        "vision_dim": 8,
        "vision_depth": 1,
        "vision_heads": 2,
        "embed_dim": 6,
    },
    inputs=_inputs,
    tasks={
        "retrieve": {
            "dim": 64,
            "depth": 2,
            "num_heads": 4,
            "hidden": 128,
            "patch": 8,
            "vision_dim": 64,
            "vision_depth": 2,
            "vision_heads": 4,
            "embed_dim": 32,
        }
    },
)
