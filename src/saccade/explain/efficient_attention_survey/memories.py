"""Memories that learn while they read: TTT's linear and MLP models, Titans' with momentum and forgetting, by chunks.

    f(x) = x W, or silu(x W_1) W_2;   g_s = grad |f(k_s) - v_s|^2 / 2 at the weights W of the mini-batch's beginning
    M_t = keep_t M_{t-1} + S_t,   S_t = momentum_t S_{t-1} - rate_t g_t,   o_t = f(q_t) at M_t

Within a mini-batch all gradients are known at once, and of each matrix they are outer products a_s^T d_s of what it was
given and of what came back; so no M_t is ever made, and a mini-batch is a few masked products,

    x M_t = c_t x M + e_t x S - sum_{s<=t} D_ts (x . a_s) d_s,   c_t = prod_{1..t} keep,   K_tr = prod_{r+1..t} keep
    D = K E,   E_rs = prod_{s+1..r} momentum,   e_t = sum_r K_tr prod_{1..r} momentum      (without momentum D = K)

Shape letters: B batch, H heads, N tokens, D head dim of q and k, E of v, C tokens of a mini-batch, P of all of them,
I and O inputs and outputs of a matrix of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.sharding import in_parts


class MemoryState(NamedTuple):
    """What a memory is after some tokens.

    Attributes:
        weights: M, of each matrix (B, H, I, O).
        start: W, at which the mini-batch that has begun takes its gradients.
        momentum: S of each matrix; empty where there is none.
        seen: tokens of that mini-batch so far, (B,).
    """

    weights: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    seen: Tensor


@in_parts
def memory_attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    rate_BHN: Tensor,
    matrices: Sequence[Tensor],
    *,
    log_keep_BHN: Tensor | None = None,
    log_momentum_BHN: Tensor | None = None,
    real_BN: Tensor | None = None,
    state: MemoryState | None = None,
    return_state: bool = False,
    batch_size: int = 16,
) -> Any:
    """Read a memory that is taught each key's value first; equations at the top of this file.

    With one matrix, mini-batches of one token, and neither forgetting nor momentum this is the delta rule.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys and values.
        rate_BHN: of the steps.
        matrices: W before the first token: (H, D, E), or (H, D, I) and (H, I, E), each also (B, H, ...).
        log_keep_BHN: log of what stays of the weights; nothing is forgotten where None.
        log_momentum_BHN: log of what stays of the momentum; none is kept where None.
        real_BN: True = real token; others change nothing, and what is read there is 0.
        state: after an earlier call, in place of `matrices`.
        return_state: also return the state after the last token.
        batch_size: C, tokens that take their gradients at the same weights. The result depends on it.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit.
    """
    B, H, N, _ = q_BHND.shape
    if k_BHND.shape != q_BHND.shape or v_BHNE.shape[:3] != (B, H, N) or rate_BHN.shape != (B, H, N):
        raise ValueError(
            f"q, k, v and rate must be (B, H, N, D), (B, H, N, D), (B, H, N, E) and (B, H, N), got "
            f"{tuple(q_BHND.shape)}, {tuple(k_BHND.shape)}, {tuple(v_BHNE.shape)} and {tuple(rate_BHN.shape)}"
        )
    widths = [q_BHND.shape[-1], *(each.shape[-1] for each in matrices)]
    if not matrices or widths[-1] != v_BHNE.shape[-1] or [each.shape[-2] for each in matrices] != widths[:-1]:
        shapes = [tuple(each.shape) for each in matrices]
        raise ValueError(f"matrices must lead from width {widths[0]} to {v_BHNE.shape[-1]}, got {shapes}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    kind = working_dtype(q_BHND.dtype)
    moving = log_momentum_BHN is not None
    if state is None:
        weights = tuple(each.to(kind).expand(B, H, -1, -1) for each in matrices)
        still = tuple(torch.zeros_like(each) for each in weights) if moving else ()
        state = MemoryState(weights, weights, still, torch.zeros(B, dtype=torch.long, device=q_BHND.device))
        P = N + -N % batch_size
    else:
        P = N + batch_size - 1
        P += -P % batch_size
    real_BN = torch.ones(B, N, dtype=torch.bool, device=q_BHND.device) if real_BN is None else real_BN
    # real tokens stand together, after as many empty places as their mini-batch has had tokens before
    count_B, rank_BN = real_BN.sum(1), real_BN.cumsum(1) - 1
    order_BN = torch.argsort(~real_BN, dim=1, stable=True)
    wanted_BP = torch.arange(P, device=q_BHND.device) - state.seen[:, None]
    there_BP = (wanted_BP >= 0) & (wanted_BP < count_B[:, None])
    token_BP = order_BN.gather(1, wanted_BP.clamp(0, N - 1)) if N else order_BN

    def placed(x: Tensor) -> list[Tensor]:
        """(B, H, N, ...) -> mini-batches (B, H, C, ...), 0 where there is no token."""
        if not N:
            return []
        index, there = token_BP[:, None].expand(B, H, P), there_BP[:, None]
        if x.ndim == 4:
            index, there = index[..., None].expand(-1, -1, -1, x.shape[3]), there[..., None]
        return list(x.to(kind).gather(2, index).masked_fill(~there, 0).split(batch_size, 2))

    taken = there_BP.to(kind)[:, None].split(batch_size, 2)
    batches = (placed(x) for x in (q_BHND, k_BHND, v_BHNE, rate_BHN))
    spans = ([None] * len(taken) if log is None else placed(log) for log in (log_keep_BHN, log_momentum_BHN))
    full_B = state.seen + count_B
    outs = []
    for c, (q, k, v, rate, keep, momentum) in enumerate(zip(*batches, *spans, strict=False)):
        reach = _reach(keep, momentum, taken[c], rate)
        out, weights, still = _mini_batch(q, k, v, rate, state, reach)
        outs.append(out)
        done = (full_B >= (c + 1) * batch_size)[:, None, None, None]
        start = tuple(torch.where(done, new, old) for new, old in zip(weights, state.start, strict=True))
        state = MemoryState(weights, start, still, state.seen)
    read = torch.cat(outs, 2) if outs else v_BHNE.new_zeros(B, H, 0, v_BHNE.shape[3])
    at_BN = (rank_BN + state.seen[:, None]).clamp(min=0)
    out = read.gather(2, at_BN[:, None, :, None].expand(B, H, N, read.shape[3])) if N else read
    out = out.masked_fill(~real_BN[:, None, :, None], 0).to(v_BHNE.dtype)
    return (out, state._replace(seen=full_B % batch_size)) if return_state else out


class _Reach(NamedTuple):
    """How what was there and what is written reach the tokens of a mini-batch.

    Attributes:
        weights: c, of M, (B, H, C).
        momentum: e, of S, (B, H, C).
        written: D, (B, H, C, C).
        carried: of S to the S after the last token, (B, H).
        last: the last row of E, (B, H, C).
    """

    weights: Tensor
    momentum: Tensor
    written: Tensor
    carried: Tensor
    last: Tensor


def _reach(keep: Tensor | None, momentum: Tensor | None, taken: Tensor, like: Tensor) -> _Reach:
    """Of logs (B, H, C); `taken` is 0 where there is no token: there momentum does not move M."""
    below = torch.ones(like.shape[-1], like.shape[-1], dtype=torch.bool, device=like.device).tril()

    def products(log: Tensor) -> tuple[Tensor, Tensor]:
        total = log.cumsum(-1)
        return total.exp(), (total[..., None] - total[..., None, :]).masked_fill(~below, -torch.inf).exp()

    kept, K = products(torch.zeros_like(like) if keep is None else keep)
    if momentum is None:
        none = torch.zeros_like(like)
        return _Reach(kept, none, K, none[..., 0], none)
    carried, E = products(momentum)
    K = K * taken[..., None, :]
    return _Reach(kept, (K @ carried[..., None])[..., 0], K @ E, carried[..., -1], E[..., -1, :])


def _mini_batch(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: MemoryState, reach: _Reach
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What is read, and weights and momentum after it."""
    given, said = [k], list[Tensor]()
    for number, matrix in enumerate(state.start):
        if number:
            given.append(F.silu(said[-1]))
        said.append(given[-1] @ matrix)
    back = [rate[..., None] * (said[-1] - v)]
    for matrix, before in zip(state.start[:0:-1], said[-2::-1], strict=True):
        sigma = before.sigmoid()
        back.insert(0, (back[0] @ matrix.mT) * sigma * (1 + before * (1 - sigma)))
    x, weights, momentum = q, list[Tensor](), list[Tensor]()
    for number, (matrix, a, d) in enumerate(zip(state.weights, given, back, strict=True)):
        x = F.silu(x) if number else x
        read = reach.weights[..., None] * (x @ matrix) - (reach.written * (x @ a.mT)) @ d
        after = reach.weights[..., -1, None, None] * matrix - (reach.written[..., -1, :, None] * a).mT @ d
        if state.momentum:
            moving = state.momentum[number]
            read = read + reach.momentum[..., None] * (x @ moving)
            after = after + reach.momentum[..., -1, None, None] * moving
            momentum.append(reach.carried[..., None, None] * moving - (reach.last[..., None] * a).mT @ d)
        weights.append(after)
        x = read
    return x, tuple(weights), tuple(momentum)
