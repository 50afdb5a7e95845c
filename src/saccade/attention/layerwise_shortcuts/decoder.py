"""The stack as a language model.

Shape letters: B batch, N tokens, S depths, C channels, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.layerwise_shortcuts.operator import Depths
from saccade.attention.layerwise_shortcuts.stack import ShortcutStack
from saccade.layers.cache import LayerCaches
from saccade.layers.initialization import start_language_model
from saccade.layers.positions import sinusoids
from saccade.ops.masks import Mask


class ShortcutDecoder(nn.Module):
    """The paper's language model: embedding, L layers of which the last has shortcuts, norm, logits.

    Args:
        vocab: V.
        dim, num_heads, layers, depths: this library's small GPT with the paper's example depths.
        positions: "rotary", "learned" or "sinusoidal"; the last two are added to h_0 only.
        max_length: how many positions are learned.
        stack: `ShortcutStack`'s other arguments.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        num_heads: int = 8,
        *,
        layers: int = 10,
        depths: Depths = (2, 4, 8),
        positions: Literal["rotary", "learned", "sinusoidal"] = "rotary",
        max_length: int = 1024,
        **stack: Any,
    ) -> None:
        super().__init__()
        if vocab < 1:
            raise ValueError(f"vocab must be positive, got {vocab}")
        if positions not in ("rotary", "learned", "sinusoidal"):
            raise ValueError(f"positions must be 'rotary', 'learned' or 'sinusoidal', got {positions!r}")
        self.positions = positions
        self.embedding = nn.Embedding(vocab, dim)
        self.place = nn.Embedding(max_length, dim) if positions == "learned" else None
        self.stack = ShortcutStack(
            dim, num_heads, layers=layers, depths=depths, rope=positions == "rotary", causal=True, **stack
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)
        for module in (self.embedding, self.place, self.head):
            if module is not None:
                start_language_model(module)

    def forward(
        self, tokens_BN: Tensor, *, mask: Tensor | Mask | None = None, cache: LayerCaches | None = None
    ) -> Tensor:
        """Logits of the next token, (B, N, V); `tokens_BN` continue what `cache` has seen.

        Raises:
            ValueError: if the arguments do not fit together, or there are more tokens than learned positions.
        """
        x_BNC = self.stack(self._embed(tokens_BN, 0 if cache is None else cache.length), mask=mask, cache=cache)
        return self.head(self.norm(x_BNC))

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerCaches:
        """Empty caches for `forward(tokens, cache=cache)`."""
        return self.stack.new_cache(batch_size, device=device, dtype=dtype)

    def depth_shares(self, tokens_BN: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """Which depths the last layer reads at each token, (B, H, N, S), in the order of `stack.depths`."""
        return self.stack.depth_shares(self._embed(tokens_BN, 0), mask=mask)

    def _embed(self, tokens_BN: Tensor, start: int) -> Tensor:
        if tokens_BN.ndim != 2:
            raise ValueError(f"tokens must be (batch, tokens), got {tuple(tokens_BN.shape)}")
        x_BNC = self.embedding(tokens_BN)
        positions_N = torch.arange(start, start + tokens_BN.shape[1], device=tokens_BN.device)
        if self.place is not None:
            if start + tokens_BN.shape[1] > self.place.num_embeddings:
                raise ValueError(f"there are {self.place.num_embeddings} positions, got {start + tokens_BN.shape[1]}")
            x_BNC = x_BNC + self.place(positions_N)
        if self.positions == "sinusoidal":
            x_BNC = x_BNC + sinusoids(positions_N, x_BNC.shape[-1]).to(x_BNC.dtype)
        return x_BNC
