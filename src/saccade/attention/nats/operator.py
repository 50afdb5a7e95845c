"""NAtS: how long tokens live, the mask of that, and attention under it with gradients for the roles.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim, E width of values,
n chunks, R the 3 roles, r queries of a piece, c tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.autocast import working_dtype
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import FOREVER, Lifetimes, Mask
from saccade.ops.masks.block_states import block_sums
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import running_max

GLOBAL, LOCAL, SLIDING = 0, 1, 2


#: query-key pairs per head from which keys are read by how long they live
_SORT_FROM = 2**19


#: bytes of a tile of scores in the backward pass
_PIECE_BYTES = 4 * 2**20


def end_index(global_BKn: Tensor) -> Tensor:
    """e_j (B, K, n): the first chunk from j on that is Global, else the last; a reverse cumulative minimum.

    Args:
        global_BKn: bool, True = the chunk is Global.
    """
    n = global_BKn.shape[-1]
    number_n = torch.arange(n, device=global_BKn.device)
    ends = torch.where(global_BKn, number_n, max(n - 1, 0))
    return -running_max(-ends.flip(-1), -1).flip(-1)


def lifetimes(role_BKn: Tensor, length: int, *, window: int, chunk_size: int = 1) -> Tensor:
    """The last query that sees each of `length` tokens, (B, K, length); tokens past the last whole chunk are seen.

    Args:
        role_BKn: 0 Global, 1 Local, 2 Sliding, per chunk; a last, short chunk may have one or not.
        length: N, tokens.
        window: W, following queries that see a Sliding token.
        chunk_size: c, tokens per role.
    """
    number_n = torch.arange(role_BKn.shape[-1], device=role_BKn.device)
    is_global = role_BKn == GLOBAL
    local_BKn = (end_index(is_global) + 1) * chunk_size - 1
    # a Local that no Global ends stays
    ended_BKn = is_global.flip(-1).cumsum(-1).flip(-1) > 0
    local_BKn = torch.where(ended_BKn, local_BKn, FOREVER)
    sliding_n = number_n * chunk_size + window + chunk_size - 1
    until_BKn = torch.where(role_BKn == LOCAL, local_BKn, sliding_n)
    until_BKn = until_BKn.masked_fill(is_global, FOREVER)
    until_BKN = until_BKn.repeat_interleave(chunk_size, -1)[..., :length]
    return F.pad(until_BKN, (0, length - until_BKN.shape[-1]), value=FOREVER)


def nats_mask(roles_BKnR: Tensor, length: int, *, window: int, chunk_size: int = 1, group: int = 1) -> Lifetimes:
    """The roles' mask over `length` tokens for `group` query heads per key head; prints itself with `.picture(N)`.

    Args:
        roles_BKnR: one-hot, as in `nats_attend`.
        length: N, tokens.
        window: W.
        chunk_size: c.
        group: H / K, query heads that share a key head.
    """
    until_BKN = lifetimes(roles_BKnR.argmax(-1), length, window=window, chunk_size=chunk_size)
    born_BKN = torch.arange(length, device=until_BKN.device).expand_as(until_BKN)
    return Lifetimes(born_BKN, until_BKN, group)


def nats_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    roles_BKnR: Tensor,
    *,
    window: int,
    chunk_size: int = 1,
    mask: GivenMask = None,
    scale: float | None = None,
    clamp: bool = True,
) -> Tensor:
    """Causal attention of each query to the keys that are still alive, with gradients for the roles.

    Time and memory follow the live keys; where the roles need gradients the backward pass looks at every causal pair,
    a piece of queries at a time.

    Args:
        q_BHND, k_BKND, v_BKNE: queries, keys and values of the same N tokens; K divides H.
        roles_BKnR: one-hot (B, K, n, 3): Global, Local, Sliding; one per chunk, n = ceil(N / c).
        window: W.
        chunk_size: c.
        mask: bool (B, N), True = real token; or a mask object or 4-axis bool tensor of further pairs to leave out.
        scale: factor of the dot product, D ** -0.5 where None.
        clamp: the authors' bound P_ij <= 1 in the roles' gradients; without it they are exact, and may be huge.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    B, H, N, K = *q_BHND.shape[:3], k_BKND.shape[1]
    if window < 0 or chunk_size < 1:
        raise ValueError(f"window must be at least 0 and chunk_size at least 1, got {window} and {chunk_size}")
    if not K or H % K or k_BKND.shape[2] != N:
        raise ValueError(f"queries and keys must be of the same tokens, got {(H, N)} and {tuple(k_BKND.shape[1:3])}")
    if roles_BKnR.shape != (B, K, -(-N // chunk_size), 3):
        expected = (B, K, -(-N // chunk_size), 3)
        raise ValueError(f"roles must be one-hot of shape {expected}, got {tuple(roles_BKnR.shape)}")
    pattern = Pattern.of(mask, B, N, N, heads=H, causal=True)
    real_BN = pattern.valid_BM
    role_BKn = roles_BKnR.argmax(-1)
    if real_BN is not None:
        some_Bn = chunk_sum(real_BN[:, None].float(), chunk_size) > 0
        role_BKn = torch.where((role_BKn == GLOBAL) & ~some_Bn, SLIDING, role_BKn)
    until_BKN = lifetimes(role_BKn, N, window=window, chunk_size=chunk_size)
    if real_BN is not None:
        until_BKN = until_BKN.masked_fill(~real_BN[:, None], -1)
    pairs = replace(pattern, causal=False, valid_BM=None).mask
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and roles_BKnR.requires_grad:
        job = _Job(role_BKn, until_BKN, pairs, window, chunk_size, scale, clamp)
        return _WithRoles.apply(q_BHND, k_BKND, v_BKNE, roles_BKnR, job)
    return _attend_living(q_BHND, k_BKND, v_BKNE, until_BKN, pairs, scale)[0]


def nats_attend_reference(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    roles_BKnR: Tensor,
    *,
    window: int,
    chunk_size: int = 1,
    scale: float | None = None,
) -> Tensor:
    """The definition with the product form, N x N, for roles that may be soft. The oracle of the tests.

    Args:
        q_BHND, k_BKND, v_BKNE: queries, keys and values of the same N tokens; K divides H.
        roles_BKnR: one-hot, or shares of the three roles that sum to 1.
        window, chunk_size, scale: as in `nats_attend`.
    """
    H, N, D = q_BHND.shape[1:]
    k_BHND, v_BHNE, a_BHnR = (repeat_heads(x, H) for x in (k_BKND, v_BKNE, roles_BKnR))
    n, token_N = a_BHnR.shape[2], torch.arange(N, device=q_BHND.device)
    chunk_N = token_N // chunk_size
    number_n = torch.arange(n, device=q_BHND.device)
    # prod_{m=j+1}^{i-1} (1 - G_m): a cumulative product along i of factors that begin after j
    begun_nn = number_n[:, None] > number_n
    factors = torch.where(begun_nn, (1 - a_BHnR[..., GLOBAL])[..., :, None], 1.0)
    product = torch.cat([torch.ones_like(factors[..., :1, :]), factors.cumprod(-2)[..., :-1, :]], -2)
    alive = a_BHnR[..., None, :, GLOBAL] + a_BHnR[..., None, :, LOCAL] * product
    near_NN = token_N[:, None] <= chunk_N * chunk_size + window + chunk_size - 1
    m_BHNN = alive[..., chunk_N[:, None], chunk_N] + a_BHnR[..., None, chunk_N, SLIDING] * near_NN
    weight = (q_BHND @ k_BHND.mT * (D**-0.5 if scale is None else scale)).exp() * (m_BHNN * 1.0).tril()
    return weight / weight.sum(-1, keepdim=True) @ v_BHNE


def live_share(roles_BKnR: Tensor, length: int, *, window: int, chunk_size: int = 1) -> Tensor:
    """Share of `length` tokens that the next query sees, (B, K): the size of the KV cache against a full one.

    Args:
        roles_BKnR: one-hot, as in `nats_attend`.
        length: N, tokens.
        window: W.
        chunk_size: c.
    """
    until_BKN = lifetimes(roles_BKnR.argmax(-1), length, window=window, chunk_size=chunk_size)
    return (until_BKN >= length).float().mean(-1)


def chunk_sum(x: Tensor, size: int) -> Tensor:
    """Sums over consecutive pieces of `size` along the last axis; the last may be short."""
    return x if size == 1 else block_sums(x, size)


def _attend_living(
    q: Tensor, k: Tensor, v: Tensor, until_BKN: Tensor, mask: Mask | None, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    group = q.shape[1] // k.shape[1]
    born_BKN = torch.arange(k.shape[2], device=k.device).expand_as(until_BKN)
    if mask is None and q.shape[2] * k.shape[2] >= _SORT_FROM:
        # what stays makes whole blocks; what lives for less than two of the planner's blocks is read apart
        haste = (until_BKN < k.shape[2]).to(torch.uint8) + (until_BKN - born_BKN < 128)
        born_BKN = haste.argsort(dim=-1, stable=True)
        until_BKN = until_BKN.gather(-1, born_BKN)
        k, v = (x.gather(2, born_BKN[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    living: Mask = Lifetimes(born_BKN, until_BKN, group)
    living = living if mask is None else living & mask
    if return_lse:
        return attend(q, k, v, mask=living, scale=scale, return_lse=True)
    return attend(q, k, v, mask=living, scale=scale), None


@dataclass
class _Job:
    """What one call with gradients for its roles computes."""

    role_BKn: Tensor
    until_BKN: Tensor
    mask: Mask | None
    window: int
    chunk_size: int
    scale: float
    clamp: bool


class _WithRoles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, roles: Tensor, job: _Job) -> Tensor:
        out, lse = _attend_living(q, k, v, job.until_BKN, job.mask, job.scale, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job, ctx.roles_dtype = job, roles.dtype
        return out

    @staticmethod
    @first_derivatives_only("NAtS with gradients for its roles", "nats_attend_reference has all")
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        job: _Job = ctx.job
        B, H, N, _ = q.shape
        K = k.shape[1]
        group, size = H // K, job.chunk_size
        wide = working_dtype(q.dtype)
        q_, k_, v_, grad_ = (x.to(wide) for x in (q, k, v, grad_out))
        # rows of one key head side by side: no copy of the keys
        q_, grad_, out_, lse_ = (x.unflatten(1, (K, group)) for x in (q_, grad_, out.to(wide), lse.to(wide)))
        lse_ = lse_.masked_fill(lse_ == float("-inf"), float("inf"))
        grad_q, grad_k, grad_v = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
        shift_BKGN1 = (grad_ * out_).sum(-1, keepdim=True)
        n = job.role_BKn.shape[-1]
        grad_roles = q_.new_zeros(B, K, n, 3)
        token_N = torch.arange(N, device=q.device)
        number_n = torch.arange(n, device=q.device)
        before_BKn = _global_before(job.role_BKn == GLOBAL)
        step = max(1, _PIECE_BYTES // max(1, B * H * N * wide.itemsize))
        for first in range(0, N, step):
            last = min(first + step, N)
            row_r, chunks = token_N[first:last], -(-last // size)
            possible = row_r[:, None] >= token_N[:last]
            if job.mask is not None:
                possible = possible & _asked(job.mask, B, H, row_r, token_N[:last]).unflatten(1, (-1, group))
            real = job.until_BKN[:, :, None, None, :last] >= 0
            seen = possible & (row_r[:, None] <= job.until_BKN[:, :, None, None, :last])
            rows = (slice(None), slice(None), slice(None), slice(first, last))
            keys, values = k_[:, :, None, :last], v_[:, :, None, :last]
            weight = (q_[rows] @ keys.mT).mul_(job.scale).sub_(lse_[rows][..., None])
            weight = (weight.clamp_(max=0) if job.clamp else weight).exp_().mul_(possible & real)
            t = (grad_[rows] @ values.mT).sub_(shift_BKGN1[rows]).mul_(weight)
            weight.mul_(seen)
            grad_v[:, :, :last] += (weight.mT @ grad_[rows]).sum(2)
            t_BKrn = chunk_sum(t.sum(2), size)
            t.mul_(seen)
            grad_q[rows] = (t @ keys).mul_(job.scale)
            grad_k[:, :, :last] += (t.mT @ q_[rows]).sum(2).mul_(job.scale)

            own_r = row_r // size
            end_BKr = before_BKn[..., own_r]
            end2_BKr = before_BKn.gather(-1, end_BKr.clamp(min=0)).masked_fill(end_BKr < 0, -1)
            J = number_n[:chunks]
            uninterrupted = end_BKr[..., None] <= J
            near = row_r[:, None] <= J * size + job.window + size - 1
            grad = grad_roles[:, :, :chunks]
            grad[..., GLOBAL] += t_BKrn.sum(2)
            grad[..., LOCAL] += (t_BKrn * uninterrupted).sum(2)
            grad[..., SLIDING] += (t_BKrn * near).sum(2)
            # what Locals before chunk m, and not ended before that, owe to m being no Global
            owed = t_BKrn * (job.role_BKn[:, :, None, :chunks] == LOCAL)
            owed = F.pad(owed.cumsum(-1), (1, 0))
            to_end = owed.gather(-1, end_BKr.clamp(min=0)[..., None])
            to_end2 = owed.gather(-1, end2_BKr.clamp(min=0)[..., None])
            between = (end_BKr[..., None] < J) & (own_r[:, None] > J)
            lost = (owed[..., :-1] - to_end) * between
            lost += (to_end - to_end2) * (end_BKr[..., None] == J)
            grad[..., GLOBAL] -= lost.sum(2)
        grads = (grad_q.flatten(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *grads, grad_roles.to(ctx.roles_dtype), None


def _global_before(global_BKn: Tensor) -> Tensor:
    """The last Global chunk before each chunk, -1 where there is none."""
    marked = torch.where(global_BKn, torch.arange(global_BKn.shape[-1], device=global_BKn.device), -1)
    return F.pad(running_max(marked, -1), (1, 0), value=-1)[..., :-1]


def _asked(mask: Mask, B: int, H: int, q_r: Tensor, k: Tensor) -> Tensor:
    b = torch.arange(B, device=k.device)[:, None, None, None]
    h = torch.arange(H, device=k.device)[:, None, None]
    return mask.to(k.device).allowed(b, h, q_r[:, None], k).expand(B, H, len(q_r), len(k))
