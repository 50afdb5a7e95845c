"""Lightning attention in its two published layers, and TransNormerLLM: its block, its cache, the language model.

Shape letters: B batch, N tokens, M tokens so far, C channels, H heads, D query/key width, E value width, I hidden
channels (H x E).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.lightning.operator import Form, Norm, TransNormerOutput, decay_slopes
from saccade.layers.initialization import start_language_model
from saccade.layers.mlp import GatedMLP
from saccade.layers.norms import SimpleRMSNorm
from saccade.ops.autocast import working_dtype
from saccade.ops.constants import numbers
from saccade.ops.linear import linear_attend, linear_step
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import places


class LRPE(nn.Module):
    """x -> [x cos(theta t), x sin(theta t)], t the position: q_i . k_j becomes sum_c q_ic k_jc cos(theta_c (i - j)).

    theta (H, 1, D) is learned, from 10000^(-2 m / (H D)), m = 0..HD-1 over heads and channels.

    Args:
        num_heads, head_dim: H and D.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        m = torch.arange(num_heads * head_dim, dtype=torch.float64)
        theta = 10000 ** (-2 * m / (num_heads * head_dim))
        self.theta = nn.Parameter(theta.float().view(num_heads, 1, head_dim))

    def forward(self, x_BHND: Tensor, start: int = 0) -> Tensor:
        theta_H1D = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        positions_N = start + places(x_BHND.shape[2], x_BHND.device)
        angle_HND = theta_H1D * positions_N[:, None].to(theta_H1D.dtype)
        return torch.cat([x_BHND * angle_HND.cos(), x_BHND * angle_HND.sin()], -1).to(x_BHND.dtype)


@dataclass
class LightningCache:
    """What a layer keeps of the past, of the same size however many tokens there were.

    Attributes:
        state: KV (B, H, D, E).
        length: tokens seen.
    """

    state: Tensor
    length: int = 0

    @property
    def nbytes(self) -> int:
        return self.state.numel() * self.state.element_size()


