"""Kernels of causal linear attention with decay. What is computed stands in `ops.linear`, what calls them in `linear`.

    A_ij = (q_i . k_j) (decays between j and i)                    scores, scores_by_channel
    S <- (decays of the chunk) S + (k * to_end)^T v                states: before each chunk
    o = scale (A v + (q * from_start) S)                           outputs

and backward, with dS the gradient of the state after each chunk, which runs as S does but from the end:

    dS <- (decays of the chunk) dS + scale (q * from_start)^T do   states, REVERSE
    dA = scale do v^T, where j <= i                                grad_scores
    dv = scale A^T do + (k * to_end) dS                            grad_values
    dq, dk: of A, + scale (do S^T) * from_start, + (v dS^T) * to_end   grad_queries_keys

FORM says what the decays vary by. "none". "head": tables of powers, `fore` (H, C) from the start of a chunk, `aft`
(H, C) to its end, `between` (H, C, C). "token": the same for each chunk. "channel": chunks of two halves, `fore` from
the start of a half to each token, inclusive, `aft` from each token, exclusive, to the end of its half; what leads from
the earlier half to the later goes by way of the middle, and inside a half products run from token to token. Factors
only ever multiply, and gradients of their logarithms are sums of the terms in which they occur.

Shape letters: R = B H rows (batch row and query head), N tokens in T chunks of C, D feature width, E value width; BD,
BE columns of a tile. WORK is the type of what is multiplied; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, rows, columns, step, end, width):
    """Rows below `end` and columns below `width` of x, `step` apart; zeros elsewhere."""
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows[:, None] * step + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, rows, columns, step, end, width):
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    tl.store(x + rows[:, None] * step + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, WORK: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(WORK), b.to(WORK), input_precision=PRECISION)


@triton.jit
def _decays_at(row, chunk, T, H, FORM: tl.constexpr):
    """Which chunk's decays those of this one are: the same for all chunks of a head where they are powers."""
    if FORM == "head":
        at = row % H
    else:
        at = row * T + chunk
    return at


