"""NAtS: each token learns how long it stays in the KV cache: for ever, until the next such token, or for a window.

Deng and Lindauer, "Neural Attention Search", arXiv 2502.13251.

    L_j = W_r x_j                                       role logits per key head; mean over chunks of c tokens
    a_j = (G_j, L_j, S_j) = one-hot of L_j              Gumbel-softmax, straight-through, in training; arg-max else
    e_j = the first n >= j with G_n = 1, else the last chunk
    M_ij = G_j + L_j prod_{n=j+1}^{i-1} (1 - G_n) + S_j [i - j <= W]        = [i <= end of life of j],   i >= j
    o_i = sum_j M_ij exp(q_i . k_j / sqrt(D)) v_j / sum_j M_ij exp(q_i . k_j / sqrt(D))

With chunks of c tokens the product runs over chunk numbers; a Sliding J is seen by i <= J c + W + c - 1, a Local by
i < (e_J + 1) c.

| here         | paper   | meaning                                           | from scratch | LLM adaptation |
|--------------|---------|---------------------------------------------------|--------------|----------------|
| `window`     | W       | following queries that see a Sliding token        | 16           | 256            |
| `chunk_size` | c       | tokens per role                                   | 8            | 1              |
| `penalty`    | lambda  | weight of sum_j [G_j (n - j) + L_j (e_j - j)] / n | 5e-7         | 5e-7           |
| `tau`        | tau     | temperature of the Gumbel-softmax                 | 1            | 1              |

Gradients of the roles are those of the product form at the one-hot roles (t_ij = P_ij (<dO_i, v_j> - <dO_i, O_i>), also
where M_ij = 0, with the authors' clamp P_ij <= 1), in closed form: M_ij changes with G_n where n ends, or would end, a
Local. The layer divides them by c and adds the penalty's derivative, as the authors' kernel does (e_j held fixed).

Choices that the paper leaves open: the first chunk is Global always; forcing the last one in training changes no
output, so it is not done; a chunk that is not complete has no role yet and is seen; padding is seen by none and is not
in a chunk's mean, the first chunk is the first that has a real token, and a chunk of padding ends no Local. The
penalty is a loss of its own: it reaches the roles of all tokens, whichever outputs are trained. `from_softmax` starts
with W_r = 0: arg-max ties are Global, so that the layer equals the softmax layer, while training draws roles evenly.
Long sequences read keys by how long they live, long-lived ones first, so that blocks of short-lived keys far behind a
query are skipped.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim, E width of values,
n chunks, R the 3 roles, r queries of a piece, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.selection import running_max

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

GLOBAL, LOCAL, SLIDING = 0, 1, 2

#: the end of a life that has none yet
_FOREVER = 2**31 - 1
#: query-key pairs per head from which keys are read by how long they live
_SORT_FROM = 2**19
#: bytes of a tile of scores in the backward pass
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Lifetimes(Mask):
    """Key j is seen by the queries from `born` to `until`, inclusive; query 0 is number `offset`.

    Attributes:
        born_BKM, until_BKM: integers per key head.
        group: query heads that share a key head.
    """

    born_BKM: Tensor
    until_BKM: Tensor
    group: int = 1
    offset: int = 0

    @property
    def batch(self) -> int:
        return self.until_BKM.shape[0]

    @property
    def heads(self) -> int:
        return self.until_BKM.shape[1] * self.group

    def check(self, n: int, m: int) -> None:
        if self.until_BKM.shape[2] != m:
            raise ValueError(f"the lifetimes are those of {self.until_BKM.shape[2]} keys, got {m}")

    def tensors(self) -> list[Tensor]:
        return [self.born_BKM, self.until_BKM]

    def to(self, device: torch.device | str) -> Mask:
        return Lifetimes(self.born_BKM.to(device), self.until_BKM.to(device), self.group, self.offset)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = torch.zeros_like(b) if self.batch == 1 else b
        head = h // self.group if self.until_BKM.shape[1] > 1 else torch.zeros_like(h)
        time = q + self.offset
        return (time >= self.born_BKM[row, head, k]) & (time <= self.until_BKM[row, head, k])

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = masks._pair(block_size, "block_size")
        first_q, last_q = (edge[:, None] + self.offset for edge in masks._edges(n, block_q, device))
        low_born, high_born = masks._block_range(self.born_BKM.to(device), block_k)
        low_until, high_until = masks._block_range(self.until_BKM.to(device), block_k)
        some = (last_q >= low_born[:, :, None]) & (first_q <= high_until[:, :, None])
        every = (first_q >= high_born[:, :, None]) & (last_q <= low_until[:, :, None])
        return masks._state(some, every & some).repeat_interleave(self.group, 1)

    def key_limits(self) -> tuple[Tensor, Tensor]:
        return self.born_BKM - self.offset, self.until_BKM - self.offset

    def __repr__(self) -> str:
        return f"lifetimes({self.heads} heads, {self.until_BKM.shape[2]} keys)"


def end_index(global_BKn: Tensor) -> Tensor:
    """e_j (B, K, n): the first chunk from j on that is Global, else the last; a reverse cumulative minimum."""
    n = global_BKn.shape[-1]
    number_n = torch.arange(n, device=global_BKn.device)
    ends = torch.where(global_BKn, number_n, max(n - 1, 0))
    return -running_max(-ends.flip(-1), -1).flip(-1)


def lifetimes(role_BKn: Tensor, length: int, *, window: int, chunk_size: int = 1) -> Tensor:
    """The last query that sees each of `length` tokens, (B, K, length); tokens past the last whole chunk are seen.

    Args:
        role_BKn: 0 Global, 1 Local, 2 Sliding, per chunk; a last, short chunk may have one or not.
    """
    number_n = torch.arange(role_BKn.shape[-1], device=role_BKn.device)
    is_global = role_BKn == GLOBAL
    local_BKn = (end_index(is_global) + 1) * chunk_size - 1
    # a Local that no Global ends stays
    ended_BKn = is_global.flip(-1).cumsum(-1).flip(-1) > 0
    local_BKn = torch.where(ended_BKn, local_BKn, _FOREVER)
    sliding_n = number_n * chunk_size + window + chunk_size - 1
    until_BKn = torch.where(role_BKn == LOCAL, local_BKn, sliding_n)
    until_BKn = until_BKn.masked_fill(is_global, _FOREVER)
    until_BKN = until_BKn.repeat_interleave(chunk_size, -1)[..., :length]
    return F.pad(until_BKN, (0, length - until_BKN.shape[-1]), value=_FOREVER)


def nats_mask(roles_BKnR: Tensor, length: int, *, window: int, chunk_size: int = 1, group: int = 1) -> Lifetimes:
    """The roles' mask over `length` tokens for `group` query heads per key head; prints itself with `.picture(N)`."""
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
    mask: Tensor | Mask | None = None,
    scale: float | None = None,
    clamp: bool = True,
) -> Tensor:
    """Causal attention of each query to the keys that are still alive, with gradients for the roles.

    Time and memory follow the live keys; where the roles need gradients the backward pass looks at every causal pair,
    a piece of queries at a time.

    Args:
        roles_BKnR: one-hot (B, K, n, 3): Global, Local, Sliding; one per chunk, n = ceil(N / c).
        window: W.
        chunk_size: c.
        mask: bool (B, N), True = real token; or a mask object or 4-axis bool tensor of further pairs to leave out.
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
    mask = as_mask(mask, k_BKND)
    role_BKn = roles_BKnR.argmax(-1)
    if isinstance(mask, masks.Padding):
        some_Bn = _chunk_sum(mask.valid_BM[:, None].float(), chunk_size) > 0
        role_BKn = torch.where((role_BKn == GLOBAL) & ~some_Bn, SLIDING, role_BKn)
    until_BKN = lifetimes(role_BKn, N, window=window, chunk_size=chunk_size)
    if isinstance(mask, masks.Padding):
        until_BKN = until_BKN.masked_fill(~mask.valid_BM[:, None], -1)
        mask = None
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and roles_BKnR.requires_grad:
        job = _Job(role_BKn, until_BKN, mask, window, chunk_size, scale, clamp)
        return _WithRoles.apply(q_BHND, k_BKND, v_BKNE, roles_BKnR, job)
    return _attend_living(q_BHND, k_BKND, v_BKNE, until_BKN, mask, scale)[0]


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
    """The definition with the product form, N x N, for roles that may be soft. The oracle of the tests."""
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
    """Share of `length` tokens that the next query sees, (B, K): the size of the KV cache against a full one."""
    until_BKN = lifetimes(roles_BKnR.argmax(-1), length, window=window, chunk_size=chunk_size)
    return (until_BKN >= length).float().mean(-1)


def _chunk_sum(x: Tensor, size: int) -> Tensor:
    """Sums over consecutive pieces of `size` along the last axis; the last may be short."""
    return x if size == 1 else masks._block_sums(x, size)


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
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
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
            t_BKrn = _chunk_sum(t.sum(2), size)
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


class _Penalised(torch.autograd.Function):
    """The roles, unchanged; their gradient per token of a chunk, and the derivative of the penalty added to it."""

    @staticmethod
    def forward(ctx: Any, roles_BKnR: Tensor, penalty: float, chunk_size: int) -> Tensor:
        ctx.penalty, ctx.chunk_size = penalty, chunk_size
        ctx.save_for_backward(roles_BKnR)
        return roles_BKnR.clone()

    @staticmethod
    @first_derivatives_only("NAtS with gradients for its roles", "nats_attend_reference has all")
    def backward(ctx: Any, grad: Tensor) -> Any:
        (roles_BKnR,) = ctx.saved_tensors
        n = roles_BKnR.shape[2]
        number_n = torch.arange(n, device=grad.device)
        local_BKn = end_index(roles_BKnR.argmax(-1) == GLOBAL) - number_n
        life = torch.stack([(n - number_n).expand_as(local_BKn), local_BKn, torch.zeros_like(local_BKn)], -1)
        return grad / ctx.chunk_size + ctx.penalty / max(n, 1) * life, None, None


class NAtSCache:
    """The keys and values that are still alive, per key head; for inference.

    Heads keep sets of different sizes; each is stored in as many places as the largest set needs, and places that
    died are given back every `update_every` tokens.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, window: int, chunk_size: int = 1, update_every: int = 16) -> None:
        self.window, self.chunk_size, self.update_every = window, chunk_size, update_every
        self.length = self._used = self._since = 0
        self._keys: Tensor | None = None
        self._values: Tensor
        #: born, end of life, and whether Local: (B, K, room) each
        self._born: Tensor
        self._until: Tensor
        self._local: Tensor
        self._pending: Tensor

    def extend(self, k_BKND: Tensor, v_BKNE: Tensor, logits_BKNR: Tensor) -> tuple[Tensor, Tensor, Lifetimes]:
        """Add N tokens; returns the keys and values held and who of the N queries sees which, per key head."""
        self._append(k_BKND.detach(), v_BKNE.detach())
        self._give_roles(logits_BKNR.detach())
        start = self.length - k_BKND.shape[2]
        born, until = self._born[..., : self._used], self._until[..., : self._used]
        assert self._keys is not None
        return self._keys[:, :, : self._used], self._values[:, :, : self._used], Lifetimes(born, until, 1, start)

    def _append(self, k: Tensor, v: Tensor) -> None:
        B, K, N, _ = k.shape
        if self._keys is None:
            self._keys, self._values = k[:, :, :0], v[:, :, :0]
            self._born = self._until = torch.zeros(B, K, 0, dtype=torch.int32, device=k.device)
            self._local = torch.zeros(B, K, 0, dtype=torch.bool, device=k.device)
            self._pending = torch.zeros(B, K, 3, device=k.device)
        if self._keys.shape[0] != B:
            raise ValueError(f"the cache holds {self._keys.shape[0]} sequences, got {B}")
        if self._used + N > self._keys.shape[2]:
            room = self._used + N + self.update_every
            self._set(slice(0, self._used), room)
        new = slice(self._used, self._used + N)
        assert self._keys is not None
        self._keys[:, :, new], self._values[:, :, new] = k, v
        self._born[..., new] = torch.arange(self.length, self.length + N, device=k.device)
        self._until[..., new], self._local[..., new] = _FOREVER, False
        self._used, self.length = self._used + N, self.length + N

    def _give_roles(self, logits_BKNR: Tensor) -> None:
        """Ends of life for the tokens of the chunks that are complete now, and for the Locals that they end."""
        c, N = self.chunk_size, logits_BKNR.shape[2]
        first, waiting = (self.length - N) // c, (self.length - N) % c
        done = self.length // c - first
        # the role of a mean is the role of a sum
        sums = _chunk_sum(F.pad(logits_BKNR.float(), (0, 0, waiting, 0)).mT, c).mT
        sums[:, :, 0] += self._pending
        if self.length % c:
            self._pending = sums[:, :, -1]
        else:
            self._pending = torch.zeros_like(self._pending)
        if not done:
            return
        role_BKn = sums[:, :, :done].argmax(-1)
        if first == 0:
            role_BKn[..., 0] = GLOBAL
        until = lifetimes(role_BKn, done * c, window=self.window, chunk_size=c)
        until = torch.where(until == _FOREVER, until, until + first * c).to(torch.int32)
        is_global = role_BKn == GLOBAL
        end_BK = (end_index(is_global)[..., 0] + first + 1) * c - 1
        end_BK1 = torch.where(is_global.any(-1), end_BK, _FOREVER).to(torch.int32)[..., None]
        new = slice(self._used - N - waiting, self._used - self.length % c)
        old = slice(0, new.start)
        alive = self._until[..., old]
        self._until[..., old] = torch.where(self._local[..., old], alive.minimum(end_BK1), alive)
        self._until[..., new] = until
        self._local[..., new] = (role_BKn == LOCAL).repeat_interleave(c, -1)

    def forget(self, tokens: int) -> None:
        """Give back the places of what no later query sees, once `update_every` tokens came since."""
        self._since += tokens
        if self._since < self.update_every or self._keys is None:
            return
        self._since = 0
        alive = self._until[..., : self._used] >= self.length
        kept = int(alive.sum(-1).max())
        # the dead first: tokens that wait for their chunk's role stay the last of every head
        order = alive.to(torch.uint8).argsort(dim=-1, stable=True)[..., self._used - kept :]
        self._set(order, kept + self.update_every)
        self._used = kept

    def _set(self, order: Tensor | slice, room: int) -> None:
        """Move the places named by `order` to the front of new storage."""

        def moved(x: Tensor) -> Tensor:
            if isinstance(order, slice):
                x = x[:, :, order]
            else:
                x = x.gather(2, order if x.ndim == 3 else order[..., None].expand(-1, -1, -1, x.shape[-1]))
            return F.pad(x, (0, 0) * (x.ndim - 3) + (0, room - x.shape[2]))

        assert self._keys is not None
        self._keys, self._values = moved(self._keys), moved(self._values)
        self._born, self._until, self._local = moved(self._born), moved(self._until), moved(self._local)

    @property
    def kept_BK(self) -> Tensor:
        """Tokens that the next query will see, per key head."""
        if self._keys is None:
            raise ValueError("the cache has seen no token")
        return (self._until[..., : self._used] >= self.length).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes in use, those of shorter heads' empty places counted."""
        if self._keys is None:
            return 0
        held = (self._keys, self._values, self._born, self._until, self._local)
        return sum(x[:, :, : self._used].numel() * x.element_size() for x in held)


