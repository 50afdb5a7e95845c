"""Routed block attention in Triton: tiles of the queries that chose a block, then a merge by LSE.

The lists of who chose which block are made by one sort, on the device, and nothing is read back: how many tiles they
fill is known there alone, so as many programs start as there could be, and those without a tile end at once. Partial
outputs, and the shares of gradients, wait in memory of at most `WAITING` bytes: longer inputs are done in several
ranges of queries. Sums are made in one order, so that results repeat bit for bit.

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim, S tokens per block, n
key blocks, j blocks chosen per query; Q queries of a range, P choices of a range, G = B H n groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.native.routes import by_block
from saccade.ops.triton.launching import block, chosen, for_hip, launch, products, work_type

__all__ = ["attend_routes_in_triton", "rehearse", "route_gradients_in_triton", "runs_in_triton"]

#: columns of q, k and v that a program can hold
WIDEST = 256

#: bytes of partial outputs that wait for their merge
WAITING = 2**30


def runs_in_triton(q_BHND: Tensor) -> bool:
    """Whether the operator calls these kernels for such queries.

    Args:
        q_BHND: of `routed_attend`.
    """
    return chosen(q_BHND.device, q_BHND.dtype) and q_BHND.shape[3] <= WIDEST


class Listed(NamedTuple):
    """Who chose which block.

    Attributes:
        places_P: places of the choices among (B, H, Q, j), group after group; those of no block last.
        starts: where each group begins, and where the last ends (G + 1,).
        tile_group: the group of each tile, -1 for those that are not needed.
        tile_first: the first of its choices.
    """

    places_P: Tensor
    starts: Tensor
    tile_group: Tensor
    tile_first: Tensor


def attend_routes_in_triton(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, chosen_BHNj: Tensor, size: int, scale: float, own: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, D) and LSE (B, H, N) in float32: `routed_attend` without its checks.

    Args:
        q_BHND, k_BKMD, v_BKMD, chosen_BHNj: as there; keys and values of one width.
        size: S.
        scale: of the dot product.
        own: attend the own block.
    """
    from saccade.ops.triton import routed_kernels as kernels

    q, k, v = (x.contiguous() for x in (q_BHND, k_BKMD, v_BKMD))
    (B, H, N, D), (K, M), cut = q.shape, k.shape[1:3], _cut(q)
    out, lse = torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)
    for first, last in _ranges(chosen_BHNj, D * q.itemsize, size if own else 1):
        here = chosen_BHNj[:, :, first:last].contiguous()
        Q, j = here.shape[2:]
        part, part_lse = q.new_empty(B * H * Q * j, D), lse.new_empty(B * H * Q * j)
        if j:
            listed = _list(here, K, M // size, cut["ROWS"])
            launch(
                kernels.attend_parts,
                (len(listed.tile_group),),
                *(q, k, v, *listed, part, part_lse, D, N, Q, first, size, j, H // K, scale),
                **cut,
            )
        strip = size if own else cut["ROWS"]
        launch(
            kernels.merge_own,
            (-(-Q // strip) * -(-strip // cut["ROWS"]) * B * H,),
            *(q, k, v, here, part, part_lse, out, lse, D, N, M, Q, first, last, strip, j, H // K, scale),
            **cut,
            OWN=own,
        )
    return out, lse


def route_gradients_in_triton(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    chosen_BHNj: Tensor,
    size: int,
    scale: float,
    own: bool,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    grad_BHND: Tensor,
    grad_lse_BHN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given what each query got from all of its blocks.

    Args:
        q_BHND, k_BKMD, v_BKMD, chosen_BHNj, size, scale, own: as in `attend_routes_in_triton`.
        out_BHND, lse_BHN: what it gave.
        grad_BHND, grad_lse_BHN: the gradients of both.
    """
    from saccade.ops.triton import routed_kernels as kernels

    q, k, v, grad, lse = (x.contiguous() for x in (q_BHND, k_BKMD, v_BKMD, grad_BHND.to(q_BHND.dtype), lse_BHN))
    (B, H, N, D), (K, M), cut = q.shape, k.shape[1:3], _cut(q)
    # d s = P (dP - rowsum(dO O) + dLSE)
    delta = (grad.float() * out_BHND.float()).sum(-1)
    delta = delta if grad_lse_BHN is None else delta - grad_lse_BHN
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given, constants = (q, k, v, grad, lse, delta), {**cut, "stages": 1}
    for first, last in _ranges(chosen_BHNj, D * q.itemsize, size if own else 1):
        here = chosen_BHNj[:, :, first:last].contiguous()
        Q, j = here.shape[2:]
        part = q.new_empty(B * H * Q * j, D)
        if j:
            listed = _list(here, K, M // size, cut["ROWS"])
            launch(
                kernels.query_parts,
                (len(listed.tile_group),),
                *(*given, *listed, part, D, N, Q, first, size, j, H // K, scale),
                **constants,
            )
        strip = size if own else cut["ROWS"]
        launch(
            kernels.query_gradients,
            (-(-Q // strip) * -(-strip // cut["ROWS"]) * B * H,),
            *(*given, here, part, dq, D, N, M, Q, first, last, strip, j, H // K, scale),
            **constants,
            OWN=own,
        )
    listed = _list(chosen_BHNj.contiguous(), K, M // size, cut["ROWS"])
    rows = min(32, constants["ROWS"], constants["KEYS"])  # two sums are kept here
    constants |= {"ROWS": rows, "KEYS": rows}
    launch(
        kernels.key_gradients,
        (-(-size // rows) * B * K * (M // size),),
        *(*given, listed.places_P, listed.starts, dk, dv, D, N, M, size, chosen_BHNj.shape[3], H // K, scale),
        **constants,
        OWN=own,
    )
    return dq, dk, dv


def _cut(q: Tensor) -> dict[str, Any]:
    """How work is cut into programs: the width of rows in registers, rows of queries and of keys, warps; how they
    multiply.

    What that takes of the registers, and where a tile does not fit, `compiling` says.
    """
    width = block(q.shape[3], WIDEST)
    if work_type(q.dtype) == torch.float32:
        rows, keys, warps = (32, 32, 8) if width <= 64 else (16, 32, 8) if width <= 128 else (16, 16, 8)
    else:
        rows, keys, warps = (64, 64, 4) if width <= 64 else (64, 32, 4) if width <= 128 else (32, 32, 8)
    if for_hip(q.device):
        warps = 4  # of twice as many threads, which have twice the registers where there are no more of them
    return {"WIDTH": width, "ROWS": rows, "KEYS": keys, "warps": warps, **products(q.device, q.dtype)}


def _ranges(chosen: Tensor, width: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries, of whole steps, whose partial outputs of `width` bytes fit into `WAITING`."""
    B, H, N, j = chosen.shape
    most = max(1, WAITING // (B * H * max(1, j) * width) // step) * step
    for first in range(0, N, most):
        yield first, min(first + most, N)


def _list(chosen: Tensor, K: int, n: int, rows: int) -> Listed:
    B, H = chosen.shape[:2]
    groups = B * H * n
    _, places, counts = by_block(chosen, K, n)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tiles = (counts + rows - 1) // rows
    ends = tiles.cumsum(0)
    tile = torch.arange(chosen.numel() // rows + min(groups, chosen.numel()), device=chosen.device)
    group = torch.searchsorted(ends, tile, right=True)
    known = group.clamp(max=groups - 1)
    first = starts[known] + (tile - (ends - tiles)[known]) * rows
    return Listed(places, starts, torch.where(group < groups, group, -1), first)


def rehearse(every: bool) -> None:
    """Launch what is launched here, on meta tensors.

    Args:
        every: by all types, widths and forms, else the largest.
    """
    half, single = torch.bfloat16, torch.float32
    forms = product((half, torch.float16, single), (64, 128, 256), (True, False)) if every else ((half, 128, True),)
    sizes = ((16, 4, 4096, 512, 3), (1, 1, 1, 1, 1))
    for (dtype, width, own), (H, K, N, size, j) in product(forms, sizes):
        q, k = (torch.empty(1, heads, N, width if N > 1 else 1, dtype=dtype, device="meta") for heads in (H, K))
        given = q, k, k, torch.empty(1, H, N, j, dtype=torch.long, device="meta"), size, 0.1, own
        out, lse = attend_routes_in_triton(*given)
        route_gradients_in_triton(*given, out, lse, out, None)
