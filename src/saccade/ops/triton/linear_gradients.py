"""Kernels of the backward pass of causal linear attention with decay; see `linear_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.triton.linear_kernels import _decays_at, _dot, _from_start, _load, _store, _to_end, _whole


@triton.jit
def grad_scores(
    v, grad, between, scored, out, logs, N, E, T, H, G, v_b, v_h, v_n, g_b, g_h, g_n, scale,
    FORM: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, OF_DECAY: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, T, C, C) of the scores, times what decays between their tokens but by channel.

    OF_DECAY: also `logs` (R, T, C), the part of the pairs inside a chunk in the gradient of each factor's logarithm.
    """
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i = tl.arange(0, C)
    size = tl.minimum(N - chunk * C, C)
    v += row // H * v_b + row % H // G * v_h + chunk * C * v_n
    grad += row // H * g_b + row % H * g_h + chunk * C * g_n
    found = tl.zeros((C, C), tl.float32)
    for e in range(0, E, BE):
        wide = e + tl.arange(0, BE)
        given = _load(grad, i, wide, g_n, size, E)
        found += _dot(given, tl.trans(_load(v, i, wide, v_n, size, E)), WORK, PRECISION)
    found *= scale
    square = i[:, None] * C + i[None, :]
    to = (row * T + chunk) * C * C
    if OF_DECAY:
        # the factor of token t occurs in the terms (i, j) with j < t <= i
        terms = found * tl.load(scored + to + square).to(tl.float32)
        earlier = tl.where(i[:, None] < i[None, :], 1.0, 0.0)
        sums = tl.dot(terms, earlier, input_precision=PRECISION)
        sums = tl.sum(tl.where(i[:, None] >= i[None, :], sums, 0.0), axis=0)
        tl.store(logs + (row * T + chunk) * C + i, sums)
    if FORM == "none" or FORM == "channel":
        found = tl.where(i[:, None] >= i[None, :], found, 0.0)
    else:
        found *= tl.load(between + _decays_at(row, chunk, T, H, FORM) * C * C + square)
    tl.store(out + to + square, found.to(out.dtype.element_ty))


@triton.jit
def grad_values(
    k, grad, fore, aft, scored, after, out, N, D, E, T, H, G, k_b, k_h, k_n, g_b, g_h, g_n, scale,
    FORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, N, E), from the scores inside the chunks and the gradients `after` (R, T, D, E) of the states after them."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i = tl.arange(0, C)
    wide = tl.program_id(1) * BE + tl.arange(0, BE)
    size = tl.minimum(N - chunk * C, C)
    k += row // H * k_b + row % H // G * k_h + chunk * C * k_n
    grad += row // H * g_b + row % H * g_h + chunk * C * g_n
    after += (row * T + chunk) * D * E
    weights = tl.load(scored + (row * T + chunk) * C * C + i[:, None] * C + i[None, :])
    found = _dot(tl.trans(weights), _load(grad, i, wide, g_n, size, E), WORK, PRECISION) * scale
    for d in range(0, D, BD):
        columns = d + tl.arange(0, BD)
        key = _load(k, i, columns, k_n, size, D)
        if FORM != "none":
            key *= _to_end(fore, aft, _decays_at(row, chunk, T, H, FORM), size, columns, D, FORM, C)
        found += _dot(key, _load(after, columns, wide, E, D, E), WORK, PRECISION)
    _store(out + (row * N + chunk * C) * E, found, i, wide, E, size, E)


