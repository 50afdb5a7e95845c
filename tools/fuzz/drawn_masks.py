"""Masks drawn at random, each with the bool tensor that it stands for, worked out pair by pair without the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from random import Random

import torch
from torch import Tensor

from saccade import masks
from saccade.ops.masks import Mask

__all__ = ["Drawn", "draw_mask"]


@dataclass
class Drawn:
    """A mask, what it stands for (broadcasts to (B, H, N, M)), and how it was made."""

    mask: Mask
    allowed: Tensor
    text: str


def draw_mask(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int, depth: int = 2) -> Drawn:
    """A mask for these sizes; with `depth` operators inside each other at most."""
    if depth and rng.random() < 0.4:
        left = draw_mask(rng, generator, B, H, N, M, depth - 1)
        kind = rng.choice("&&&||~")
        if kind == "~":
            return Drawn(~left.mask, ~left.allowed, f"~({left.text})")
        right = draw_mask(rng, generator, B, H, N, M, depth - 1)
        if kind == "&":
            return Drawn(left.mask & right.mask, left.allowed & right.allowed, f"({left.text} & {right.text})")
        return Drawn(left.mask | right.mask, left.allowed | right.allowed, f"({left.text} | {right.text})")
    options: list[Callable[..., Drawn]] = [_causal, _window, _prefix, _documents, _padding, _blocks, _dense, _function]
    if N == M and N:
        options += [_neighborhood, _neighborhood, _per_document]
    return rng.choice(options)(rng, generator, B, H, N, M)


def _distance(N: int, M: int) -> Tensor:
    return torch.arange(M) - torch.arange(N)[:, None]


def _causal(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    offset = rng.choice((0, 0, M - N, M - 1, rng.randint(-5, 5)))
    return Drawn(masks.causal(offset), _distance(N, M) <= offset, f"causal({offset})")


def _window(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    left = rng.choice((0, 1, 7, 63, 64, rng.randint(0, max(N, M) + 3)))
    right = rng.choice((0, 0, rng.randint(-left, 20)))
    offset = rng.choice((0, 0, M - N))
    sinks = rng.choice((0, 0, 0, 1, 4, 20))
    distance = _distance(N, M) - offset
    allowed = ((distance >= -left) | (torch.arange(M) < sinks)) & (distance <= right)
    keep = {"sinks": sinks} if sinks else {}
    return Drawn(
        masks.window(left, right, offset=offset, **keep), allowed, f"window({left}, {right}, offset={offset}, {keep})"
    )


def _prefix(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    if B and rng.random() < 0.4:
        length = torch.randint(0, M + 2, (B,), generator=generator)
        allowed = (torch.arange(M) < length[:, None])[:, None, None].expand(B, 1, N, M)
        return Drawn(masks.prefix(length), allowed, f"prefix(tensor({length.tolist()}))")
    length = rng.randint(0, M + 2)
    return Drawn(masks.prefix(length), (torch.arange(M) < length).expand(N, M), f"prefix({length})")


def _ids(generator: torch.Generator, rows: int, length: int, ordered: bool) -> Tensor:
    ids = torch.randint(0, 5, (rows, length), generator=generator)
    return ids.sort(-1).values if ordered else ids


def _documents(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    rows, ordered = rng.choice((1, max(B, 1))), rng.random() < 0.7
    query = _ids(generator, rows, N, ordered)
    key = query if N == M and rng.random() < 0.7 else _ids(generator, rows, M, ordered)
    allowed = (query[:, :, None] == key[:, None])[:, None]
    return Drawn(masks.documents(query, key), allowed, f"documents({query.tolist()}, {key.tolist()})")


def _per_document(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    ids = _ids(generator, rng.choice((1, max(B, 1))), N, True)
    length = rng.randint(0, 4)
    place = (ids[:, :, None] == ids[:, None]).tril(-1).sum(-1)
    inner = (place[:, None, :] < length) | (place[:, None, :] <= place[:, :, None])
    allowed = ((ids[:, :, None] == ids[:, None]) & inner)[:, None]
    mask = masks.per_document(ids, masks.prefix(length) | masks.causal())
    return Drawn(mask, allowed, f"per_document({ids.tolist()}, prefix({length}) | causal())")


def _padding(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    rows = rng.choice((1, max(B, 1)))
    kind = rng.choice(("end", "start", "holes", "nothing"))
    length = torch.randint(0, M + 1, (rows, 1), generator=generator)
    valid = {
        "end": torch.arange(M) < length,
        "start": torch.arange(M) >= length,
        "holes": torch.rand(rows, M, generator=generator) < 0.6,
        "nothing": torch.zeros(rows, M, dtype=torch.bool),
    }[kind]
    return Drawn(masks.padding(valid), valid[:, None, None].expand(rows, 1, N, M), f"padding({kind}, rows={rows})")


def _blocks(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    block_q, block_k = (rng.choice((1, 3, 8, 16, 17, 32, 64, 100)) for _ in "qk")
    rows, heads = rng.choice((1, max(B, 1))), rng.choice((1, max(H, 1)))
    n, m = ceil(N / block_q), ceil(M / block_k)
    keep = torch.rand(rows, heads, n, m, generator=generator) < rng.choice((0.0, 0.1, 0.5, 1.0))
    allowed = keep.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :N, :M]
    return Drawn(masks.blocks(keep, (block_q, block_k)), allowed, f"blocks({tuple(keep.shape)}, {block_q}x{block_k})")


def _dense(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    shape = [rng.choice((1, size)) for size in (max(B, 1), max(H, 1), N, M)]
    allowed = torch.rand(shape, generator=generator) < rng.choice((0.05, 0.5, 0.95))
    return Drawn(masks.dense(allowed), allowed.expand(*shape[:2], N, M), f"dense{tuple(shape)}")


def _function(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    step, most = rng.randint(2, 9), rng.randint(1, 9)
    i, j = torch.arange(N)[:, None], torch.arange(M)
    if rng.random() < 0.3:  # one that wants scalars
        table = torch.randint(0, max(M, 1), (max(N, 1), 2), generator=generator)

        def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (table[q][0] <= k) & (k <= table[q][1])

        allowed = (table[:N, :1] <= j) & (j <= table[:N, 1:])
        return Drawn(masks.function(within), allowed, f"function(table[q][0] <= k <= table[q][1], {table.tolist()})")
    mask = masks.function(lambda b, h, q, k: (q * 7 + k * 3) % step < most)
    return Drawn(mask, (i * 7 + j * 3) % step < most, f"function((q * 7 + k * 3) % {step} < {most})")


def _neighborhood(rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int) -> Drawn:
    size = _factors(rng, N)
    kernel, dilation, stride, causal = [], [], [], []
    for n in size:
        d = rng.choice((1, 1, 1, min(2, n), min(3, n)))
        w = rng.randint(1, max(1, min(n // d, rng.choice((3, 7, 13, n)))))
        kernel.append(w)
        dilation.append(d)
        stride.append(rng.choice((1, 1, w, rng.randint(1, w))))
        causal.append(rng.random() < 0.25)
    mask = masks.neighborhood(size, kernel, dilation, causal, stride=stride)
    allowed = torch.ones(N, N, dtype=torch.bool)
    for axis, n in enumerate(size):
        position = torch.arange(N) // prod(size[axis + 1 :]) % n
        near = _axis(n, kernel[axis], dilation[axis], stride[axis], causal[axis])
        allowed &= near[position[:, None], position]
    return Drawn(mask, allowed, f"neighborhood({size}, {kernel}, {dilation}, {causal}, stride={stride})")


def _factors(rng: Random, n: int) -> tuple[int, ...]:
    """n as a product of one to three sizes."""
    sizes = [n]
    for _ in range(rng.randint(0, 2)):
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        divisors = [d for d in range(1, sizes[largest] + 1) if sizes[largest] % d == 0]
        d = rng.choice(divisors)
        sizes[largest : largest + 1] = [sizes[largest] // d, d]
    return tuple(sizes)


def _axis(n: int, kernel: int, dilation: int, stride: int, causal: bool) -> Tensor:
    """Neighbours on one axis, (n, n): within a residue class the `kernel` nearest of the leader of `stride` queries."""
    near = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        peers = list(range(i % dilation, n, dilation))
        place = peers.index(i)
        if causal:
            leader = min(place // stride * stride + stride - 1, len(peers) - 1)
            chosen = peers[max(0, leader - kernel + 1) : place + 1]
        else:
            leader = min(place // stride * stride + stride // 2, len(peers) - 1)
            start = min(max(0, leader - kernel // 2), len(peers) - kernel)
            chosen = peers[start : start + kernel]
        near[i, chosen] = True
    return near
