"""ACAM-KD: a student imitates its teacher's features where, and in the channels that, the two of them point out.

Lan, Tian, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation", ICCV 2025, arXiv
2503.06307.

    fused = V softmax(Q^T K / sqrt(C/2))^T      Q = W_q F_T, K = W_k F, V = W_v F           (STCA-FF)
    M^c   = sigmoid(m_c mean_N(fused)),         M^s = sigmoid(m_s fused)                    (ASCM), M units each
    L_c   = 1/M sum_m || M^c_m (F_T - F) ||^2 / (N sum_k M^c_mk)
    L_s   = 1/M sum_m || M^s_m (F_T - F) ||^2 / (C sum_p M^s_mp)
    L_div = Dice overlap of the units' masks,   L = L_task + alpha (L_c + L_s) + lambda L_div, summed over levels

| here            | paper             | default                                                      |
|-----------------|-------------------|--------------------------------------------------------------|
| `units`         | M                 | 6 (detection); the number of classes (segmentation)          |
| `alpha`         | alpha             | 1                                                            |
| `weight`        | lambda            | 1                                                            |
| `query`         | which asks        | "teacher"                                                    |
| `diversity`     | L_div             | "ratio", as printed; "pairwise" as in its parent, MasKD      |
| `normalise`     | 1 / sum of a mask | True, as MasKD; False divides by the number of its entries   |
| `channel_units` | m_c               | "scalar": one number for each unit; "vector": one a channel  |
| `keys`          | none              | None: all positions answer; 32 pools large maps to 32 x 32   |

No code of the authors is known: this rests on what others printed of the paper. 1x1 convolutions start as torch's,
units normal 0.01, so that all masks are near a half. With a mask of real positions nothing of the others is read or
counted. Attention is never a matrix of all positions: memory is linear in them.
"""

from __future__ import annotations

import torch

from saccade.adapt.acam_kd.objective import ACAMKD, LevelDistillation, masked_error, overlap
from saccade.catalogue import register

__all__ = ["ACAMKD", "LevelDistillation", "masked_error", "overlap"]


def _inputs(module: torch.nn.Module, size: int) -> tuple[list[torch.Tensor], ...]:
    return tuple([torch.randn(2, c, max(1, size // s), size) for c, s in zip(cs, (1, 2))] for cs in ((6, 8), (4, 5)))


register(
    "acam-kd",
    kind="objective",
    summary="Feature distillation whose masks of channels and positions come of cross attention, teacher to student.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="attention O(N^2 C) time and O(N C) memory a level, in training only; nothing at inference",
    invariants=(
        "equal features give no loss and no gradient by their difference",
        "zero units: all masks are 1/2, and both terms half the mean square",
        "ratio: M equal binary masks overlap by M - 1, orthogonal ones by 0; pairwise: by 1 and 0; one unit by 0",
        "masks follow the student: they change where its features alone do",
        "positions that move together leave all terms as they are",
    ),
    build=ACAMKD,
    example={"channels": (6, 8), "student_channels": (4, 5), "units": 3, "detach": False},
    inputs=_inputs,
)
