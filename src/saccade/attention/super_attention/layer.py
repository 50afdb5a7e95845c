"""The alignment of values by position, and one layer for standard, optimised, efficient and super attention.

Shape letters: B batch, N queries, M keys, C channels, H heads, D key channels of a head, E value channels of a head,
L longest input, G kernels (1 or H).
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from saccade.layers.cache import KVCache
from saccade.layers.pretrained import copy_affine, read_softmax
from saccade.ops.attend import attend
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import refuse_parts

Variant = Literal["standard", "optimised", "efficient", "super"]


KernelInit = Literal["xavier", "orthogonal", "identity"]


def align(
    v_BHME: Tensor,
    kernel_GLL: Tensor,
    bias_GL: Tensor | None = None,
    *,
    causal: bool = False,
    start: int = 0,
    real_BM: Tensor | None = None,
) -> Tensor:
    """V' = W_A V (+ b_A): rows `start` to M of it, (B, H, M - start, E). G is 1 or H.

    Args:
        v_BHME: values.
        kernel_GLL: W_A, one for all heads or one for each; M of its rows and columns are used.
        bias_GL: b_A, a number for each row.
        causal: without the upper part of W_A.
        start: the first row that is computed (decoding: those before it are known).
        real_BM: True = real token; the others' values count as 0.
    """
    M = v_BHME.shape[2]
    if real_BM is not None:
        v_BHME = v_BHME.masked_fill(~real_BM[:, None, :, None], 0.0)
    kernel = kernel_GLL[:, start:M, :M]
    if causal:
        kernel = kernel.tril(start)
    if kernel.shape[0] == 1:  # one product for all rows and heads: a broadcast one would copy W_A for each
        columns = v_BHME.permute(2, 0, 1, 3)
        out = (kernel[0] @ columns.flatten(1)).unflatten(1, columns.shape[1:]).permute(1, 2, 0, 3)
    else:
        out = kernel @ v_BHME
    return out if bias_GL is None else out + bias_GL[:, start:M, None]


class SuperAttention(nn.Module):
    """Standard, Optimised, Efficient or Super Attention.

    Args:
        dim: channels C.
        num_heads: H; the paper recommends one for "efficient".
        causal: no token attends to a later one, nor does W_A mix one in.
        variant: see the paper's page.
        max_length: L.
        head_dim, value_dim: D and E, dim / num_heads where None. Slices of the raw input need H D (or H E) <= dim.
        kernel_per_head, kernel_init, kernel_bias: of W_A.
        qkv_bias, proj_bias: biases of the projections that there are.

    Raises:
        ValueError: if sizes do not fit or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        variant: Variant = "super",
        max_length: int = 1024,
        head_dim: int | None = None,
        value_dim: int | None = None,
        kernel_per_head: bool = False,
        kernel_init: KernelInit = "xavier",
        kernel_bias: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
        if kernel_init not in get_args(KernelInit):
            raise ValueError(f"kernel_init must be one of {', '.join(get_args(KernelInit))}, got {kernel_init!r}")
        if dim < 1 or num_heads < 1 or max_length < 1:
            raise ValueError(f"dim, num_heads, max_length must be positive, got {dim}, {num_heads}, {max_length}")
        if dim % num_heads and None in (head_dim, value_dim):
            raise ValueError(f"num_heads must divide dim ({dim}) where head_dim is not given, got {num_heads}")
        self.dim, self.num_heads, self.causal, self.variant, self.max_length = (
            dim,
            num_heads,
            causal,
            variant,
            max_length,
        )
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.value_dim = dim // num_heads if value_dim is None else value_dim
        sliced = {"standard": (), "optimised": ("value_dim",)}.get(variant, ("head_dim", "value_dim"))
        for name in ("head_dim", "value_dim"):
            width = getattr(self, name)
            if width < 1 or (name in sliced and num_heads * width > dim):
                limit = dim // num_heads if name in sliced else "any width"
                raise ValueError(f"{name} must be between 1 and {limit} for {variant!r}, got {width}")
        keys, values = num_heads * self.head_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(dim, keys, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, keys, bias=qkv_bias) if "head_dim" not in sliced else None
        self.v_proj = nn.Linear(dim, values, bias=qkv_bias) if "value_dim" not in sliced else None
        self.out_proj = nn.Linear(values, dim, bias=proj_bias)
        self.kernel = self.kernel_shift = None
        if variant == "super":
            kernels = num_heads if kernel_per_head else 1
            self.kernel = nn.Parameter(torch.empty(kernels, max_length, max_length))
            self.kernel_shift = nn.Parameter(torch.zeros(kernels, max_length)) if kernel_bias else None
        self.reset_parameters(kernel_init)

    def reset_parameters(self, kernel_init: KernelInit = "xavier") -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        fill = {"xavier": nn.init.xavier_uniform_, "orthogonal": nn.init.orthogonal_, "identity": nn.init.eye_}
        for kernel in () if self.kernel is None else self.kernel.unbind():
            fill[kernel_init](kernel)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to itself, to `context_BMC`, or to what `cache` holds followed by itself.

        Args:
            mask: bool (B, M), True = real token; for all but "super" also a 4-axis bool tensor or mask object over
                query-key pairs. With a cache, M counts all tokens so far.

        Raises:
            ValueError: if the arguments do not fit together, or there are more than `max_length` keys for "super".
        """
        refuse_parts("super-attention")
        if context_BMC is not None and self.causal:
            raise ValueError("a causal layer takes no context")
        if cache is not None and not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
        source_BMC = x_BNC if context_BMC is None else context_BMC
        return self.attend_to(x_BNC, source_BMC, source_BMC, mask=mask, cache=cache)

    def attend_to(
        self,
        query_BNC: Tensor,
        key_BMC: Tensor,
        value_BMC: Tensor,
        *,
        mask: GivenMask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The paper's call f(q, k, v), with keys and values from different inputs; arguments as `forward`."""
        self._check(query_BNC, key_BMC, value_BMC)
        q_BHND, k_BHMD, v_BHME = self._heads_of(query_BNC, key_BMC, value_BMC)
        offset = 0
        if cache is not None:
            offset = cache.length
            self._check_length(offset + k_BHMD.shape[2])
        pattern = self._pattern(mask, query_BNC, key_BMC, offset)
        if cache is not None:
            k_BHMD, v_BHME = self._remember(cache, k_BHMD, v_BHME, pattern.valid_BM)
        elif self.kernel is not None:
            v_BHME = self._align(v_BHME, pattern.valid_BM)
        out_BHNE = attend(q_BHND, k_BHMD, v_BHME, mask=pattern.mask)
        return self.out_proj(out_BHNE.transpose(1, 2).flatten(2))

    def mix(
        self,
        x_BNC: Tensor,
        values_BHME: Tensor,
        *,
        context: Tensor | None = None,
        mask: GivenMask = None,
    ) -> Tensor:
        """The weights, W_A among them, applied to given values (B, H, M, E); without W_A's bias, which takes none."""
        source = x_BNC if context is None else context
        self._check(x_BNC, source, source)
        q_BHND, k_BHMD, _ = self._heads_of(x_BNC, source, source)
        pattern = self._pattern(mask, x_BNC, source, 0)
        if self.kernel is not None:
            values_BHME = align(values_BHME, self.kernel, causal=self.causal, real_BM=pattern.valid_BM)
        return attend(q_BHND, k_BHMD, values_BHME, mask=pattern.mask)

    @classmethod
    def from_softmax(cls, module: nn.Module, **arguments: Any) -> Self:
        """This layer with what a softmax attention layer computes, its linear maps merged.

        Equal for `variant="standard"`, and for one head for the others: W_O' = W_V W_O, W_Q' = W_Q W_K^T; values'
        biases go into W_O's, keys' biases change no weight. "super" starts with W_A = 1.

        Raises:
            ValueError: if the layer is no plain softmax attention, has rotary positions or grouped heads, or has
                several heads, for which the merge is a restriction.
        """
        layer = read_softmax(module)
        if layer.rope:
            raise ValueError("rotary positions stand between the queries' and keys' maps: they cannot be merged")
        if layer.num_kv_heads != layer.num_heads:
            raise ValueError(f"grouped heads ({layer.num_kv_heads} of {layer.num_heads}) are not supported")
        variant = arguments.get("variant", "super")
        if variant != "standard" and (layer.num_heads > 1 or layer.head_dim != layer.dim):
            raise ValueError(
                f"{variant!r} equals softmax attention with one head of width {layer.dim} only, "
                f"got {layer.num_heads} of {layer.head_dim}"
            )
        merged_values, merged_keys = variant != "standard", variant in ("efficient", "super")
        (w_q, b_q), (w_k, _), (w_v, b_v), (w_o, b_o) = layer.q, layer.k, layer.v, layer.out
        with torch.no_grad():
            if merged_keys:
                w_q, b_q = w_k.T @ w_q, None if b_q is None else w_k.T @ b_q
            if merged_values:
                b_o = b_o if b_v is None else w_o @ b_v + (0 if b_o is None else b_o)
                w_o = w_o @ w_v
        theirs = {
            "num_heads": layer.num_heads,
            "causal": bool(layer.causal),
            "head_dim": layer.head_dim,
            "value_dim": layer.head_dim,
            "kernel_init": "identity",
            "qkv_bias": b_q is not None or (layer.qkv_bias and not merged_keys),
            "proj_bias": b_o is not None,
        }
        new = cls(layer.dim, **{**theirs, **arguments})
        for place, source in ((new.q_proj, (w_q, b_q)), (new.k_proj, layer.k), (new.v_proj, layer.v)):
            if place is not None:
                copy_affine(place, source)
        copy_affine(new.out_proj, (w_o, b_o))
        return new.to(device=w_q.device, dtype=w_q.dtype).train(module.training)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache; see the paper's page for what it keeps."""
        return _AlignedCache() if self.variant == "super" else KVCache()

    def extra_repr(self) -> str:
        length = f", max_length={self.max_length}" if self.kernel is not None else ""
        return f"variant={self.variant!r}, num_heads={self.num_heads}, causal={self.causal}{length}"

    def _heads_of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        k = key[..., :keys] if self.k_proj is None else self.k_proj(key)
        v = value[..., :values] if self.v_proj is None else self.v_proj(value)
        q_BHND, k_BHMD, v_BHME = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_proj(query), k, v)
        )
        return q_BHND, k_BHMD, v_BHME

    def _align(self, v_BHME: Tensor, real_BM: Tensor | None) -> Tensor:
        assert self.kernel is not None
        return align(v_BHME, self.kernel, self.kernel_shift, causal=self.causal, real_BM=real_BM)

    def _remember(
        self, cache: KVCache, k_BHND: Tensor, v_BHNE: Tensor, real_BM: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All keys and all (aligned) values so far."""
        once = self.k_proj is None and self.head_dim == self.value_dim
        if not isinstance(cache, _AlignedCache):
            keys, values = cache.append(k_BHND, v_BHNE[..., :0] if once else v_BHNE)
            return keys, keys if once else values
        assert self.kernel is not None
        start = cache.length
        keys, raw = cache.append(k_BHND, v_BHNE[..., :0] if once else v_BHNE)
        raw = keys if once else raw
        rows = align(raw, self.kernel, self.kernel_shift, causal=True, start=start, real_BM=real_BM)
        aligned, _ = cache.aligned.append(rows, rows[..., :0])
        return keys, aligned

    def _pattern(self, mask: GivenMask, query: Tensor, key: Tensor, offset: int) -> Pattern:
        pattern = Pattern.of(
            *(mask, query.shape[0], query.shape[1], offset + key.shape[1]),
            heads=self.num_heads,
            causal=self.causal,
            offset=offset,
            crosses=query is not key,
        )
        # W_A mixes the values of all positions
        return pattern if self.kernel is None else pattern.only(("padding",), "'super'")

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tokens in (("x", query), ("key", key), ("value", value)):
            if tokens.ndim != 3 or tokens.shape[-1] != self.dim:
                raise ValueError(f"{name} must be (batch, tokens, {self.dim}), got {tuple(tokens.shape)}")
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            batches = tuple(x.shape[0] for x in (query, key, value))
            raise ValueError(f"query, key and value must have one batch size, got {batches}")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"key and value must have as many tokens, got {key.shape[1]} and {value.shape[1]}")
        self._check_length(key.shape[1])

    def _check_length(self, tokens: int) -> None:
        if self.kernel is not None and tokens > self.max_length:
            raise ValueError(f"max_length is {self.max_length}, the size of W_A; got {tokens} tokens")


class _AlignedCache(KVCache):
    """Raw tokens, and the rows of W_A v that belong to them."""

    def __init__(self) -> None:
        super().__init__()
        self.aligned = KVCache()

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.aligned.nbytes
