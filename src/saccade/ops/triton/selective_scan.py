"""Selective scan in Triton, forward and backward: `forward` and `backward` of `ops/selective_scan/operator.py`.

Shape letters: B batch, T tokens, G groups, C channels of a group, N states of a channel, S segments of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.triton.launching import launch

__all__ = ["rehearse", "scan_backward_in_triton", "scan_in_triton"]

#: states that backward keeps at a time, each program those of its tokens
KEPT = 1 << 24

#: numbers of a program's states
TILE = 512


def scan_in_triton(
    u_BTGC: Tensor, delta_BTGC: Tensor, a_GNC: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, segment: int
) -> tuple[Tensor, Tensor]:
    """y (B, T, G, C), and the states at the starts of segments (B, S, G, N, C), in float32.

    Args:
        u_BTGC, delta_BTGC, a_GNC, b_BTGN, c_BTGN: as in the operator.
        segment: its tokens.
    """
    from saccade.ops.triton import selective_scan_kernels as kernels

    u, delta, a, b, c = (x.contiguous() for x in (u_BTGC, delta_BTGC, a_GNC, b_BTGN, c_BTGN))
    (B, T, G, C), N = u.shape, a.shape[1]
    segments, tile = -(-T // segment), _tile(N)
    blocks = -(-C // tile["CHANNELS"])
    programs = (blocks * segments * B * G,)
    starts, whole = u.new_empty(B, segments, G, N, C), u.new_empty(B, segments, G, C)
    y = torch.empty_like(u)
    sizes = (T, G, C, N, segments, segment)
    launch(kernels.segment_ends, programs, u, delta, a, b, starts, whole, *sizes, BACKWARDS=False, **tile)
    launch(kernels.carry, (blocks * B * G,), a, starts, whole, G, C, N, segments, BACKWARDS=False, **tile)
    launch(kernels.read, programs, u, delta, a, b, c, starts, y, *sizes, **tile)
    return y, starts


def scan_backward_in_triton(
    u_BTGC: Tensor,
    delta_BTGC: Tensor,
    a_GNC: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    states_BSGNC: Tensor,
    grad_BTGC: Tensor,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, a, b and c.

    Args:
        u_BTGC, delta_BTGC, a_GNC, b_BTGN, c_BTGN: as in the operator.
        states_BSGNC: what segments start with.
        grad_BTGC: the gradient of y.
        segment: its tokens.
    """
    from saccade.ops.triton import selective_scan_kernels as kernels

    u, delta, a, b, c = (x.contiguous() for x in (u_BTGC, delta_BTGC, a_GNC, b_BTGN, c_BTGN))
    starts, grad = states_BSGNC.contiguous(), grad_BTGC.contiguous()
    (B, T, G, C), N, segments = u.shape, a.shape[1], starts.shape[1]
    tile = _tile(N)
    blocks = -(-C // tile["CHANNELS"])
    ends, whole = torch.empty_like(starts), u.new_empty(B, segments, G, C)
    sizes = (T, G, C, N, segments, segment)
    programs = (blocks * segments * B * G,)
    launch(kernels.segment_ends, programs, grad, delta, a, c, ends, whole, *sizes, BACKWARDS=True, **tile)
    launch(kernels.carry, (blocks * B * G,), a, ends, whole, G, C, N, segments, BACKWARDS=True, **tile)
    of_u, of_delta, of_a = (torch.empty_like(x) for x in (u, delta, starts))
    of_b, of_c = (u.new_empty(blocks, B, T, G, N) for _ in range(2))
    together = max(1, min(segments, KEPT // (segment * B * G * N * C)))
    room = u.new_empty(together, B, segment, G, N, C)
    for first in range(0, segments, together):
        pieces = min(together, segments - first)
        launch(
            kernels.gradients,
            (blocks * pieces * B * G,),
            *(u, delta, a, b, c, grad, starts, ends, room, of_u, of_delta, of_a, of_b, of_c),
            *(B, *sizes, first, pieces),
            **tile,
        )
    return of_u, of_delta, of_a.sum((0, 1)), of_b.sum(0), of_c.sum(0)


def _tile(N: int) -> dict[str, int]:
    """States and channels of a program, and its warps."""
    states = 1 << (N - 1).bit_length()
    channels = max(16, TILE // states)
    return {"CHANNELS": channels, "STATES": states, "warps": min(16, max(2, channels * states // TILE))}


def rehearse(every: bool) -> None:
    """Launch what is launched here, on meta tensors.

    Args:
        every: by several numbers of states, else by one.
    """
    usual = [(2, 4096, 768, N) for N in ((1, 16, 64, 256) if every else (16,))]
    for B, T, C, N in (*usual, (1, 1, 1, 1)):
        u, b, a = (torch.empty(shape, device="meta") for shape in ((B, T, 1, C), (B, T, 1, N), (1, N, C)))
        _, states = scan_in_triton(u, u, a, b, b, 64)
        scan_backward_in_triton(u, u, a, b, b, states, u, 64)
