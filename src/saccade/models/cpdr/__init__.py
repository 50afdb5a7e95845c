"""CPDR: a decoder's pyramid is crossed twice before the heads, down by channel and up by spatial attention.

Li, Wang, Katsaggelos, "CPDR: Towards Highly-Efficient Salient Object Detection via Crossed Post-decoder Refinement",
BMVC 2024, arXiv 2501.06441.

    SE(x) = sigmoid(m W2 ReLU(W1 mean x)),      SA(x) = sigmoid(conv_kxk [mean over channels of x; largest])
    ADF:   x' = CBR([CBR_s2(finer'); x] SE(coarser))                            from the finest map down
    AUF:   x'' = CBR([CBR(up(coarser'')); x'] down(SA(finer')))                 from the coarsest up
    DACF:  l = CBR(low down(SA(high))),  h = CBR(high SE(low)),  CBR(h + CBR_1x1(up [l; CBR_s2(h)]))

CBR is convolution, batch norm, ReLU. CPDR-A is ADF three times, then AUF three times; CPDR-B is DACF three times, at
half the width. Heads give logits at strides 1, 2 and 4; the first is the answer.

| here | paper | default |
|---|---|---|
| `base` | b, the width at the image's size | 16 |
| `reductions` | SE's ratios | 2, 4, 8 at b, 2b, 4b (A); 8, 4, 2 at 4b, 2b, b (B) |
| `factor` | m | 2 |
| `kernel_size` | k | 7 |

Sizes: CPDR-S is the default, on MobileNetV2; CPDR-L and CPDR-M are `neck="a"` on EfficientNet-B0 and -B3 (as the
repository names them), given as `backbone`. The paper's code names no classes for ADF and AUF; here they are modules.
Maps of any size are resized to the next one's size, which for multiples of 32 is the paper's factor of 2. The loss
class is missing from the release: `saliency_loss` is what the configuration names, multi-scale Dice and IoU.
"""

from __future__ import annotations

from saccade.catalogue import Published, register
from saccade.models.cpdr.blocks import ADF, AUF, CPDRA, CPDRB, DACF, ChannelAttention, SpatialAttention
from saccade.models.cpdr.losses import dice_iou, saliency_loss
from saccade.models.cpdr.network import CPDR, Decoder

__all__ = [
    "ADF",
    "AUF",
    "CPDR",
    "CPDRA",
    "CPDRB",
    "DACF",
    "ChannelAttention",
    "Decoder",
    "SpatialAttention",
    "dice_iou",
    "saliency_loss",
]


register(
    "cpdr",
    kind="model",
    summary="Salient objects: the decoder's pyramid refined crosswise, channels on the way down, places on the way up.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="the neck: time O(9 b^2 H W) at the image's size, b of 8 or 16; linear in pixels",
    invariants=(
        "with zero weights both attentions are 1/2 everywhere, and ADF is its convolutions on half of the input",
        "DACF halves the channels and keeps the finer size; both necks keep sizes",
        "the spatial gate of a map that is constant in space is constant in the interior, after resizing too",
        "resizing down and up again keeps a map's corners",
    ),
    build=CPDR,
    example={"base": 4, "reductions": (2, 2, 2), "width": 0.25},
    tasks={"salient": {"base": 8, "reductions": (4, 4, 2), "width": 0.25}},
    published=(
        Published("CPDR-L", {"backbone": "efficientnet-b0", "neck": "a"}, inputs={"pixel_values": (1, 3, 256, 256)}),
        Published("CPDR-M", {"backbone": "efficientnet-b3", "neck": "a"}, inputs={"pixel_values": (1, 3, 256, 256)}),
        Published("CPDR-S", {}, inputs={"pixel_values": (1, 3, 256, 256)}),
    ),
)