class NAtS(QKVAttention):
    """Neural Attention Search as a layer.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be True.
        window: W, following queries that see a Sliding token.
        chunk_size: c, tokens per role.
        penalty: lambda; larger keeps less.
        tau: temperature of the Gumbel-softmax in training.
        detach_roles: the role head's input gets no gradient (adapting a frozen model).

    Raises:
        ValueError: if `causal` is False or an option is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        window: int = 16,
        chunk_size: int = 8,
        penalty: float = 5e-7,
        tau: float = 1.0,
        detach_roles: bool = False,
        **projections: Any,
    ) -> None:
        if not causal:
            raise ValueError("NAtS is causal: roles say how long a token is seen by later ones; got causal=False")
        if window < 0 or chunk_size < 1:
            raise ValueError(f"window must be at least 0 and chunk_size at least 1, got {window} and {chunk_size}")
        if penalty < 0 or tau <= 0:
            raise ValueError(f"penalty must be at least 0 and tau above 0, got {penalty} and {tau}")
        super().__init__(dim, num_heads, causal, **projections)
        self.window, self.chunk_size, self.penalty, self.tau = window, chunk_size, penalty, tau
        self.detach_roles = detach_roles
        self.role_proj = nn.Linear(dim, 3 * self.num_kv_heads, bias=False)

    def start_as_softmax(self) -> None:
        """Every role Global: the layer equals the softmax layer (in evaluation; training draws roles evenly)."""
        nn.init.zeros_(self.role_proj.weight)

    def role_logits(self, x_BNC: Tensor) -> Tensor:
        """(B, K, N, 3), per token."""
        x_BNC = x_BNC.detach() if self.detach_roles else x_BNC
        return self.role_proj(x_BNC).unflatten(-1, (self.num_kv_heads, 3)).transpose(1, 2)

    def roles(self, x_BNC: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """One-hot roles (B, K, n, 3): sampled with straight-through gradients in training, else the arg-max.

        Args:
            mask: as in `forward`; what a padding mask hides has no say in its chunk.
        """
        logits = self.role_logits(x_BNC)
        mask = as_mask(mask, logits)
        real_B1N = x_BNC.new_ones(1, 1, x_BNC.shape[1], dtype=torch.bool)
        if isinstance(mask, masks.Padding):
            real_B1N = mask.valid_BM[:, None]
            logits = torch.where(real_B1N[..., None], logits, 0.0)
        tokens_B1n1 = _chunk_sum(real_B1N.to(logits.dtype), self.chunk_size)[..., None]
        logits = _chunk_sum(logits.mT, self.chunk_size).mT / tokens_B1n1.clamp(min=1)
        if self.training:
            roles = F.gumbel_softmax(logits, self.tau, hard=True, dim=-1)
        else:
            roles = F.one_hot(logits.argmax(-1), 3).to(logits.dtype)
        first = torch.tensor([1.0, 0.0, 0.0], dtype=roles.dtype, device=roles.device)
        some_B1n1 = tokens_B1n1 > 0
        roles = torch.where(some_B1n1 & (some_B1n1.cumsum(2) == 1), first, roles)
        if self.training and roles.requires_grad:
            roles = _Penalised.apply(roles, self.penalty, self.chunk_size)
        return roles

    def mask(self, x_BNC: Tensor) -> Lifetimes:
        """Who is seen by whom for this input, to print (`.picture(N)`) or to combine with other masks."""
        group = self.num_heads // self.num_kv_heads
        options = {"window": self.window, "chunk_size": self.chunk_size, "group": group}
        return nats_mask(self.roles(x_BNC), x_BNC.shape[1], **options)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: NAtSCache | None = None,  # type: ignore[override]
    ) -> Tensor:
        """Attend from `x_BNC` to itself, or to what is alive in `cache` and itself.

        Raises:
            ValueError: if there is a context, or a mask beside a cache.
        """
        self._check(x_BNC, context_BMC, cache)  # type: ignore[arg-type]
        if cache is not None and mask is not None:
            raise ValueError("NAtS decodes without a mask: its cache holds no padding")
        if cache is not None and x_BNC.shape[1] == 0:
            return x_BNC
        q_BHND, k_BKND = self._queries_and_keys(x_BNC, None, 0 if cache is None else cache.length)
        v_BKND = self._heads(self.v_proj(x_BNC), self.num_kv_heads)
        if cache is None:
            out = self._living(q_BHND, k_BKND, v_BKND, self.roles(x_BNC, mask=mask), mask)
        else:
            keys, values, living = cache.extend(k_BKND, v_BKND, self.role_logits(x_BNC))
            out = _attend_cached(q_BHND, keys, values, living)
            cache.forget(x_BNC.shape[1])
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        q_BHND, k_BKND = self._queries_and_keys(x_BNC, None, 0)
        k_BHND, roles = (repeat_heads(x, self.num_heads) for x in (k_BKND, self.roles(x_BNC, mask=mask)))
        return self._living(q_BHND, k_BHND, values_BHME, roles, mask)

    def _living(self, q: Tensor, k: Tensor, v: Tensor, roles: Tensor, mask: Tensor | Mask | None) -> Tensor:
        return nats_attend(q, k, v, roles, window=self.window, chunk_size=self.chunk_size, mask=mask)

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NAtSCache:
        return NAtSCache(self.window, self.chunk_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, chunk_size={self.chunk_size}"


def _attend_cached(q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, living: Lifetimes) -> Tensor:
    B, H, N, _ = q_BHND.shape
    K = k_BKMD.shape[1]
    if N > 1:
        whole = Lifetimes(living.born_BKM, living.until_BKM, H // K, living.offset)
        return attend(q_BHND, k_BKMD, v_BKME, mask=whole)
    # one query: its group as rows, so that no key is copied for each of its query heads
    rows_BKGD = q_BHND.view(B, K, H // K, -1)
    seen_BK1M = (living.until_BKM >= living.offset)[:, :, None]
    return attend(rows_BKGD, k_BKMD, v_BKME, mask=seen_BK1M.expand(-1, -1, H // K, -1)).view(B, H, 1, -1)


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' kernel: heads first, one-hot roles per chunk."""
    q, k, v, roles = (inputs[name] for name in ("q", "k", "v", "roles"))
    options: dict[str, Any] = {"window": int(args["local_seq_max_length"])}
    options["chunk_size"] = int(args.get("nats_chunk_size", 1))
    N, group = q.shape[2], q.shape[1] // k.shape[1]
    until = lifetimes(roles.argmax(-1), N, **options).clamp(max=N - 1)
    ended = torch.zeros(*until.shape[:2], N + 1, dtype=torch.int32, device=q.device)
    ended.scatter_add_(2, until + 1, torch.ones_like(until, dtype=torch.int32))
    seen = torch.arange(1, N + 1, device=q.device) - ended[..., :N].cumsum(-1)
    return {
        "out": nats_attend(q, k, v, roles, **options),
        "end_index": end_index(roles[..., GLOBAL] > 0),
        "keys_per_query": repeat_heads(seen[..., None], k.shape[1] * group)[..., 0].to(torch.int32),
    }