@triton.jit
def grad_queries_keys(
    q, k, v, grad, fore, aft, of_scores, before, after, grad_q, grad_k, logs,
    N, D, E, T, H, G, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, scale,
    FORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, OF_DECAY: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, N, D) of queries and keys; by channel added to what `grad_scores_by_channel` has left there.

    OF_DECAY: also the part of the states in the gradient of each factor's logarithm: by channel added to `logs`
    (R, N, D), else, summed over the channels of a tile, `logs` (D / BD, R, T, C).
    """
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i = tl.arange(0, C)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    size = tl.minimum(N - chunk * C, C)
    q += row // H * q_b + row % H * q_h + chunk * C * q_n
    k += row // H * k_b + row % H // G * k_h + chunk * C * k_n
    v += row // H * v_b + row % H // G * v_h + chunk * C * v_n
    grad += row // H * g_b + row % H * g_h + chunk * C * g_n
    before += (row * T + chunk) * D * E
    after += (row * T + chunk) * D * E
    of_q, of_k = tl.zeros((C, BD), tl.float32), tl.zeros((C, BD), tl.float32)
    of_whole = tl.zeros((BD,), tl.float32)
    for e in range(0, E, BE):
        wide = e + tl.arange(0, BE)
        state, grad_state = _load(before, columns, wide, E, D, E), _load(after, columns, wide, E, D, E)
        of_q += _dot(_load(grad, i, wide, g_n, size, E), tl.trans(state), WORK, PRECISION)
        of_k += _dot(_load(v, i, wide, v_n, size, E), tl.trans(grad_state), WORK, PRECISION)
        if OF_DECAY:
            of_whole += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
    of_q *= scale
    if FORM != "none":
        at = _decays_at(row, chunk, T, H, FORM)
        of_q *= _from_start(fore, at, columns, D, FORM, C)
        of_k *= _to_end(fore, aft, at, size, columns, D, FORM, C)
    query, key = _load(q, i, columns, q_n, size, D), _load(k, i, columns, k_n, size, D)
    to = (row * N + chunk * C) * D
    if OF_DECAY:
        # the factor of token t occurs in from_start of i >= t, in to_end of j < t, and in the whole chunk
        of_whole *= _whole(fore, at, size, columns, D, FORM, C)
        later = tl.where(i[:, None] <= i[None, :], 1.0, 0.0)
        earlier = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
        if FORM == "channel":
            sums = tl.dot(later, query * of_q, input_precision=PRECISION)
            sums += tl.dot(earlier, key * of_k, input_precision=PRECISION)
            sums += of_whole[None, :] + _load(logs + to, i, columns, D, size, D)
            _store(logs + to, sums, i, columns, D, size, D)
        else:
            sums = tl.sum(later * tl.sum(query * of_q, axis=1)[None, :], axis=1)
            sums += tl.sum(earlier * tl.sum(key * of_k, axis=1)[None, :], axis=1) + tl.sum(of_whole, axis=0)
            rows = tl.num_programs(0).to(tl.int64)  # R T
            tl.store(logs + (tl.program_id(1) * rows + tl.program_id(0)) * C + i, sums)
    if FORM == "channel":
        of_q += _load(grad_q + to, i, columns, D, size, D)
        of_k += _load(grad_k + to, i, columns, D, size, D)
    else:
        inside = tl.load(of_scores + (row * T + chunk) * C * C + i[:, None] * C + i[None, :])
        of_q += _dot(inside, key, WORK, PRECISION)
        of_k += _dot(tl.trans(inside), query, WORK, PRECISION)
    _store(grad_q + to, of_q, i, columns, D, size, D)
    _store(grad_k + to, of_k, i, columns, D, size, D)


@triton.jit
def grad_scores_by_channel(
    q, k, factors, fore, aft, of_scores, grad_q, grad_k, logs,
    N, D, T, H, G, q_b, q_h, q_n, k_b, k_h, k_n, f_b, f_h, f_n,
    HALF: tl.constexpr, BD: tl.constexpr, OF_DECAY: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the scores inside a chunk give of the gradients (R, N, D) of queries, keys and logarithms of the factors."""
    chunk, row = (tl.program_id(0) % T).to(tl.int64), (tl.program_id(0) // T).to(tl.int64)
    i, columns = tl.arange(0, HALF), tl.arange(0, BD)
    C: tl.constexpr = 2 * HALF
    start = chunk * C
    size = N - start
    q += row // H * q_b + row % H * q_h + start * q_n
    k += row // H * k_b + row % H // G * k_h + start * k_n
    factors += row // H * f_b + row % H * f_h + start * f_n
    of_scores += (row * T + chunk) * C * C
    local, to = (row * T + chunk) * C * D, (row * N + start) * D
    from_middle = _load(fore + local, HALF + i, columns, D, C, D)
    to_middle = _load(aft + local, i, columns, D, C, D)
    later_ones = tl.where(i[:, None] <= i[None, :], 1.0, 0.0)
    earlier_ones = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
    corner = tl.load(of_scores + (HALF + i)[:, None] * C + i[None, :])
    for first in range(0, C, HALF):
        query = _load(q, first + i, columns, q_n, size, D)
        # of the pairs of a later and an earlier half
        if first == 0:
            other = _load(q, HALF + i, columns, q_n, size, D) * from_middle
            of_k = _dot(tl.trans(corner), other, WORK, PRECISION) * to_middle
            of_q = tl.zeros((HALF, BD), tl.float32)
            if OF_DECAY:
                key = _load(k, i, columns, k_n, size, D)
                sums = tl.dot(earlier_ones, key * of_k, input_precision=PRECISION)
        else:
            other = _load(k, i, columns, k_n, size, D) * to_middle
            of_q = _dot(corner, other, WORK, PRECISION) * from_middle
            of_k = tl.zeros((HALF, BD), tl.float32)
            if OF_DECAY:
                sums = tl.dot(later_ones, query * of_q, input_precision=PRECISION)
        # of the pairs of one half, key after key from the last: reach_i = product of the factors after j up to i
        reach = tl.zeros((HALF, BD), tl.float32)
        for step in range(0, HALF):
            j = first + HALF - 1 - step
            factor = tl.load(factors + (j + 1) * f_n + columns, mask=columns < tl.where(j + 1 < size, D, 0), other=1.0)
            reach = tl.where((first + i == j)[:, None], 1.0, reach * factor[None, :])
            earlier = tl.load(k + j * k_n + columns, mask=columns < tl.where(j < size, D, 0), other=0.0).to(tl.float32)
            given = tl.load(of_scores + (first + i) * C + j).to(tl.float32)[:, None] * reach
            of_q += given * earlier[None, :]
            given *= query
            of_k += tl.where((first + i == j)[:, None], tl.sum(given, axis=0)[None, :], 0.0)
            if OF_DECAY:
                terms = tl.where((first + i > j)[:, None], given * earlier[None, :], 0.0)
                after = tl.dot(later_ones, terms, input_precision=PRECISION)
                sums += tl.where((first + i > j)[:, None], after, 0.0)
        _store(grad_q + to, of_q, first + i, columns, D, size, D)
        _store(grad_k + to, of_k, first + i, columns, D, size, D)
        if OF_DECAY:
            _store(logs + to, sums, first + i, columns, D, size, D)
