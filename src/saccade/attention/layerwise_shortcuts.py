"""Layerwise attention shortcuts: the last layer of a decoder attends to the features of several earlier layers.

Verma and Pilanci, "Adaptive Large Language Models By Layerwise Attention Shortcuts", arXiv 2409.10870.

With h_0 the embeddings, h_1 ... h_{L-1} the outputs of ordinary pre-norm blocks, and chosen depths l_1 < ... < l_S,

    f_l = MLP_l(LN_l(h_l)),   C = [f_{l_1}; ...; f_{l_S}]   along the key axis, S M keys
    Q = LN(h_{L-1}) W_Q,  K = C W_K,  V = C W_V
    x = h_{L-1} + softmax(Q K^T / sqrt(D) + mask) V W_O,   h_L = x + FFN(LN(x))

where query t sees the feature of token s at every depth iff s <= t. All depths compete in one softmax per head, so a
token chooses, head by head, from which depth it reads. Keys stand position-major here, key s S + i is token s at depth
l_{i+1}: what a cache holds is a prefix, and causality is a staircase of steps S keys wide (`DepthMask`).

The authors published no code, and the card had no more than abstract, reviews and examples. What those leave open is an
argument, with this library's reading as default:

| argument | values | reading |
|---|---|---|
| `last_layer` | "replace", "add" | cross-attention in place of the last self-attention, or after it |
| `include_below` | True, False | layer L-1 is among the depths even if not named: the plain decoder is a special case |
| `combine` | "keys", "features" | concatenate along keys, or along features (S C -> C, M keys, no choice of a depth) |
| `tied_mlp` | False, True | a feature module per depth, or one for all (`depth_embedding=True` tells them apart) |
| `mlp_hidden` | width, 0 | dim where None; 0: no MLP, the feature is LN_l(h_l) |
| `residual_mlp` | False, True | f = u + MLP(u), u = LN(h), last layer 0 at the start: starts at the layers themselves |
| positions | rotary, learned, sinusoidal | rotary: the keys of token s are rotated by s at every depth |

A plain decoder, which the paper compares with, is `depths=None`. Weights start as GPT's, N(0, 0.02).

Shape letters: B batch, N queries, M tokens that are attended to, S depths, C channels, H query heads, K key heads,
D head dim, E width of given values, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue import Claim, ClaimResult, register
from saccade.layers.cache import KVCache, LayerCaches
from saccade.layers.mlp import FeedForward
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.masks import EMPTY, FULL, Mask
from saccade.ops.merge import merge
from saccade.ops.rope import rotate

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

#: tokens from which a causal softmax per depth, merged, beats one over the staircase of all depths on the CPU: equal at
#: 1024, 0.7 of its time at 4096, forward and backward
LONG = 1024

Depths = Sequence[int] | Literal["all"] | None


@dataclass(frozen=True, eq=False)
class DepthMask(Mask):
    """A mask of tokens over keys that hold each token `depths` times in a row."""

    tokens: Mask
    depths: int

    @property
    def batch(self) -> int:
        return self.tokens.batch

    @property
    def heads(self) -> int:
        return self.tokens.heads

    def check(self, n: int, m: int) -> None:
        if m % self.depths:
            raise ValueError(f"keys must hold {self.depths} depths of each token, got {m} keys")
        self.tokens.check(n, m // self.depths)

    def tensors(self) -> list[Tensor]:
        return self.tokens.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return DepthMask(self.tokens.to(device), self.depths)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.tokens.allowed(b, h, q, k // self.depths)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
        size = max(1, block_k // self.depths)
        states = self.tokens.block_map(n, m // self.depths, (block_q, size), device)
        first_k = torch.arange(0, m, block_k, device=device)
        last_k = (first_k + block_k - 1).clamp(max=m - 1)
        # a block of keys touches a few blocks of tokens: from `first` to `last`, at most `reach` of them
        first, last = first_k // self.depths // size, last_k // self.depths // size
        reach = ((block_k - 1) // self.depths + 1) // size + 2
        touched = torch.stack([states[..., torch.minimum(first + i, last)] for i in range(reach)])
        some, every = touched.amax(0) != EMPTY, touched.amin(0) == FULL
        return some.to(torch.int8) + every.to(torch.int8)

    def __repr__(self) -> str:
        return f"depths({self.tokens!r}, {self.depths})"


def _token_mask(mask: Mask | None, causal: bool, offset: int, N: int) -> Mask | None:
    """Which tokens a query sees; a single query after all others sees everything that `mask` lets it."""
    if not causal or (offset and N == 1):
        return mask
    return masks.causal(offset) if mask is None else mask & masks.causal(offset)


def shortcut_attend(
    q_BHND: Tensor,
    k_BKMSD: Tensor,
    v_BKMSE: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = True,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q K^T scale) V over all depths of the tokens that a query sees: (B, H, N, E).

    Work follows the mask's blocks, memory is linear. The order of the depths does not matter.

    Args:
        q_BHND: queries; query 0 stands at token `offset`.
        k_BKMSD, v_BKMSE: keys and values of M tokens at S depths; K divides H.
        mask: over (query, token) pairs, for every depth; without causality.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: if shapes do not fit.

    >>> q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3, 4)
    >>> shortcut_attend(q, k, k).shape
    torch.Size([1, 2, 5, 4])
    """
    S = _check_depths(k_BKMSD, v_BKMSE)
    if mask is None and causal and not offset and k_BKMSD.shape[2] >= LONG and q_BHND.device.type == "cpu":
        return _depth_by_depth(q_BHND, k_BKMSD, v_BKMSE, scale)
    seen = _token_mask(mask, causal, offset, q_BHND.shape[2])
    if seen is not None and S > 1:
        seen = DepthMask(seen, S)
    return attend(q_BHND, k_BKMSD.flatten(2, 3), v_BKMSE.flatten(2, 3), mask=seen, scale=scale)