@triton.jit
def _from_start(fore, at, columns, D, FORM: tl.constexpr, C: tl.constexpr):
    """Products from the chunk's start to each token, inclusive: (C, 1), or (C, BD)."""
    i = tl.arange(0, C)
    if FORM == "channel":
        first = fore + at * C * D
        local = tl.load(first + i[:, None] * D + columns[None, :], mask=(columns < D)[None, :], other=1.0)
        half = tl.load(first + (C // 2 - 1) * D + columns, mask=columns < D, other=1.0)
        found = local * tl.where((i >= C // 2)[:, None], half[None, :], 1.0)
    else:
        found = tl.load(fore + at * C + i)[:, None]
    return found


@triton.jit
def _to_end(fore, aft, at, size, columns, D, FORM: tl.constexpr, C: tl.constexpr):
    """Products from each token, exclusive, to the end of the chunk of `size` tokens: (C, 1), or (C, BD)."""
    i = tl.arange(0, C)
    if FORM == "channel":
        local = tl.load(aft + at * C * D + i[:, None] * D + columns[None, :], mask=(columns < D)[None, :], other=1.0)
        half = tl.load(fore + at * C * D + (C - 1) * D + columns, mask=columns < D, other=1.0)
        found = local * tl.where((i < C // 2)[:, None], half[None, :], 1.0)
    elif FORM == "head":
        # the table is of a whole chunk, whose end is C - size tokens further
        shifted = i + C - size
        found = tl.load(aft + at * C + shifted, mask=shifted < C, other=1.0)[:, None]
    else:
        found = tl.load(aft + at * C + i)[:, None]
    return found


@triton.jit
def _whole(fore, at, size, columns, D, FORM: tl.constexpr, C: tl.constexpr):
    """Product over the chunk: one number, or (BD,)."""
    if FORM == "channel":
        first = fore + at * C * D + columns
        half = tl.load(first + (C // 2 - 1) * D, mask=columns < D, other=1.0)
        found = half * tl.load(first + (C - 1) * D, mask=columns < D, other=1.0)
    else:
        found = tl.load(fore + at * C + size - 1)
    return found


@triton.jit
def products_by_token(factors, fore, aft, between, N, T, H, f_b, f_h, f_n, C: tl.constexpr):
    """`fore`, `aft` (R, T, C) and `between` (R, T, C, C) of factors (B, H, N); tokens beyond the last decay by 1."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    factors += row // H * f_b + row % H * f_h + chunk * C * f_n
    at = row * T + chunk
    j = tl.arange(0, C)
    reach = tl.zeros((C,), tl.float32)
    product = 1.0
    for i in range(0, C):
        factor = tl.load(factors + i * f_n, mask=chunk * C + i < N, other=1.0)
        reach = tl.where(j == i, 1.0, reach * factor)
        product = product * factor
        tl.store(between + (at * C + i) * C + j, reach)
        tl.store(fore + at * C + i, product)
    tl.store(aft + at * C + j, reach)


@triton.jit
def products_by_channel(factors, fore, aft, N, D, T, H, f_b, f_h, f_n, HALF: tl.constexpr, BD: tl.constexpr):
    """`fore` and `aft` (R, T, C, D) of factors (B, H, N, D), local to halves; tokens beyond the last decay by 1."""
    half, row = (tl.program_id(0) % (2 * T)).to(tl.int64), (tl.program_id(0) // (2 * T)).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    size = N - half * HALF
    factors += row // H * f_b + row % H * f_h + half * HALF * f_n + columns
    to = (row * 2 * T + half) * HALF * D + columns
    before = tl.full((BD,), 1.0, tl.float32)
    after = tl.full((BD,), 1.0, tl.float32)
    for i in range(0, HALF):
        before = before * tl.load(factors + i * f_n, mask=columns < tl.where(i < size, D, 0), other=1.0)
        tl.store(fore + to + i * D, before, mask=inside)
        last = HALF - 1 - i
        tl.store(aft + to + last * D, after, mask=inside)
        after = after * tl.load(factors + last * f_n, mask=columns < tl.where(last < size, D, 0), other=1.0)


@triton.jit
def scores(
    q, k, between, out, N, D, T, H, G, q_b, q_h, q_n, k_b, k_h, k_n,
    FORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Decayed scores (R, T, C, C) inside the chunks, 0 above the diagonal, but by channel."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i = tl.arange(0, C)
    q += row // H * q_b + row % H * q_h + chunk * C * q_n
    k += row // H * k_b + row % H // G * k_h + chunk * C * k_n
    found = tl.zeros((C, C), tl.float32)
    for d in range(0, D, BD):
        columns = d + tl.arange(0, BD)
        later = _load(q, i, columns, q_n, N - chunk * C, D)
        earlier = _load(k, i, columns, k_n, N - chunk * C, D)
        found += _dot(later, tl.trans(earlier), WORK, PRECISION)
    square = i[:, None] * C + i[None, :]
    if FORM == "none":
        found = tl.where(i[:, None] >= i[None, :], found, 0.0)
    else:
        found *= tl.load(between + _decays_at(row, chunk, T, H, FORM) * C * C + square)
    tl.store(out + (row * T + chunk) * C * C + square, found.to(out.dtype.element_ty))


@triton.jit
def scores_by_channel(
    q, k, factors, fore, aft, out, N, D, T, H, G, q_b, q_h, q_n, k_b, k_h, k_n, f_b, f_h, f_n,
    HALF: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scores` with a factor for each channel; BD >= D, and what goes by way of the middle in tiles of BC."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i, columns = tl.arange(0, HALF), tl.arange(0, BD)
    C: tl.constexpr = 2 * HALF
    start = chunk * C
    size = N - start
    q += row // H * q_b + row % H * q_h + start * q_n
    k += row // H * k_b + row % H // G * k_h + start * k_n
    factors += row // H * f_b + row % H * f_h + start * f_n
    local = (row * T + chunk) * C * D
    out += (row * T + chunk) * C * C
    for first in range(0, C, HALF):
        later = _load(q, first + i, columns, q_n, size, D)
        reach = tl.zeros((HALF, BD), tl.float32)
        found = tl.zeros((HALF, HALF), tl.float32)
        for step in range(0, HALF):
            # reach_i = product of the factors after j up to i
            j = first + HALF - 1 - step
            factor = tl.load(factors + (j + 1) * f_n + columns, mask=columns < tl.where(j + 1 < size, D, 0), other=1.0)
            reach = tl.where((first + i == j)[:, None], 1.0, reach * factor[None, :])
            earlier = tl.load(k + j * k_n + columns, mask=columns < tl.where(j < size, D, 0), other=0.0).to(tl.float32)
            column = tl.sum(later * reach * earlier[None, :], axis=1)
            found = tl.where((first + i == j)[None, :], column[:, None], found)
        square = (first + i)[:, None] * C + (first + i)[None, :]
        tl.store(out + square, found.to(out.dtype.element_ty))
    found = tl.zeros((HALF, HALF), tl.float32)
    for d in range(0, D, BC):
        tile = d + tl.arange(0, BC)
        from_middle = _load(q, HALF + i, tile, q_n, size, D) * _load(fore + local, HALF + i, tile, D, C, D)
        to_middle = _load(k, i, tile, k_n, size, D) * _load(aft + local, i, tile, D, C, D)
        found += _dot(from_middle, tl.trans(to_middle), WORK, PRECISION)
    tl.store(out + (HALF + i)[:, None] * C + i[None, :], found.to(out.dtype.element_ty))
    tl.store(out + i[:, None] * C + (HALF + i)[None, :], tl.zeros((HALF, HALF), out.dtype.element_ty))


@triton.jit
def states(
    x, y, fore, aft, start, out, end, N, D, E, T, H, G, x_b, x_h, x_n, y_b, y_h, y_n, scale,
    FORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States `out` (R, T, D, E) before each chunk, from `start` (R, D, E) to `end`: of keys x and values y.

    REVERSE: their gradients after each chunk, from the last chunk to the first: of queries x and gradients y.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    columns, wide = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    x += row // H * x_b + row % H // G * x_h
    y += row // H * y_b + row % H // G * y_h
    state = _load(start + row * D * E, columns, wide, E, D, E)
    for t in range(0, T):
        chunk = tl.cast(t, tl.int64)
        if REVERSE:
            chunk = T - 1 - chunk
        _store(out + (row * T + chunk) * D * E, state, columns, wide, E, D, E)
        size = tl.minimum(N - chunk * C, C)
        a = _load(x + chunk * C * x_n, i, columns, x_n, size, D)
        b = _load(y + chunk * C * y_n, i, wide, y_n, size, E)
        if FORM != "none":
            at = _decays_at(row, chunk, T, H, FORM)
            if REVERSE:
                a *= _from_start(fore, at, columns, D, FORM, C)
            else:
                a *= _to_end(fore, aft, at, size, columns, D, FORM, C)
            whole = _whole(fore, at, size, columns, D, FORM, C)
            if FORM == "channel":
                state *= whole[:, None]
            else:
                state *= whole
        state += _dot(tl.trans(a), b, WORK, PRECISION) * scale
    _store(end + row * D * E, state, columns, wide, E, D, E)


@triton.jit
def outputs(
    q, v, fore, scored, before, out, N, D, E, T, H, G, q_b, q_h, q_n, v_b, v_h, v_n, scale,
    FORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, N, E), from the scores inside the chunks and the states before them."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i = tl.arange(0, C)
    wide = tl.program_id(1) * BE + tl.arange(0, BE)
    size = tl.minimum(N - chunk * C, C)
    q += row // H * q_b + row % H * q_h + chunk * C * q_n
    v += row // H * v_b + row % H // G * v_h + chunk * C * v_n
    before += (row * T + chunk) * D * E
    weights = tl.load(scored + (row * T + chunk) * C * C + i[:, None] * C + i[None, :])
    found = _dot(weights, _load(v, i, wide, v_n, size, E), WORK, PRECISION)
    for d in range(0, D, BD):
        columns = d + tl.arange(0, BD)
        query = _load(q, i, columns, q_n, size, D)
        if FORM != "none":
            query *= _from_start(fore, _decays_at(row, chunk, T, H, FORM), columns, D, FORM, C)
        found += _dot(query, _load(before, columns, wide, E, D, E), WORK, PRECISION)
    _store(out + (row * N + chunk * C) * E, found * scale, i, wide, E, size, E)
