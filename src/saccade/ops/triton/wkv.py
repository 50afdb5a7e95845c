"""`ops.wkv.scan.around` in Triton: the sums over the tokens before and after each token, segment by segment.

Shape letters: R rows of a sum (see `ops/wkv/scan.py`), B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.triton.launching import launch

__all__ = ["around_in_triton", "rehearse"]

#: tokens of a segment
SEGMENT = 64

#: channels of a program
CHANNELS = 32


def around_in_triton(
    tokens_RBTC: Tensor, w_C: Tensor, chunk: int, shift: int, moments: bool, backwards: bool
) -> Tensor:
    """For each token the sums over all others: `ops.wkv.scan.around`, of any T, in float32.

    Args:
        tokens_RBTC: each alone, seen from its own place.
        w_C: the decay.
        chunk: tokens of a chunk; the last one may have fewer.
        shift: 0 or 1.
        moments: whether there are moments among the rows.
        backwards: as if tokens stood in the other order, in the same chunks.
    """
    from saccade.ops.triton import wkv_kernels as kernels

    tokens, w = tokens_RBTC.contiguous(), w_C.contiguous()
    R, B, T, C = tokens.shape
    chunks, parts = -(-T // chunk), -(-chunk // SEGMENT)
    segments, blocks = chunks * parts, -(-C // CHANNELS)
    before, after = (tokens.new_empty(R, B, segments, C) for _ in range(2))
    out = torch.empty_like(tokens)
    sizes = (B, T, C, chunk, parts, segments, chunks * chunk)
    cut = {"SEGMENT": SEGMENT, "BLOCK": CHANNELS, "MOMENTS": moments, "warps": 1}
    launch(kernels.segment_sums, (blocks * segments * B,), tokens, w, before, after, *sizes, FLIP=backwards, **cut)
    launch(kernels.carry, (blocks * B,), w, before, after, B, C, chunk, parts, segments, shift, **cut)
    launch(
        kernels.token_sums,
        (blocks * segments * B,),
        *(tokens, w, before, after, out, *sizes, shift),
        FLIP=backwards,
        **cut,
    )
    return out


def rehearse(every: bool) -> None:
    """Launch what is launched here, on meta tensors.

    Args:
        every: both distances, else the published one.
    """
    cases = [(2, 4096, 768, 4096, 1), (1, 1, 1, 1, 1), *([(2, 4096, 768, 256, 0)] if every else [])]
    for rows, moments in ((6, True), (4, False)):
        for B, T, C, chunk, shift in cases:
            tokens, w = torch.empty(rows, B, T, C, device="meta"), torch.empty(C, device="meta")
            around_in_triton(tokens, w, chunk, shift, moments, not moments)
