"""The feed-forward network with its norm, and the block of both.

Shape letters: B batch, N tokens, M tokens of a context, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.attention.mega.attention import ACTIVATIONS, MegaAttention, MegaCache, Norm, check_names, sizes_of
from saccade.attention.mega.cross_attention import MegaCrossAttention
from saccade.attention.mega.norms import Dropout, norm_of
from saccade.layers.initialization import start_language_model


class NormalizedFeedForward(nn.Module):
    """y = x + W2 f(W1 norm(x)), or norm(x + W2 f(W1 x)) where not prenorm.

    Args:
        dim, hidden_dim: widths of x and of W1 x.
        norm, prenorm, activation, feature_dropout: `MegaAttention`'s.
        dropout: of the hidden channels and of the output.

    Raises:
        ValueError: if a width is not positive or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        norm: Norm | None = "layer",
        prenorm: bool = True,
        activation: str = "silu",
        dropout: float = 0.0,
        feature_dropout: bool = False,
    ) -> None:
        super().__init__()
        check_names(dim, 1, 1, hidden_dim, "softmax", activation)
        self.prenorm, self.activation = prenorm, activation
        self.dropout = Dropout(dropout, feature_dropout)
        self.norm = norm_of(norm, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.apply(start_language_model)

    def forward(self, x_BNC: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.fc1(self.norm(x_BNC) if self.prenorm else x_BNC))
        y_BNC = x_BNC + self.dropout(self.fc2(self.dropout(hidden)))
        return y_BNC if self.prenorm else self.norm(y_BNC)


class MegaBlock(nn.Module):
    """A Mega layer, gated cross-attention where there is a context, and the normalised feed-forward network.

    Args:
        dim, num_heads, causal: and what else `MegaAttention` takes.
        ffn_dim: hidden width, twice dim where None.
        cross: with cross-attention, for a decoder.
    """

    #: the card's table: the layers of each published model. Path-X's batch norm is synchronised; batch norm over
    #: several processes is `nn.SyncBatchNorm.convert_sync_batchnorm`'s
    CONFIGS: dict[str, dict[str, Any]] = {
        "listops": sizes_of(80, 64, prenorm=False),
        "text": sizes_of(128, 64, prenorm=False, norm="scale"),
        "retrieval": sizes_of(128, 64, prenorm=False, norm="scale"),
        "image": sizes_of(160, 96, norm="batch", attention="laplace"),
        "pathfinder": sizes_of(128, 64, norm="batch", attention="laplace"),
        "path-x": sizes_of(64, 32, norm="batch", attention="laplace", truncation=4096),
        "wmt-base": sizes_of(512, 128, prenorm=False),
        "wmt-big": sizes_of(1024, 256, prenorm=False),
        "wikitext-103": sizes_of(1024, 256, causal=True, chunk_size=1024),
        "enwik8": sizes_of(512, 128, causal=True, chunk_size=2048),
    }

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        causal: bool = False,
        *,
        ffn_dim: int | None = None,
        cross: bool = False,
        **layer: Any,
    ) -> None:
        super().__init__()
        self.attention = MegaAttention(dim, num_heads, causal, **layer)
        own = ("ema_dim", "value_dim", "chunk_size", "truncation")
        self.cross = None
        if cross:
            shared = {name: value for name, value in layer.items() if name not in own}
            self.cross = MegaCrossAttention(dim, num_heads, **shared)
        names = ("norm", "prenorm", "activation", "dropout", "feature_dropout")
        self.ffn = NormalizedFeedForward(
            dim, 2 * dim if ffn_dim is None else ffn_dim, **{name: layer[name] for name in names if name in layer}
        )

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> MegaBlock:
        """The layer of a published model; `changes` override its arguments.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in cls.CONFIGS:
            raise ValueError(f"config must be one of {', '.join(cls.CONFIGS)}, got {name!r}")
        return cls(**{**cls.CONFIGS[name], **changes})

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: MegaCache | None = None,
    ) -> Tensor:
        """The block's output (B, N, C) for `x_BNC`, which continues what `cache` has seen.

        Args:
            mask, context_mask: bool (B, N) and (B, M), True = real token; with a cache N counts all tokens so far.
            cache: of `new_cache`.

        Raises:
            ValueError: if a context is given to a block without cross-attention, or none to one with it.
        """
        if (context_BMC is None) != (self.cross is None):
            raise ValueError(f"a context must be given if and only if cross=True, got {context_BMC is not None}")
        start = 0 if cache is None else cache.length
        x_BNC = self.attention(x_BNC, mask=mask, cache=cache)
        if self.cross is not None:
            x_BNC = self.cross(x_BNC, context_BMC, mask=context_mask, start=start)
        return self.ffn(x_BNC)

    def new_cache(self, batch_size: int, **options: Any) -> MegaCache:
        return self.attention.new_cache(batch_size, **options)
