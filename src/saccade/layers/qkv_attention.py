"""The layer around any function of (q, k, v): projections, heads, rotary positions, cache, output projection.

    q, k, v = heads(x Wq), heads(c Wk), heads(c Wv);   y = concat(attend(q, k, v)) Wo,   c = context or x

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D head dim, E width of given values.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.layers.cache import KVCache
from saccade.layers.pretrained import copy_affine, read_softmax
from saccade.ops import masks
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.rope import rotate

if TYPE_CHECKING:
    from typing_extensions import Self


class QKVAttention(nn.Module):
    """Base of the mechanisms that are a function of queries, keys and values; a subclass gives `attend`.

    Args:
        dim: channels C of input and output.
        num_heads: query heads H.
        causal: no token attends to a later one.
        num_kv_heads: key and value heads K, a divisor of H (grouped-query attention); H where None.
        head_dim: D, dim / num_heads where None.
        rope: rotary positions on queries and keys (self-attention only).
        rope_base: their base.
        qkv_bias, proj_bias: biases of the projections.

    Raises:
        ValueError: if the head counts do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim and num_heads must be positive, got {dim} and {num_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}) where head_dim is not given, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
        self.dim, self.num_heads, self.num_kv_heads, self.causal = dim, num_heads, num_kv_heads, causal
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if rope and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        self.rope, self.rope_base = rope, rope_base
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        """The mechanism. Query 0 stands at key `offset`; `mask` is the caller's, without causality."""
        raise NotImplementedError

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to itself, to `context_BMC`, or to what `cache` holds followed by itself.

        Args:
            mask: bool (B, M), True = real token; or a 4-axis bool tensor or mask object over query-key pairs. With a
                cache, M counts all tokens so far.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        self._check(x_BNC, context_BMC, cache)
        q_BHND, k_BKMD = self._queries_and_keys(x_BNC, context_BMC, 0 if cache is None else cache.length)
        v_BKMD = self._heads(self.v_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        offset = 0
        if cache is not None:
            offset = cache.length
            k_BKMD, v_BKMD = cache.append(k_BKMD, v_BKMD)
        causal = self.causal and context_BMC is None
        out = self.attend(q_BHND, k_BKMD, v_BKMD, mask=as_mask(mask, k_BKMD), causal=causal, offset=offset)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """This layer's weights on `x_BNC`, applied to given values (B, H, M, E); what `attention_map` calls."""
        q_BHND, k_BKMD = self._queries_and_keys(x_BNC, None, 0)
        k_BHMD = repeat_heads(k_BKMD, self.num_heads)
        return self.attend(q_BHND, k_BHMD, values_BHME, mask=as_mask(mask, k_BHMD), causal=self.causal, offset=0)

    @classmethod
    def from_softmax(cls, module: nn.Module, **arguments: Any) -> Self:
        """This mechanism with the projections, heads and positions of a trained softmax attention layer.

        Args:
            module: an `nn.MultiheadAttention`, a layer of this library, or one that names its projections as
                transformers and diffusers do (Llama, BERT, ViT, GPT-2 ...).
            arguments: the constructor's other arguments; they go before what the layer says of itself.

        Raises:
            ValueError: if the layer is no plain softmax attention, or has what this mechanism cannot take over.
        """
        layer = read_softmax(module)
        theirs: dict[str, Any] = {
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "rope": layer.rope,
            "rope_base": layer.rope_base,
            "qkv_bias": layer.qkv_bias,
            "proj_bias": layer.proj_bias,
        }
        if layer.causal is not None:
            theirs["causal"] = layer.causal
        accepted = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            theirs = {name: value for name, value in theirs.items() if name in accepted}
        new = cls(layer.dim, **{**theirs, **arguments})
        places = ((new.q_proj, layer.q), (new.k_proj, layer.k), (new.v_proj, layer.v), (new.out_proj, layer.out))
        for place, source in places:
            copy_affine(place, source)
        if layer.rope and not new.rope:
            raise ValueError(f"the layer has rotary positions and this {cls.__name__} has none")
        new.start_as_softmax()
        return new.to(device=layer.q[0].device, dtype=layer.q[0].dtype).train(module.training)

    def start_as_softmax(self) -> None:
        """Set what `from_softmax` does not copy so that the layer starts as its paper says; nothing here."""

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for `forward(x, cache=cache)`, which consumes a prompt, then token after token."""
        return KVCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, rope={self.rope}"

    def _queries_and_keys(self, x_BNC: Tensor, context_BMC: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        q_BHND = self._heads(self.q_proj(x_BNC), self.num_heads)
        k_BKMD = self._heads(self.k_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        if self.rope and context_BMC is None:
            positions_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
            q_BHND, k_BKMD = (rotate(x, positions_N, base=self.rope_base) for x in (q_BHND, k_BKMD))
        return q_BHND, k_BKMD

    def _heads(self, x_BNC: Tensor, heads: int) -> Tensor:
        return x_BNC.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: KVCache | None) -> None:
        for name, tokens in (("x", x_BNC), ("context", context_BMC)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.dim):
                raise ValueError(f"{name} must be (batch, tokens, {self.dim}), got {tuple(tokens.shape)}")
        if context_BMC is not None and self.causal:
            raise ValueError("a causal layer takes no context")
        if context_BMC is not None and context_BMC.shape[0] != x_BNC.shape[0]:
            raise ValueError(f"x and context must have one batch size, got {x_BNC.shape[0]} and {context_BMC.shape[0]}")
        if cache is not None and not self.causal:
            raise ValueError("only a causal layer decodes with a cache")


def as_mask(mask: Tensor | Mask | None, keys_BKMD: Tensor) -> Mask | None:
    """A module's `mask` argument as a mask object: (B, M) is padding, 4 axes are pairs.

    Raises:
        ValueError: if it is neither.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a bool tensor or a mask of saccade.masks, got {type(mask).__name__}")
    if mask.ndim == 2:
        if mask.shape != (keys_BKMD.shape[0], keys_BKMD.shape[2]):
            raise ValueError(
                f"a padding mask must be (batch, keys) = {(keys_BKMD.shape[0], keys_BKMD.shape[2])}, "
                f"got {tuple(mask.shape)}"
            )
        return masks.padding(mask)
    return masks.dense(mask)
