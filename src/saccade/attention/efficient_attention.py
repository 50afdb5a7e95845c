"""Efficient Attention: keys and values meet first, so that cost is linear in the number of positions.

Shen et al., "Efficient Attention: Attention with Linear Complexities", arXiv 1812.01243.

    E(Q, K, V) = rho_q(Q) (rho_k(K)^T V)

    softmax:  rho_q = softmax of each row (over a position's channels), rho_k = softmax of each column (over positions)
    scaling:  rho_q(Y) = rho_k(Y) = Y / sqrt(n)                          E = (Q K^T / n) V exactly

Each of the d_k columns of rho_k(K) is an attention map over all positions, the same for every query; it yields one
"global context vector". A position's query says how to combine them. With softmax rho_q(Q) rho_k(K)^T is a
row-stochastic n x n matrix that is never formed; it resembles softmax(Q K^T), and does not equal it.

| paper | here |
|---|---|
| n | N queries, M keys |
| d_k, d_v | key_channels, value_channels over all heads; head_dim of the layer |
| rho_k(K)^T V | the context (B, H, D, E), all that is kept of the positions |
| E, W_r | `efficient_attend`, out_proj |

What the paper leaves open, or does not have:
- heads: the paper has one; the authors' code splits d_k and d_v in contiguous groups, as here.
- padding: a padded key has weight 0; scaling counts the valid positions. A sequence of padding alone gives zeros.
- a causal form is NOT in the paper. The reading here is that position i sees the paper's formula on positions j <= i:
  rho_k becomes a cumulative softmax and n becomes i + 1. With z_i = logsumexp_{j<=i} k_j per channel this is a
  recurrence whose weights sum to one, S_i = (1 - w_i) S_{i-1} + w_i v_i, w_i = exp(k_i - z_i), so nothing overflows.
- no scale 1 / sqrt(d_k) anywhere, no norm, no zero initialisation, as in the authors' code.

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D key width, E value width; in maps
H and W are height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.cache import StateCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.backends.sdpa import in_rows
from saccade.ops.grad import needs_grad
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend
from saccade.ops.masks import Dense, Mask, Padding
from saccade.ops.memory import large_empty

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Normalization = Literal["softmax", "scaling"]

#: positions of a piece of a long causal sequence
_PIECE = 2048


class EfficientState(NamedTuple):
    """What the causal form keeps: context_BHDE, and total_BK1D (softmax: z, log of the sum of exponentials) or
    total_B111 (scaling: valid positions seen)."""

    context: Tensor
    total: Tensor


def efficient_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    normalization: Normalization = "softmax",
    state: EfficientState | None = None,
    return_state: bool = False,
) -> Any:
    """rho_q(Q) (rho_k(K)^T V), see the equations at the top of this file.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; N = M where causal.
        mask: bool (B, M), True = real token, or `saccade.masks.padding`.
        causal: position i sees positions j <= i (not in the paper).
        state: of an earlier causal call, whose positions come before these; return_state: also return the new one.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit, the mask is of pairs, or there is a state without causality.

    >>> import torch
    >>> q, k, v = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.ones(1, 1, 5, 2)
    >>> bool(torch.allclose(efficient_attend(q, k, v), v))                # the weights of a query sum to one
    True
    """
    if normalization not in ("softmax", "scaling"):
        raise ValueError(f"normalization must be 'softmax' or 'scaling', got {normalization!r}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True: otherwise every position sees all others")
    valid_B1M1 = _valid(mask, k_BKMD)
    if causal:
        out, after = _causal(q_BHND, k_BKMD, v_BKME, valid_B1M1, state, normalization)
        return (out, after) if return_state else out
    if _fits_pieces(max(q_BHND.shape[2], k_BKMD.shape[2]), q_BHND, k_BKMD, v_BKME):
        return _in_pieces(q_BHND, k_BKMD, v_BKME, valid_B1M1, normalization)
    if normalization == "softmax":
        q_BHND = q_BHND.softmax(-1)
        if valid_B1M1 is None:
            k_BKMD = k_BKMD.softmax(2)
        else:  # the smallest number and not -inf: a row without any real token would give NaN
            k_BKMD = k_BKMD.masked_fill(~valid_B1M1, torch.finfo(k_BKMD.dtype).min).softmax(2) * valid_B1M1
    else:
        n = k_BKMD.shape[2] if valid_B1M1 is None else valid_B1M1.sum(2, keepdim=True)
        root = torch.as_tensor(n, dtype=torch.float32, device=k_BKMD.device).clamp(min=1).sqrt().to(k_BKMD.dtype)
        q_BHND, k_BKMD = q_BHND / root, k_BKMD / root
        if valid_B1M1 is not None:
            k_BKMD = k_BKMD * valid_B1M1
    return linear_attend(q_BHND, k_BKMD, v_BKME, causal=False)


def _fits_pieces(length: int, *inputs: Tensor) -> bool:
    """Long enough for pieces, and nothing of them has to be remembered."""
    return length > _PIECE and not needs_grad(*inputs) and not torch.compiler.is_compiling()


def _in_pieces(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, normalization: Normalization) -> Tensor:
    """The same without causality, in pieces whose maps stay in cache and take no memory that grows."""
    (B, H, N, D), (K, M), E = q.shape, k.shape[1:3], v.shape[3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lowest = torch.finfo(wide).min

    def keys(piece: slice) -> Tensor:
        key = k[:, :, piece].to(wide)
        return key if valid is None else key.masked_fill(~valid[:, :, piece], lowest)

    top = k.new_full((B, K, 1, D), lowest, dtype=wide)
    for start in range(0, M, _PIECE):
        top = torch.maximum(top, keys(slice(start, start + _PIECE)).amax(2, keepdim=True))
    context, total = q.new_zeros(B, K, D, E, dtype=wide), q.new_zeros(B, K, 1, D, dtype=wide)
    for start in range(0, M, _PIECE):
        piece = slice(start, start + _PIECE)
        weight = (keys(piece) - top).exp_() if normalization == "softmax" else k[:, :, piece].to(wide)
        if valid is not None:
            weight = weight * valid[:, :, piece]
        context += weight.mT @ v[:, :, piece].to(wide)
        total += weight.sum(2, keepdim=True)
    if normalization == "softmax":
        # no real token: no sum, and nothing to divide
        context /= total.clamp(min=torch.finfo(wide).tiny).mT
    else:
        context /= M if valid is None else valid.sum((1, 2, 3)).clamp(min=1)[:, None, None, None]
    out = large_empty((B, H, N, E), q.dtype, q.device)
    for start in range(0, N, _PIECE):
        piece = slice(start, start + _PIECE)
        query = q[:, :, piece].to(wide)
        query = query.softmax(-1) if normalization == "softmax" else query
        out[:, :, piece] = (query.unflatten(1, (K, -1)) @ context[:, :, None]).flatten(1, 2)
    return out


def _causal(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None, normalization: Normalization
) -> tuple[Tensor, EfficientState]:
    form = _causal_softmax if normalization == "softmax" else _causal_scaling
    N = q.shape[2]
    if k.shape[2] != N or not _fits_pieces(N, q, k, v, *(state or ())):
        return form(q, k, v, valid, state)
    # a long sequence piece by piece, so that sums and weights stay in cache and take no memory that grows
    out = large_empty((*q.shape[:3], v.shape[3]), q.dtype, q.device)
    for start in range(0, N, _PIECE):
        piece = slice(start, start + _PIECE)
        real = None if valid is None else valid[:, :, piece]
        out[:, :, piece], state = form(q[:, :, piece], k[:, :, piece], v[:, :, piece], real, state)
    assert state is not None
    return out, state


def _causal_softmax(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None
) -> tuple[Tensor, EfficientState]:
    H, dtype = q.shape[1], q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    nothing = torch.finfo(wide).min / 2  # as a logarithm: far below any key, and still finite
    q, k, v = q.to(wide).softmax(-1), k.to(wide), v.to(wide)
    if valid is not None:
        k = k.masked_fill(~valid, nothing)
    before = k.new_full((*k.shape[:2], 1, k.shape[3]), nothing) if state is None else state.total
    total = torch.cat([before, k], 2).logcumsumexp(2)
    weight = (k - total[:, :, 1:]).exp()
    if valid is not None:
        weight = weight * valid
    out, context = linear_attend(
        q,
        weight,
        v,
        decay=repeat_heads(1.0 - weight, H),  # not exp(z_{i-1} - z_i): this way weights sum to 1 at any length
        state=None if state is None else state.context,
        return_state=True,
    )
    return out.to(dtype), EfficientState(context, total[:, :, -1:])


def _causal_scaling(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None
) -> tuple[Tensor, EfficientState]:
    ones = q.new_ones(k.shape[0], 1, k.shape[2], 1, dtype=torch.float32)
    counts = (ones if valid is None else ones * valid).cumsum(2)
    if valid is not None:
        k = k * valid
    if state is not None:
        counts = counts + state.total
    out, context = linear_attend(q, k, v, state=None if state is None else state.context, return_state=True)
    start = ones.new_zeros(k.shape[0], 1, 1, 1) if state is None else state.total
    after = torch.cat([start, counts], 2)[:, :, -1:]
    return (out / counts.clamp(min=1)).to(q.dtype), EfficientState(context, after)


def _valid(mask: Tensor | Mask | None, k_BKMD: Tensor) -> Tensor | None:
    """The real tokens, (B, 1, M, 1)."""
    if mask is None:
        return None
    B, M = k_BKMD.shape[0], k_BKMD.shape[2]
    valid = mask
    if isinstance(mask, Padding):
        valid = mask.valid_BM
    elif isinstance(mask, Dense) and mask.mask_BHNM.shape[1:3] == (1, 1):
        valid = mask.mask_BHNM[:, 0, 0]
    if not isinstance(valid, Tensor):
        raise ValueError(f"efficient attention takes padding masks only: its maps are one for all queries, got {mask}")
    if valid.dtype != torch.bool or valid.ndim != 2 or valid.shape[0] not in (1, B) or valid.shape[1] != M:
        raise ValueError(f"mask must be bool (batch, keys) = {(B, M)}, got {valid.dtype} {tuple(valid.shape)}")
    return valid[:, None, :, None]


class EfficientAttention(QKVAttention):
    """Efficient attention on token sequences; without positions, as in the paper.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, qkv_bias, proj_bias: as in `QKVAttention`, with biases by
            default, which the paper's 1x1 convolutions have. causal=True is not in the paper.
        normalization: "softmax" or "scaling".

    Raises:
        ValueError: if head counts do not divide, or the normalisation is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        normalization: Normalization = "softmax",
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=False,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
        )
        _check_normalization(normalization)
        self.normalization: Normalization = normalization

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        return efficient_attend(q_BHND, k_BKMD, v_BKME, mask=mask, causal=causal, normalization=self.normalization)

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """Args:
            mask: bool (B, M), True = real token. With a cache, M counts all tokens so far.
            cache: of `new_cache`; the sequence goes on where it ended.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        if cache is None:
            return super().forward(x_BNC, context_BMC, mask=mask)
        self._check(x_BNC, context_BMC, None)
        if not self.causal or context_BMC is not None:
            raise ValueError("only a causal layer decodes with a cache, and without context")
        if cache.state is not None and cache.state.context.shape[0] != x_BNC.shape[0]:
            raise ValueError(f"the cache is for {cache.state.context.shape[0]} sequences, got {x_BNC.shape[0]}")
        total = cache.length + x_BNC.shape[1]
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (x_BNC.shape[0], total):
                raise ValueError(f"with a cache the mask must be (batch, all tokens) = {(x_BNC.shape[0], total)}")
            mask = mask[:, cache.length :]
        with torch.no_grad():
            q_BHND, k_BKMD = self._queries_and_keys(x_BNC, None, 0)
            v_BKME = self._heads(self.v_proj(x_BNC), self.num_kv_heads)
            out, cache.state = efficient_attend(
                q_BHND,
                k_BKMD,
                v_BKME,
                mask=mask,
                causal=True,
                normalization=self.normalization,
                state=cache.state,
                return_state=True,
            )
            cache.length = total
            return self.out_proj(out.transpose(1, 2).flatten(2))

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty cache; its state comes with the first tokens, in float32 (float64 for a float64 layer)."""
        return StateCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, normalization={self.normalization!r}"


