"""LLaMA's blocks (Touvron et al., arXiv 2302.13971), with any attention in them, and the language model made of them.

    u = x + attention(norm(x)),      y = u + W_down (silu(W_gate norm(u)) * W_up norm(u)),      norm(x) = w x / rms(x)

Parameters have transformers' names, but for the attention's `out_proj`, which is `o_proj` there: `from_transformers`.
Rotary positions turn channel i with channel i + D/2, as in transformers; weights of LLaMA's own release turn neighbours
and come here through `split_halves`.

Shape letters: B batch, N tokens, M keys, C channels, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.cache import LayerCaches
from saccade.layers.mlp import GatedMLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import GivenMask

__all__ = ["Llama", "LlamaAttention", "LlamaBlock", "LlamaLM", "from_transformers", "split_halves"]


class LlamaAttention(SoftmaxAttention):
    """`SoftmaxAttention`, causal unless told otherwise; a call may give the positions of its tokens.

    Args:
        dim, num_heads, causal: as there, and so are all others.
    """

    def __init__(self, dim: int, num_heads: int = 8, causal: bool = True, **arguments: Any) -> None:
        super().__init__(dim, num_heads, causal, **arguments)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `QKVAttention.forward`.

        Args:
            positions: (N,) or (B, N); where None, tokens are counted from what the cache holds.
        """
        return self.steps(x_BNC, context_BMC, mask, cache, given=positions)

    def project(
        self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None, given: Tensor | None = None
    ) -> tuple[Any, ...]:
        if positions is not None and given is not None:
            positions = given if given.ndim == 1 else given[:, None]
        return super().project(x_BNC, context_BMC, positions)


class LlamaBlock(nn.Module):
    """x (B, N, C) to the same shape. A subclass may replace `feed`, what is added after the attention.

    Args:
        attention: a module of width `dim`.
        dim: C.
        hidden: inner width of the gated MLP, 8 dim / 3 where None.
        mlp: another module in the MLP's place.
        eps: of both norms.
        input_norm: whether there is a norm before the attention.
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        hidden: int | None = None,
        *,
        mlp: nn.Module | None = None,
        eps: float = 1e-6,
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(dim, hidden) if mlp is None else mlp
        self.input_layernorm: nn.Module = nn.RMSNorm(dim, eps) if input_norm else nn.Identity()
        self.post_attention_layernorm = nn.RMSNorm(dim, eps)

    def feed(self, x_BNC: Tensor) -> Tensor:
        """What is added to the stream behind the attention."""
        return self.mlp(self.post_attention_layernorm(x_BNC))

    def forward(self, x_BNC: Tensor, **attention: Any) -> Tensor:
        """`mask`, `cache`, `positions` and what else the attention takes go to it."""
        x_BNC = x_BNC + self.self_attn(self.input_layernorm(x_BNC), **attention)
        return x_BNC + self.feed(x_BNC)


class Llama(nn.Module):
    """Blocks and a last norm over embeddings of tokens.

    Args:
        vocabulary: V.
        dim, hidden: C, and the inner width of the MLPs.
        blocks: the blocks, where they are not `layers` plain ones.
        layers: how many.
        num_heads, num_kv_heads, head_dim, rope_base: `LlamaAttention`'s.
        eps: of the norms.

    Raises:
        ValueError: if the head counts do not divide.

    >>> model = Llama(50, 32, layers=2, num_heads=4)
    >>> model(torch.randint(50, (2, 7))).shape
    torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        hidden: int | None = None,
        *,
        blocks: Sequence[nn.Module] | None = None,
        layers: int = 2,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        heads: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "rope_base": rope_base}
        if blocks is None:
            attentions = (LlamaAttention(dim, num_heads, **heads) for _ in range(layers))
            blocks = [LlamaBlock(attention, dim, hidden, eps=eps) for attention in attentions]
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.layers, self.norm = nn.ModuleList(blocks), nn.RMSNorm(dim, eps)

    def new_cache(self, batch_size: int) -> LayerCaches:
        """An empty cache for all blocks."""
        attentions: list[Any] = [block.self_attn for block in self.layers]
        return LayerCaches([attention.new_cache(batch_size) for attention in attentions])

    def forward(
        self,
        ids_BN: Tensor | None = None,
        *,
        embeds_BNC: Tensor | None = None,
        mask: GivenMask = None,
        cache: LayerCaches | None = None,
        **attention: Any,
    ) -> Tensor:
        """Last hidden states (B, N, C), normed.

        Args:
            ids_BN: tokens; or
            embeds_BNC: their embeddings.
            mask: as an attention takes it.
            cache: of `new_cache`.
            attention: what else every block takes, such as `positions`.

        Raises:
            ValueError: if not one of tokens and embeddings is given.
        """
        if (ids_BN is None) == (embeds_BNC is None):
            raise ValueError("either ids or embeds must be given")
        x_BNC = self.embed_tokens(ids_BN) if embeds_BNC is None else embeds_BNC
        for number, block in enumerate(self.layers):
            x_BNC = block(x_BNC, mask=mask, cache=None if cache is None else cache.layers[number], **attention)
        if cache is not None:
            cache.length += x_BNC.shape[1]
        return self.norm(x_BNC)


class LlamaLM(nn.Module):
    """`Llama` with a head: logits (B, N, V) of the next token.

    Args:
        model: the blocks.
        tied: the head has the embedding's weights.
    """

    def __init__(self, model: Llama, *, tied: bool = False) -> None:
        super().__init__()
        self.model = model
        self.lm_head = nn.Linear(model.embed_tokens.embedding_dim, model.embed_tokens.num_embeddings, bias=False)
        if tied:
            self.lm_head.weight = model.embed_tokens.weight

    def forward(self, ids_BN: Tensor | None = None, **inputs: Any) -> Tensor:
        """Arguments are `Llama.forward`'s."""
        return self.lm_head(self.model(ids_BN, **inputs))


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' Llama (or of any part of it) under the names that it has here.

    Args:
        state: by transformers' names.
    """
    return {name.replace("self_attn.o_proj.", "self_attn.out_proj."): tensor for name, tensor in state.items()}


def split_halves(weight: Tensor, num_heads: int) -> Tensor:
    """W_q or W_k (H D, C), or a bias (H D,), whose rotary positions turn neighbours, for positions that turn halves.

    The same change of queries and keys leaves their products as they are.

    Args:
        weight: of LLaMA's own release.
        num_heads: H, of W_k the key heads.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).flatten(0, 1)
