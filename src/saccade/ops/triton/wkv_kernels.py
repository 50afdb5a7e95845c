"""The kernels of WKV: decayed sums over the tokens before and after each token, segment by segment.

A chunk is cut into segments. First the sum of each segment, seen from its last and from its first place; then, segment
after segment, what stands before and after each; then each segment's tokens one by one, forwards and backwards. A sum
is what it is in `ops/wkv/scan.py`: key and age of its largest term, the sums of both x, and their moments.

Shape letters: R rows of a sum, B batch, T tokens, C channels, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.triton.selective_scan_kernels import program_of
from saccade.ops.wkv.scan import EMPTY as LEAST

EMPTY = tl.constexpr(LEAST)


@triton.jit
def _join(ak, aa, a0, a1, am0, am1, bk, ba, b0, b1, bm0, bm1, w, MOMENTS: tl.constexpr):
    """The sums of both, which are seen from the same place."""
    ages = aa - ba
    gap = (ak - bk) - w * ages
    first = gap > 0
    less = tl.exp(-tl.abs(gap))
    of_a, of_b = tl.where(first, 1.0, less), tl.where(first, less, 1.0)
    s0, s1 = of_a * a0 + of_b * b0, of_a * a1 + of_b * b1
    m0, m1 = am0, am1
    if MOMENTS:  # those of one of the two are counted from another term now
        m0 = of_a * am0 + of_b * bm0 + tl.where(first, -of_b * b0, of_a * a0) * ages
        m1 = of_a * am1 + of_b * bm1 + tl.where(first, -of_b * b1, of_a * a1) * ages
    return tl.where(first, ak, bk), tl.where(first, aa, ba), s0, s1, m0, m1


@triton.jit
def _apart(B, rows, C):
    """Numbers from one row of a sum to the next; five times as many may be more than 32 bits hold."""
    return tl.cast(B, tl.int64) * rows * C


@triton.jit
def _nothing(BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    return zero + EMPTY, zero, zero, zero, zero, zero


@triton.jit
def _load(rows, row, step, mask, MOMENTS: tl.constexpr):
    """The rows of a sum, which are `step` numbers apart."""
    key = tl.load(rows + row, mask=mask, other=EMPTY)
    age = tl.load(rows + step + row, mask=mask, other=0.0)
    s0 = tl.load(rows + 2 * step + row, mask=mask, other=0.0)
    s1 = tl.load(rows + 3 * step + row, mask=mask, other=0.0)
    m0, m1 = tl.zeros_like(key), tl.zeros_like(key)
    if MOMENTS:
        m0 = tl.load(rows + 4 * step + row, mask=mask, other=0.0)
        m1 = tl.load(rows + 5 * step + row, mask=mask, other=0.0)
    return key, age, s0, s1, m0, m1


@triton.jit
def _store(rows, row, step, mask, key, age, s0, s1, m0, m1, MOMENTS: tl.constexpr):
    tl.store(rows + row, key, mask=mask)
    tl.store(rows + step + row, age, mask=mask)
    tl.store(rows + 2 * step + row, s0, mask=mask)
    tl.store(rows + 3 * step + row, s1, mask=mask)
    if MOMENTS:
        tl.store(rows + 4 * step + row, m0, mask=mask)
        tl.store(rows + 5 * step + row, m1, mask=mask)


@triton.jit
def _token(tokens, place, b, channel, B, T, C, whole, FLIP: tl.constexpr, MOMENTS: tl.constexpr):
    """The token at a place (from the end with FLIP); nothing where the last chunk is filled up."""
    t = place
    if FLIP:
        t = whole - 1 - place
    return _load(tokens, (b * T + t) * C + channel, _apart(B, T, C), channel < tl.where(t < T, C, 0), MOMENTS)


@triton.jit
def segment_sums(
    tokens, w_ptr, last, first, B, T, C, chunk, parts, segments, whole,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, FLIP: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Each segment, seen from its last and from its first place: (R, B, S, C) both."""
    block, segment, b = program_of(C, segments, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + channel, mask=channel < C, other=0.0)
    start = segment // parts * chunk + segment % parts * SEGMENT
    length = tl.minimum(SEGMENT, chunk - segment % parts * SEGMENT)
    fk, fa, f0, f1, fm0, fm1 = _nothing(BLOCK)
    gk, ga, g0, g1, gm0, gm1 = _nothing(BLOCK)
    for i in range(length):
        k, a, x0, x1, m0, m1 = _token(tokens, start + i, b, channel, B, T, C, whole, FLIP, MOMENTS)
        fk, fa, f0, f1, fm0, fm1 = _join(fk, fa + 1.0, f0, f1, fm0, fm1, k, a, x0, x1, m0, m1, w, MOMENTS)
        gk, ga, g0, g1, gm0, gm1 = _join(gk, ga, g0, g1, gm0, gm1, k, a + i, x0, x1, m0, m1, w, MOMENTS)
    row, step = (b * segments + segment) * C + channel, _apart(B, segments, C)
    _store(last, row, step, channel < C, fk, fa, f0, f1, fm0, fm1, MOMENTS)
    _store(first, row, step, channel < C, gk, ga, g0, g1, gm0, gm1, MOMENTS)


