"""BERT: embeddings of words, positions and segments, and blocks that normalise after each branch (Devlin et al.,
arXiv 1810.04805), with an attention to something else than the text in between where there is one (BLIP, arXiv
2201.12086).

    x <- norm(x + attention(x)),    x <- norm(x + cross(x, context)),    x <- norm(x + W2 gelu(W1 x))

`BERT` is the table from transformers' names of the parameters to ours.

Shape letters: B batch, N tokens, M context tokens, C channels, E channels of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue.names import Names
from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import GivenMask

_ATTENTION = {
    "self.query.{leaf}": "q_proj.{leaf}",
    "self.key.{leaf}": "k_proj.{leaf}",
    "self.value.{leaf}": "v_proj.{leaf}",
    "output.dense.{leaf}": "out_proj.{leaf}",
}
_BLOCK = {
    **{f"attention.{theirs}": f"attention.{ours}" for theirs, ours in _ATTENTION.items()},
    "attention.output.LayerNorm.{leaf}": "attention_norm.{leaf}",
    **{f"crossattention.{theirs}": f"cross.{ours}" for theirs, ours in _ATTENTION.items()},
    "crossattention.output.LayerNorm.{leaf}": "cross_norm.{leaf}",
    "intermediate.dense.{leaf}": "mlp.fc1.{leaf}",
    "output.dense.{leaf}": "mlp.fc2.{leaf}",
    "output.LayerNorm.{leaf}": "mlp_norm.{leaf}",
}
#: transformers' names in a `BertModel` without pooler -> those in `Bert`
BERT = Names(
    {
        "embeddings.word_embeddings.weight": "embeddings.words.weight",
        "embeddings.position_embeddings.weight": "embeddings.positions.weight",
        "embeddings.token_type_embeddings.weight": "embeddings.types.weight",
        "embeddings.LayerNorm.{leaf}": "embeddings.norm.{leaf}",
        "embeddings.position_ids": None,
        **{f"encoder.layer.{{i}}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
    }
)


class BertEmbeddings(nn.Module):
    """Word ids (B, N) -> norm(word + position + segment), (B, N, C).

    Args:
        vocabulary: words.
        dim: C.
        positions: the longest text.
        types: segments; 0 has no embedding of them.
        drop: dropout at the end.
        norm_eps: of the norm.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        positions: int = 512,
        types: int = 2,
        drop: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(positions, dim)
        self.types = nn.Embedding(types, dim) if types else None
        self.norm, self.drop = nn.LayerNorm(dim, norm_eps), nn.Dropout(drop)
        for table in (self.words, self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids_BN: Tensor, types_BN: Tensor | None = None) -> Tensor:
        """`types_BN`: the segment of each word, 0 where None.

        Raises:
            ValueError: if the ids are not (B, N) with at most as many words as there are positions, or segments are
                given and there are none.
        """
        longest = self.positions.num_embeddings
        if ids_BN.ndim != 2 or ids_BN.shape[1] > longest:
            raise ValueError(f"word ids must be (batch, at most {longest} words), got {tuple(ids_BN.shape)}")
        if types_BN is not None and self.types is None:
            raise ValueError("segments are given, and this text encoder has none: build it with types=2")
        x_BNC = self.words(ids_BN) + self.positions.weight[: ids_BN.shape[1]]
        if self.types is not None:
            x_BNC = x_BNC + self.types(torch.zeros_like(ids_BN) if types_BN is None else types_BN)
        return self.drop(self.norm(x_BNC))


