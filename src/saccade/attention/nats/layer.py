"""NAtS as a layer: roles from a projection, a penalty on long lives, and a cache that gives back what has died.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, C channels, D head dim, E width of
values, n chunks, R the 3 roles, c tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.nats.operator import (
    GLOBAL,
    LOCAL,
    chunk_sum,
    end_index,
    lifetimes,
    nats_attend,
    nats_mask,
)
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import FOREVER, Lifetimes
from saccade.ops.pattern import GivenMask, Pattern, Said


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

    Args:
        window: W, following queries that see a Sliding token.
        chunk_size: c, tokens per role.
        update_every: tokens between two returns of places that died.

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
        self._until[..., new], self._local[..., new] = FOREVER, False
        self._used, self.length = self._used + N, self.length + N

    def _give_roles(self, logits_BKNR: Tensor) -> None:
        """Ends of life for the tokens of the chunks that are complete now, and for the Locals that they end."""
        c, N = self.chunk_size, logits_BKNR.shape[2]
        first, waiting = (self.length - N) // c, (self.length - N) % c
        done = self.length // c - first
        # the role of a mean is the role of a sum
        sums = chunk_sum(F.pad(logits_BKNR.float(), (0, 0, waiting, 0)).mT, c).mT
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
        until = torch.where(until == FOREVER, until, until + first * c).to(torch.int32)
        is_global = role_BKn == GLOBAL
        end_BK = (end_index(is_global)[..., 0] + first + 1) * c - 1
        end_BK1 = torch.where(is_global.any(-1), end_BK, FOREVER).to(torch.int32)[..., None]
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

    takes_decoding: tuple[Said, ...] = ()

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

    def roles(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        """One-hot roles (B, K, n, 3): sampled with straight-through gradients in training, else the arg-max.

        Args:
            mask: as in `forward`; padding has no say in its chunk.
        """
        return self._roles(self.role_logits(x_BNC), self.pattern(mask, x_BNC, None, None))

    def _roles(self, logits: Tensor, pattern: Pattern) -> Tensor:
        real_B1N = logits.new_ones(1, 1, logits.shape[2], dtype=torch.bool)
        if pattern.valid_BM is not None:
            real_B1N = pattern.valid_BM[:, None]
            logits = torch.where(real_B1N[..., None], logits, 0.0)
        tokens_B1n1 = chunk_sum(real_B1N.to(logits.dtype), self.chunk_size)[..., None]
        logits = chunk_sum(logits.mT, self.chunk_size).mT / tokens_B1n1.clamp(min=1)
        if self.training:
            roles = F.gumbel_softmax(logits, self.tau, hard=True, dim=-1)
        else:
            roles = F.one_hot(logits.argmax(-1), 3).to(logits.dtype)
        first = (torch.arange(3, device=roles.device) == 0).to(roles.dtype)
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

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys, values, and the logits of the roles."""
        return *super().project(x_BNC, context_BMC, positions), self.role_logits(x_BNC)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, logits_BKNR: Tensor) -> Tensor:
        roles = repeat_heads(self._roles(logits_BKNR, pattern), k_BKMD.shape[1])
        options: dict[str, Any] = {"window": self.window, "chunk_size": self.chunk_size, "mask": pattern}
        return nats_attend(q_BHND, k_BKMD, v_BKME, roles, **options)

    def remember(
        self,
        cache: NAtSCache,
        q_BHND: Tensor,
        k_BKND: Tensor,
        v_BKNE: Tensor,
        pattern: Pattern,
        logits_BKNR: Tensor,
    ) -> Tensor:
        """Attend to what is alive in `cache`, and forget what is not."""
        if not q_BHND.shape[2]:
            return q_BHND
        keys, values, living = cache.extend(k_BKND, v_BKNE, logits_BKNR)
        out = _attend_cached(q_BHND, keys, values, living)
        cache.forget(q_BHND.shape[2])
        return out

    def new_cache(
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
