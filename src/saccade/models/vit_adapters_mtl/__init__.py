"""Vision Transformer Adapters: one Swin answers several dense tasks, each of which tells its windows where to look.

Bhattacharjee, Suesstrunk, Salzmann, "Vision Transformer Adapters for Generalizable Multitask Learning", ICCV 2023,
arXiv 2308.12372.

    FiLM(x, w) = (1 + gamma) x + beta,    [gamma; beta] = W w + b                      w: the embedding of the task
    TAA:   softmax(q k^T / sqrt(d) + bias + A'(w) + mask) v,    A'(w) = blocks of FiLM(A, w) on the diagonal
    TSN:   (x - mean) / std FiLM(weight, w) + bias
    side stream:   h <- Up(Down(FiLM(x + h, W_e w)))    after each block x; LN(h) of the last stage is decoded
    TROA:  w_i = sum_j Omega_ij theta_j,    Omega_ij <- Omega_ij exp(eta cos(g_i, g_j)), rows to a sum of 1

| here                         | paper, authors' code              | default                      |
|------------------------------|-----------------------------------|------------------------------|
| `TaskAdaptedAttention`       | TAA                               |                              |
| `TaskScaledNorm`             | TSN; the authors' `use_tsn_layer` | on                           |
| `Bottleneck`                 | adapter, a third of C wide        | on                           |
| `TaskAffinity`               | TROA                              | off, as in the authors' code |
| `condition`                  | d, width of an embedding          | window_size ** 3             |
| `conditioned_blocks`         | blocks with TAA and TSN           | the last six of stage 3      |
| `SwinAdapters`               | the same, around transformers'    |                              |

Source of what differs: the authors' code. It has a decoder for each task (the paper: one with several heads), scales
the norm's weight alone, and its training script has attention without 1 / sqrt(d) (`scale=1.0`); TROA is not in it, and
its step here is inferred from the authors' slides. The side stream has no way around its bottlenecks. `decoder_depths`
are by resolution. Images of any size are filled up with zeros, as windows at the border are.

Whoever has pretrained weights calls `freeze()`; around a frozen Swin of transformers nothing is changed for good:

    adapters = SwinAdapters(swin, tasks=2)
    with adapters(swin, task_id) as maps:
        swin(pixel_values)
"""

from __future__ import annotations

from saccade.catalogue import Published, register
from saccade.models.vit_adapters_mtl.adapters import Bottleneck, FiLM, TaskBias, TaskScaledNorm, block_diagonal
from saccade.models.vit_adapters_mtl.affinity import TaskAffinity, similarities
from saccade.models.vit_adapters_mtl.attention import AdaptedBlock, TaskAdaptedAttention
from saccade.models.vit_adapters_mtl.decoder import PatchExpand, TaskDecoder
from saccade.models.vit_adapters_mtl.losses import berhu, depth_loss, multitask_loss
from saccade.models.vit_adapters_mtl.network import MultitaskSwin
from saccade.models.vit_adapters_mtl.swin import SwinAdapters

__all__ = [
    "AdaptedBlock",
    "Bottleneck",
    "FiLM",
    "MultitaskSwin",
    "PatchExpand",
    "SwinAdapters",
    "TaskAdaptedAttention",
    "TaskAffinity",
    "TaskBias",
    "TaskDecoder",
    "TaskScaledNorm",
    "berhu",
    "block_diagonal",
    "depth_loss",
    "multitask_loss",
    "similarities",
]


register(
    "vit-adapters-mtl",
    kind="model",
    summary="A Swin of several dense tasks: the task's embedding biases its windows' attention, norms and side stream.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "local",
        "representations": "single",
    },
    efficiency="sparse/fixed/window",
    complexity="TAA N K + 2 K (D + 1) parameters a block, no further pairs; a bottleneck 2 C^2 / 3 + D^2 + 2 C D",
    invariants=(
        "with A and FiLM zero an adapted block is Swin's, and a task-scaled norm a layer norm",
        "the task's bias is zero off its diagonal blocks, and the same for all images of a task",
        "a permuted batch gives permuted outputs; a task's logits depend on its own images alone",
        "frozen parameters get no gradient",
        "affinity rises with the cosine of the gradients, and rows of it sum to 1",
        "around a Swin of transformers, and off again: it says what it said",
    ),
    build=MultitaskSwin,
    example={
        "task_classes": (3, 1),
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 4,
        "depths": (2, 1),
        "num_heads": (2, 2),
        "decoder_depths": (2, 1),
        "window_size": 2,
        "conditioned_blocks": ((1,), (0,)),
        "mlp_ratio": 1.0,
        "drop_path": 0.0,
        "decoder_drop": 0.0,
    },
    published=(Published("Swin-S", {}),),
)
