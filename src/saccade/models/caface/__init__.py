"""CAFace: one template of any number of images of a face, by soft clusters that are kept as a running summary.

Kim, Liu, Jain, Liu, "Cluster and Aggregate: Face Recognition with Large Probe Set", NeurIPS 2022, arXiv 2210.10864.

    s_n = [SIM(means and deviations of maps); E(||f_n||)],   v_n = f_n / ||f_n||
    A = softmax_m(Wq LN(G) . Wk LN(x) / sqrt(D)),   x = images of Transformer([s; G])       a_m = sum_n A_mn
    F_m = sum_n A_mn v_n / max(a_m, 1),   S_m = sum_n A_mn LN(x)_n / max(a_m, 1)
    (a, F, S) <- (a + a', (a F + a' F') / (a + a'), ...)                                    more images
    template = sum_m W_m F_m,   W = softmax_m(MLP(Mixer([G; S])))

| here           | paper                        | default                  |
|----------------|------------------------------|--------------------------|
| `num_centres`  | M global centres G           | 4                        |
| `style_dim`, `norm_dim` | of SIM, of E        | 64, 64                   |
| `depth`        | blocks of CN, mixers of AGN  | 2 (the released; also 3) |
| `per_channel`  | K = C weights, or one        | True (the released)      |
| `stages`       | whose maps are the style     | the second and third     |

E counts the length of a feature, in deviations from the running mean of all lengths, in tenths, clipped at 3, and is a
sinusoid of that. Images see each other in a batch (O(N^2)); over batches the cost is linear and memory constant: the
same batches in any order give the same template, other batches one that is near.

Choices where paper and code differ, as the code makes them: a cluster with less than one image's weight is divided by
1, not by its mass, and the updated centres are not used. A mask of padding, which the code has not, leaves it out of
the attention and gives it no share. The network before it is any that gives maps; training is `training_loss` with
AdamW at 1e-3, weight decay 5e-4, ten epochs, a tenth of it after 6 and 9, the network frozen.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.caface.aggregator import (
    AggregationNetwork,
    ClusterAggregate,
    ClusterNetwork,
    GatedMixer,
    NormEmbedding,
    StyleMaker,
    style_statistics,
)
from saccade.models.caface.losses import centre_loss, memory_loss, training_loss
from saccade.models.caface.network import CAFace

__all__ = [
    "AggregationNetwork",
    "CAFace",
    "ClusterAggregate",
    "ClusterNetwork",
    "GatedMixer",
    "NormEmbedding",
    "StyleMaker",
    "centre_loss",
    "memory_loss",
    "style_statistics",
    "training_loss",
]


register(
    "caface",
    kind="model",
    summary="Any number of images of one face to one template: soft clusters by style, kept as a running summary.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(N^2 D) in a batch of N images, linear over batches; state M (C + D + 1) numbers",
    invariants=(
        "the shares of an image sum to 1 over centres, the weights of a channel over clusters",
        "the order of images in a batch does not matter, nor that of batches",
        "one image has F_m = A_m v; with one centre the template is the mean of v",
        "without blocks, and with a mass of 1 and more, batches give what the whole set gives",
        "padding changes nothing",
    ),
    build=CAFace,
    example={
        "dim": 12,
        "width": 4,
        "trunk_stages": 2,
        "stages": (0, 1),
        "style_dim": 6,
        "norm_dim": 6,
        "num_heads": 3,
        "depth": 1,
    },
    inputs=lambda module, size: (torch.rand(2, 3, 3, size, size + 2),),
    tasks={"recognise": {"dim": 64, "width": 16, "style_dim": 16, "norm_dim": 16, "num_heads": 4, "drop_path": 0.0}},
)
