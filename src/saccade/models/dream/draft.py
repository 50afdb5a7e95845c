"""The draft: three small layers between a target model's own embedding and its own head.

Shape letters: B batch, T tokens, S features of the target, Q queries, K keys, D channels, H heads, G key heads,
E head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.cache import KVCache
from saccade.layers.llama import LlamaAttention, LlamaBlock
from saccade.layers.mlp import GatedMLP
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.masks import Mask

__all__ = ["DraftCache", "DraftOutput", "DreamDraft", "FeatureAttention", "FeatureBlock"]


@dataclass
class DraftOutput:
    """What the draft says.

    Attributes:
        hidden: normed, to be read by the target's head (B, T, D); it imitates the target's last hidden states.
        mid: behind the first layer (B, T, D); it imitates an intermediate feature of the target.
    """

    hidden: Tensor
    mid: Tensor


@dataclass
class DraftCache:
    """What the three layers keep: the features' keys lag behind the tokens' by one.

    Attributes:
        first, features, last: of each layer.
    """

    first: KVCache = field(default_factory=KVCache)
    features: KVCache = field(default_factory=KVCache)
    last: KVCache = field(default_factory=KVCache)

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.first.length

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return self.first.nbytes + self.features.nbytes + self.last.nbytes

    def crop(self, length: int) -> None:
        """Forget what came behind the first `length` tokens and their features."""
        self.first.crop(length)
        self.last.crop(length)
        self.features.crop(min(self.features.length, length - 1))


class FeatureAttention(nn.Module):
    """From draft tokens to the target's features, without positions; queries and keys are normed head by head.

        y = softmax(norm(W_q x) norm(W_k f)^T / sqrt(E) + M) W_v f

    Args:
        dim: D.
        num_heads, num_kv_heads: H, G.
        eps: of the norms.
        strict: a query that may read no feature gives zeros; else, as the authors' code does, the mean of all values.

    Raises:
        ValueError: if the head counts do not divide.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int | None = None, *, eps: float = 1e-6, strict: bool = False
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % num_heads or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must divide dim ({dim}) and num_kv_heads num_heads, got {num_heads} and {num_kv_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim, self.strict = (
            num_heads,
            num_kv_heads,
            dim // num_heads,
            strict,
        )
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(dim, num_kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, eps), nn.RMSNorm(self.head_dim, eps)

    def forward(
        self, x_BQD: Tensor, features_BSD: Tensor, *, mask: Mask | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, Q, D). Without a mask query r reads keys 0 .. K - Q + r of those that the cache holds and the new ones.

        Args:
            mask: of queries and all keys.
            cache: of the features' keys and values.
        """
        q_BHQE = self.q_norm(self.q_proj(x_BQD).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)
        k_BGSE, v_BGSE = (
            f(features_BSD).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
            for f in (self.k_proj, self.v_proj)
        )
        k_BGKE, v_BGKE = self.k_norm(k_BGSE), v_BGSE
        if cache is not None:
            k_BGKE, v_BGKE = cache.append(k_BGKE, v_BGKE)
        queries, keys = x_BQD.shape[1], k_BGKE.shape[2]
        sees = masks.causal(keys - queries) if mask is None else mask
        out_BHQE = attend(q_BHQE, k_BGKE, v_BGKE, mask=sees)
        if mask is None and 0 < keys < queries and not self.strict:
            # an additive mask of one finite number is no mask: the softmax over a row of it is uniform
            mean_BH1E = v_BGKE.mean(2, keepdim=True).repeat_interleave(self.num_heads // self.num_kv_heads, 1)
            blind = queries - keys
            out_BHQE = torch.cat([mean_BH1E.expand(-1, -1, blind, -1), out_BHQE[:, :, blind:]], 2)
        return self.o_proj(out_BHQE.transpose(1, 2).flatten(2))


class FeatureBlock(nn.Module):
    """Gated cross-attention to the target's features: at gates of 0, as it starts, nothing but its input.

        u = x + tanh(g_attn) attention(norm(x), f),     y = u + tanh(g_mlp) mlp(norm(u))

    Args:
        dim, hidden: D, and the inner width of the MLP.
        num_heads, num_kv_heads, eps, strict: `FeatureAttention`'s.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        eps: float = 1e-6,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.cross_attn = FeatureAttention(dim, num_heads, num_kv_heads, eps=eps, strict=strict)
        self.mlp = GatedMLP(dim, hidden)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.cross_attn_attn_gate, self.cross_attn_mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x_BQD: Tensor, features_BSD: Tensor, **attention: Any) -> Tensor:
        """(B, Q, D); `mask` and `cache` are the attention's."""
        attended = self.cross_attn(self.input_layernorm(x_BQD), features_BSD, **attention)
        x_BQD = x_BQD + self.cross_attn_attn_gate.tanh() * attended
        return x_BQD + self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x_BQD))