class CrossAttention(SoftmaxAttention):
    """Softmax attention from tokens of width `dim` to a context of width `context_dim`.

    Args:
        dim, num_heads: of `SoftmaxAttention`.
        context_dim: E.
        **arguments: of `SoftmaxAttention`.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, **arguments: Any) -> None:
        super().__init__(dim, num_heads, rope=False, **arguments)
        self.context_dim = context_dim
        bias, width = self.k_proj.bias is not None, self.k_proj.out_features
        self.k_proj, self.v_proj = (nn.Linear(context_dim, width, bias=bias) for _ in range(2))

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: object) -> None:
        super().check(x_BNC, None, cache)
        if context_BMC is None:
            raise ValueError("a cross attention needs a context, got None")
        if context_BMC.ndim != 3 or context_BMC.shape[::2] != (len(x_BNC), self.context_dim):
            expected = f"({len(x_BNC)}, tokens, {self.context_dim})"
            raise ValueError(f"context must be {expected}, got {tuple(context_BMC.shape)}")


class BertBlock(nn.Module):
    """x (B, N, C) to the same shape.

    Args:
        dim: C.
        num_heads: of each attention.
        hidden: inner width of the MLP, 4 dim where None.
        context_dim: E; None has no cross attention.
        drop: dropout of what each branch gives.
        attn_drop: dropout of the attentions' weights.
        inner_drop: dropout within the MLP, as `nn.TransformerEncoderLayer` has it and BERT not.
        norm_eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int | None = None,
        *,
        context_dim: int | None = None,
        drop: float = 0.1,
        attn_drop: float = 0.1,
        inner_drop: float = 0.0,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        biases = {"qkv_bias": True, "proj_bias": True}
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, attn_drop=attn_drop, **biases)
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.cross = None
        if context_dim is not None:
            self.cross = CrossAttention(dim, num_heads, context_dim, attn_drop=attn_drop, **biases)
        self.cross_norm = None if context_dim is None else nn.LayerNorm(dim, norm_eps)
        self.mlp, self.mlp_norm = MLP(dim, hidden, inner_drop=inner_drop), nn.LayerNorm(dim, norm_eps)
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x_BNC: Tensor,
        context_BME: Tensor | None = None,
        *,
        mask: GivenMask = None,
        context_mask: GivenMask = None,
    ) -> Tensor:
        """Without a context, a block with a cross attention is one without.

        Args:
            mask, context_mask: of the two attentions, see `QKVAttention`.

        Raises:
            ValueError: if there is a context and the block has no cross attention, or shapes do not fit.
        """
        x_BNC = self.attention_norm(x_BNC + self.drop(self.attention(x_BNC, mask=mask)))
        if context_BME is not None:
            if self.cross is None or self.cross_norm is None:
                raise ValueError("a context is given, and this text encoder has no cross attention: give context_dim")
            x_BNC = self.cross_norm(x_BNC + self.drop(self.cross(x_BNC, context_BME, mask=context_mask)))
        return self.mlp_norm(x_BNC + self.drop(self.mlp(x_BNC)))


class Bert(nn.Module):
    """Word ids (B, N) -> states (B, N, C), looking at a context (B, M, E) where one is given.

    Args:
        vocabulary: words.
        dim: C.
        depth: blocks.
        num_heads, hidden, context_dim: of a block.
        positions: the longest text.
        types: segments; 0 has no embedding of them.
        drop: dropout of embeddings, branches and attention weights.
        norm_eps: of the norms.

    Raises:
        ValueError: if a number is not positive or `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        context_dim: int | None = None,
        positions: int = 512,
        types: int = 2,
        drop: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if min(vocabulary, dim, positions) < 1 or min(depth, types) < 0:
            raise ValueError(
                "vocabulary, dim and positions must be positive, depth and types not negative, got "
                f"{vocabulary}, {dim}, {positions}, {depth} and {types}"
            )
        self.dim = dim
        self.embeddings = BertEmbeddings(
            vocabulary, dim, positions=positions, types=types, drop=drop, norm_eps=norm_eps
        )
        self.blocks = nn.ModuleList(
            BertBlock(
                dim, num_heads, hidden, context_dim=context_dim, drop=drop, attn_drop=drop, norm_eps=norm_eps
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(
        self,
        ids_BN: Tensor,
        context_BME: Tensor | None = None,
        *,
        mask: GivenMask = None,
        types: Tensor | None = None,
        context_mask: GivenMask = None,
    ) -> Tensor:
        """
        Args:
            mask: bool (B, N), True = real word, or over pairs of words.
            types: (B, N), the segment of each word.
            context_mask: bool (B, M).

        Raises:
            ValueError: if shapes do not fit, or what is given has no module here.
        """
        return self.encode(self.embeddings(ids_BN, types), context_BME, mask=mask, context_mask=context_mask)

    def encode(
        self,
        x_BNC: Tensor,
        context_BME: Tensor | None = None,
        *,
        mask: GivenMask = None,
        context_mask: GivenMask = None,
    ) -> Tensor:
        """`forward` from embeddings on, which may hold other things than words."""
        for block in self.blocks:
            x_BNC = block(x_BNC, context_BME, mask=mask, context_mask=context_mask)
        return x_BNC
