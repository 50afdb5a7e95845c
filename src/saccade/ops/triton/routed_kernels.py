"""The kernels of routed block attention: parts of queries at the blocks that they chose, and the merge with their own.

Choices stand in the order of their groups, (batch row, key head, block, query head): `places` are their places among
all (B, H, Q, j) of a range of Q queries, and a group's are those from starts[group] on. A tile is some choices of one
group. q, k, v, out and gradients are rows: (B H N, D) and (B K M, D).

Scores are in powers of two inside: exp(x) = 2^(x log2(e)).

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim, Q queries of a range, j
choices of a query.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, row, real, D, WIDTH: tl.constexpr):
    """Rows of a matrix, zeros where they are not real, filled up to WIDTH."""
    column = tl.arange(0, WIDTH)
    return tl.load(ptr + row[:, None] * D + column[None, :], mask=real[:, None] & (column[None, :] < D), other=0.0)


@triton.jit
def _put(ptr, row, real, D, value, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = real[:, None] & (column[None, :] < D)
    tl.store(ptr + row[:, None] * D + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, WORK: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(WORK), b.to(WORK), input_precision=PRECISION)


@triton.jit
def _chosen_rows(places_ptr, index, real, choices, Q, N, first):
    """The place of each choice, and the row of its query."""
    place = tl.load(places_ptr + index, mask=real, other=0)
    query = place // choices
    return place, query // Q * N + query % Q + first


@triton.jit
def _attend_block(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    key_row,
    inside,
    seen,
    scale,
    D,
    WIDTH: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the running softmax, in powers of two, over the keys that are `seen` (queries, keys)."""
    k = _rows(k_ptr, key_row, inside, D, WIDTH)
    score = tl.where(seen, _dot(q, tl.trans(k), WORK, PRECISION) * (scale * LOG2E), float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    kept, weight = tl.exp2(top - safe), tl.exp2(score - safe[:, None])
    v = _rows(v_ptr, key_row, inside, D, WIDTH)
    acc = acc * kept[:, None] + _dot(weight, v, WORK, PRECISION)
    return acc, highest, total * kept + tl.sum(weight, 1)


@triton.jit
def attend_parts(
    q_ptr, k_ptr, v_ptr, places_ptr, starts_ptr, tile_group_ptr, tile_first_ptr, part_ptr, part_lse_ptr,
    D, N, Q, first, size, choices, heads_per_key, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the choices of a tile get from their block: output (B H Q j, D), and LSE."""
    group = tl.load(tile_group_ptr + tl.program_id(0)).to(tl.int64)
    if group < 0:  # fewer tiles than there could be
        return
    index = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, ROWS)
    real = index < tl.load(starts_ptr + group + 1)
    place, row = _chosen_rows(places_ptr, index, real, choices, Q, N, first)
    q = _rows(q_ptr, row, real, D, WIDTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, size, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = (key < size)[None, :] & real[:, None]
        key_row = group // heads_per_key * size + key
        acc, top, total = _attend_block(
            acc, top, total, q, k_ptr, v_ptr, key_row, key < size, seen, scale, D, WIDTH, WORK, PRECISION
        )
    _put(part_ptr, place, real, D, acc / tl.where(total == 0.0, 1.0, total)[:, None], WIDTH)
    tl.store(part_lse_ptr + place, (top + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
def _own_queries(first, last, size, ROWS: tl.constexpr):
    """The head of a program, and its queries, all of one strip of `size`: where the strip begins, the first from there,
    and all; whether each is there. Programs are on one axis, as the others have room for 65,535 only."""
    tiles = tl.cdiv(size, ROWS)
    programs = tl.cdiv(last - first, size) * tiles
    here = tl.program_id(0) % programs
    begin, start = first + here // tiles * size, here % tiles * ROWS
    offset = start + tl.arange(0, ROWS)
    return (tl.program_id(0) // programs).to(tl.int64), begin, start, offset, (offset < size) & (begin + offset < last)


@triton.jit
def merge_own(
    q_ptr, k_ptr, v_ptr, chosen_ptr, part_ptr, part_lse_ptr, out_ptr, lse_ptr,
    D, N, M, Q, first, last, size, choices, heads_per_key, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries from `first` to `last`: their own block up to themselves, and the parts of what they chose."""
    head, begin, start, offset, real = _own_queries(first, last, size, ROWS)
    row = head * N + begin + offset
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if OWN:
        q = _rows(q_ptr, row, real, D, WIDTH)
        first_key = head // heads_per_key * M + M - N + begin
        for first_seen in range(0, tl.minimum(start + ROWS, size), KEYS):
            key = first_seen + tl.arange(0, KEYS)
            seen = (key < size)[None, :] & (key[None, :] <= offset[:, None]) & real[:, None]
            acc, top, total = _attend_block(
                acc, top, total, q, k_ptr, v_ptr, first_key + key, key < size, seen, scale, D, WIDTH, WORK, PRECISION
            )
    for choice in range(choices):
        place = (head * Q + begin + offset - first) * choices + choice
        made = real & (tl.load(chosen_ptr + place, mask=real, other=-1) >= 0)
        lse = tl.load(part_lse_ptr + place, mask=made, other=float("-inf")) * LOG2E
        highest = tl.maximum(top, lse)
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        kept, weight = tl.exp2(top - safe), tl.exp2(lse - safe)
        acc = acc * kept[:, None] + weight[:, None] * _rows(part_ptr, place, made, D, WIDTH).to(tl.float32)
        top, total = highest, total * kept + weight
    some = total != 0.0
    _put(out_ptr, row, real, D, acc / tl.where(some, total, 1.0)[:, None], WIDTH)
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=real)


@triton.jit
def _score_gradients(q, grad, k, v, lse, delta, seen, scale, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """Weights and gradients of the scores (queries, keys), given the LSE and the output's part of the whole row."""
    score = _dot(q, tl.trans(k), WORK, PRECISION) * (scale * LOG2E)
    weight = tl.where(seen, tl.exp2(score - lse[:, None] * LOG2E), 0.0)
    of_weight = _dot(grad, tl.trans(v), WORK, PRECISION)
    return weight, weight * (of_weight - delta[:, None]) * scale


@triton.jit
def query_parts(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, places_ptr, starts_ptr, tile_group_ptr, tile_first_ptr, part_ptr,
    D, N, Q, first, size, choices, heads_per_key, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of a tile's block in the gradients of its queries, (B H Q j, D)."""
    group = tl.load(tile_group_ptr + tl.program_id(0)).to(tl.int64)
    if group < 0:
        return
    index = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, ROWS)
    real = index < tl.load(starts_ptr + group + 1)
    place, row = _chosen_rows(places_ptr, index, real, choices, Q, N, first)
    q, grad = _rows(q_ptr, row, real, D, WIDTH), _rows(grad_ptr, row, real, D, WIDTH)
    lse, delta = tl.load(lse_ptr + row, mask=real, other=0.0), tl.load(delta_ptr + row, mask=real, other=0.0)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, size, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < size
        key_row = group // heads_per_key * size + key
        k, v = _rows(k_ptr, key_row, inside, D, WIDTH), _rows(v_ptr, key_row, inside, D, WIDTH)
        _, of_score = _score_gradients(
            q, grad, k, v, lse, delta, real[:, None] & inside[None, :], scale, WORK, PRECISION
        )
        dq += _dot(of_score, k, WORK, PRECISION)
    _put(part_ptr, place, real, D, dq, WIDTH)


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, chosen_ptr, part_ptr, dq_ptr,
    D, N, M, Q, first, last, size, choices, heads_per_key, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries from `first` to `last`: those by their own block, and the shares of what they chose."""
    head, begin, start, offset, real = _own_queries(first, last, size, ROWS)
    row = head * N + begin + offset
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    if OWN:
        q, grad = _rows(q_ptr, row, real, D, WIDTH), _rows(grad_ptr, row, real, D, WIDTH)
        lse, delta = tl.load(lse_ptr + row, mask=real, other=0.0), tl.load(delta_ptr + row, mask=real, other=0.0)
        first_key = head // heads_per_key * M + M - N + begin
        for first_seen in range(0, tl.minimum(start + ROWS, size), KEYS):
            key = first_seen + tl.arange(0, KEYS)
            k = _rows(k_ptr, first_key + key, key < size, D, WIDTH)
            v = _rows(v_ptr, first_key + key, key < size, D, WIDTH)
            seen = (key < size)[None, :] & (key[None, :] <= offset[:, None]) & real[:, None]
            _, of_score = _score_gradients(q, grad, k, v, lse, delta, seen, scale, WORK, PRECISION)
            dq += _dot(of_score, k, WORK, PRECISION)
    for choice in range(choices):
        place = (head * Q + begin + offset - first) * choices + choice
        made = real & (tl.load(chosen_ptr + place, mask=real, other=-1) >= 0)
        dq += _rows(part_ptr, place, made, D, WIDTH).to(tl.float32)
    _put(dq_ptr, row, real, D, dq, WIDTH)


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, places_ptr, starts_ptr, dk_ptr, dv_ptr,
    D, N, M, size, choices, heads_per_key, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values of a block, by all queries that chose it, and by those whose own it is."""
    tiles = tl.cdiv(size, KEYS)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * KEYS
    key = start + tl.arange(0, KEYS)
    inside = key < size
    k = _rows(k_ptr, block * size + key, inside, D, WIDTH)
    v = _rows(v_ptr, block * size + key, inside, D, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    begin = tl.load(starts_ptr + block * heads_per_key)
    end = tl.load(starts_ptr + (block + 1) * heads_per_key)
    for i in range(tl.cdiv(end - begin, ROWS)):
        index = begin + i * ROWS + tl.arange(0, ROWS)
        real = index < end
        _, row = _chosen_rows(places_ptr, index, real, choices, N, N, 0)
        q, grad = _rows(q_ptr, row, real, D, WIDTH), _rows(grad_ptr, row, real, D, WIDTH)
        lse, delta = tl.load(lse_ptr + row, mask=real, other=0.0), tl.load(delta_ptr + row, mask=real, other=0.0)
        weight, of_score = _score_gradients(
            q, grad, k, v, lse, delta, real[:, None] & inside[None, :], scale, WORK, PRECISION
        )
        dv += _dot(tl.trans(weight), grad, WORK, PRECISION)
        dk += _dot(tl.trans(of_score), q, WORK, PRECISION)
    blocks = M // size
    own = (block % blocks) * size - (M - N)
    if OWN and own >= 0:
        for head in range(heads_per_key):
            first_row = (block // blocks * heads_per_key + head) * N + own
            for at in range(start // ROWS * ROWS, size, ROWS):
                offset = at + tl.arange(0, ROWS)
                real = offset < size
                row = first_row + offset
                q, grad = _rows(q_ptr, row, real, D, WIDTH), _rows(grad_ptr, row, real, D, WIDTH)
                lse = tl.load(lse_ptr + row, mask=real, other=0.0)
                delta = tl.load(delta_ptr + row, mask=real, other=0.0)
                seen = real[:, None] & inside[None, :] & (key[None, :] <= offset[:, None])
                weight, of_score = _score_gradients(q, grad, k, v, lse, delta, seen, scale, WORK, PRECISION)
                dv += _dot(tl.trans(weight), grad, WORK, PRECISION)
                dk += _dot(tl.trans(of_score), q, WORK, PRECISION)
    _put(dk_ptr, block * size + key, inside, D, dk, WIDTH)
    _put(dv_ptr, block * size + key, inside, D, dv, WIDTH)