class DreamDraft(nn.Module):
    """Token embeddings and the target's features to hidden states that the target's head reads.

    Token i reads the features of the tokens before it; the first reads none, see `strict`.

    Args:
        dim, hidden: D and the inner width of the MLPs, the target's.
        num_heads, num_kv_heads: the target's; the key heads of all three layers.
        eps, rope_base: of the norms, and of the positions of the first and the last layer.
        strict: the first token, that no feature comes before, reads zeros. The released code has it read the mean of
            all features of the call, so that outputs depend a little on how a text is cut into calls.

    Raises:
        ValueError: if the head counts do not divide.

    >>> draft = DreamDraft(32, 48, 4)
    >>> draft(torch.randn(1, 7, 32), torch.randn(1, 6, 32)).hidden.shape
    torch.Size([1, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        eps: float = 1e-6,
        rope_base: float = 10000.0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim

        def attention() -> LlamaAttention:
            return LlamaAttention(dim, num_heads, num_kv_heads=num_kv_heads, rope_base=rope_base)

        self.first = LlamaBlock(attention(), dim, hidden, eps=eps, input_norm=False)
        self.features = FeatureBlock(dim, hidden, num_heads, num_kv_heads, eps=eps, strict=strict)
        self.last = LlamaBlock(attention(), dim, hidden, eps=eps)
        self.norm = nn.RMSNorm(dim, eps)

    def new_cache(self) -> DraftCache:
        """An empty cache of `forward`."""
        return DraftCache()

    def forward(
        self,
        inputs_embeds: Tensor,
        target_features: Tensor,
        *,
        mask: Tensor | Mask | None = None,
        feature_mask: Mask | None = None,
        positions: Tensor | None = None,
        cache: DraftCache | None = None,
    ) -> DraftOutput:
        """
        Args:
            inputs_embeds: of tokens (B, T, D); those of an image are its projected features.
            target_features: the target's last hidden states, of the tokens up to the last but one: (B, T - 1, D), and
                (B, T, D) where a cache holds earlier ones.
            mask: real tokens (B, T), or who sees whom among tokens, counted with those of the cache.
            feature_mask: which features each token reads, where that is not all before it.
            positions: (T,) or (B, T), where they do not count on.
            cache: of `new_cache`; it holds these tokens and features too afterwards.

        Raises:
            ValueError: if shapes do not fit.
        """
        tokens, features = inputs_embeds, target_features
        for name, given in (("inputs_embeds", tokens), ("target_features", features)):
            if given.ndim != 3 or given.shape[-1] != self.dim or given.shape[0] != tokens.shape[0]:
                raise ValueError(f"{name} must be (batch, tokens, {self.dim}), got {tuple(given.shape)}")
        past = cache is not None and cache.length > 0
        if features.shape[1] != tokens.shape[1] - (not past):
            raise ValueError(
                f"{tokens.shape[1]} tokens {'after others ' if past else ''}go with "
                f"{tokens.shape[1] - (not past)} target_features, got {features.shape[1]}"
            )
        caches = (None, None, None) if cache is None else (cache.first, cache.features, cache.last)
        mid = self.first(tokens, mask=mask, positions=positions, cache=caches[0])
        x_BTD = self.features(mid, features, mask=feature_mask, cache=caches[1])
        x_BTD = self.last(x_BTD, mask=mask, positions=positions, cache=caches[2])
        return DraftOutput(self.norm(x_BTD), mid)