class _Window(QKVAttention):
    """Sliding window: what the same number of keys would be without roles."""

    left = 0

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=masks.window(self.left))


def _claim(lab: Lab) -> ClaimResult:
    """Recall among distractors: what the cache holds at the end, and the accuracy, against dense and a window."""
    settings: dict[str, Any] = {"length": 128, "power": 1.0, "layers": 1, "steps": 400, "lr": 5e-3}

    def mixer(penalty: float) -> Any:
        return lambda dim: NAtS(dim, 4, window=4, chunk_size=1, penalty=penalty, rope=False)

    def dense(dim: int) -> nn.Module:
        layer = _Window(dim, 4, True, rope=False)
        layer.left = 2**20
        return layer

    measured = {}
    _, _, measured["dense_recall_accuracy"] = lab.recall(dense, description="dense", **settings)
    model, _, measured["nats_recall_accuracy"] = lab.recall(mixer(5e-6), description="NAtS", **settings)
    layer = next(m for m in model.modules() if isinstance(m, NAtS))
    length = lab.size(128, 48)
    shares: list[float] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shares.append(float(live_share(layer.roles(inputs[0]), length, window=4).mean()))

    hook = layer.register_forward_pre_hook(record)
    with torch.no_grad():
        model(lab.data.recall(lab.size(64, 2), length, 8, power=1.0, generator=lab.generator())[0])
    hook.remove()
    measured["nats_live_kv_share"] = shares[0]

    def window(dim: int) -> nn.Module:
        layer = _Window(dim, 4, True, rope=False)
        layer.left = max(0, round(shares[0] * length) - 1)
        return layer

    _, _, measured["window_of_that_size_recall_accuracy"] = lab.recall(window, description="window", **settings)
    gap = measured["dense_recall_accuracy"] - measured["nats_recall_accuracy"]
    ahead = measured["nats_recall_accuracy"] - measured["window_of_that_size_recall_accuracy"]
    return ClaimResult(measured, holds=gap < 0.05 and shares[0] < 0.6 and ahead > 0.3)