class EfficientAttention2d(nn.Module):
    """The paper's module on feature maps: x + W_r E(x W_q, x W_k, x W_v), any height and width.

    Args:
        channels: c.
        num_heads: groups of the channels of keys and values.
        key_channels, value_channels: d_k, d_v over all heads; c / 2 where None.
        normalization: "softmax" or "scaling".
        residual: add the input.

    Raises:
        ValueError: if the heads do not divide key_channels and value_channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        normalization: Normalization = "softmax",
        residual: bool = True,
    ) -> None:
        super().__init__()
        key_channels = max(1, channels // 2) if key_channels is None else key_channels
        value_channels = max(1, channels // 2) if value_channels is None else value_channels
        if num_heads < 1 or key_channels % num_heads or value_channels % num_heads:
            raise ValueError(
                f"num_heads must divide key_channels ({key_channels}) and value_channels ({value_channels}), "
                f"got {num_heads}"
            )
        _check_normalization(normalization)
        self.channels, self.num_heads, self.residual = channels, num_heads, residual
        self.normalization: Normalization = normalization
        self.k_proj = nn.Conv2d(channels, key_channels, 1)
        self.q_proj = nn.Conv2d(channels, key_channels, 1)
        self.v_proj = nn.Conv2d(channels, value_channels, 1)
        self.out_proj = nn.Conv2d(value_channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Raises:
        ValueError: if x is not (B, channels, H, W).
        """
        self._check(x_BCHW)
        out_BHNE = self.mix(x_BCHW, self._heads(self.v_proj(x_BCHW)))
        out_BCHW = self.out_proj(out_BHNE.mT.flatten(1, 2).unflatten(-1, x_BCHW.shape[2:]))
        return x_BCHW + out_BCHW if self.residual else out_BCHW

    def mix(self, x_BCHW: Tensor, values_BHME: Tensor) -> Tensor:
        """This module's weights on `x_BCHW`, applied to given values of its H W positions (row-major)."""
        q_BHND, k_BHND = self._heads(self.q_proj(x_BCHW)), self._heads(self.k_proj(x_BCHW))
        return efficient_attend(q_BHND, k_BHND, values_BHME, normalization=self.normalization)

    def maps(self, x_BCHW: Tensor) -> Tensor:
        """The global attention maps rho_k(K) (B, key_channels, H, W): what each key channel looks at."""
        self._check(x_BCHW)
        k_BCHW = self.k_proj(x_BCHW)
        if self.normalization == "softmax":
            return k_BCHW.flatten(2).softmax(-1).view_as(k_BCHW)
        return k_BCHW / (k_BCHW.shape[2] * k_BCHW.shape[3]) ** 0.5

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalization={self.normalization!r}"

    def _heads(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(2).unflatten(1, (self.num_heads, -1)).mT

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")


def _check_normalization(normalization: str) -> None:
    if normalization not in ("softmax", "scaling"):
        raise ValueError(f"normalization must be 'softmax' or 'scaling', got {normalization!r}")


# The authors' module.


def _build(args: dict[str, Any]) -> nn.Module:
    return EfficientAttention2d(
        args["in_channels"],
        args["head_count"],
        key_channels=args["key_channels"],
        value_channels=args["value_channels"],
    )


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"keys": "k_proj", "queries": "q_proj", "values": "v_proj", "reprojection": "out_proj"}
    split = ((name.partition("."), tensor) for name, tensor in state.items())
    return {f"{names.get(first, first)}.{rest}": tensor for (first, _, rest), tensor in split}


