"""Twins: backbones of attention inside windows, and of attention to one representative per sub-window, in turn.

Chu, Tian, Wang, Zhang, Ren, Wei, Xia, Shen, "Twins: Revisiting the Design of Spatial Attention in Vision
Transformers", arXiv 2104.13840 (NeurIPS 2021).

    LSA(x) = W_o attention(q, k, v) inside windows of ws x ws tokens;  q, k, v = W_qkv x
    GSA(x) = W_o attention(W_q x, k, v);   k, v = W_kv LN(conv(x)), a convolution of kernel and stride sr
    PEG(x) = x + depthwise 3 x 3 convolution (x)
    block: x += attention(LN(x)), x += MLP(LN(x));  stage: embedding, a block, PEG, the other blocks

Twins-SVT has LSA in blocks 0, 2, ... of a stage and GSA in blocks 1, 3, ...; Twins-PCPVT has GSA alone. Positions are
known by PEG only, so maps of any size are taken. A pair costs 2 H W C (ws^2 + H W / sr^2) beside its projections.

| here             | paper | meaning                                                         | default (SVT-S) |
|------------------|-------|-----------------------------------------------------------------|-----------------|
| `windows`        | ws    | sides of LSA's windows per stage; 1, or None for all, has GSA alone | 7, 7, 7, 7  |
| `reductions`     | sr    | of GSA per stage                                                | 8, 4, 2, 1      |
| `padding`        |       | where a window is not filled: "mask" or "zeros"                 | "mask"          |

Where a map is no multiple of the window, the segmentation code fills it up, right and below, after the norm:
with "mask" the tokens that fill up are not seen (the authors' way, without the slip by which no filling at all marked
everything), with "zeros" they take part. Embeddings and GSA's convolution drop what they cannot cover, as the authors'
convolutions do; a map smaller than one patch is filled up with zeros, which is ours. Drop path grows linearly from 0
over the blocks. Dropout of attention weights, 0 in all runs of the authors, is not offered.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.twins.network import (
    DEPTHS,
    PADDINGS,
    PCPVT,
    GlobalSubsampledAttention,
    LocallyGroupedAttention,
    Stage,
    Twins,
)

__all__ = ["PADDINGS", "GlobalSubsampledAttention", "LocallyGroupedAttention", "Stage", "Twins"]


_B = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 18, 2)}


_L = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}


# ours without them: 3.67, 6.44, 9.50, 2.81, 8.33, 14.81
_COUNTED = "the paper's FLOPs leave out the products of queries with keys and of weights with values"


register(
    "twins",
    kind="model",
    summary="Backbones that alternate attention in windows with attention to one representative per sub-window.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "local", "representations": "single"},
    efficiency="",
    complexity="LSA: time 2 ws^2 H W C; GSA: 2 (H W)^2 C / sr^2; memory O(H W C)",
    invariants=(
        "LSA in one window as large as the map is multi-head attention",
        "LSA: a token changes outputs of its own window only; GSA: it changes all",
        "GSA with sr = 1 is multi-head attention; with an averaging kernel, attention to normalised means",
        "windows that are not filled are windows of fewer tokens (padding 'mask')",
        "PEG with zero weights is the identity, and moves with its input inside the map",
        "the parameters of the published sizes, exactly",
    ),
    build=Twins,
    example={
        "dims": (8, 16),
        "num_heads": (1, 2),
        "depths": (2, 2),
        "mlp_ratios": (2, 2),
        "reductions": (2, 1),
        "windows": (3, 2),
        "num_classes": 5,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 5),),
    published=tuple(
        Published(f"Twins-{name}", arguments, parameters, flops, tolerance=0.05, note=_COUNTED)
        for name, arguments, parameters, flops in (
            ("PCPVT-S", PCPVT, 24.106216, 3.7),
            ("PCPVT-B", {**PCPVT, "depths": (3, 4, 18, 3)}, 43.828456, 6.4),
            ("PCPVT-L", {**PCPVT, "depths": (3, 8, 27, 3)}, 60.989672, 9.5),
            ("SVT-S", {"depths": DEPTHS}, 24.060776, 2.8),
            ("SVT-B", _B, 56.070952, 8.3),
            ("SVT-L", _L, 99.271400, 14.8),
        )
    ),
)
