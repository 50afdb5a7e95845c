"""The layers: damped average, gated attention on it, gated cross-attention, normalised feed-forward, a block.

Shape letters: B batch, N queries, M keys, C channels, H heads, Z key width, V value width, E width of given values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.mega.norms import _Dropout, _initialise, _norm
from saccade.attention.mega.operator import _NORMALIZERS, Attention, _bias, laplace, mega_attend
from saccade.layers.cache import KVCache
from saccade.ops import masks
from saccade.ops.ema import ema, ema_step
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern

Norm = Literal["layer", "scale", "rms", "batch"]

#: tokens of a piece where a long sequence is read in pieces
_STREAM = 4096


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "relu2": lambda x: x.relu().square(),
    "laplace": laplace,
    "linear": lambda x: x,
}


class DampedEMA(nn.Module):
    """SiLU(EMA(x) + omega x) with p = sigmoid(delta), a = sigmoid(alpha), q = 1 - p a:

        s_t = p beta x_t + q s_{t-1},   EMA(x)_t = sum_n gamma_n s_tn / sqrt(h)

    Args:
        dim: channels; ema_dim: h, averages per channel.
        bidirectional: a second bank runs backwards; both see the current token.
        truncation: taps of the kernel, all where None.
    """

    def __init__(
        self, dim: int, ema_dim: int = 16, *, bidirectional: bool = False, truncation: int | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or ema_dim < 1:
            raise ValueError(f"dim and ema_dim must be positive, got {dim} and {ema_dim}")
        if truncation is not None and truncation < 1:
            raise ValueError(f"truncation must be at least 1, got {truncation}")
        self.dim, self.ema_dim, self.bidirectional, self.truncation = dim, ema_dim, bidirectional, truncation
        rows = 2 * dim if bidirectional else dim
        self.delta = nn.Parameter(0.2 * torch.randn(rows, ema_dim, 1))
        self.alpha = nn.Parameter(0.2 * torch.randn(rows, ema_dim, 1))
        signs = 1.0 - 2.0 * (torch.arange(ema_dim) % 2)
        self.beta = nn.Parameter(signs[:, None] + 0.02 * torch.randn(rows, ema_dim, 1))
        self.gamma = nn.Parameter(torch.randn(rows, ema_dim))
        self.omega = nn.Parameter(torch.randn(dim))

    def forward(self, x_BNC: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Args:
        valid_BN: True = real token; others enter the average as 0.
        """
        given = x_BNC if valid_BN is None else x_BNC * valid_BN[..., None]
        if self.bidirectional:
            both = ema(torch.cat([given, given.flip(1)], -1), *self.coefficients(), taps=self.truncation)
            y = both[..., : self.dim] + both[..., self.dim :].flip(1)
        else:
            y = ema(given, *self.coefficients(), taps=self.truncation)
        return F.silu(y + self.omega * x_BNC)

    def decode(self, x_BNC: Tensor, state: Tensor | None, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens after `state`, and the state after them: s (B, C, h), or, where the kernel is cut, the
        inputs (B, < truncation, C) that it still reaches."""
        given = x_BNC if valid_BN is None else x_BNC * valid_BN[..., None]
        if self.truncation is not None:
            held = given if state is None else torch.cat([state, given], 1)
            y = ema(held, *self.coefficients(), taps=self.truncation)[:, held.shape[1] - given.shape[1] :]
            state = held[:, max(0, held.shape[1] - self.truncation + 1) :]
        elif given.shape[1] == 1:
            y, state = ema_step(given, *self.coefficients(), state)
        else:
            y, state = ema(given, *self.coefficients(), state=state, return_state=True)
        assert state is not None
        return F.silu(y + self.omega * x_BNC), state

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay q, weight p beta and mix gamma / sqrt(h) of `ops.ema`."""
        wide = torch.promote_types(self.delta.dtype, torch.float32)
        p, a, beta = self.delta.to(wide).sigmoid(), self.alpha.to(wide).sigmoid(), self.beta.to(wide)
        return (1.0 - p * a).squeeze(-1), (p * beta).squeeze(-1), self.gamma.to(wide) / math.sqrt(self.ema_dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, ema_dim={self.ema_dim}, bidirectional={self.bidirectional}, truncation={self.truncation}"


@dataclass
class MegaCache:
    """State of the average, and keys and values of all tokens, or of those in the chunk that is not full yet."""

    average: Tensor | None = None
    keys: KVCache = field(default_factory=KVCache)
    length: int = 0

    @property
    def nbytes(self) -> int:
        own = 0 if self.average is None else self.average.numel() * self.average.element_size()
        return own + self.keys.nbytes


class MegaAttention(nn.Module):
    """The Mega layer, with its gated residual; equations at the top of this file.

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
        key_dim = _key_dim(dim, num_heads) if key_dim is None else key_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        _check_names(dim, num_heads, key_dim, value_dim, attention, activation)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.key_dim, self.value_dim, self.chunk_size = key_dim, value_dim, chunk_size
        self.attention: Attention = attention
        self.prenorm, self.activation = prenorm, activation
        self.attn_drop, self.dropout = attn_drop, _Dropout(dropout, feature_dropout)
        self.norm = _norm(norm, dim)
        self.ema = DampedEMA(dim, ema_dim, bidirectional=not causal, truncation=truncation)
        self.v_proj = nn.Linear(dim, value_dim)
        self.mx_proj = nn.Linear(dim, 2 * dim + key_dim + value_dim)
        self.h_proj = nn.Linear(value_dim, dim)
        self.gamma = nn.Parameter(0.02 * torch.randn(2, key_dim))
        self.beta = nn.Parameter(torch.zeros(2, key_dim))
        self.bias = _bias(position, max_positions if chunk_size is None else chunk_size, key_dim, num_heads)
        self.apply(_initialise)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: MegaCache | None = None,
    ) -> Tensor:
        """Args:
            mask: bool (B, M), True = real token (with a cache M counts all tokens so far); pairs, 4 axes or a mask
                object, where all tokens are in one chunk.
            cache: of `new_cache`; the sequence goes on where it ended.

        Raises:
            ValueError: if the arguments do not fit together, or there is a context (see `MegaCrossAttention`).
        """
        if context_BMC is not None:
            raise ValueError("Mega attends to its own tokens: MegaCrossAttention takes a context")
        _check_tokens(x_BNC, self.dim)
        if cache is None:
            valid_BN, pairs = self._split_mask(mask, x_BNC, 0)
            if self._can_stream(x_BNC):
                return self._stream(x_BNC, valid_BN)
            return self._layer(x_BNC, valid_BN, self.causal, pairs)
        if not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
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
        z_BNZ = F.silu(self._split(self.mx_proj(self.ema(normed, valid_BN)))[1])
        return self._chunks(*self._queries_and_keys(z_BNZ), values_BHME, valid_BN, causal, pairs)

    def _layer(self, x_BNC: Tensor, valid_BN: Tensor | None, causal: bool, pairs: Mask | None) -> Tensor:
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        average_BNC = self.ema(normed, valid_BN)

        def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._chunks(q, k, v, valid_BN, causal, pairs)

        return self._gated(x_BNC, normed, average_BNC, weighted)

    def _can_stream(self, x_BNC: Tensor) -> bool:
        if self.chunk_size is None or not self.causal or self.training or torch.is_grad_enabled():
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
        f = _ACTIVATIONS[self.activation]
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
        """Attention inside each chunk: the whole ones as one batch, and what is left."""
        (B, _, N, _), size = q.shape, self.chunk_size
        if size is None or size >= N:
            return self._attend(q, k, v, valid_BN, causal, pairs, 0)
        whole = N // size * size

        def fold(x: Tensor) -> Tensor:
            """(B, H, n size, D) -> (B n, H, size, D)"""
            return x[:, :, :whole].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

        valid = None if valid_BN is None else valid_BN[:, :whole].reshape(-1, size)
        out = self._attend(fold(q), fold(k), fold(v), valid, causal, pairs, 0)
        out = out.unflatten(0, (B, whole // size)).transpose(1, 2).flatten(2, 3)
        if whole == N:
            return out
        valid = None if valid_BN is None else valid_BN[:, whole:]
        rest = self._attend(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:], valid, causal, pairs, 0)
        return torch.cat([out, rest], 2)

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
        B, N = x_BNC.shape[:2]
        pattern = Pattern.of(mask, B, N, start + N, heads=self.num_heads, causal=self.causal, offset=start)
        pairs = (
            None if mask is None else replace(pattern, causal=pattern.causal and not self.causal, valid_BM=None).mask
        )
        if pairs is not None and self.chunk_size is not None and x_BNC.shape[1] > self.chunk_size:
            raise ValueError(f"a mask of pairs needs all tokens in one chunk of {self.chunk_size}")
        return pattern.real_keys(B), pairs


class MegaCrossAttention(nn.Module):
    """Gated attention of a decoder to a context; no average, no causality.

        [u | r | q] = norm(x) W_q;  k = c W_k,  v = f(c W_v);  y = x + u (f((A v * r) W_h) - x)

    Arguments as in `MegaAttention`; the value width is dim. The simple bias counts x and context from their starts.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        attention: Attention = "softmax",
        position: Literal["rotary", "simple"] | None = "rotary",
        max_positions: int = 1024,
        norm: Norm | None = "layer",
        prenorm: bool = True,
        activation: str = "silu",
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        feature_dropout: bool = False,
    ) -> None:
        super().__init__()
        key_dim = _key_dim(dim, num_heads) if key_dim is None else key_dim
        _check_names(dim, num_heads, key_dim, dim, attention, activation)
        self.dim, self.num_heads, self.key_dim = dim, num_heads, key_dim
        self.attention: Attention = attention
        self.prenorm, self.activation = prenorm, activation
        self.attn_drop, self.dropout = attn_drop, _Dropout(dropout, feature_dropout)
        self.norm = _norm(norm, dim)
        self.q_proj = nn.Linear(dim, 2 * dim + key_dim)
        self.k_proj, self.v_proj = nn.Linear(dim, key_dim), nn.Linear(dim, dim)
        self.h_proj = nn.Linear(dim, dim)
        self.bias = _bias(position, max_positions, key_dim, num_heads)
        self.apply(_initialise)

    def forward(self, x_BNC: Tensor, context_BMC: Tensor, *, mask: GivenMask = None, start: int = 0) -> Tensor:
        """Args:
            mask: bool (B, M) of the context, True = real token; or pairs.
            start: position of the first of `x_BNC`, where they are decoded piece by piece.

        Raises:
            ValueError: if shapes do not fit.
        """
        for tokens in (x_BNC, context_BMC):
            _check_tokens(tokens, self.dim)
        f = _ACTIVATIONS[self.activation]
        update, reset, q_BNZ = self._project(x_BNC)
        v_BHMV = self._heads(f(self.v_proj(context_BMC)))
        out_BNC = self._weighted(q_BNZ, context_BMC, v_BHMV, mask, start).transpose(1, 2).flatten(2)
        candidate = self.dropout(f(self.h_proj(out_BNC * F.silu(reset))))
        y_BNC = torch.lerp(x_BNC, candidate.to(x_BNC.dtype), update.sigmoid().to(x_BNC.dtype))
        return y_BNC if self.prenorm else self.norm(y_BNC)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor, mask: GivenMask = None) -> Tensor:
        """The weights A applied to given values (B, H, M, E); what `attention_map` calls."""
        return self._weighted(self._project(x_BNC)[2], context, values_BHME, mask, 0)

    def _project(self, x_BNC: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        return self.q_proj(normed).split([self.dim, self.dim, self.key_dim], -1)

    def _weighted(self, q_BNZ: Tensor, context: Tensor, v: Tensor, mask: GivenMask, start: int) -> Tensor:
        k = self._heads(self.k_proj(context))
        return mega_attend(
            self._heads(q_BNZ),
            k,
            v,
            attention=self.attention,
            bias=self.bias,
            mask=mask,
            offset=start,
            dropout=self.attn_drop if self.training else 0.0,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class NormalizedFeedForward(nn.Module):
    """y = x + W2 f(W1 norm(x)), or norm(x + W2 f(W1 x)) where not prenorm."""

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
        _check_names(dim, 1, 1, hidden_dim, "softmax", activation)
        self.prenorm, self.activation = prenorm, activation
        self.dropout = _Dropout(dropout, feature_dropout)
        self.norm = _norm(norm, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.apply(_initialise)

    def forward(self, x_BNC: Tensor) -> Tensor:
        hidden = _ACTIVATIONS[self.activation](self.fc1(self.norm(x_BNC) if self.prenorm else x_BNC))
        y_BNC = x_BNC + self.dropout(self.fc2(self.dropout(hidden)))
        return y_BNC if self.prenorm else self.norm(y_BNC)


def _sizes(dim: int, key_dim: int, **rest: Any) -> dict[str, Any]:
    return {"dim": dim, "key_dim": key_dim, "value_dim": 2 * dim, "ffn_dim": 2 * dim, **rest}


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
        "listops": _sizes(80, 64, prenorm=False),
        "text": _sizes(128, 64, prenorm=False, norm="scale"),
        "retrieval": _sizes(128, 64, prenorm=False, norm="scale"),
        "image": _sizes(160, 96, norm="batch", attention="laplace"),
        "pathfinder": _sizes(128, 64, norm="batch", attention="laplace"),
        "path-x": _sizes(64, 32, norm="batch", attention="laplace", truncation=4096),
        "wmt-base": _sizes(512, 128, prenorm=False),
        "wmt-big": _sizes(1024, 256, prenorm=False),
        "wikitext-103": _sizes(1024, 256, causal=True, chunk_size=1024),
        "enwik8": _sizes(512, 128, causal=True, chunk_size=2048),
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
        """Raises:
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


def _key_dim(dim: int, num_heads: int) -> int:
    """A quarter of dim, rounded up to an even width per head."""
    step = 2 * max(1, num_heads)
    return -(-max(1, dim // 4) // step) * step


def _check_names(dim: int, num_heads: int, key_dim: int, value_dim: int, attention: str, activation: str) -> None:
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    if num_heads < 1 or min(key_dim, value_dim) < 1 or key_dim % num_heads or value_dim % num_heads:
        raise ValueError(f"num_heads must divide key_dim ({key_dim}) and value_dim ({value_dim}), got {num_heads}")
    if attention not in _NORMALIZERS:
        raise ValueError(f"attention must be one of {', '.join(_NORMALIZERS)}, got {attention!r}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")


def _check_tokens(x_BNC: Tensor, dim: int) -> None:
    if x_BNC.ndim != 3 or x_BNC.shape[-1] != dim:
        raise ValueError(f"x must be (batch, tokens, {dim}), got {tuple(x_BNC.shape)}")
