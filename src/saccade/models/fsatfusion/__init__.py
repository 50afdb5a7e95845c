"""FSATFusion: two images fused end to end by transformer blocks with a mean over tokens, and gates of frequencies.

"FSATFusion: Frequency-Spatial Attention Transformer for Infrared and Visible Image Fusion", arXiv 2506.10366, Computer
Vision and Image Understanding 263, 104600 (2026).

    z_c = sum_pq x_c[p, q] cos(pi u (p + 1/2) / P) cos(pi v (q + 1/2) / Q) ...        frequencies (u, v) of channel c
    FSAM:   x' = x sigmoid(W2 ReLU(W1 z)),   y = x' sigmoid(conv7x7[max_C x'; std_C x'])
    ITM:    T <- T + att(LN T),   T <- T + (h + mean_N h) / 2,   h = MLP(LN T)
    layer:  x <- ITM_i(x),   x <- ReLU(BN(x + FSAM(x)))                               i = 1, 2; one FSAM and BN
    F = tanh(conv1x1(layer(ReLU(BN(conv3x3(ReLU(conv3x3[I_ir; I_vi])))))))

| here          | paper                             | default       |
|---------------|-----------------------------------|---------------|
| `channels`    | C                                 | 16            |
| `depth`       | ITM blocks                        | 2             |
| `window_size` | of att                            | 1: no other token is seen |
| `grid`        | (P, Q), to which maps are pooled  | 224 x 224     |
| `frequencies` | the best n of FcaNet              | 16            |

It learns without a truth (`fusion_loss`): Adam at 1e-3, batches of 32 pairs of 224 pixels, 50 epochs.

Source of what the paper leaves open: the authors' code. It makes tokens of a map without transposing it, so that a
token is 16 neighbouring values of one channel; the default here is a token per position, and `layout="code"` theirs,
which their weights bring with them. Its gradient loss compares means over whole batches, in which nearly all cancels
out: `gradient_loss(of="pixels")` is the usual reading. It also builds a convolution, a patch embedding and a second
FSAM that nothing calls; they are not here.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.fsatfusion.attention import (
    TOP_COLUMNS,
    TOP_ROWS,
    FrequencyChannelGate,
    FrequencySpatialAttention,
    FSATLayer,
    MeanTransformerBlock,
)
from saccade.models.fsatfusion.losses import fusion_loss, gradient_loss, structure_loss
from saccade.models.fsatfusion.network import FSATFusion

__all__ = [
    "TOP_COLUMNS",
    "TOP_ROWS",
    "FSATFusion",
    "FSATLayer",
    "FrequencyChannelGate",
    "FrequencySpatialAttention",
    "MeanTransformerBlock",
    "fusion_loss",
    "gradient_loss",
    "structure_loss",
]


register(
    "fsatfusion",
    kind="model",
    summary="Two images fused end to end: transformer blocks with a mean over tokens, gates of cosine statistics.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(H W C^2), 9,395 parameters",
    invariants=(
        "the statistic of frequency (0, 0) is the mean times the square root of the grid's positions",
        "gates lie in (0, 1): FSAM makes no value larger",
        "in windows of one token, tokens meet in the mean of h alone",
        "the mean over tokens of (h + mean h) / 2 is the mean of h",
        "the structure loss of the larger of both images is 0",
    ),
    build=FSATFusion,
    example={"grid": (14, 21), "mlp_ratio": 2.0},
    inputs=lambda module, size: (torch.rand(2, 1, size, size + 2), torch.rand(2, 1, size, size + 2)),
    tasks={"fuse": {}},
)
