"""SMAFormer: medical segmentation by a U whose blocks put three attentions behind multi-head attention.

"SMAFormer: Synergistic Multi-Attention Transformer for Medical Image Segmentation", IEEE BIBM 2024, pp. 4048-4053,
arXiv 2409.00346.

    modulator:  A = softmax_rows(PA(x) CA(x)),   y = BN(conv(A SA(x))) + bias + x          maps as S x S matrices
    PA(x) = x sigmoid(BN(conv x)),   CA(x) = x sigmoid(W2 ReLU(W1 mean x)),   SA: dilated 3 x 3 convolutions, fused
    SMA(x, r) = modulator(softmax(Q(r) K(r)^T / sqrt(d)) V(x))
    block:      q = LN(SMA(x, r) + x),   y = LN(E-MLP(q) + q),     r = x in the encoder, a skip in the decoder
    E-MLP:      linear, GELU, 3 x 3 convolution, 3 x 3 convolution, linear

| here            | paper                            | default                   |
|-----------------|----------------------------------|---------------------------|
| `filters`       | widths from image to bottom      | 16, 32, 64, 128, 256, 512 |
| `rates`         | dilations of SA                  | 1, 6, 12, 18              |
| `reduction`     | of CA                            | 16                        |
| `num_heads`     | of the attention                 | 8                         |
| `expansion`     | of E-MLP                         | 2                         |
| `fusion_gate`   | the modulator behind attention   | True                      |

Source: the authors' first code, through the card; the loss is of their second version. Where the code differs from
what the paper means, the paper is the default and the code an option, which `load` and `from_authors` take with the
authors' weights: the code attends over the batch (`over="batch"`), and makes maps of tokens without transposing them in
three places (`scrambled=True`). E-MLP's convolutions are full 3 x 3, as in the code. An image of any size is filled up
with zeros to a square of a multiple of 32, since maps are multiplied as matrices.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.models.smaformer.modulator import (
    ConvolutionalMLP,
    Modulator,
    PatchEmbedding,
    SMAFormerBlock,
    SynergisticAttention,
    to_map,
    to_tokens,
)
from saccade.models.smaformer.network import ResidualConv, SMAFormer, segmentation_loss

__all__ = [
    "ConvolutionalMLP",
    "Modulator",
    "PatchEmbedding",
    "ResidualConv",
    "SMAFormer",
    "SMAFormerBlock",
    "SynergisticAttention",
    "segmentation_loss",
    "to_map",
    "to_tokens",
]


register(
    "smaformer",
    kind="model",
    summary="Segmentation by a U of convolutions and blocks that fuse pixel, channel and spatial attention.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="attention: time O(N^2 C), memory linear in N; modulator: time O(C S^3 + 36 C^2 S^2) for N = S^2",
    note="attention over tokens at half the image's size: 65,536 tokens of a 512 x 512 image",
    invariants=(
        "rows of A sum to 1",
        "with the last norm's weight and bias 0 the modulator is x + bias",
        "where all rows of SA(x) are equal, A does not matter",
        "images of a batch do not meet, unless attention runs over it",
        "the patch embedding halves the sides; its tokens have mean 0 and variance 1",
    ),
    build=SMAFormer,
    example={"num_classes": 2, "filters": (4, 4, 4, 4, 4, 8), "num_heads": 2, "reduction": 2, "rates": (1, 2)},
    tasks={"segment": {"filters": (8, 16, 16, 32, 32, 64), "num_heads": 2, "reduction": 4}},
)