register(
    "nats",
    kind="sequence",
    summary="Each token learns its role in the KV cache: kept for ever, until the next such token, or for a window.",
    supports=("causal", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/token/trained-routing",
    complexity="time O(N s D) and cache O(s D) with s live tokens; training O(N^2 D), linear memory",
    invariants=(
        "all Global, or all Local without a later Global, is causal attention",
        "all Sliding is a window of W + 1 keys and the first token",
        "the closed gradient of the roles is that of the product form",
        "roles after a query do not change it; a Global still sees the Locals that it ends",
        "decoding with the cache that forgets equals the parallel form",
        "starts equal to the softmax layer that it came from",
    ),
    build=NAtS,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "window": 3, "chunk_size": 2},
    at_length=lambda length: {"window": min(16, max(1, length // 8)), "chunk_size": 1 if length < 512 else 8},
    ports=(
        AuthorsPort(
            module="nats_attention", build=lambda args: nn.Identity(), convert=lambda state: state, run=_run_authors
        ),
    ),
    claim=Claim(
        paper="large KV reduction with maintained perplexity (from scratch, PG-19) and needle scores (abstract)",
        expected="on recall of length 128 among distractors, NAtS keeps less than 60 % of the tokens within 5 points "
        "of dense attention's accuracy, 30 points above a window of as many keys as it keeps",
        run=_claim,
    ),
)
