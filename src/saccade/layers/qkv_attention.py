"""The layer around any function of (q, k, v): projections, heads, rotary positions, cache, output projection.

    q, k, v = heads(x Wq), heads(c Wk), heads(c Wv);   y = concat(attend(q, k, v)) Wo,   c = context or x

A call is four steps, of which a subclass gives `attend` and may replace any other: `project` makes queries, keys and
values (and what else the mechanism reads off its tokens, which is handed on), `remember` joins them to what a cache
holds, `attend` is the mechanism, `out` joins the heads. The mask is resolved once, before; `takes` says what it may
be. A mechanism that is called with more than tokens, mask and cache names it in a `forward` of its own, which hands it
to `steps`, and so to `project`.

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D head dim, E width of given values.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.layers.cache import Cache, KVCache
from saccade.layers.placement import check_placed
from saccade.layers.pretrained import copy_affine, read_softmax
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import EVERYTHING, GivenMask, Pattern, Said
from saccade.ops.rope import rotate
from saccade.ops.sharding import in_force, places, refuse_parts, whole

if TYPE_CHECKING:
    from typing_extensions import Self


class QKVAttention(nn.Module):
    """Base of the mechanisms that are a function of queries, keys and values; a subclass gives `attend`.

    Args:
        dim: channels C of input and output.
        num_heads: query heads H.
        causal: no token attends to a later one.
        num_kv_heads: key and value heads K, a divisor of H (grouped-query attention); H where None.
        head_dim: D, dim / num_heads where None.
        rope: rotary positions on queries and keys (self-attention only).
        rope_base: their base.
        qkv_bias, proj_bias: biases of the projections.

    Raises:
        ValueError: if the head counts do not divide.
    """

    #: what a mask may say, beside the layer's own causality
    takes: tuple[Said, ...] = EVERYTHING
    #: the same where there is a cache
    takes_decoding: tuple[Said, ...] = EVERYTHING
    #: whether tokens may be one rank's part of a sequence (`saccade.parallel`); a class that has an `attend` of its own
    #: says so itself
    takes_parts: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "attend" in vars(cls) and "takes_parts" not in vars(cls):
            cls.takes_parts = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim and num_heads must be positive, got {dim} and {num_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}) where head_dim is not given, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
        self.dim, self.num_heads, self.num_kv_heads, self.causal = dim, num_heads, num_kv_heads, causal
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if rope and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        self.rope, self.rope_base = rope, rope_base
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    def forward(
        self, x_BNC: Tensor, context_BMC: Tensor | None = None, *, mask: GivenMask = None, cache: Any = None
    ) -> Tensor:
        """Attend from `x_BNC` to itself, to `context_BMC`, or to what `cache` holds followed by itself.

        Args:
            mask: bool (B, M) or (B, 1, 1, M), True = real token; a 4-axis bool tensor or mask object over query-key
                pairs; or the `cu_seqlens` of packed sequences. With a cache, M counts all tokens so far.
            cache: of `new_cache`.

        Raises:
            ValueError: if the arguments do not fit together, or the mask says what this mechanism cannot take.
        """
        return self.steps(x_BNC, context_BMC, mask, cache)

    def steps(self, x_BNC: Tensor, context_BMC: Tensor | None, mask: GivenMask, cache: Any, **inputs: Any) -> Tensor:
        """A call; `inputs` are what `project` takes beside tokens and positions."""
        self.check(x_BNC, context_BMC, cache)
        start = 0 if cache is None else cache.length
        pattern = self.pattern(mask, x_BNC, context_BMC, cache)
        projected = self.project(x_BNC, context_BMC, self.positions(x_BNC, context_BMC, start), **inputs)
        if cache is None:
            return self.out(self.attend(*projected[:3], pattern, *projected[3:]))
        return self.out(self.remember(cache, *projected[:3], pattern, *projected[3:]))

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor | None = None, mask: GivenMask = None
    ) -> Tensor:
        """This layer's weights on `x_BNC`, applied to given values (B, H, M, E); what `attention_map` calls."""
        self.check(x_BNC, context, None)
        pattern = self.pattern(mask, x_BNC, context, None)
        q_BHND, k_BKMD, _, *more = self.project(x_BNC, context, self.positions(x_BNC, context, 0))
        return self.attend(q_BHND, repeat_heads(k_BKMD, self.num_heads), values_BHME, pattern, *more)

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries (B, H, N, D) of `x_BNC`, keys (B, K, M, D) and values (B, K, M, E) of the context or of `x_BNC`.

        Whatever comes after these three is handed to `remember` and `attend`.

        Args:
            positions: of the tokens, (N,); None where the layer has none.
        """
        source_BMC = x_BNC if context_BMC is None else context_BMC
        q_BHND = self.split_heads(self.q_proj(x_BNC), self.num_heads)
        k_BKMD = self.split_heads(self.k_proj(source_BMC), self.num_kv_heads)
        v_BKMD = self.split_heads(self.v_proj(source_BMC), self.num_kv_heads)
        if positions is not None:
            q_BHND, k_BKMD = self.rotate(q_BHND, positions), self.rotate(k_BKMD, positions)
        return q_BHND, k_BKMD, v_BKMD

    def remember(
        self,
        cache: Any,
        q_BHND: Tensor,
        k_BKND: Tensor,
        v_BKNE: Tensor,
        pattern: Pattern,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """The mechanism on what `cache` holds followed by the new tokens, which it then holds too."""
        k_BKMD, v_BKME = cache.append(k_BKND, v_BKNE)
        return self.attend(q_BHND, k_BKMD, v_BKME, pattern, *more)

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, *more: Any, **named: Any
    ) -> Tensor:
        """The mechanism, (B, H, N, E). Query 0 stands at key `pattern.offset`; what `project` adds has names here."""
        raise NotImplementedError

    def out(self, out_BHNE: Tensor) -> Tensor:
        """The heads joined, (B, N, C)."""
        return self.out_proj(out_BHNE.transpose(1, 2).flatten(2))

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        """Raise ValueError if tokens, context and cache do not fit together, or not the layer."""
        for name, tokens in (("x", x_BNC), ("context", context_BMC)):
            if tokens is not None and not isinstance(tokens, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(tokens).__name__}")
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.dim):
                raise ValueError(f"{name} must be (batch, tokens, {self.dim}), got {tuple(tokens.shape)}")
            if tokens is not None:
                check_placed(self, name, tokens)
        if context_BMC is not None and self.causal:
            raise ValueError("a causal layer takes no context")
        if context_BMC is not None and context_BMC.shape[0] != x_BNC.shape[0]:
            raise ValueError(f"x and context must have one batch size, got {x_BNC.shape[0]} and {context_BMC.shape[0]}")
        if cache is not None and not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
        if not self.takes_parts:
            refuse_parts(type(self).__name__)
        if in_force() is not None and cache is not None:
            raise ValueError("a cache holds a whole sequence: decode outside of saccade.parallel")

    def pattern(self, mask: GivenMask, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> Pattern:
        """A mask, and the layer's causality, as what is hidden from whom.

        Raises:
            ValueError: if the mask does not fit, or says what this mechanism cannot take.
        """
        batch, n, start = x_BNC.shape[0], whole(x_BNC.shape[1]), 0 if cache is None else cache.length
        m, crosses = (start + n, False) if context_BMC is None else (whole(context_BMC.shape[1]), True)
        pattern = Pattern.of(mask, batch, n, m, heads=self.num_heads, causal=self.causal, offset=start, crosses=crosses)
        if mask is not None:
            name = type(self).__name__
            pattern.only(self.takes, name)
            if cache is not None:
                pattern.only(self.takes_decoding, f"{name} with a cache")
        return pattern

    def positions(self, x_BNC: Tensor, context_BMC: Tensor | None, start: int) -> Tensor | None:
        """Rotary positions (N,) of the tokens; None in a layer without, and where there is a context."""
        if not self.rope or context_BMC is not None:
            return None
        if in_force() is not None:
            return places(x_BNC.shape[1], x_BNC.device)
        return torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)

    def split_heads(self, x_BNC: Tensor, heads: int) -> Tensor:
        """(B, N, heads D) -> (B, heads, N, D); fewer heads where a tensor-parallel plan gave some to others."""
        heads = min(heads, x_BNC.shape[-1] // self.head_dim)
        return x_BNC.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def rotate(self, x_BHND: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys, turned by their positions."""
        return rotate(x_BHND, positions, base=self.rope_base)

    @classmethod
    def from_softmax(cls, module: nn.Module, **arguments: Any) -> Self:
        """This mechanism with the projections, heads and positions of a trained softmax attention layer.

        Args:
            module: an `nn.MultiheadAttention`, a layer of this library, or one that names its projections as
                transformers and diffusers do (Llama, BERT, ViT, GPT-2 ...).
            arguments: the constructor's other arguments; they go before what the layer says of itself.

        Raises:
            ValueError: if the layer is no plain softmax attention, or has what this mechanism cannot take over.

        Warns:
            UserWarning: if the layer has a sliding window, which the mechanism has not.
        """
        layer = read_softmax(module)
        if layer.window is not None:
            warnings.warn(
                f"{type(module).__name__} sees {layer.window} tokens, its own among them, and this {cls.__name__} has "
                "no such window: it starts like the layer as far as these",
                stacklevel=2,
            )
        theirs: dict[str, Any] = {
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "rope": layer.rope,
            "rope_base": layer.rope_base,
            "qkv_bias": layer.qkv_bias,
            "proj_bias": layer.proj_bias,
        }
        if layer.causal is not None:
            theirs["causal"] = layer.causal
        accepted = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            theirs = {name: value for name, value in theirs.items() if name in accepted}
        new = cls(layer.dim, **{**theirs, **arguments})
        places = ((new.q_proj, layer.q), (new.k_proj, layer.k), (new.v_proj, layer.v), (new.out_proj, layer.out))
        for place, source in places:
            copy_affine(place, source)
        if layer.rope and not new.rope:
            raise ValueError(f"the layer has rotary positions and this {cls.__name__} has none")
        new.start_as_softmax()
        return new.to(device=layer.q[0].device, dtype=layer.q[0].dtype).train(module.training)

    def start_as_softmax(self) -> None:
        """Set what `from_softmax` does not copy so that the layer starts as its paper says; nothing here."""

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """An empty cache for `forward(x, cache=cache)`, which consumes a prompt, then token after token."""
        return KVCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, rope={self.rope}"
