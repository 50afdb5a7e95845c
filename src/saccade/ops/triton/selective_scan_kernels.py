"""The kernels of the selective scan: segments of tokens side by side, their states carried from one to the next.

A program has the states (STATES, CHANNELS) of some channels of one segment in registers and goes through its tokens.
Programs are numbered along one axis, as the others have room for 65,535 only.

Shape letters: B batch, T tokens, G groups, C channels of a group, N states of a channel, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_of(C, segments, CHANNELS: tl.constexpr):
    """The block of channels of a program, its segment among so many, and its row."""
    blocks = tl.cdiv(C, CHANNELS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    return block, rest % segments, (rest // segments).to(tl.int64)


@triton.jit
def _places(block, b, G, C, N, CHANNELS: tl.constexpr, STATES: tl.constexpr):
    """Channels and states of a program, which of them there are, and where A of its group is."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    both = (state[:, None] < N) & (channel[None, :] < C)
    return channel, state, both, (b % G) * N * C + state[:, None] * C + channel[None, :]


@triton.jit
def segment_ends(
    u_ptr, delta_ptr, a_ptr, b_ptr, ends_ptr, whole_ptr, T, G, C, N, segments, SEGMENT,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """What each segment makes of nothing, (B, S, G, N, C), and the sum of its steps, (B, S, G, C).

    Backwards u is the gradient of y and b is C: the gradient of what the segment starts with.
    """
    block, segment, b = program_of(C, segments, CHANNELS)
    channel, state, both, a_at = _places(block, b, G, C, N, CHANNELS, STATES)
    a = tl.load(a_ptr + a_at, mask=both, other=0.0)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, T)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    whole = tl.zeros((CHANNELS,), tl.float32)
    for i in range(last - first):
        t = first + i
        if BACKWARDS:
            t = last - 1 - i
        row = (b // G * T + t) * G + b % G
        step = tl.load(delta_ptr + row * C + channel, mask=channel < C, other=0.0)
        x = tl.load(u_ptr + row * C + channel, mask=channel < C, other=0.0)
        enters = tl.load(b_ptr + row * N + state, mask=state < N, other=0.0)
        decay = tl.exp(step[None, :] * a)
        if BACKWARDS:
            h = decay * (h + enters[:, None] * x[None, :])
        else:
            h = decay * h + enters[:, None] * (step * x)[None, :]
        whole += step
    row = (b // G * segments + segment) * G + b % G
    tl.store(ends_ptr + row * N * C + state[:, None] * C + channel[None, :], h, mask=both)
    tl.store(whole_ptr + row * C + channel, whole, mask=channel < C)


@triton.jit
def carry(
    a_ptr, ends_ptr, whole_ptr, G, C, N, segments,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """In place: from what each segment makes of nothing to what it starts with; backwards, from the last one on."""
    block, _, b = program_of(C, 1, CHANNELS)
    channel, state, both, a_at = _places(block, b, G, C, N, CHANNELS, STATES)
    a = tl.load(a_ptr + a_at, mask=both, other=0.0)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    for i in range(segments):
        segment = i
        if BACKWARDS:
            segment = segments - 1 - i
        row = (b // G * segments + segment) * G + b % G
        at = ends_ptr + row * N * C + state[:, None] * C + channel[None, :]
        added = tl.load(at, mask=both, other=0.0)
        tl.store(at, h, mask=both)
        whole = tl.load(whole_ptr + row * C + channel, mask=channel < C, other=0.0)
        h = tl.exp(whole[None, :] * a) * h + added


@triton.jit
def read(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, starts_ptr, y_ptr, T, G, C, N, segments, SEGMENT,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """y, from what each segment starts with."""
    block, segment, b = program_of(C, segments, CHANNELS)
    channel, state, both, a_at = _places(block, b, G, C, N, CHANNELS, STATES)
    a = tl.load(a_ptr + a_at, mask=both, other=0.0)
    row = (b // G * segments + segment) * G + b % G
    h = tl.load(starts_ptr + row * N * C + state[:, None] * C + channel[None, :], mask=both, other=0.0)
    for t in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T)):
        row = (b // G * T + t) * G + b % G
        step = tl.load(delta_ptr + row * C + channel, mask=channel < C, other=0.0)
        x = tl.load(u_ptr + row * C + channel, mask=channel < C, other=0.0)
        enters = tl.load(b_ptr + row * N + state, mask=state < N, other=0.0)
        reads = tl.load(c_ptr + row * N + state, mask=state < N, other=0.0)
        h = tl.exp(step[None, :] * a) * h + enters[:, None] * (step * x)[None, :]
        tl.store(y_ptr + row * C + channel, tl.sum(reads[:, None] * h, 0), mask=channel < C)


@triton.jit
def gradients(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, grad_ptr, starts_ptr, ends_ptr, room_ptr,
    of_u_ptr, of_delta_ptr, of_a_ptr, of_b_ptr, of_c_ptr, B, T, G, C, N, segments, SEGMENT, first_segment, pieces,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Of `pieces` segments, given the states that they start with and the gradients of those that they end with.

    The states before its tokens a program keeps in `room`. Gradients of A are those of each segment, those of B and C
    those of each program's channels.
    """
    block, place, b = program_of(C, pieces, CHANNELS)
    segment = first_segment + place
    channel, state, both, a_at = _places(block, b, G, C, N, CHANNELS, STATES)
    a = tl.load(a_ptr + a_at, mask=both, other=0.0)
    here = state[:, None] * C + channel[None, :]
    segment_row = (b // G * segments + segment) * G + b % G
    h = tl.load(starts_ptr + segment_row * N * C + here, mask=both, other=0.0)
    room = room_ptr + (b * pieces + place) * SEGMENT * N * C + here
    first = segment * SEGMENT
    count = tl.minimum(SEGMENT, T - first)
    for i in range(count):
        row = (b // G * T + first + i) * G + b % G
        tl.store(room + i * N * C, h, mask=both)
        step = tl.load(delta_ptr + row * C + channel, mask=channel < C, other=0.0)
        x = tl.load(u_ptr + row * C + channel, mask=channel < C, other=0.0)
        enters = tl.load(b_ptr + row * N + state, mask=state < N, other=0.0)
        h = tl.exp(step[None, :] * a) * h + enters[:, None] * (step * x)[None, :]
    tl.debug_barrier()  # what is read now was written above
    later = tl.load(ends_ptr + segment_row * N * C + here, mask=both, other=0.0)
    of_a = tl.zeros((STATES, CHANNELS), tl.float32)
    for back in range(count):
        i = count - 1 - back
        row = (b // G * T + first + i) * G + b % G
        before = tl.load(room + i * N * C, mask=both, other=0.0)
        step = tl.load(delta_ptr + row * C + channel, mask=channel < C, other=0.0)
        x = tl.load(u_ptr + row * C + channel, mask=channel < C, other=0.0)
        dy = tl.load(grad_ptr + row * C + channel, mask=channel < C, other=0.0)
        enters = tl.load(b_ptr + row * N + state, mask=state < N, other=0.0)
        reads = tl.load(c_ptr + row * N + state, mask=state < N, other=0.0)
        decay = tl.exp(step[None, :] * a)
        h = decay * before + enters[:, None] * (step * x)[None, :]
        g = later + reads[:, None] * dy[None, :]
        part = (block.to(tl.int64) * B * T * G + row) * N + state
        tl.store(of_c_ptr + part, tl.sum(h * dy[None, :], 1), mask=state < N)
        tl.store(of_b_ptr + part, tl.sum(g * (step * x)[None, :], 1), mask=state < N)
        of_taken = tl.sum(g * enters[:, None], 0)
        later = decay * g
        of_power = later * before
        tl.store(of_u_ptr + row * C + channel, of_taken * step, mask=channel < C)
        tl.store(of_delta_ptr + row * C + channel, of_taken * x + tl.sum(of_power * a, 0), mask=channel < C)
        of_a += of_power * step[None, :]
    tl.store(of_a_ptr + segment_row * N * C + here, of_a, mask=both)