class LightningAttention(nn.Module):
    """Lightning attention between projections, in either published form.

    "transnormer": y = Wo [SRMSNorm(o) * u],  q, k = SiLU(x Wq), SiLU(x Wk);  v, u = x Wv, x Wu
    "gated":       y = Wo [LayerNorm(o) * sigmoid(W_b W_a x)],  q, k, v = SiLU of projections

    with o = lightning_attend over heads of hidden_dim / num_heads, the norm over all heads together.

    Args:
        dim: channels C.
        num_heads: H.
        causal: must be True.
        form: "transnormer" or "gated".
        hidden_dim: I, dim where None.
        layer_index, num_layers: where the layer stands, for the slopes.
        slopes: decay rates of the heads, instead of `decay_slopes`.
        lrpe: learned rotary positions on q and k; None: in layer 0 of the transnormer form.
        norm: of the output, "srms", "layer" or "rms"; None: as the form has it.
        bias: of all projections.

    Raises:
        ValueError: if not causal, or the sizes do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        form: Form = "transnormer",
        hidden_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
        slopes: Sequence[float] | None = None,
        lrpe: bool | None = None,
        norm: Norm | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        hidden = dim if hidden_dim is None else hidden_dim
        if not causal:
            raise ValueError("lightning attention is causal only, got causal=False")
        if dim < 1 or num_heads < 1 or hidden % num_heads:
            raise ValueError(f"num_heads must divide hidden_dim ({hidden}), got {num_heads}")
        if form not in ("transnormer", "gated"):
            raise ValueError(f"form must be 'transnormer' or 'gated', got {form!r}")
        slopes = decay_slopes(num_heads, layer_index, num_layers) if slopes is None else slopes
        if len(slopes) != num_heads or min(slopes) < 0:
            raise ValueError(f"slopes must be {num_heads} numbers >= 0, got {list(slopes)}")
        self.dim, self.num_heads, self.hidden_dim, self.form, self.causal = dim, num_heads, hidden, form, causal
        # numbers, not a buffer: half precision would round the rate of decay
        self.slopes = tuple(float(slope) for slope in slopes)
        if form == "transnormer":
            self.qkvu_proj = nn.Linear(dim, 4 * hidden, bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, hidden, bias=bias) for _ in range(3))
            rank = hidden // num_heads
            self.gate = nn.Sequential(nn.Linear(dim, rank, bias=bias), nn.Linear(rank, hidden, bias=bias))
        wants_lrpe = form == "transnormer" and layer_index == 0 if lrpe is None else lrpe
        self.lrpe = LRPE(num_heads, hidden // num_heads) if wants_lrpe else None
        self.norm = _norm(("srms" if form == "transnormer" else "layer") if norm is None else norm, hidden)
        self.out_proj = nn.Linear(hidden, dim, bias=bias)
        self.apply(start_language_model)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: LightningCache | None = None,
    ) -> Tensor:
        """The layer's output (B, N, C) for `x_BNC`, which continues what `cache` has seen.

        Args:
            mask: bool (B, M), True = real token; others get v = 0. With a cache, M counts all tokens so far.
            cache: of `new_cache`; the sequence goes on where it ended.

        Raises:
            ValueError: if the arguments do not fit together, or there is a context.
        """
        start = 0 if cache is None else cache.length
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        if context_BMC is not None:
            raise ValueError("lightning attention has no cross-attention: its decay needs one sequence")
        if cache is not None and cache.state.shape[0] != x_BNC.shape[0]:
            raise ValueError(f"the cache is for {cache.state.shape[0]} sequences, got {x_BNC.shape[0]}")
        q_BHND, k_BHND, v_BNI, u_BNI = self._project(x_BNC, start)
        v_BHNE = self._heads(v_BNI)
        if cache is None:
            out_BHNE = self._mix(q_BHND, k_BHND, v_BHNE, mask)
        else:
            with torch.no_grad():
                v_BHNE = _without_padding(v_BHNE, mask, start)
                step = linear_step if x_BNC.shape[1] == 1 else _parallel
                out_BHNE, cache.state = step(q_BHND, k_BHND, v_BHNE, cache.state, decay=self._decay(x_BNC))
                cache.length += x_BNC.shape[1]
        return self.out_proj(self.norm(out_BHNE.transpose(1, 2).flatten(2)) * u_BNI)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: GivenMask = None) -> Tensor:
        """This layer's weights on `x_BNC`, applied to given values (B, H, M, E); what `attention_map` calls."""
        q_BHND, k_BHND, _, _ = self._project(x_BNC, 0)
        return self._mix(q_BHND, k_BHND, values_BHME, mask)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LightningCache:
        """An empty state, in float32 (float64 for a float64 layer) whatever `dtype` is: it sums over time."""
        weight = self.out_proj.weight
        wide = working_dtype(dtype or weight.dtype)
        width = self.hidden_dim // self.num_heads
        shape = (batch_size, self.num_heads, width * (1 if self.lrpe is None else 2), width)
        return LightningCache(torch.zeros(shape, dtype=wide, device=weight.device if device is None else device))

    @torch.no_grad()
    def start_as_softmax(self) -> None:
        """Open the gate, where a bias can do so: softmax attention, in whose place the layer is put, has none."""
        if self.form == "gated":
            nn.init.zeros_(cast(nn.Linear, self.gate[-1]).weight)
        elif self.qkvu_proj.bias is not None:
            self.qkvu_proj.weight[-self.hidden_dim :] = 0
            self.qkvu_proj.bias[-self.hidden_dim :] = 1

    @torch.no_grad()
    def take_rotary(self, base: float) -> None:
        """Begin LRPE, where there is one, as rotary positions: channels c and c + D/2 turn by base^(-2 c / D).

        Args:
            base: of the rotary positions.
        """
        if self.lrpe is not None:
            theta_H1D, D = self.lrpe.theta, self.lrpe.theta.shape[-1]
            theta_H1D.copy_(base ** (-2.0 * (torch.arange(D, device=theta_H1D.device) % max(1, D // 2)) / D))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, form={self.form!r}, hidden_dim={self.hidden_dim}"

    def _project(self, x_BNC: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.form == "transnormer":
            q, k, v, u = self.qkvu_proj(x_BNC).chunk(4, -1)
        else:
            q, k, v = self.q_proj(x_BNC), self.k_proj(x_BNC), F.silu(self.v_proj(x_BNC))
            u = torch.sigmoid(self.gate(x_BNC))
        q, k = self._heads(F.silu(q)), self._heads(F.silu(k))
        if self.lrpe is not None:
            q, k = self.lrpe(q, start), self.lrpe(k, start)
        return q, k, v, u

    def _mix(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, mask: GivenMask) -> Tensor:
        return linear_attend(q_BHND, k_BHND, _without_padding(v_BHNE, mask, 0), decay=self._decay(q_BHND))

    def _decay(self, like: Tensor) -> Tensor:
        return numbers(self.slopes, like, torch.float64).neg().exp()

    def _heads(self, x_BNI: Tensor) -> Tensor:
        return x_BNI.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # a checkpoint may carry the slopes it was trained with
        slopes = state_dict.pop(f"{prefix}slopes", None)
        if slopes is not None:
            self.slopes = tuple(slopes.flatten().tolist())
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _parallel(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, decay: Tensor) -> tuple[Tensor, Tensor]:
    return linear_attend(q, k, v, decay=decay, state=state, return_state=True)


def _without_padding(v_BHNE: Tensor, mask: GivenMask, start: int) -> Tensor:
    B, N = v_BHNE.shape[0], v_BHNE.shape[2]
    pattern = Pattern.of(mask, B, N, start + N, causal=True, offset=start)
    real_BM = pattern.only(("padding",), "lightning attention").valid_BM
    return v_BHNE if real_BM is None else v_BHNE.masked_fill(~real_BM[:, None, start:, None], 0.0)


def _norm(kind: str, width: int) -> nn.Module:
    if kind not in ("srms", "layer", "rms"):
        raise ValueError(f"norm must be 'srms', 'layer' or 'rms', got {kind!r}")
    return (
        SimpleRMSNorm() if kind == "srms" else nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)
    )


class SGLU(GatedMLP):
    """y = [(x W1) * (x W2)] W3: a gated linear unit without any activation function.

    Args:
        dim, hidden_dim: widths of x and of the products.
        bias: of all three.
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__(dim, hidden_dim, activation="identity", bias=bias)


class TransNormerBlock(nn.Module):
    """x <- x + GLA(norm(x));  x <- x + SGLU(norm(x)).

    Args:
        dim, num_heads: `LightningAttention`'s; attention: its other arguments.
        glu_dim: hidden channels of the SGLU.
        norm: of the inputs and of the attention's output, "srms", "layer" or "rms".
        bias: of all projections.

    Raises:
        ValueError: as `LightningAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, glu_dim: int, *, norm: Norm = "srms", bias: bool = False, **attention: Any
    ) -> None:
        super().__init__()
        self.attention_norm, self.glu_norm = _norm(norm, dim), _norm(norm, dim)
        self.attention = LightningAttention(dim, num_heads, norm=norm, bias=bias, **attention)
        self.glu = SGLU(dim, glu_dim, bias)
        self.glu.apply(start_language_model)

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None, cache: LightningCache | None = None) -> Tensor:
        x_BNC = x_BNC + self.attention(self.attention_norm(x_BNC), mask=mask, cache=cache)
        return x_BNC + self.glu(self.glu_norm(x_BNC))

    def new_cache(self, batch_size: int, **options: Any) -> LightningCache:
        return self.attention.new_cache(batch_size, **options)


@dataclass
class TransNormerCache:
    """The caches of all layers."""

    layers: list[LightningCache]

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class TransNormerLM(nn.Module):
    """TransNormerLLM: embedding (times sqrt(dim)), blocks, norm, and a head of its own weights.

    Args:
        vocab_size, dim, num_layers, num_heads: the usual.
        glu_dim: hidden channels of the SGLU; hidden_dim: of the attention, dim where None.
        lrpe: whether each layer has LRPE; None: the first alone.
        norm, bias: of all layers.
        scale_embedding: multiply embeddings by sqrt(dim).
        slopes: decay rates of all layers, instead of `decay_slopes`.

    Raises:
        ValueError: if sizes do not fit.
    """

    #: parameters of the published sizes; the card names 1b and 7b as recalled
    CONFIGS = {
        "385m": {"vocab_size": 64000, "dim": 1024, "num_layers": 24, "num_heads": 8, "glu_dim": 2816},
        "1b": {"vocab_size": 64000, "dim": 2048, "num_layers": 16, "num_heads": 16, "glu_dim": 5632},
        "7b": {"vocab_size": 64000, "dim": 4096, "num_layers": 30, "num_heads": 32, "glu_dim": 11264},
    }

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        glu_dim: int,
        hidden_dim: int | None = None,
        lrpe: Sequence[bool] | None = None,
        norm: Norm = "srms",
        bias: bool = False,
        scale_embedding: bool = True,
        slopes: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if lrpe is not None and len(lrpe) != num_layers:
            raise ValueError(f"lrpe must have one entry per layer ({num_layers}), got {len(lrpe)}")
        self.scale = math.sqrt(dim) if scale_embedding else 1.0
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            TransNormerBlock(
                dim, num_heads, glu_dim, norm=norm, bias=bias, hidden_dim=hidden_dim, layer_index=layer,
                num_layers=num_layers, lrpe=layer == 0 if lrpe is None else bool(lrpe[layer]), slopes=slopes,
            )
            for layer in range(num_layers)
        )  # fmt: skip
        self.norm = _norm(norm, dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in (self.embedding, self.head):
            start_language_model(module)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> TransNormerLM:
        """A published size: "385m", "1b" or "7b"; `changes` override its arguments.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in cls.CONFIGS:
            raise ValueError(f"config must be one of {', '.join(cls.CONFIGS)}, got {name!r}")
        arguments: dict[str, Any] = {**cls.CONFIGS[name], **changes}
        return cls(**arguments)

    def forward(
        self, tokens_BN: Tensor, *, mask: GivenMask = None, cache: TransNormerCache | None = None
    ) -> TransNormerOutput:
        """Logits of the next token after each of `tokens_BN` (int64); mask and cache as in `LightningAttention`.

        Raises:
            ValueError: if the tokens are no integers (B, N).
        """
        if tokens_BN.ndim != 2 or tokens_BN.is_floating_point():
            raise ValueError(f"tokens must be integers (batch, tokens), got {tokens_BN.dtype} {tuple(tokens_BN.shape)}")
        x_BNC = self.embedding(tokens_BN) * self.scale
        for index, layer in enumerate(self.layers):
            x_BNC = layer(x_BNC, mask=mask, cache=None if cache is None else cache.layers[index])
        return TransNormerOutput(self.head(self.norm(x_BNC)))

    def new_cache(self, batch_size: int, **options: Any) -> TransNormerCache:
        return TransNormerCache([layer.new_cache(batch_size, **options) for layer in self.layers])  # type: ignore[operator]
