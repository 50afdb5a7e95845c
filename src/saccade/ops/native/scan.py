"""Selective scan in C: a pass over the tokens, in which the states stay in the cache.

Shape letters: B batch, T tokens, G groups, C channels of a group, N states of a channel, S segments of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library
from saccade.ops.native.tasks import WIDTH

__all__ = ["scan_backward_in_c", "scan_in_c"]

#: vectors of channels of a task, at most
_VECTORS = 4


def scan_in_c(
    u_BTGC: Tensor, delta_BTGC: Tensor, a_GNC: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, segment: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """What `ops.selective_scan.operator.forward` gives, the states empty without `keep`; all float32.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    C, N = u_BTGC.shape[3], a_GNC.shape[1]
    u, delta, a = _whole(u_BTGC), _whole(delta_BTGC), _whole(a_GNC / -math.log(2))
    y = large_empty(tuple(u.shape), u.dtype, u.device)
    B, T, G, wide = u.shape
    kept = large_empty((B, -(-T // segment), G, N, wide), u.dtype, u.device) if keep else None
    _run("saccade_scan", (u, delta, a, b_BTGN.contiguous(), c_BTGN.contiguous(), y, kept), u, N, segment)
    return _cut(y, C), u.new_empty(0) if kept is None else _cut(kept, C)


def scan_backward_in_c(
    u_BTGC: Tensor,
    delta_BTGC: Tensor,
    a_GNC: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    states_BSGNC: Tensor,
    grad_BTGC: Tensor,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ops.selective_scan.operator.backward` gives; all float32.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    C, N = u_BTGC.shape[3], a_GNC.shape[1]
    u, delta, kept, grad = map(_whole, (u_BTGC, delta_BTGC, states_BSGNC, grad_BTGC))
    a = _whole(a_GNC / -math.log(2))
    B, T, G, wide = u.shape
    of_u, of_delta = (large_empty(tuple(u.shape), u.dtype, u.device) for _ in range(2))
    of_a = u.new_empty(B, G, N, wide)
    of_b, of_c = (u.new_empty(B, T, G, _division(u)[1], N) for _ in range(2))
    given = (u, delta, a, b_BTGN.contiguous(), c_BTGN.contiguous(), kept, grad)
    _run("saccade_scan_backward", (*given, of_u, of_delta, of_a, of_b, of_c), u, N, segment)
    return _cut(of_u, C), _cut(of_delta, C), of_a[..., :C].sum(0), of_b.sum(3), of_c.sum(3)


def _whole(x: Tensor) -> Tensor:
    """Contiguous, the channels filled up to whole vectors."""
    missing = -x.shape[-1] % WIDTH
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def _cut(x: Tensor, channels: int) -> Tensor:
    return x[..., :channels].contiguous()


def _division(u: Tensor) -> tuple[int, int]:
    """Vectors of a task, and tasks of a group's channels: several for each thread, where there is so much."""
    B, _, G, C = u.shape
    lanes = library().saccade_lanes()
    vectors = max(1, min(_VECTORS, B * G * C // lanes // (2 * torch.get_num_threads())))
    return vectors, -(-C // (lanes * vectors))


def _run(name: str, tensors: tuple[Tensor | None, ...], like: Tensor, states: int, segment: int) -> None:
    threads = torch.get_num_threads()
    if getattr(library(), name)(*map(address, tensors), *like.shape, states, segment, *_division(like), threads):
        raise MemoryError("no room for the working memory of selective_scan")
