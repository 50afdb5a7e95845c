"""DAT and DAT++: backbones in which all queries attend to the same few points, which the queries have moved.

Xia, Pan, Song, Li, Huang, "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", arXiv 2309.01430;
extends "Vision Transformer with Deformable Attention" (DAT), arXiv 2201.00520.

    q = x W_q,   dp = theta(q),   p = ref + dp          offsets of a coarse grid of n x m points, per group of channels
    s = phi(x; p),   k = s W_k,   v = s W_v             phi: bilinear sampling
    y = W_o softmax(q k^T / sqrt(D) + phi(B; (query - p) / 2)) v            B: table of biases by displacement

so attention costs O(H W N C) with N = n m points, 49 at every stage of the published sizes, instead of O((H W)^2 C).

| here                    | paper | meaning                                                | default (DAT-T++)     |
|-------------------------|-------|--------------------------------------------------------|-----------------------|
| `stride`, `kernel_size` | r, k  | of theta: depthwise convolution, LN, GELU, 1x1         | 8,4,2,1 and 9,7,5,3   |
| `groups`                | G     | sets of points                                         | 1,2,4,8               |
| `offset_range`          | s     | negative: unbounded, points clamped to the map (DAT++) | -1                    |
| `bias`                  | B     | "table"; "log", "fixed", "convolution" of the code     | "table"               |
| `patterns`              |       | N neighbourhood, D deformable, L and S windows         | N D in turn, last D D |
| `local_perception`, `conv_mlp`, `conv_stem` | | DAT++'s convolutions; DAT has none         | True                  |

Where paper and code differ, this follows the code: reference points (i + 1/2) / (n - 1) lean to the lower right
(`reference="symmetric"` spreads them evenly), and for images of another size the table is stretched over the map. One
point per axis, which would divide by zero, stands in the middle. Patches of the stem and merges, and windows, that do
not divide a map are filled up with zeros. The first DAT's sizes are not on the card; its blocks (L, S, D) are options.

Sampling and the table are `saccade.ops.deformable`; the table is read as shifted crops, not pair by pair.
"""

import torch
from torch import Tensor, nn

from saccade.catalogue import Published, register
from saccade.models.dat.attention import DeformableAttention, NeighborhoodAttention
from saccade.models.dat.model import DAT, Block, ConvMLP, Stage

__all__ = [
    "DAT",
    "Block",
    "ConvMLP",
    "DeformableAttention",
    "NeighborhoodAttention",
    "Stage",
]


def _plus(dims: tuple[int, ...], heads: tuple[int, ...], groups: tuple[int, ...]) -> dict[str, object]:
    return {"dims": dims, "num_heads": heads, "groups": groups}


def _images(module: nn.Module, size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, max(1, size - 2)),)


_T, _S, _B = (64, 128, 256, 512), (96, 192, 384, 768), (128, 256, 512, 1024)
_HEADS = {_T: (2, 4, 8, 16), _S: (3, 6, 12, 24), _B: (4, 8, 16, 32)}

register(
    "dat",
    kind="model",
    summary="Backbones whose queries share a few sampling points that are moved by offsets predicted from the queries.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "hard",
        "representations": "multi-representational",
    },
    efficiency="sparse/token/trained-routing",
    complexity="deformable attention: time 2 H W N C + 2 H W C^2 + 2 N C^2 + (k^2 + 2) N C, N points",
    invariants=(
        "points that stay on every pixel, aligned: dense attention with relative bias, exactly",
        "the bias of a point on a pixel is an entry of the table",
        "points lie in [-1, 1] without a range, within s / (n - 1) of their references with one",
        "groups permuted together with their weights permute the result",
        "N = ceil(H / stride) ceil(W / stride) points",
        "at another image size with the same number of points, time grows linearly with pixels",
    ),
    build=DAT,
    example={
        "dims": (8, 16),
        "patterns": ("ND", "LS"),
        "num_heads": (2, 4),
        "groups": (1, 2),
        "strides": (2, 1),
        "kernel_sizes": (5, 3),
        "window": 2,
        "neighborhood": 3,
        "image_size": 24,
        "num_classes": 5,
    },
    inputs=_images,
    published=(
        Published("DAT-T++", _plus(_T, _HEADS[_T], (1, 2, 4, 8)), 23.962876, 4.3),
        Published("DAT-S++", _plus(_S, _HEADS[_S], (1, 2, 3, 6)), 53.127366, 9.4),
        Published("DAT-B++", _plus(_B, _HEADS[_B], (2, 4, 8, 16)), 93.690640, 16.6),
        Published(
            "DAT-P",
            {**_plus(_T, _HEADS[_T], (1, 2, 4, 8)), "conv_stem": False, "conv_mlp": False, "local_perception": False},
            22.772796,
            note="no FLOPs published",
        ),
    ),
)