# The claim: what is far away on a map, at a cost linear in its positions.


class DotProduct2d(EfficientAttention2d):
    """The non-local block to compare with: the same projections around softmax(Q K^T) V."""

    def mix(self, x_BCHW: Tensor, values_BHME: Tensor) -> Tensor:
        q_BHND, k_BHND = self._heads(self.q_proj(x_BCHW)), self._heads(self.k_proj(x_BCHW))
        q_BHND, k_BHND, values_BHME = (in_rows(x) for x in (q_BHND, k_BHND, values_BHME))
        return F.scaled_dot_product_attention(q_BHND, k_BHND, values_BHME, scale=1.0)


def _far_lookup(batch: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (B, 8, side, side) and labels (B, side, side), -1 where nothing is asked.

    Each of 4 names (channels 0 to 3) stands at one place together with one of 4 colours (channels 4 to 7), and alone at
    4 other places, where the label is the colour beside its twin, wherever on the map that is.
    """
    names, asked, N = 4, 4, side * side
    place = torch.rand(batch, N, generator=generator).argsort(-1)[:, : names * (1 + asked)].view(batch, names, -1)
    colour = torch.randint(4, (batch, names), generator=generator)
    x, label = torch.zeros(batch, names + 4, N), torch.full((batch, N), -1)
    row = torch.arange(batch)[:, None, None]
    x[row, torch.arange(names)[:, None], place] = 1.0
    x[row[..., 0], names + colour, place[:, :, 0]] = 1.0
    label.scatter_(1, place[:, :, 1:].flatten(1), colour.repeat_interleave(asked, 1))
    return x.unflatten(-1, (side, side)), label.unflatten(-1, (side, side))


def _claim(lab: Lab) -> ClaimResult:
    blocks: dict[str, Callable[[], nn.Module]] = {
        "efficient": lambda: EfficientAttention2d(32, key_channels=32, value_channels=32),
        "dot_product": lambda: DotProduct2d(32, key_channels=32, value_channels=32),
        "no_attention": nn.Identity,
    }
    measured = {f"{name}_accuracy": _learn(lab, block, name) for name, block in blocks.items()}
    ratios = []
    for n in lab.progress(lab.size((4096, 16384), (64, 256)), "time by positions"):
        q, k, v = torch.randn(3, 1, 1, n, 64, generator=lab.generator())
        dense = lab.seconds(partial(F.scaled_dot_product_attention, q, k, v), 3)
        ratios.append(dense / lab.seconds(partial(efficient_attend, q, k, v), 3))
        measured[f"dot_product_time_over_efficient_at_{n}_positions"] = ratios[-1]
    efficient, dense, none = (measured[f"{name}_accuracy"] for name in blocks)
    holds = efficient > 0.9 * dense and efficient > none + 0.3 and ratios[-1] > 2.5 * ratios[0]
    return ClaimResult(measured, holds=holds, note="chance is 0.25; four times the positions in the last two figures")


def _learn(lab: Lab, block: Callable[[], nn.Module], name: str) -> float:
    """Held-out accuracy at the places asked for, of a small network around the block."""
    side, batch = lab.size(12, 8), lab.size(32, 2)
    with lab.seeded():
        first, second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        model = nn.Sequential(first, nn.ReLU(), block(), second, nn.ReLU(), nn.Conv2d(32, 4, 1))

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1], ignore_index=-1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield _far_lookup(batch, side, generator)

    lab.train(model, batches(), loss, 1000, lr=1e-2, description=name)
    x, label = _far_lookup(lab.size(256, 2), side, torch.Generator().manual_seed(10**6 + lab.seed))
    with torch.no_grad():
        right = model.eval()(x).argmax(1) == label
    return right[label >= 0].float().mean().item()


register(
    "efficient-attention",
    kind="sequence",
    summary="Keys and values meet first: softmax over positions and over channels instead of pairs; linear cost.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/kernel",
    complexity="time O(N D E), extra memory O(D E)",
    note="The causal form (cumulative softmax, decoding with a constant state) is not in the paper. On feature maps: "
    "saccade.attention.efficient_attention.EfficientAttention2d, which the authors' port builds.",
    invariants=(
        "with scaling it equals (Q K^T / n) V",
        "with softmax its implicit weights are not negative, each row sums to 1, and A V = E",
        "permuting positions permutes the output",
        "one key channel per head gives every position the same average",
        "one head equals the plain definition; W_r = 0 makes the feature-map module the identity",
        "the causal form at i is the paper's form on the positions up to i",
    ),
    build=EfficientAttention,
    example={"dim": 16, "num_heads": 4},
    ports=(
        AuthorsPort(
            "efficient_attention",
            build=_build,
            convert=_convert,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
    ),
    claim=Claim(
        paper="same performance as dot-product attention with linear instead of quadratic memory and computation",
        expected="a conv net that must look up what stands far away on a map: with efficient attention 0.9 of the "
        "accuracy with dot-product attention or more, 0.3 above none; 4 times the positions: time ratio > 2.5 times",
        run=_claim,
    ),
)
