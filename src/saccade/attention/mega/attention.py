"""The Mega layer: gated attention on a damped average, whole, in chunks, in a stream of pieces, and while decoding.

Shape letters: B batch, N queries, M keys, C channels, H heads, Z key width, V value width, E width of given values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.mega.ema import DampedEMA
from saccade.attention.mega.norms import Dropout, norm_of
from saccade.attention.mega.operator import NORMALIZERS, Attention, laplace, mega_attend, position_bias
from saccade.layers.cache import KVCache
from saccade.layers.initialization import start_language_model
from saccade.ops import masks
from saccade.ops.chunks import attend_in_chunks
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import in_force, places, whole

Norm = Literal["layer", "scale", "rms", "batch"]

#: tokens of a piece where a long sequence is read in pieces
_STREAM = 4096

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "relu2": lambda x: x.relu().square(),
    "laplace": laplace,
    "linear": lambda x: x,
}


@dataclass
class MegaCache:
    """What the layer keeps while it decodes.

    Attributes:
        average: state of the damped average; None before the first token.
        keys: keys and values of all tokens, or of those in the chunk that is not full yet.
        length: tokens seen.
    """

    average: Tensor | None = None
    keys: KVCache = field(default_factory=KVCache)
    length: int = 0

    @property
    def nbytes(self) -> int:
        own = 0 if self.average is None else self.average.numel() * self.average.element_size()
        return own + self.keys.nbytes


class MegaAttention(nn.Module):
    """The Mega layer, with its gated residual; equations on the paper's page.

    Args:
        dim: channels C.
        num_heads: 1 in the paper.
        causal: one-directional average, and no token attends to a later one.
        key_dim: Z, a quarter of dim (rounded up to fit) where None.
        value_dim: V, twice dim where None.
        ema_dim: h.
        chunk_size: attend inside chunks of so many tokens; None: to all.
        attention: "softmax", "laplace" or "relu2".
        position: "rotary", "simple" or None.
        max_positions: reach of the simple bias; that of a chunked layer is its chunk.
        norm: "layer", "scale", "rms", "batch", or None; prenorm: of the input, else of the output.
        activation: f.
        truncation: taps of the average's kernel, all where None.
        dropout: of the average and of H; attn_drop: of the weights; feature_dropout: drop whole channels instead.

    Raises:
        ValueError: if sizes do not fit or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        causal: bool = False,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        ema_dim: int = 16,
        chunk_size: int | None = None,
        attention: Attention = "softmax",
        position: Literal["rotary", "simple"] | None = "rotary",
        max_positions: int = 1024,
        norm: Norm | None = "layer",
        prenorm: bool = True,
        activation: str = "silu",
        truncation: int | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        feature_dropout: bool = False,
    ) -> None:
        super().__init__()
        key_dim = width_of_keys(dim, num_heads) if key_dim is None else key_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        check_names(dim, num_heads, key_dim, value_dim, attention, activation)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.key_dim, self.value_dim, self.chunk_size = key_dim, value_dim, chunk_size
        self.attention: Attention = attention
        self.prenorm, self.activation = prenorm, activation
        self.attn_drop, self.dropout = attn_drop, Dropout(dropout, feature_dropout)
        self.norm = norm_of(norm, dim)
        self.ema = DampedEMA(dim, ema_dim, bidirectional=not causal, truncation=truncation)
        self.v_proj = nn.Linear(dim, value_dim)
        self.mx_proj = nn.Linear(dim, 2 * dim + key_dim + value_dim)
        self.h_proj = nn.Linear(value_dim, dim)
        self.gamma = nn.Parameter(0.02 * torch.randn(2, key_dim))
        self.beta = nn.Parameter(torch.zeros(2, key_dim))
        self.bias = position_bias(position, max_positions if chunk_size is None else chunk_size, key_dim, num_heads)
        self.apply(start_language_model)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: MegaCache | None = None,
    ) -> Tensor:
        """The layer's output (B, N, C) for `x_BNC`, which continues what `cache` has seen.

        Args:
            mask: bool (B, M), True = real token (with a cache M counts all tokens so far); pairs, 4 axes or a mask
                object, where all tokens are in one chunk.
            cache: of `new_cache`; the sequence goes on where it ended.

        Raises:
            ValueError: if the arguments do not fit together, or there is a context (see `MegaCrossAttention`).
        """
        if context_BMC is not None:
            raise ValueError("Mega attends to its own tokens: MegaCrossAttention takes a context")
        check_tokens(x_BNC, self.dim)
        if cache is None:
            valid_BN, pairs = self._split_mask(mask, x_BNC, 0)
            if self._can_stream(x_BNC):
                return self._stream(x_BNC, valid_BN)
            return self._layer(x_BNC, valid_BN, self.causal, pairs)
        if not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
        if in_force() is not None:
            raise ValueError("a cache holds a whole sequence: decode outside of saccade.parallel")
        with torch.no_grad():
            return self._decode(x_BNC, mask, cache)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: GivenMask = None) -> Tensor:
        """This layer's weights A on `x_BNC`, applied to given values (B, H, M, E); what `attention_map` calls."""
        valid_BN, pairs = self._split_mask(mask, x_BNC, 0)
        return self._weights(x_BNC, values_BHME, valid_BN, self.causal, pairs)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MegaCache:
        """An empty cache; of bounded size where the layer is chunked. The average is kept in float32."""
        return MegaCache()

    def extra_repr(self) -> str:
        return f"attention={self.attention!r}, causal={self.causal}, chunk_size={self.chunk_size}"

    def _weights(
        self, x_BNC: Tensor, values_BHME: Tensor, valid_BN: Tensor | None, causal: bool, pairs: Mask | None
    ) -> Tensor:
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        z_BNZ = F.silu(self._split(self.mx_proj(self._average(normed, valid_BN)))[1])
        return self._chunks(*self._queries_and_keys(z_BNZ), values_BHME, valid_BN, causal, pairs)

    def _layer(self, x_BNC: Tensor, valid_BN: Tensor | None, causal: bool, pairs: Mask | None) -> Tensor:
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        average_BNC = self._average(normed, valid_BN)

        def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._chunks(q, k, v, valid_BN, causal, pairs)

        return self._gated(x_BNC, normed, average_BNC, weighted)

    def _average(self, normed: Tensor, valid_BN: Tensor | None) -> Tensor:
        """The average of these tokens, which are some of those that the mask speaks of under `saccade.parallel`."""
        if valid_BN is not None and in_force() is not None:
            valid_BN = valid_BN[:, places(normed.shape[1], normed.device)]
        return self.ema(normed, valid_BN)

    def _can_stream(self, x_BNC: Tensor) -> bool:
        if self.chunk_size is None or not self.causal or self.training or torch.is_grad_enabled() or in_force():
            return False
        return not torch.compiler.is_compiling() and x_BNC.shape[1] > max(_STREAM, self.chunk_size)

    def _stream(self, x_BNC: Tensor, valid_BN: Tensor | None) -> Tensor:
        """A long sequence as a decoder would read it, in pieces of whole chunks: what is between the projections stays
        in cache, and memory beyond input and output does not grow."""
        cache, out_BNC = MegaCache(), torch.empty_like(x_BNC)
        size = max(1, _STREAM // (self.chunk_size or 1)) * (self.chunk_size or 1)
        for start in range(0, x_BNC.shape[1], size):
            piece = slice(start, start + size)
            valid_BM = None if valid_BN is None else valid_BN[:, : start + size]
            out_BNC[:, piece] = self._decode(x_BNC[:, piece], valid_BM, cache)
        return out_BNC

    def _gated(
        self, x_BNC: Tensor, normed: Tensor, average_BNC: Tensor, weighted: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Everything around the average and the attention: projections, gates, residual."""
        f = ACTIVATIONS[self.activation]
        value_BHNV = f(self.v_proj(normed)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        update, z, reset, h = self._split(self.mx_proj(self.dropout(average_BNC)))
        out_BHNV = weighted(*self._queries_and_keys(F.silu(z)), value_BHNV)
        out_BNV = out_BHNV.transpose(1, 2).flatten(2) * F.silu(reset)
        candidate = self.dropout(f(h + self.h_proj(out_BNV)))
        y_BNC = torch.lerp(x_BNC, candidate.to(x_BNC.dtype), update.sigmoid().to(x_BNC.dtype))
        return y_BNC if self.prenorm else self.norm(y_BNC)

    def _decode(self, x_BNC: Tensor, mask: GivenMask, cache: MegaCache) -> Tensor:
        if cache.average is not None and cache.average.shape[0] != x_BNC.shape[0]:
            raise ValueError(f"the cache is for {cache.average.shape[0]} sequences, got {x_BNC.shape[0]}")
        valid_BM, pairs = self._split_mask(mask, x_BNC, cache.length)
        if pairs is not None:
            raise ValueError("with a cache the mask must be padding, (batch, all tokens)")
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        valid_BN = None if valid_BM is None else valid_BM[:, cache.length :]
        average_BNC, cache.average = self.ema.decode(normed, cache.average, valid_BN)

        def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._continue(q, k, v, valid_BM, cache)

        return self._gated(x_BNC, normed, average_BNC, weighted)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None, cache: MegaCache) -> Tensor:
        """The rest of the chunk that is being filled, whole chunks, and the beginning of the next."""
        N, size = q.shape[2], self.chunk_size

        def grow(begin: int, end: int) -> Tensor:
            held = cache.keys.length
            keys, values = cache.keys.append(k[:, :, begin:end], v[:, :, begin:end])
            valid = None if valid_BM is None else valid_BM[:, cache.length + begin - held : cache.length + end]
            if cache.keys.length == size:
                cache.keys = KVCache()
            return self._attend(q[:, :, begin:end], keys, values, valid, True, None, held)

        head = N if size is None else min(N, -cache.keys.length % size)
        tail = 0 if size is None else (N - head) % size
        pieces = [v[:, :, :0]]
        if head:
            pieces.append(grow(0, head))
        if head + tail < N:
            rows, start = slice(head, N - tail), cache.length + head
            valid = None if valid_BM is None else valid_BM[:, start : cache.length + N - tail]
            pieces.append(self._chunks(q[:, :, rows], k[:, :, rows], v[:, :, rows], valid, True))
        if tail:
            pieces.append(grow(N - tail, N))
        cache.length += N
        return torch.cat(pieces, 2)

    def _chunks(
        self, q: Tensor, k: Tensor, v: Tensor, valid_BN: Tensor | None, causal: bool, pairs: Mask | None = None
    ) -> Tensor:
        """Attention inside each chunk."""
        size = self.chunk_size
        if size is None or size >= whole(q.shape[2]):
            return self._attend(q, k, v, valid_BN, causal, pairs, 0)

        def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
            return self._attend(q, k, v, valid, causal, pairs, 0)

        return attend_in_chunks(attend, size, q, k, v, valid_BN)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid_BM: Tensor | None,
        causal: bool,
        pairs: Mask | None,
        offset: int,
    ) -> Tensor:
        mask = pairs
        if valid_BM is not None:
            mask = masks.padding(valid_BM) if pairs is None else masks.padding(valid_BM) & pairs
        dropout = self.attn_drop if self.training else 0.0
        return mega_attend(
            q,
            k,
            v,
            attention=self.attention,
            bias=self.bias,
            mask=mask,
            causal=causal,
            offset=offset,
            dropout=dropout,
        )

    def _split(self, base_BN: Tensor) -> tuple[Tensor, ...]:
        return base_BN.split([self.dim, self.key_dim, self.value_dim, self.dim], -1)

    def _queries_and_keys(self, z_BNZ: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (z_BNZ * gamma + beta for gamma, beta in zip(self.gamma, self.beta, strict=True))
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))  # type: ignore[return-value]

    def _split_mask(self, mask: GivenMask, x_BNC: Tensor, start: int) -> tuple[Tensor | None, Mask | None]:
        """A caller's mask as padding (B, M), or as pairs."""
        B, N = x_BNC.shape[0], whole(x_BNC.shape[1])
        pattern = Pattern.of(mask, B, N, start + N, heads=self.num_heads, causal=self.causal, offset=start)
        pairs = (
            None if mask is None else replace(pattern, causal=pattern.causal and not self.causal, valid_BM=None).mask
        )
        if pairs is not None and self.chunk_size is not None and self.chunk_size < N:
            raise ValueError(f"a mask of pairs needs all tokens in one chunk of {self.chunk_size}")
        return pattern.real_keys(B), pairs


def sizes_of(dim: int, key_dim: int, **rest: Any) -> dict[str, Any]:
    """Arguments of a published block: values and feed-forward layer are twice as wide as the input."""
    return {"dim": dim, "key_dim": key_dim, "value_dim": 2 * dim, "ffn_dim": 2 * dim, **rest}


def width_of_keys(dim: int, num_heads: int) -> int:
    """A quarter of dim, rounded up to an even width per head."""
    step = 2 * max(1, num_heads)
    return -(-max(1, dim // 4) // step) * step


def check_names(dim: int, num_heads: int, key_dim: int, value_dim: int, attention: str, activation: str) -> None:
    """Raise ValueError unless the heads divide the widths and the names are known."""
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    if num_heads < 1 or min(key_dim, value_dim) < 1 or key_dim % num_heads or value_dim % num_heads:
        raise ValueError(f"num_heads must divide key_dim ({key_dim}) and value_dim ({value_dim}), got {num_heads}")
    if attention not in NORMALIZERS:
        raise ValueError(f"attention must be one of {', '.join(NORMALIZERS)}, got {attention!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_tokens(x_BNC: Tensor, dim: int) -> None:
    """Raise ValueError unless there are tokens of width `dim`."""
    if x_BNC.ndim != 3 or x_BNC.shape[-1] != dim:
        raise ValueError(f"x must be (batch, tokens, {dim}), got {tuple(x_BNC.shape)}")