def _depth_by_depth(q_BHND: Tensor, k_BKMSD: Tensor, v_BKMSE: Tensor, scale: float | None) -> Tensor:
    """The same without a mask beyond causality: the softmax over a union of keys, from that over each part."""
    (out, lse), *others = (
        attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(), scale=scale, return_lse=True)
        for k_BKMD, v_BKME in zip(k_BKMSD.unbind(3), v_BKMSE.unbind(3))
    )
    for other in others:
        out, lse = merge(out, lse, *other)
    return out


def depth_shares(
    q_BHND: Tensor,
    k_BKMSD: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = True,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """How much of each query's attention goes to each depth, (B, H, N, S); rows sum to 1, or to 0 without any key.

    share_l = exp(lse_l - lse) with lse_l the log of the sum of exponentials over the keys of depth l alone: no map of
    weights is made. Arguments are `shortcut_attend`'s.

    Raises:
        ValueError: if shapes do not fit.
    """
    S = _check_depths(k_BKMSD, k_BKMSD)
    seen = _token_mask(mask, causal, offset, q_BHND.shape[2])
    lse = [
        attend(q_BHND, k_BKMSD[:, :, :, i], k_BKMSD[:, :, :, i, :0], mask=seen, scale=scale, return_lse=True)[1]
        for i in range(S)
    ]
    lse_BHNS = torch.stack(lse, -1)
    nothing = lse_BHNS.amax(-1, keepdim=True) == -torch.inf
    return lse_BHNS.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _check_depths(k_BKMSD: Tensor, v_BKMSE: Tensor) -> int:
    if k_BKMSD.ndim != 5 or k_BKMSD.shape[:4] != v_BKMSE.shape[:4] or not k_BKMSD.shape[3]:
        raise ValueError(
            f"keys and values must be (batch, heads, tokens, depths, width), got {tuple(k_BKMSD.shape)} and "
            f"{tuple(v_BKMSE.shape)}"
        )
    return k_BKMSD.shape[3]


class DepthFeature(nn.Module):
    """f = MLP(LN(h)), C -> hidden -> C with GELU; `residual` adds LN(h), `hidden` 0 leaves LN(h) alone."""

    def __init__(self, dim: int, hidden: int, *, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(dim), residual
        self.mlp = FeedForward(dim, hidden) if hidden else None
        self.start()

    def start(self) -> None:
        """With `residual`, set the MLP's last layer to 0."""
        if self.residual and self.mlp is not None:
            nn.init.zeros_(self.mlp.down.weight)
            nn.init.zeros_(self.mlp.down.bias)

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
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to the hidden states (B, N, C) of the same tokens, and to what `cache` holds before them.

        Args:
            hidden: S of them, in the order of the depths. They are normalised here, `x_BNC` is not.
            mask: bool (B, M), True = real token, or pairs of queries and tokens; counts for every depth.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        q, k, v, seen, offset = self._prepare(x_BNC, hidden, mask, cache)
        out = shortcut_attend(q, k, v, mask=seen, causal=self.causal, offset=offset)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def shares(self, x_BNC: Tensor, hidden: Sequence[Tensor], *, mask: Tensor | Mask | None = None) -> Tensor:
        """The share of each depth in each token's attention, (B, H, N, S).

        Raises:
            ValueError: as `forward`, or where features are joined, which leaves no choice of a depth.
        """
        if self.combine == "features":
            raise ValueError("combine='features' has no attention over depths to show")
        q, k, _, seen, _ = self._prepare(x_BNC, hidden, mask, None)
        return depth_shares(q, k, mask=seen, causal=self.causal)

    def mix(  # type: ignore[override]
        self, x_BNC: Tensor, values_BHME: Tensor, *, hidden: Sequence[Tensor], mask: Tensor | Mask | None = None
    ) -> Tensor:
        """This layer's weights on given values: one a token, (B, H, M, E), or one a key, (B, H, M S, E).

        `attention_map(layer, x, hidden=hidden)` is the map over tokens, `attention_map(layer, x, hidden=hidden,
        values=(B, H, M * S)).unflatten(-1, (M, S))` the one by depth.
        """
        q, k, _, seen, _ = self._prepare(x_BNC, hidden, mask, None)
        M, S = k.shape[2:4]
        per_key = values_BHME.shape[2] == M * S
        v = values_BHME.unflatten(2, (M, S)) if per_key else values_BHME[:, :, :, None].expand(-1, -1, -1, S, -1)
        k = k.repeat_interleave(self.num_heads // k.shape[1], 1)
        return shortcut_attend(q, k, v, mask=seen, causal=self.causal)

    def _prepare(
        self, x_BNC: Tensor, hidden: Sequence[Tensor], mask: Tensor | Mask | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Mask | None, int]:
        self._check(x_BNC, None, cache)
        shapes = [tuple(h.shape) for h in hidden]
        if shapes != [tuple(x_BNC.shape)] * self.depths:
            raise ValueError(f"hidden must be {self.depths} tensors of shape {tuple(x_BNC.shape)}, got {shapes}")
        start = 0 if cache is None else cache.length
        c_BMSC = self.features(hidden)
        q = self._heads(self.q_proj(x_BNC), self.num_heads)
        k, v = (p(c_BMSC).unflatten(-1, (-1, self.head_dim)).permute(0, 3, 1, 2, 4) for p in (self.k_proj, self.v_proj))
        if self.rope:
            positions_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
            q = rotate(q, positions_N, base=self.rope_base)
            k = rotate(k, positions_N[:, None], base=self.rope_base)
        if cache is not None:
            # all depths of a token side by side: the cache counts tokens
            k, v = cache.append(k.flatten(3), v.flatten(3))
            k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        return q, k, v, as_mask(mask, k), start

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, depths={self.depths}, combine={self.combine!r}"


class ShortcutBlock(nn.Module):
    """The last layer: a pre-norm block whose attention is `ShortcutAttention`, with `before` after a self-attention."""

    def __init__(self, mixer: ShortcutAttention, ffn_dim: int | None, before: nn.Module | None) -> None:
        super().__init__()
        dim = mixer.dim
        self.norm0 = None if before is None else nn.LayerNorm(dim)
        self.before = before
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.ffn = nn.LayerNorm(dim), FeedForward(dim, ffn_dim)

    def forward(self, x_BNC: Tensor, hidden: Sequence[Tensor], *, mask: Any = None, cache: Any = None) -> Tensor:
        x_BNC = self.below(x_BNC, mask=mask, cache=None if cache is None else cache.layers[0])
        last = None if cache is None else cache.layers[1]
        x_BNC = x_BNC + self.mixer(self.norm1(x_BNC), hidden, mask=mask, cache=last)
        return x_BNC + self.ffn(self.norm2(x_BNC))

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
                caches.append(LayerCaches([before, cache_of(block.mixer)]))
            else:
                caches.append(cache_of(block.mixer))
        return LayerCaches(caches)

    def depth_shares(self, x_BNC: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The share of each of `depths` in each token's attention in the last layer, (B, H, N, S).

        Raises:
            ValueError: if there are no shortcuts, or features are joined.
        """
        last, query_BNC, hidden = self._at_last(x_BNC, mask)
        return last.mixer.shares(query_BNC, hidden, mask=mask)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The last layer's weights on given values, as `ShortcutAttention.mix`."""
        last, query_BNC, hidden = self._at_last(x_BNC, mask)
        return last.mixer.mix(query_BNC, values_BHME, hidden=hidden, mask=mask)

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


def _claim(lab: Lab) -> ClaimResult:
    """Character language models with and without shortcuts, the plain one with as many parameters as the largest."""
    layers, depths, dim, length, batch = 6, (2, 4, 5), lab.size(64, 16), 64, lab.size(16, 2)
    rows: dict[str, dict[str, Any]] = {
        "shortcuts_as_default": {"depths": depths},
        "shortcuts_residual": {"depths": depths, "residual_mlp": True},
        "shortcuts_added": {"depths": depths, "residual_mlp": True, "last_layer": "add"},
        # what the additional attention does without a choice of depths
        "layer_below_added": {"depths": depths[-1:], "residual_mlp": True, "last_layer": "add"},
    }

    def build(options: Mapping[str, Any]) -> ShortcutDecoder:
        with lab.seeded():
            return ShortcutDecoder(256, dim, 4, layers=layers, **options)

    def parameters(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    missing = parameters(build(rows["shortcuts_added"])) - parameters(build({"depths": None}))
    # a feed-forward layer of width F has 2 C F + F + C parameters
    rows = {"plain": {"depths": None, "ffn_dim": 4 * dim + round(missing / (layers * (2 * dim + 1)))}, **rows}
    text, held_out = lab.data.text_bytes("train"), lab.data.text_bytes("held-out")
    tokens, targets = lab.data.windows(held_out, lab.size(256, 2), length, torch.Generator().manual_seed(10**6))
    measured: dict[str, float] = {}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield lab.data.windows(text, batch, length, generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    for name, options in rows.items():
        model = build(options)
        lab.train(model, batches(), loss, 200, lr=3e-3, description=name)
        with torch.no_grad():
            losses_BN = F.cross_entropy(model.eval()(tokens).mT, targets, reduction="none")
            measured[f"{name}_held_out_nats_per_byte"] = losses_BN.mean().item()
            measured[f"{name}_parameters"] = float(parameters(model))
            if model.stack.depths != depths:
                continue
            shares_BNS = model.depth_shares(tokens).mean(1)
        for i, depth in enumerate(depths):
            measured[f"{name}_share_of_depth_{depth}"] = shares_BNS[..., i].mean().item()
        measured[f"{name}_share_std_between_tokens"] = shares_BNS.std((0, 1)).mean().item()
        easy = losses_BN <= losses_BN.median()
        gap = shares_BNS[..., -1][~easy].mean() - shares_BNS[..., -1][easy].mean()
        measured[f"{name}_share_of_deepest_hard_less_easy_tokens"] = gap.item()
    plain = measured["plain_held_out_nats_per_byte"]
    replaced = measured["shortcuts_residual_held_out_nats_per_byte"]
    return ClaimResult(
        measured,
        holds=replaced <= plain and measured["shortcuts_residual_share_std_between_tokens"] > 0.01,
        note="holds if shortcuts in place of the last self-attention, begun as residual features, do not lose against "
        "the plain decoder and their shares differ between tokens; one seed, differences below 0.02 are noise",
    )


register(
    "layerwise-shortcuts",
    kind="sequence",
    summary="A decoder whose last layer attends, per token, to the features of several earlier layers at once.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="dense",
    complexity="the last layer attends to S M keys: time O(S N M D) and S times the cache of one layer; S MLPs",
    note="a small stack of layers; built from the card, the authors published no code: what it leaves open are options",
    invariants=(
        "depths = (L - 1,), no MLP, one norm for queries and features: the plain decoder",
        "masking the keys of a depth is leaving it out",
        "shares of the depths sum to 1 per head and token, and are the sums of the weights",
        "the order of the depths, with their MLPs, does not matter",
        "tied MLPs and equal hidden states: every share is 1 / S",
        "one token: attention over depths only",
        "no output before an edited token changes, at any depth; decoding equals the full pass",
    ),
    build=ShortcutStack,
    passes=(ShortcutAttention,),
    example={"dim": 16, "num_heads": 4, "causal": True, "layers": 3, "depths": (0, 1), "num_kv_heads": 2},
    claim=Claim(
        paper="lower next-token loss than a GPT-like baseline of the same size on four data sets; depth maps show "
        "shallow layers for easy tokens, deep ones for hard ones",
        expected="held-out loss of a six-layer character model no higher than the plain decoder's with as many "
        "parameters, and shares of the depths that differ between tokens; in trials of 200 to 400 steps the shares "
        "differ where features start as the layers, and all losses are within noise or behind the plain decoder",
        run=_claim,
    ),
)