@triton.jit
def carry(
    w_ptr, last, first, B, C, chunk, parts, segments, shift,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """In place: what stands before each segment, seen from its first token, and after it, seen from its last."""
    block, _, b = program_of(C, 1, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    mask, step = channel < C, _apart(B, segments, C)
    w = tl.load(w_ptr + channel, mask=mask, other=0.0)
    pk, pa, p0, p1, pm0, pm1 = _nothing(BLOCK)  # the chunks before, seen from the last place of the last of them
    for j in range(segments // parts):
        ik, ia, i0, i1, im0, im1 = _nothing(BLOCK)  # this one, seen from the place before
        for p in range(parts):
            row = (b * segments + j * parts + p) * C + channel
            k, a, x0, x1, m0, m1 = _load(last, row, step, mask, MOMENTS)
            rk, ra, r0, r1, rm0, rm1 = _join(
                pk, pa + (p * SEGMENT + 1 - shift), p0, p1, pm0, pm1, ik, ia, i0, i1, im0, im1, w, MOMENTS
            )
            _store(last, row, step, mask, rk, ra, r0, r1, rm0, rm1, MOMENTS)
            length = tl.minimum(SEGMENT, chunk - p * SEGMENT)
            ik, ia, i0, i1, im0, im1 = _join(ik, ia + length, i0, i1, im0, im1, k, a, x0, x1, m0, m1, w, MOMENTS)
        pk, pa, p0, p1, pm0, pm1 = _join(pk, pa + chunk, p0, p1, pm0, pm1, ik, ia, i0, i1, im0, im1, w, MOMENTS)
    zk, za, z0, z1, zm0, zm1 = _nothing(BLOCK)  # all that comes after, seen from its first place
    for back in range(segments):
        segment = segments - 1 - back
        row = (b * segments + segment) * C + channel
        k, a, x0, x1, m0, m1 = _load(first, row, step, mask, MOMENTS)
        _store(first, row, step, mask, zk, za + (1 - shift), z0, z1, zm0, zm1, MOMENTS)
        length = tl.minimum(SEGMENT, chunk - segment % parts * SEGMENT)
        zk, za, z0, z1, zm0, zm1 = _join(zk, za + length, z0, z1, zm0, zm1, k, a, x0, x1, m0, m1, w, MOMENTS)


@triton.jit
def token_sums(
    tokens, w_ptr, before, after, out, B, T, C, chunk, parts, segments, whole, shift,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, FLIP: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """For each token the sums over all others, (R, B, T, C)."""
    block, segment, b = program_of(C, segments, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + channel, mask=channel < C, other=0.0)
    start = segment // parts * chunk + segment % parts * SEGMENT
    length = tl.minimum(SEGMENT, chunk - segment % parts * SEGMENT)
    row, step = (b * segments + segment) * C + channel, _apart(B, segments, C)
    rk, ra, r0, r1, rm0, rm1 = _load(before, row, step, channel < C, MOMENTS)
    apart = _apart(B, T, C)
    for i in range(length):
        t = start + i
        if FLIP:
            t = whole - 1 - t
        here = channel < tl.where(t < T, C, 0)
        _store(out, (b * T + t) * C + channel, apart, here, rk, ra, r0, r1, rm0, rm1, MOMENTS)
        k, a, x0, x1, m0, m1 = _token(tokens, start + i, b, channel, B, T, C, whole, FLIP, MOMENTS)
        rk, ra, r0, r1, rm0, rm1 = _join(rk, ra + 1.0, r0, r1, rm0, rm1, k, a, x0, x1, m0, m1, w, MOMENTS)
    tl.debug_barrier()  # what is read now was written above
    zk, za, z0, z1, zm0, zm1 = _load(after, row, step, channel < C, MOMENTS)
    for back in range(length):
        i = length - 1 - back
        t = start + i
        if FLIP:
            t = whole - 1 - t
        here, place = channel < tl.where(t < T, C, 0), (b * T + t) * C + channel
        rk, ra, r0, r1, rm0, rm1 = _load(out, place, apart, here, MOMENTS)
        rk, ra, r0, r1, rm0, rm1 = _join(rk, ra, r0, r1, rm0, rm1, zk, za, z0, z1, zm0, zm1, w, MOMENTS)
        _store(out, place, apart, here, rk, ra, r0, r1, rm0, rm1, MOMENTS)
        k, a, x0, x1, m0, m1 = _token(tokens, start + i, b, channel, B, T, C, whole, FLIP, MOMENTS)
        zk, za, z0, z1, zm0, zm1 = _join(zk, za + 1.0, z0, z1, zm0, zm1, k, a + (1 - shift), x0, x1, m0, m1, w, MOMENTS)
