"""Flash Window Attention: the exact attention of Swin's windows, many short ones, with no weights kept in memory.

Zhang, "Flash Window Attention: speedup the attention computation for Swin Transformer", arXiv 2501.06480.

    P = softmax(s q k^T + b + m_w),   o = P v                     per window w and head; b: relative positions
    dv = P^T do,   dP = do v^T,   dS = P * (dP - rowsum(P * dP)),   dq = s dS k,   dk = s dS^T q,   db = sum_w dS

The paper gives one window and head to one GPU program that holds the whole T x T matrix on chip, walks over the
feature dimension in chunks, and computes P again in the backward pass, so that memory sees q, k, v, b and o only.
`saccade.ops.partitions` keeps what carries over to a machine with caches: pieces of windows whose scores stay on chip,
P computed again, nothing of T x T kept; there the whole feature dimension is one chunk.

| here          | paper    | meaning                                              | default      |
|---------------|----------|------------------------------------------------------|--------------|
| `window_size` | window   | tokens per axis; T = their product                   | 7 (Swin)     |
| `shift`       | shift    | cyclic shift of the windows, w // 2 in odd blocks    | 0            |
| `scale`       | s        | factor of the product; the bias is added after it    | D ** -0.5    |
| `mask`        | m        | (P, T, T), added; window i takes mask i mod P        | none         |

Choices that the paper leaves open: the author's module forgets the shift mask when its kernel is on and skips `proj`;
his kernel's dq and dk lack s, and weights are rounded to the input's dtype before they are summed. Here the mask
counts, `proj` is applied, gradients are exact, weights and sums are in single precision at least. Where the window
does not divide the map, `border="zeros"` fills it up with zero tokens that take part, as Swin does, and `border="cut"`
lets the last windows be smaller. On an axis that is no longer than the window there is no shift.
"""

from __future__ import annotations

import torch

from saccade.attention.flash_window.layer import FlashWindowAttention, flash_window_attend, retrofit_swin
from saccade.catalogue import register

__all__ = ["FlashWindowAttention", "flash_window_attend", "retrofit_swin"]


register(
    "flash-window",
    kind="sequence",
    summary="Exact attention inside the (shifted) windows of a map, with relative bias, no weights kept for backward.",
    supports=("bidirectional",),
    taxonomy={"sequences": "self", "levels": "single", "positions": "local", "representations": "single"},
    efficiency="sparse/fixed/window",
    complexity="time O(N T D), T tokens per window; memory O(N D)",
    invariants=(
        "equals softmax(s q k^T + bias) v for any window, width and dtype, forward and backward",
        "the bias' gradient is the sum over windows",
        "permuting windows permutes outputs",
        "no tensor of windows x heads x T x T is kept for the backward pass",
        "a bias that leaves the diagonal gives o = v",
        "the shift's mask as part of a bias per window equals the masked core",
        "a shifted map equals roll, cut, mask, join and roll back",
        "a transformers Swin model gives the same outputs with this attention",
    ),
    build=FlashWindowAttention,
    example={"dim": 16, "num_heads": 2, "window_size": 4, "shift": 2},
    inputs=lambda module, size: (torch.randn(2, size, max(1, size - 2), module.dim),),
    at_length=lambda length: {"window_size": (min(64, max(2, length // 8)),), "shift": True},
)
