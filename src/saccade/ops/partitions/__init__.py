"""Attention inside the non-overlapping windows of a grid of tokens, which may be shifted (Swin), exactly.

    S = scale * Q K^T + bias,   P = exp2(S log2 e - lse),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O) + dlse),   dQ = scale * dS K,   dK = scale * dS^T Q
    dbias = sum of dS over windows

Cyclic shift and region mask are only a way to write down that the windows at the border are cut in two. Here they are
cut: on each axis the grid falls into a first part, whole windows, and a rest, so the whole grid falls into at most 3^d
kinds of equal boxes. Nothing is rolled, padded or masked, and a part of a window costs what its own pairs cost.

What makes it fast: windows are taken in pieces whose scores stay in the cache, a strided copy brings a piece from any
layout of tokens and heads to (window, head, row); bias and scale ride along with the product; the weights are powers of
two of scores without their maximum (rows whose sum leaves the safe range are computed again, with it), and the output
is divided instead of the weights. The backward pass computes the weights again: nothing of T x T is kept. On a CPU the
buffers of a piece (some 10 MB a thread that calls) stay from call to call: the first touch of a page of new memory
costs more than the arithmetic on it.
"""

from saccade.ops.partitions.attend import packed_window_attend, window_attend, window_bias
from saccade.ops.partitions.filled import cropped, filled, on_filled

__all__ = ["cropped", "filled", "on_filled", "packed_window_attend", "window_attend", "window_bias"]
