"""The dual attention transformer as a language model.

Shape letters: B batch, N tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from saccade.attention.relational.layers import (
    DualAttention,
    DualCache,
    RelationalAttention,
    SensoryAttention,
    retrieve,
)
from saccade.attention.relational.operator import ACTIVATIONS
from saccade.attention.relational.symbols import RETRIEVERS
from saccade.layers.initialization import start_language_model
from saccade.layers.mlp import MLP, GatedMLP
from saccade.ops.masks import Mask

#: the norms that the authors' blocks know
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": lambda dim: nn.RMSNorm(dim, eps=1e-5),
    "none": lambda dim: nn.Identity(),
}


class DualAttentionBlock(nn.Module):
    """x + attention(norm1(x), s), x + mlp(norm2(x)); with `norm_first=False` norm1(x + ..), norm2(x + ..).

    Args:
        dim, num_heads, causal: as in `DualAttention`.
        hidden, activation: of the feed-forward layer; "swiglu" or a name of `ACTIVATIONS`.
        norm_first: norms before the branches; False: after the sums.
        norm: a name of `NORMS`.
        dropout: of the outputs of both branches, and of norm1 where it comes after the sum.
        **attention: `DualAttention`'s; its symbols come from outside.

    Raises:
        ValueError: if the norm or the activation is unknown, or `DualAttention` refuses an argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        norm_first: bool = True,
        norm: str = "layer",
        dropout: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.norm_first = norm_first
        self.norm1, self.norm2, self.dropout = NORMS[norm](dim), NORMS[norm](dim), nn.Dropout(dropout)
        self.attention = DualAttention(dim, num_heads, causal, symbols=None, dropout=dropout, **attention)
        self.mlp = _feed_forward(dim, hidden, activation)

    def forward(
        self, x_BNC: Tensor, symbols: Tensor | None, *, mask: Tensor | Mask | None = None, cache: Any = None
    ) -> Tensor:
        if self.norm_first:
            x_BNC = x_BNC + self.attention(self.norm1(x_BNC), symbols=symbols, mask=mask, cache=cache)
            return x_BNC + self.dropout(self.mlp(self.norm2(x_BNC)))
        x_BNC = self.dropout(self.norm1(x_BNC + self.attention(x_BNC, symbols=symbols, mask=mask, cache=cache)))
        return self.norm2(x_BNC + self.dropout(self.mlp(x_BNC)))


def _feed_forward(dim: int, hidden: int | None, activation: str) -> MLP | GatedMLP:
    if activation == "swiglu":
        return GatedMLP(dim, hidden, bias=True)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be swiglu, {', '.join(ACTIVATIONS)}, got {activation!r}")
    # the authors' GELU is by tanh
    return MLP(dim, hidden, activation="gelu-tanh" if activation == "gelu" else activation)


class DualAttentionLM(nn.Module):
    """The paper's causal language model: in each layer symbols = retriever(x), x = block(x, symbols).

    The head's matrix is that of the token embedding.

    Args:
        vocab, dim, num_layers, num_heads, relational_heads: sizes; `num_heads` counts both kinds.
        symbols, symbol_options: the retriever, as in `DualAttention`.
        shared_symbols: one retriever for all layers (the default), or one for each.
        rope: rotary positions in every layer; False: learned ones, added to the embedding.
        max_length: learned positions for so many tokens where not `rope`.
        activation, dropout: of the blocks, see `DualAttentionBlock`.
        **block: `DualAttentionBlock`'s.

    Raises:
        ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        relational_heads: int,
        *,
        symbols: str = "symbolic",
        symbol_options: dict[str, Any] | None = None,
        shared_symbols: bool = True,
        rope: bool = True,
        max_length: int = 2048,
        activation: str = "swiglu",
        dropout: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        if symbols not in RETRIEVERS:
            raise ValueError(f"symbols must be one of {', '.join(RETRIEVERS)}, got {symbols!r}")
        self.token_embedding = nn.Embedding(vocab, dim)
        self.position_embedding = None if rope else nn.Embedding(max_length, dim)
        options = {**({"causal": True} if symbols == "relational" else {}), **(symbol_options or {})}
        if symbols == "relational" and not options["causal"]:
            raise ValueError("a causal model needs symbols that look to the left, got causal=False")
        count = 0 if not relational_heads else 1 if shared_symbols else num_layers
        made = [RETRIEVERS[symbols](dim, **options) for _ in range(count)]
        self.retrievers = nn.ModuleList(made[layer % count] for layer in range(num_layers if count else 0))
        self.blocks = nn.ModuleList(
            DualAttentionBlock(
                dim,
                num_heads,
                True,
                relational_heads=relational_heads,
                rope=rope,
                activation=activation,
                dropout=dropout,
                **block,
            )
            for _ in range(num_layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialise(num_layers)

    def forward(self, ids_BN: Tensor, caches: Sequence[DualCache] | None = None) -> Tensor:
        """Logits (B, N, V); with `caches` of `new_caches`, `ids_BN` continue what they have seen."""
        start = caches[0].length if caches else 0
        x_BNC = self.token_embedding(ids_BN)
        if self.position_embedding is not None:
            x_BNC = x_BNC + self.position_embedding.weight[start : start + ids_BN.shape[1]]
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            symbols = retrieve(self.retrievers[layer], x_BNC, start, cache) if self.retrievers else None
            x_BNC = block(x_BNC, symbols, cache=cache)
        return self.head(self.norm(x_BNC))

    def new_caches(self) -> list[DualCache]:
        """An empty cache for each layer."""
        return [DualCache() for _ in self.blocks]

    def _initialise(self, num_layers: int) -> None:
        last = 0.02 / math.sqrt(2 * num_layers)
        self.apply(start_language_model)
        for module in self.modules():
            if isinstance(module, RelationalAttention):
                nn.init.normal_(module.relation_weights, std=0.02)
            if isinstance(module, SensoryAttention):
                nn.init.normal_(module.out_proj.weight, std=last)
            if isinstance(module, (MLP, GatedMLP)):
                down = module.fc2 if isinstance(module, MLP) else module.down_proj
                nn.init.normal_(down.weight, std=last)
