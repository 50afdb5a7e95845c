"""Heads that choose their tokens: each takes the k of greatest score, and attends among them alone.

Shape letters: B batch, N tokens, C channels, E sparse heads, S slots (k), D head dim, F width of given values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from saccade.attention.mosa.other_heads import RecentKeys
from saccade.layers.cache import KVCache
from saccade.ops import masks, tokens
from saccade.ops.attend import attend
from saccade.ops.rope import rotate


def budget(length: int, sparsity: int) -> int:
    """k, the tokens that a head picks: floor(length / sparsity), at least 2, at most all.

    Args:
        length: N.
        sparsity: rho.
    """
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

    Parameters have the authors' layout: qkv (E, C, 3 D) with thirds Q, K, V, out (E, D, C).

    Args:
        dim, num_heads, head_dim: C, E and D.
        sparsity, causal, routing, include_first, rotate_fraction, rope_base: `MoSA`'s.
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


class MoSACache:
    """What `MoSA` keeps while it decodes: per sparse head its best tokens so far, and the other heads' keys.

    Args:
        slots: k.
        window: of local other heads; None where they are dense.

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
