"""Blocks one on the other, of which the last has shortcuts from earlier depths.

Shape letters: B batch, N tokens, M tokens so far, S depths, L layers, C channels, H heads, E width of given values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.attention.layerwise_shortcuts.layer import DepthFeature, ShortcutAttention
from saccade.attention.layerwise_shortcuts.operator import Depths
from saccade.layers.cache import LayerCaches
from saccade.layers.initialization import start_language_model
from saccade.layers.pre_norm import PreNormBlock
from saccade.ops.masks import Mask


class ShortcutBlock(PreNormBlock):
    """The last layer: a pre-norm block whose attention is `ShortcutAttention`.

    Args:
        attention: the cross-attention to the features.
        ffn_dim: inner width of the feed-forward layer, 4 dim where None.
        before: a self-attention that comes first, as `last_layer="add"` has it; None for none.
    """

    def __init__(self, attention: ShortcutAttention, ffn_dim: int | None, before: nn.Module | None) -> None:
        super().__init__(attention, attention.dim, ffn_dim)
        self.norm0 = None if before is None else nn.LayerNorm(attention.dim)
        self.before = before

    def forward(  # type: ignore[override]
        self, x_BNC: Tensor, hidden: Sequence[Tensor], *, mask: Any = None, cache: Any = None
    ) -> Tensor:
        x_BNC = self.below(x_BNC, mask=mask, cache=None if cache is None else cache.layers[0])
        last = None if cache is None else cache.layers[1]
        return super().forward(x_BNC, hidden=hidden, mask=mask, cache=last)

    def below(self, x_BNC: Tensor, *, mask: Any = None, cache: Any = None) -> Tensor:
        """What the cross-attention is added to."""
        if self.before is None or self.norm0 is None:
            return x_BNC
        return x_BNC + self.before(self.norm0(x_BNC), mask=mask, cache=cache)


class ShortcutStack(nn.Module):
    """L layers of width `dim`, the last of them with shortcuts: tokens in, tokens out (h_L, not normalised).

    Args:
        dim, num_heads, causal: of all layers; num_kv_heads, rope: of the last and of softmax hosts.
        layers: L.
        depths: the depths that the last layer reads, 0 (the input) to L - 1; "all" for 1 to L - 1; None for an ordinary
            last layer.
        include_below, last_layer: see the paper's page.
        host: the mechanism of layers 1 to L - 1, a slug of the catalogue; host_options: its other arguments.
        ffn_dim: inner width of the feed-forward layers, 4 dim where None.
        shortcuts: `ShortcutAttention`'s other arguments.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        layers: int = 3,
        depths: Depths = "all",
        include_below: bool = True,
        last_layer: Literal["replace", "add"] = "replace",
        host: str = "softmax",
        host_options: Mapping[str, Any] | None = None,
        num_kv_heads: int | None = None,
        rope: bool = True,
        ffn_dim: int | None = None,
        **shortcuts: Any,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if last_layer not in ("replace", "add"):
            raise ValueError(f"last_layer must be 'replace' or 'add', got {last_layer!r}")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.depths = _depths(depths, layers, include_below)
        own: dict[str, Any] = {"num_kv_heads": num_kv_heads, "rope": rope}
        options = {**(own if host == "softmax" else {}), **(host_options or {})}
        hosts: list[Any] = []

        def mixer() -> nn.Module:
            hosts.append(catalogue.create(host, dim=dim, num_heads=num_heads, causal=causal, **options))
            return hosts[-1]

        ordinary = layers if self.depths is None else layers - 1
        self.blocks = nn.ModuleList(PreNormBlock(mixer(), dim, ffn_dim) for _ in range(ordinary))
        if self.depths is not None:
            attention = ShortcutAttention(dim, num_heads, causal, depths=len(self.depths), **own, **shortcuts)
            self.blocks.append(ShortcutBlock(attention, ffn_dim, mixer() if last_layer == "add" else None))
        self._start(set() if host == "softmax" else {part for each in hosts for part in each.modules()})

    def _start(self, foreign: set[nn.Module]) -> None:
        """GPT's initialisation, less of those that have their own."""
        for module in self.modules():
            if module not in foreign:
                start_language_model(module)
        for module in self.modules():
            if isinstance(module, DepthFeature):
                module.start()

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: LayerCaches | None = None,
    ) -> Tensor:
        """All layers on `x_BNC`, which continues what `cache` has seen.

        Args:
            mask: bool (B, M), True = real token, for every layer and depth; or what `host` and `attend` take.

        Raises:
            ValueError: if the arguments do not fit together, or there is a context.
        """
        if context_BMC is not None:
            raise ValueError("the layers attend to their own tokens and take no context")
        if cache is not None and not self.causal:
            raise ValueError("only causal layers decode with a cache")
        x_BNC, hidden = self._ordinary(x_BNC, mask, cache)
        if self.depths is not None:
            x_BNC = self.blocks[-1](x_BNC, hidden, mask=mask, cache=None if cache is None else cache.layers[-1])
        if cache is not None:
            cache.length += x_BNC.shape[1]
        return x_BNC

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerCaches:
        """Empty caches; the last layer keeps S keys and values a token.

        Raises:
            ValueError: if the host does not decode.
        """

        def cache_of(mixer: Any) -> Any:
            if not hasattr(mixer, "new_cache"):
                raise ValueError(f"{type(mixer).__name__} has no cache to decode with")
            return mixer.new_cache(batch_size, device=device, dtype=dtype)

        caches: list[Any] = []
        for block in self.blocks:
            if isinstance(block, ShortcutBlock):
                before = None if block.before is None else cache_of(block.before)
                caches.append(LayerCaches([before, cache_of(block.attention)]))
            else:
                caches.append(cache_of(block.attention))
        return LayerCaches(caches)

    def depth_shares(self, x_BNC: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The share of each of `depths` in each token's attention in the last layer, (B, H, N, S).

        Raises:
            ValueError: if there are no shortcuts, or features are joined.
        """
        last, query_BNC, hidden = self._at_last(x_BNC, mask)
        return last.attention.shares(query_BNC, hidden, mask=mask)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The last layer's weights on given values, as `ShortcutAttention.mix`."""
        last, query_BNC, hidden = self._at_last(x_BNC, mask)
        return last.attention.mix(query_BNC, values_BHME, hidden=hidden, mask=mask)

    def extra_repr(self) -> str:
        return f"depths={self.depths}"

    def _ordinary(self, x_BNC: Tensor, mask: Any, cache: LayerCaches | None) -> tuple[Tensor, list[Tensor]]:
        """h_{L-1} (h_L without shortcuts), and the hidden states at the chosen depths."""
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        chosen = self.depths or ()
        hidden = [x_BNC] if 0 in chosen else []
        ordinary = self.blocks if self.depths is None else self.blocks[:-1]
        for depth, block in enumerate(ordinary, start=1):
            x_BNC = block(x_BNC, mask=mask, cache=None if cache is None else cache.layers[depth - 1])
            if depth in chosen:
                hidden.append(x_BNC)
        return x_BNC, hidden

    def _at_last(self, x_BNC: Tensor, mask: Any) -> tuple[Any, Tensor, list[Tensor]]:
        if self.depths is None:
            raise ValueError("depths=None has no shortcuts to look at")
        x_BNC, hidden = self._ordinary(x_BNC, mask, None)
        last: Any = self.blocks[-1]
        return last, last.norm1(last.below(x_BNC, mask=mask)), hidden


def _depths(depths: Depths, layers: int, include_below: bool) -> tuple[int, ...] | None:
    if depths is None:
        return None
    chosen = set(range(1, layers)) if depths == "all" else set(depths)
    if depths != "all" and (len(chosen) != len(depths) or not all(0 <= d < layers for d in chosen)):
        raise ValueError(f"depths must be different numbers from 0 to {layers - 1}, 'all' or None, got {depths!r}")
    chosen |= {layers - 1} if include_below else set()
    if not chosen:
        raise ValueError("depths must name at least one layer; depths=None is the plain decoder")
    return tuple(sorted(chosen))
