"""MoSA as a layer.

Shape letters: B batch, N tokens, M tokens so far, C channels, E sparse heads, H other heads, S slots (k), D head dim,
F width of given values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from saccade.layers.cache import KVCache
from saccade.ops import masks, tokens
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.rope import rotate


def budget(length: int, sparsity: int) -> int:
    """k, the tokens that a head picks of `length`: floor(length / sparsity), at least 2, at most all."""
    return min(max(length // sparsity, 2), length)


def attend_chosen(
    q_EBSD: Tensor, k_EBSD: Tensor, v_EBSF: Tensor, *, causal: bool = True, kept_EBS: Tensor | None = None
) -> Tensor:
    """Attention among the slots of each head and row, which stand in the order of their positions, unused ones last."""
    if causal:  # unused slots are later than all others, so nobody sees them
        return attend(q_EBSD, k_EBSD, v_EBSF, mask=masks.causal())
    return attend(q_EBSD, k_EBSD, v_EBSF, mask=None if kept_EBS is None else kept_EBS[:, :, None])


class SparseHeads(nn.Module):
    """E heads with their router: x (B, N, C) -> the sum of what they put at the tokens they picked, (B, N, C).

    Arguments are `MoSA`'s; parameters have the authors' layout: qkv (E, C, 3 D) with thirds Q, K, V, out (E, D, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        sparsity: int,
        causal: bool = True,
        routing: Literal["learned", "fixed"] = "learned",
        include_first: bool = False,
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.sparsity, self.causal = num_heads, head_dim, sparsity, causal
        self.include_first, self.rope_base = include_first, rope_base
        self.rotated = 2 * math.floor(rotate_fraction * head_dim / 2)
        self.router = nn.Linear(dim, num_heads, bias=False) if routing == "learned" else None
        self.qkv = nn.Parameter(torch.empty(num_heads, dim, 3 * head_dim))
        self.out = nn.Parameter(torch.empty(num_heads, head_dim, dim))
        nn.init.uniform_(self.qkv, -((3 * head_dim) ** -0.5), (3 * head_dim) ** -0.5)
        nn.init.uniform_(self.out, -((dim * num_heads) ** -0.5), (dim * num_heads) ** -0.5)

    def scores(self, x_BNC: Tensor) -> Tensor:
        """r, (E, B, N), in fp32 at least: in half precision the sigmoid would tie many tokens at 1."""
        assert self.router is not None
        logits_EBN = self.router(x_BNC).permute(2, 0, 1)
        return logits_EBN.to(torch.promote_types(logits_EBN.dtype, torch.float32)).sigmoid()

    def route(self, x_BNC: Tensor, real_BN: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The choice: positions (E, B, S), their gates (E, B, S) and which slots count (B, S) or None; best first."""
        B, N, _ = x_BNC.shape
        count = budget(N, self.sparsity)
        kept_B = None
        if real_BN is not None:
            real_B = real_BN.sum(-1)
            kept_B = torch.minimum((real_B // self.sparsity).clamp(min=2), real_B)
        if self.router is None:
            slot_S = torch.arange(count, device=x_BNC.device)
            position_S = (slot_S * self.sparsity).clamp(max=max(N - 1, 0))
            gate_EBS = x_BNC.new_ones(self.num_heads, B, count)
            kept_BS = None
            if real_BN is not None and kept_B is not None:
                kept_BS = real_BN[:, position_S] & (slot_S < kept_B[:, None])
                gate_EBS = gate_EBS * kept_BS
            return position_S.expand(self.num_heads, B, count), gate_EBS, kept_BS
        scores_EBN = self.scores(x_BNC)
        chances_EBN = scores_EBN.detach()
        if real_BN is not None:
            chances_EBN = chances_EBN.masked_fill(~real_BN, -1.0)
        if self.include_first and N:
            first_B = torch.zeros(B, dtype=torch.long, device=x_BNC.device)
            if real_BN is not None:
                first_B = real_BN.int().argmax(-1)
            # above every sigmoid
            chances_EBN = chances_EBN.scatter(-1, first_B[None, :, None].expand(self.num_heads, B, 1), 2.0)
        position_EBS, kept_BS = tokens.choose(chances_EBN, count, kept_B)
        gate_EBS = scores_EBN.gather(-1, position_EBS).to(x_BNC.dtype)
        return position_EBS, gate_EBS if kept_BS is None else gate_EBS * kept_BS, kept_BS

    def forward(self, x_BNC: Tensor, real_BN: Tensor | None = None) -> Tensor:
        position_EBS, gate_EBS, kept_EBS = self._choice_in_order(x_BNC, real_BN)
        q_EBSD, k_EBSD, v_EBSD = self._project(x_BNC, position_EBS)
        out_EBSD = attend_chosen(q_EBSD, k_EBSD, v_EBSD, causal=self.causal, kept_EBS=kept_EBS)
        y_EBSC = ((out_EBSD * gate_EBS[..., None]).flatten(1, 2) @ self.out).unflatten(1, position_EBS.shape[1:])
        return tokens.scatter_add(y_EBSC, position_EBS, x_BNC.shape[1])

    def mix(self, x_BNC: Tensor, values_BENF: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """The heads' weights on `x_BNC`, gate included, applied to given values; (B, E, N, F)."""
        position_EBS, gate_EBS, kept_EBS = self._choice_in_order(x_BNC, real_BN)
        q_EBSD, k_EBSD, _ = self._project(x_BNC, position_EBS)
        slots_EBSF = position_EBS[..., None].expand(*position_EBS.shape, values_BENF.shape[-1])
        values_EBNF = values_BENF.transpose(0, 1)
        v_EBSF = values_EBNF.gather(2, slots_EBSF)
        out_EBSF = attend_chosen(q_EBSD, k_EBSD, v_EBSF, causal=self.causal, kept_EBS=kept_EBS) * gate_EBS[..., None]
        out_EBNF = values_BENF.new_zeros(values_EBNF.shape).scatter_add(2, slots_EBSF, out_EBSF)
        return out_EBNF.transpose(0, 1)

    def _choice_in_order(self, x_BNC: Tensor, real_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        position_EBS, gate_EBS, kept_BS = self.route(x_BNC, real_BN)
        position_EBS, slot_EBS = tokens.in_order(position_EBS, kept_BS)
        kept_EBS = None if kept_BS is None else kept_BS.expand_as(slot_EBS).gather(-1, slot_EBS)
        return position_EBS, gate_EBS.gather(-1, slot_EBS), kept_EBS

    def _project(self, x_BNC: Tensor, position_EBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(tokens.gather(x_BNC, position_EBS), position_EBS)

    def _heads(self, chosen_EBSC: Tensor, position_EBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_EBSD = (chosen_EBSC.flatten(1, 2) @ self.qkv).unflatten(1, position_EBS.shape[1:])
        q_EBSD, k_EBSD, v_EBSD = qkv_EBSD.chunk(3, -1)
        q_EBSD, k_EBSD = (rotate(t, position_EBS, base=self.rope_base, channels=self.rotated) for t in (q_EBSD, k_EBSD))
        return q_EBSD, k_EBSD, v_EBSD

    def step(self, x_B1C: Tensor, cache: MoSACache, real_B: Tensor | None) -> Tensor:
        """One more token, against the best tokens so far; (B, 1, C)."""
        assert cache.scores is not None and cache.keys is not None and cache.values is not None
        position_EB1 = torch.full((self.num_heads, x_B1C.shape[0], 1), cache.length, device=x_B1C.device)
        q_EB1D, k_EB1D, v_EB1D = self._heads(x_B1C.expand(self.num_heads, -1, -1, -1), position_EB1)
        gate_EB1 = chance_EB1 = self.scores(x_B1C)
        if self.include_first:  # a row's first real token is never put out
            chance_EB1 = torch.where((cache.scores == -math.inf).all(-1, keepdim=True), 2.0, gate_EB1)
        lowest_EB1, slot_EB1 = cache.scores.min(-1, keepdim=True)
        enters_EB1 = chance_EB1 > lowest_EB1
        if real_B is not None:
            enters_EB1 = enters_EB1 & real_B[:, None]
        cache.scores.scatter_(-1, slot_EB1, torch.where(enters_EB1, chance_EB1, lowest_EB1))
        at_EB1D = slot_EB1[..., None].expand_as(k_EB1D)
        for held, new in ((cache.keys, k_EB1D), (cache.values, v_EB1D)):
            held.scatter_(2, at_EB1D, torch.where(enters_EB1[..., None], new, held.gather(2, at_EB1D)))
        out_EB1D = attend(q_EB1D, cache.keys, cache.values, mask=(cache.scores > -math.inf)[:, :, None])
        out_EB1D = out_EB1D * (gate_EB1 * enters_EB1).to(out_EB1D.dtype)[..., None]
        return (out_EB1D.flatten(1, 2) @ self.out).sum(0)[:, None]


class OtherHeads(nn.Module):
    """H dense heads, or local ones with a window: x (B, N, C) -> (B, N, C). Arguments are `MoSA`'s."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        window: int | None = None,
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.causal, self.window = num_heads, head_dim, causal, window
        self.rope_base = rope_base if window is None else 10000.0
        self.rotated = 2 * math.floor((rotate_fraction if window is None else 1.0) * head_dim / 2)
        self.qkv = nn.Linear(dim, 3 * head_dim * num_heads, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(
        self, x_BNC: Tensor, real_BM: Tensor | None = None, cache: KVCache | RecentKeys | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        q_BHND, k_BHMD, v_BHMD = self._project(x_BNC, start)
        if cache is not None:
            k_BHMD, v_BHMD = cache.append(k_BHMD, v_BHMD)
            forgotten = cache.length - k_BHMD.shape[2]
            start -= forgotten
            real_BM = None if real_BM is None else real_BM[:, forgotten:]
        out_BHND = attend(q_BHND, k_BHMD, v_BHMD, mask=self._mask(q_BHND, k_BHMD, real_BM, start))
        return self.out(out_BHND.transpose(1, 2).flatten(2))

    def mix(self, x_BNC: Tensor, values_BHNF: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """The heads' weights on `x_BNC`, applied to given values; (B, H, N, F)."""
        q_BHND, k_BHND, _ = self._project(x_BNC, 0)
        return attend(q_BHND, k_BHND, values_BHNF, mask=self._mask(q_BHND, k_BHND, real_BN, 0))

    def _project(self, x_BNC: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        # head by head [Q, K, V], the authors' layout
        qkv_BHND = self.qkv(x_BNC).unflatten(-1, (self.num_heads, 3 * self.head_dim)).transpose(1, 2)
        q_BHND, k_BHND, v_BHND = qkv_BHND.chunk(3, -1)
        position_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
        q_BHND, k_BHND = (rotate(t, position_N, base=self.rope_base, channels=self.rotated) for t in (q_BHND, k_BHND))
        return q_BHND, k_BHND, v_BHND

    def _mask(self, q_BHND: Tensor, k_BHMD: Tensor, real_BM: Tensor | None, start: int) -> Mask | None:
        mask = masks.causal(start) if self.causal else None
        if mask is not None and self.window is not None:
            mask = mask & _buckets(q_BHND.shape[2], k_BHMD.shape[2], self.window, start, q_BHND.device)
        if real_BM is not None:
            mask = masks.padding(real_BM) if mask is None else mask & masks.padding(real_BM)
        return mask


def _buckets(queries: int, keys: int, window: int, start: int, device: torch.device) -> Mask:
    """A bucket of `window` tokens sees itself and the one before (with the causal mask); query 0 stands at `start`."""
    if start % window == 0:
        query = torch.arange(start // window, start // window + math.ceil(queries / window), device=device)
        key = torch.arange(math.ceil(keys / window), device=device)
        return masks.blocks((query[:, None] - key <= 1), window)
    query = (start + torch.arange(queries, device=device)) // window
    key = torch.arange(keys, device=device) // window
    return masks.dense((query[:, None] - key <= 1)[None, None])


class RecentKeys:
    """Keys and values that local heads may still see: of the bucket of the next query and the one before.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, window: int) -> None:
        self.window, self.length, self._forgotten = window, 0, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns the keys and values from the first that the new tokens see to the last."""
        new = (k_BHND.detach(), v_BHND.detach())
        if self._held is not None:
            first = max(0, (self.length // self.window - 1) * self.window) - self._forgotten
            old = self._held
            new = (torch.cat([old[0][:, :, first:], new[0]], 2), torch.cat([old[1][:, :, first:], new[1]], 2))
            self._forgotten += first
        self._held = new
        self.length += k_BHND.shape[2]
        return new

    @property
    def nbytes(self) -> int:
        return 0 if self._held is None else sum(part.numel() * part.element_size() for part in self._held)


class MoSACache:
    """What `MoSA` keeps while it decodes: per sparse head its best tokens so far, and the other heads' keys.

    Attributes:
        length: tokens seen.
        scores, keys, values: (E, B, k) with -inf where a slot is empty, (E, B, k, D) each.
    """

    def __init__(self, slots: int, window: int | None) -> None:
        self.slots, self.length = slots, 0
        self.scores: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.other: KVCache | RecentKeys = KVCache() if window is None else RecentKeys(window)

    def fit(self, heads: SparseHeads, x_BNC: Tensor) -> None:
        """Make room for the sequences of `x_BNC` at the first call."""
        if self.keys is None:
            shape = (heads.num_heads, x_BNC.shape[0], self.slots)
            gate_dtype = torch.promote_types(x_BNC.dtype, torch.float32)
            self.scores = torch.full(shape, -math.inf, dtype=gate_dtype, device=x_BNC.device)
            self.keys, self.values = x_BNC.new_zeros(*shape, heads.head_dim), x_BNC.new_zeros(*shape, heads.head_dim)
        if self.keys.shape[1] != x_BNC.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} sequences, got {x_BNC.shape[0]}")

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scores held."""
        sparse = [t for t in (self.scores, self.keys, self.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in sparse) + self.other.nbytes


class MoSA(nn.Module):
    """Sparse expert-choice heads plus dense or local heads, outputs summed; see the module's docstring.

    Args:
        dim: channels C.
        num_heads: all heads, sparse and other.
        causal: attention by position; the choice of tokens is never causal (see the module's docstring).
        num_other_heads: dense (or local) heads among them; num_heads // 2 where None, 0 is the pure layer.
        sparsity: rho; a head picks N // rho tokens, at least 2.
        window: makes the other heads local, in buckets of this many tokens (causal only).
        routing: "learned", or "fixed": the baseline of every rho-th token without router and gate.
        include_first: every head picks the first token.
        head_dim: D, dim / num_heads where None.
        rotate_fraction: share of D that is rotated, 0 to 1.
        rope_base: base of the rotation.
        max_length: longest sequence that `new_cache` is for.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        num_other_heads: int | None = None,
        sparsity: int = 16,
        window: int | None = None,
        routing: Literal["learned", "fixed"] = "learned",
        include_first: bool = False,
        head_dim: int | None = None,
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        num_other_heads = num_heads // 2 if num_other_heads is None else num_other_heads
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim and num_heads must be positive, got {dim} and {num_heads}")
        if not 0 <= num_other_heads <= num_heads:
            raise ValueError(f"num_other_heads must be between 0 and num_heads ({num_heads}), got {num_other_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}) where head_dim is not given, got {num_heads}")
        head_dim = dim // num_heads if head_dim is None else head_dim
        if head_dim < 1 or sparsity < 1:
            raise ValueError(f"head_dim and sparsity must be positive, got {head_dim} and {sparsity}")
        if not 0 <= rotate_fraction <= 1:
            raise ValueError(f"rotate_fraction must be between 0 and 1, got {rotate_fraction}")
        if routing not in ("learned", "fixed"):
            raise ValueError(f"routing must be 'learned' or 'fixed', got {routing!r}")
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"window must be positive and the layer causal, got window={window}, causal={causal}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.dim, self.num_heads, self.causal, self.sparsity = dim, num_heads, causal, sparsity
        self.head_dim, self.max_length = head_dim, max_length
        self.num_sparse_heads, self.num_other_heads = num_heads - num_other_heads, num_other_heads
        self.sparse = self.other = None
        if self.num_sparse_heads:
            self.sparse = SparseHeads(
                dim,
                self.num_sparse_heads,
                head_dim,
                sparsity=sparsity,
                causal=causal,
                routing=routing,
                include_first=include_first,
                rotate_fraction=rotate_fraction,
                rope_base=rope_base,
            )
        if num_other_heads:
            self.other = OtherHeads(
                dim,
                num_other_heads,
                head_dim,
                causal=causal,
                window=window,
                rotate_fraction=rotate_fraction,
                rope_base=rope_base,
            )

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: MoSACache | None = None,
    ) -> Tensor:
        """The layer's output (B, N, C).

        Args:
            mask: bool (B, N), True = real token; with a cache (B, all tokens so far).
            cache: of `new_cache`; consumes a prompt or a token, without gradients.

        Raises:
            ValueError: if the arguments do not fit; a context is not supported.
        """
        if context_BMC is not None:
            raise ValueError("MoSA attends within one sequence: context must be None")
        real_BM = self._real_tokens(x_BNC, mask, 0 if cache is None else cache.length)
        if cache is not None:
            return self._decode(x_BNC, real_BM, cache)
        parts = [heads(x_BNC, real_BM) for heads in (self.sparse, self.other) if heads is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @torch.no_grad()
    def _decode(self, x_BNC: Tensor, mask_BM: Tensor | None, cache: MoSACache) -> Tensor:
        if not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
        out_BNC = torch.zeros_like(x_BNC) if self.other is None else self.other(x_BNC, mask_BM, cache.other)
        if self.sparse is not None:
            cache.fit(self.sparse, x_BNC)
            # token by token: who is kept when a token comes is the rule itself
            for n in range(x_BNC.shape[1]):
                real_B = None if mask_BM is None else mask_BM[:, cache.length]
                out_BNC[:, n : n + 1] += self.sparse.step(x_BNC[:, n : n + 1], cache, real_B)
                cache.length += 1
        else:
            cache.length += x_BNC.shape[1]
        return out_BNC

    def new_cache(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> MoSACache:
        """An empty cache for up to `max_length` tokens (the constructor's where None), k = max_length // sparsity.

        Raises:
            ValueError: if no max_length is given, or the routing is fixed.
        """
        max_length = self.max_length if max_length is None else max_length
        if max_length is None or max_length < 1:
            raise ValueError(f"decoding needs max_length, here or in the constructor, to know k; got {max_length}")
        if self.sparse is not None and self.sparse.router is None:
            raise ValueError("decoding needs routing='learned', got 'fixed'")
        return MoSACache(max(max_length // self.sparsity, 2), None if self.other is None else self.other.window)

    def mix(self, x_BNC: Tensor, values_BHNF: Tensor, *, mask: GivenMask = None) -> Tensor:
        """This layer's weights on `x_BNC` (gates included), applied to given values (B, H, N, F); sparse heads first.

        What `attention_map` calls; H is `num_heads`.
        """
        real_BN = self._real_tokens(x_BNC, mask, 0)
        parts_BHNF = values_BHNF.split([self.num_sparse_heads, self.num_other_heads], 1)
        return torch.cat(
            [
                heads.mix(x_BNC, part_BHNF, real_BN)
                for heads, part_BHNF in zip((self.sparse, self.other), parts_BHNF, strict=True)
                if heads is not None
            ],
            1,
        )

    def flops(self, length: int) -> int:
        """Multiplications and additions of a forward pass over `length` tokens, as the paper counts them.

        A dense head: 8 C D N + 4 D N^2; a local one: 8 C D N + 8 D N w; a sparse one: 8 C D k + 4 D k^2, and for
        the router 2 C N + D k.
        """
        C, D, N, k = self.dim, self.head_dim, length, budget(length, self.sparsity)
        sparse = 8 * C * D * k + 4 * D * k * k
        if self.sparse is not None and self.sparse.router is not None:
            sparse += 2 * C * N + D * k
        seen = N if self.other is None or self.other.window is None else min(N, 2 * self.other.window)
        return self.num_sparse_heads * sparse + self.num_other_heads * (8 * C * D * N + 4 * D * N * seen)

    def cached_pairs(self, length: int) -> int:
        """Key-value pairs kept for `length` tokens: k for a sparse head, N for a dense one, 2 w for a local one."""
        k = max(length // self.sparsity, 2)
        seen = length if self.other is None or self.other.window is None else min(length, 2 * self.other.window)
        return self.num_sparse_heads * k + self.num_other_heads * seen

    def extra_repr(self) -> str:
        return (
            f"{self.num_sparse_heads} sparse heads, {self.num_other_heads} other, sparsity={self.sparsity}, "
            f"causal={self.causal}"
        )

    def _real_tokens(self, x_BNC: Tensor, mask: GivenMask, start: int) -> Tensor | None:
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        B, N = x_BNC.shape[:2]
        pattern = Pattern.of(mask, B, N, start + N, causal=self.causal, offset=start)
        return pattern.only(("padding",), "MoSA").real_keys(B)
