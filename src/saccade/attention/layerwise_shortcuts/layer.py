"""Layerwise attention shortcuts as a layer.

Shape letters: B batch, N queries, M tokens that are attended to, S depths, C channels, H query heads, K key heads,
D head dim, E width of given values, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.attention.layerwise_shortcuts.operator import Depths, depth_shares, shortcut_attend
from saccade.layers.cache import KVCache, LayerCaches
from saccade.layers.mlp import MLP
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern


class DepthFeature(nn.Module):
    """f = MLP(LN(h)), C -> hidden -> C with GELU; `residual` adds LN(h), `hidden` 0 leaves LN(h) alone."""

    def __init__(self, dim: int, hidden: int, *, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(dim), residual
        self.mlp = MLP(dim, hidden) if hidden else None
        self.start()

    def start(self) -> None:
        """With `residual`, set the MLP's last layer to 0."""
        if self.residual and self.mlp is not None:
            nn.init.zeros_(self.mlp.fc2.weight)
            nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, h_BMC: Tensor) -> Tensor:
        u_BMC = self.norm(h_BMC)
        if self.mlp is None:
            return u_BMC
        return u_BMC + self.mlp(u_BMC) if self.residual else self.mlp(u_BMC)


class ShortcutAttention(QKVAttention):
    """Cross-attention from one layer's tokens to the features of S others, as a layer of its own.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        depths: S, how many hidden states it is given.
        mlp_hidden, combine, tied_mlp, depth_embedding, residual_mlp: see the module's docstring.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        depths: int = 3,
        mlp_hidden: int | None = None,
        combine: Literal["keys", "features"] = "keys",
        tied_mlp: bool = False,
        depth_embedding: bool = False,
        residual_mlp: bool = False,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if depths < 1:
            raise ValueError(f"depths must be at least 1, got {depths}")
        if mlp_hidden is not None and mlp_hidden < 0:
            raise ValueError(f"mlp_hidden must not be negative, got {mlp_hidden}")
        if combine not in ("keys", "features"):
            raise ValueError(f"combine must be 'keys' or 'features', got {combine!r}")
        self.depths, self.combine = depths, combine
        hidden = dim if mlp_hidden is None else mlp_hidden
        modules = 1 if tied_mlp else depths
        self.feature_of = nn.ModuleList(DepthFeature(dim, hidden, residual=residual_mlp) for _ in range(modules))
        self.embedding = nn.Parameter(0.02 * torch.randn(depths, dim)) if depth_embedding else None
        self.join = nn.Linear(depths * dim, dim) if combine == "features" else None

    @property
    def keys_per_token(self) -> int:
        """S, or 1 where features are joined."""
        return 1 if self.combine == "features" else self.depths

    def features(self, hidden: Sequence[Tensor]) -> Tensor:
        """C: (B, M, S, C), or (B, M, 1, C) where features are joined."""
        tied = len(self.feature_of) == 1
        c_BMSC = torch.stack([self.feature_of[0 if tied else i](h) for i, h in enumerate(hidden)], 2)
        c_BMSC = c_BMSC if self.embedding is None else c_BMSC + self.embedding
        return c_BMSC if self.join is None else self.join(c_BMSC.flatten(2))[:, :, None]

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        hidden: Sequence[Tensor],
        *,
        mask: GivenMask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to the hidden states (B, N, C) of the same tokens, and to what `cache` holds before them.

        Args:
            hidden: S of them, in the order of the depths. They are normalised here, `x_BNC` is not.
            mask: bool (B, M), True = real token, or pairs of queries and tokens; counts for every depth.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        q, k, v, pattern = self._prepare(x_BNC, hidden, mask, cache)
        return self.out(self.attend(q, k, v, pattern))

    def attend(self, q_BHND: Tensor, k_BKMSD: Tensor, v_BKMSE: Tensor, pattern: Pattern) -> Tensor:
        where: dict[str, Any] = {"mask": pattern.rest, "causal": pattern.causal, "offset": pattern.offset}
        return shortcut_attend(q_BHND, k_BKMSD, v_BKMSE, **where)

    def shares(self, x_BNC: Tensor, hidden: Sequence[Tensor], *, mask: GivenMask = None) -> Tensor:
        """The share of each depth in each token's attention, (B, H, N, S).

        Raises:
            ValueError: as `forward`, or where features are joined, which leaves no choice of a depth.
        """
        if self.combine == "features":
            raise ValueError("combine='features' has no attention over depths to show")
        q, k, _, pattern = self._prepare(x_BNC, hidden, mask, None)
        return depth_shares(q, k, mask=pattern.rest, causal=pattern.causal)

    def mix(  # type: ignore[override]
        self, x_BNC: Tensor, values_BHME: Tensor, *, hidden: Sequence[Tensor], mask: GivenMask = None
    ) -> Tensor:
        """This layer's weights on given values: one a token, (B, H, M, E), or one a key, (B, H, M S, E).

        `attention_map(layer, x, hidden=hidden)` is the map over tokens, `attention_map(layer, x, hidden=hidden,
        values=(B, H, M * S)).unflatten(-1, (M, S))` the one by depth.
        """
        q, k, _, pattern = self._prepare(x_BNC, hidden, mask, None)
        M, S = k.shape[2:4]
        per_key = values_BHME.shape[2] == M * S
        v = values_BHME.unflatten(2, (M, S)) if per_key else values_BHME[:, :, :, None].expand(-1, -1, -1, S, -1)
        k = k.repeat_interleave(self.num_heads // k.shape[1], 1)
        return self.attend(q, k, v, pattern)

    def _prepare(
        self, x_BNC: Tensor, hidden: Sequence[Tensor], mask: GivenMask, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Pattern]:
        self.check(x_BNC, None, cache)
        shapes = [tuple(h.shape) for h in hidden]
        if shapes != [tuple(x_BNC.shape)] * self.depths:
            raise ValueError(f"hidden must be {self.depths} tensors of shape {tuple(x_BNC.shape)}, got {shapes}")
        pattern = self.pattern(mask, x_BNC, None, cache)
        c_BMSC = self.features(hidden)
        q = self.split_heads(self.q_proj(x_BNC), self.num_heads)
        k, v = (p(c_BMSC).unflatten(-1, (-1, self.head_dim)).permute(0, 3, 1, 2, 4) for p in (self.k_proj, self.v_proj))
        positions = self.positions(x_BNC, None, pattern.offset)
        if positions is not None:
            q, k = self.rotate(q, positions), self.rotate(k, positions[:, None])
        if cache is not None:
            # all depths of a token side by side: the cache counts tokens
            k, v = cache.append(k.flatten(3), v.flatten(3))
            k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        return q, k, v, pattern

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, depths={self.depths}, combine={self.combine!r}"


class ShortcutBlock(PreNormBlock):
    """The last layer: a pre-norm block whose attention is `ShortcutAttention`, with `before` after a self-attention."""

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
        include_below, last_layer: see the module's docstring.
        host: the mechanism of layers 1 to L - 1, a slug of the catalogue; `host_options` are its other arguments.
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
            if isinstance(module, nn.Linear) and module not in foreign:
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
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


class ShortcutDecoder(nn.Module):
    """The paper's language model: embedding, L layers of which the last has shortcuts, norm, logits.

    Args:
        vocab: V.
        dim, num_heads, layers, depths: this library's small GPT with the paper's example depths.
        positions: "rotary", "learned" (up to `max_length`) or "sinusoidal"; the last two are added to h_0 only.
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
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

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
            width = x_BNC.shape[-1]
            rate_C = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=x_BNC.device) / width)
            angle_NC = positions_N[:, None] * rate_C
            x_BNC = x_BNC + torch.stack([angle_NC.sin(), angle_NC.cos()], -1).flatten(1)[:, :width].to(x_BNC.dtype)
        return x_BNC
