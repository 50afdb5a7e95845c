"""AttentionEngine's two patterns, its published variants and its scheduling, over `saccade.attend` and `linear_attend`.

Chen et al., "AttentionEngine: A Versatile Framework for Efficient Attention Mechanisms on Diverse Hardware Platforms",
arXiv 2502.15349.

Parallel pattern: relevance, element-wise modification, row normalisation in online form, aggregation.

    s = q k^T;  s = score_mod(s);  mask;  (p, stats, c) = online(s, stats) tile by tile;  o = c o + p v;  epilogue

Recurrent pattern: maps on q, k, v and a log decay g feed a gated state.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = q_t^T S_t

What the paper calls an online function is a `saccade.ops.normalizers.Normalizer` here; the tiles, the backward pass and
the choice of tile sizes are the engine's (`stream`, `saccade.autotune`, `saccade.plan`). This room holds the published
instances, and the resource model by which the paper decides what fits on a GPU.

| paper's example | here |
|---|---|
| softmax, sigmoid, ReLU, retention | `softmax_attend`, `sigmoid_attend`, `relu_attend`, `retention_attend` |
| RetNet linear, gated retention (simple GLA), Mamba-2 | `retnet_attend`, `gated_retention_attend`, `mamba2_attend` |
| MLA decode (keys and values share a latent), split-KV decode | `mla_attend`, `split_attend` |
| device record, decider | `Device`, `H100`, `schedule` |

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E head dim of v, L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.constants import Constants
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend, retention_decay
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.normalizers import AbsSum, Normalizer, Retention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Variant = Literal["softmax", "sigmoid", "relu", "retention"]


class Identity(Normalizer):
    """The identity as online function: modified scores are the weights, 0 where masked."""

    def update(self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]) -> Any:
        return scores.masked_fill(~allowed, 0.0), state, None


def softmax_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v."""
    return attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=scale)


def sigmoid_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    bias: Tensor | float = 0.0,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """sigmoid(scale q k^T + bias) v, as the paper writes it: (tanh((s + bias) / 2) + 1) / 2, and no normalisation."""
    return attend(
        q_BHND,
        k_BKMD,
        v_BKME,
        mask=mask,
        scale=scale,
        score_mod=lambda s, *_: (((s + bias) / 2).tanh() + 1) / 2,
        normalize=Identity(),
    )


def relu_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """max(scale q k^T, 0) v."""
    return attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=scale, normalize="relu")


def retention_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    decay: Tensor,
    *,
    causal: bool = True,
    offset: int = 0,
    mask: Mask | None = None,
    scale: float | None = None,
    exact_gradient: bool = False,
) -> Tensor:
    """p v / max(sum_j |p_j|, 1) with p = scale q k^T * decay: parallel retention.

    Args:
        decay: factors per head, (H,) in (0, 1]: decay^(i - j); or a given matrix (B or 1, H, N, M).
        causal: no query sees a later key.
        offset: the key at which query 0 stands.
        exact_gradient: let the gradient go through the normaliser; the authors treat it as a constant.
    """
    if causal:
        mask = masks.and_causal(mask, offset)
    if decay.ndim == 1:
        log = decay.log()
        # above the diagonal, where a causal mask forbids the pair, the power would overflow
        mod = lambda s, b, h, i, j: s * (log[h] * (i + offset - j).abs()).exp().to(s.dtype)  # noqa: E731
    else:
        mod = lambda s, b, h, i, j: s * decay[b if decay.shape[0] > 1 else b * 0, h, i, j]  # noqa: E731
    normalize = AbsSum() if exact_gradient else Retention()
    return attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=scale, score_mod=mod, normalize=normalize)


def retnet_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, gamma_H: Tensor, *, scale: float | None = None, **options: Any
) -> Any:
    """RetNet's linear form: g = log gamma_h. `options` are `linear_attend`'s `state`, `return_state`, `chunk_size`."""
    return linear_attend(q_BHND, k_BKMD, v_BKME, decay=gamma_H, scale=scale, **options)


def gated_retention_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, log_decay_BHN: Tensor, *, scale: float | None = None, **options: Any
) -> Any:
    """Simple gated linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T, g_t <= 0 given (log sigmoid of a gate).

    scale is D ** -0.5 where None.
    """
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    return linear_attend(q_BHND, k_BKMD, v_BKME, decay=log_decay_BHN.exp(), scale=scale, **options)


def mamba2_attend(x_BHNE: Tensor, dt_BHN: Tensor, a_H: Tensor, b_BGND: Tensor, c_BGND: Tensor, **options: Any) -> Any:
    """Mamba-2's state-space duality: q = C, k = B, v = x dt, g = dt A.

    S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T,   y_t = C_t^T S_t

    Args:
        x_BHNE: inputs of the heads.
        dt_BHN: step sizes, positive.
        a_H: A, negative.
        b_BGND, c_BGND: shared by the heads of a group; G divides H.
    """
    heads = x_BHNE.shape[1]
    decay = (dt_BHN * a_H[:, None]).exp()
    c = repeat_heads(c_BGND, heads)
    return linear_attend(c, repeat_heads(b_BGND, heads), x_BHNE * dt_BHN[..., None], decay=decay, **options)


def mla_attend(
    q_BHND: Tensor, latent_BMD: Tensor, value_dim: int, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Multi-head latent attention in its absorbed form: all heads read one latent, whose first channels are the values.

    Args:
        q_BHND: queries with the key projection absorbed: latent part, then rotary part.
        latent_BMD: the cache, (B, M, L + rotary channels).
        value_dim: L.

    Raises:
        ValueError: if `value_dim` is not between 1 and D.
    """
    if not 1 <= value_dim <= latent_BMD.shape[-1]:
        raise ValueError(f"value_dim must be between 1 and the latent's width {latent_BMD.shape[-1]}, got {value_dim}")
    latent = latent_BMD[:, None]
    return attend(q_BHND, latent, latent[..., :value_dim], mask=mask, scale=scale)


def split_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, splits: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Decoding with the keys in `splits` parts, put together by their log-sum-exps: o = sum_c w_c o_c.

    Returns:
        out (B, H, N, E), lse (B, H, N).

    Raises:
        ValueError: if `splits` is below 1.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    size = max(1, math.ceil(k_BKMD.shape[2] / splits))
    whole: tuple[Tensor, Tensor] | None = None
    for k, v in zip(k_BKMD.split(size, 2), v_BKME.split(size, 2)):
        part = attend(q_BHND, k, v, scale=scale, return_lse=True)
        whole = part if whole is None else merge(*whole, *part)
    assert whole is not None
    return whole


@dataclass(frozen=True)
class Device:
    """What a GPU has for one kernel: registers and shared memory of a multiprocessor, the shape of a matrix product."""

    registers: int
    registers_per_thread: int
    shared_bytes: int
    tile_m: int
    tile_n: int
    threads_per_product: int
    multiprocessors: int


H100 = Device(65536, 255, 232448, 64, 16, 128, 132)


@dataclass(frozen=True)
class Tile:
    """A fused kernel's sizes; `*_shared` say that scores or output go through shared memory beside registers."""

    block_m: int
    block_n: int
    threads: int
    stages: int
    scores_shared: bool
    output_shared: bool

    def shared_bytes(self, head_dim: int, value_dim: int, element: int) -> int:
        """q, `stages` tiles of k and v, and what goes through shared memory in fp32."""
        return (
            self.block_m * head_dim * element
            + self.block_n * head_dim * self.stages * element
            + self.block_m * self.block_n * self.scores_shared * 4
            + self.block_n * value_dim * self.stages * element
            + self.block_m * value_dim * self.output_shared * 4
        )

    def registers_per_thread(self, value_dim: int) -> float:
        """The tile of scores and the accumulator, in fp32."""
        return (self.block_m * self.block_n + self.block_m * value_dim) / self.threads

    def fits(self, device: Device, head_dim: int, value_dim: int, element: int = 2) -> bool:
        """Whether a kernel of these sizes can run."""
        registers = self.registers_per_thread(value_dim)
        return (
            self.shared_bytes(head_dim, value_dim, element) <= device.shared_bytes
            and registers <= device.registers_per_thread
            and registers * self.threads <= device.registers
            and self.block_m % (self.threads // device.threads_per_product * device.tile_m) == 0
        )


def schedule(
    head_dim: int, value_dim: int, *, device: Device = H100, element_bytes: int = 2, largest: int = 256
) -> list[Tile]:
    """The paper's decider: every tile that fits, largest first; an empty list means: do not fuse.

    Args:
        head_dim, value_dim: D and E.
        largest: the largest side of a tile that is tried.

    >>> len(schedule(128, 128)) > 0, schedule(128, 4096)
    (True, [])
    """
    if min(head_dim, value_dim, element_bytes) < 1:
        raise ValueError(f"sizes must be positive, got {head_dim}, {value_dim} and {element_bytes}")

    def tiles() -> Iterator[Tile]:
        for block_m in range(device.tile_m, largest + 1, device.tile_m):
            for block_n in range(device.tile_n, largest + 1, device.tile_n):
                for threads in range(device.threads_per_product, 1025, device.threads_per_product):
                    for stages in (1, 2, 3, 4):
                        for scores, output in ((False, False), (True, False), (False, True), (True, True)):
                            yield Tile(block_m, block_n, threads, stages, scores, output)

    fit = [tile for tile in tiles() if tile.fits(device, head_dim, value_dim, element_bytes)]
    return sorted(fit, key=lambda t: (-t.block_m * t.block_n, -t.stages, t.scores_shared + t.output_shared, t.threads))


class EngineAttention(Constants, QKVAttention):
    """The parallel pattern as a layer, with one of the published variants.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        variant: "softmax", "sigmoid", "relu" or "retention".
        normalizer: an online function of your own, in the variant's place.
        bias: b of the sigmoid, a parameter that starts at this value.
        exact_gradient: retention's gradient goes through its normaliser; False leaves that part out as the authors do.

    Raises:
        ValueError: if the variant is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        variant: Variant = "softmax",
        normalizer: Normalizer | None = None,
        bias: float = 0.0,
        exact_gradient: bool = True,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if variant not in ("softmax", "sigmoid", "relu", "retention"):
            raise ValueError(f"variant must be softmax, sigmoid, relu or retention, got {variant!r}")
        self.variant, self.normalizer, self.exact_gradient = variant, normalizer, exact_gradient
        self.bias = nn.Parameter(torch.tensor(float(bias))) if variant == "sigmoid" else None
        self.constant("decay", partial(retention_decay, num_heads) if variant == "retention" else None)

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        if self.variant == "retention" and self.normalizer is None:
            assert isinstance(self.decay, Tensor)
            where: dict[str, Any] = {"causal": causal, "offset": offset, "mask": mask}
            return retention_attend(q_BHND, k_BKMD, v_BKME, self.decay, exact_gradient=self.exact_gradient, **where)
        if causal:
            mask = masks.and_causal(mask, offset)
        if self.normalizer is not None:
            return attend(q_BHND, k_BKMD, v_BKME, mask=mask, normalize=self.normalizer)
        if self.variant == "sigmoid":
            assert self.bias is not None
            return sigmoid_attend(q_BHND, k_BKMD, v_BKME, self.bias.to(q_BHND.dtype), mask=mask)
        function = relu_attend if self.variant == "relu" else softmax_attend
        return function(q_BHND, k_BKMD, v_BKME, mask=mask)


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    causal = masks.causal() if args.get("causal", True) else None
    relu_mask = masks.causal() if args.get("relu_causal", False) else None
    softmax, lse = attend(q, k, v, mask=causal, scale=args.get("scale_softmax"), return_lse=True)
    decay = inputs["retention.decay_mask"]
    size = attend(
        q, k, torch.ones_like(v[..., :1]), mask=causal, normalize=Identity(),
        score_mod=lambda s, b, h, i, j: (s * decay[b if decay.shape[0] > 1 else b * 0, h, i, j]).abs(),
    )  # fmt: skip
    return {
        "softmax.out": softmax,
        "softmax.lse": lse,
        "sigmoid.out": sigmoid_attend(q, k, v, inputs["sigmoid.bias"], mask=causal),
        "relu.out": relu_attend(q, k, v, mask=relu_mask, scale=args.get("relu_scale")),
        "retention.out": retention_attend(q, k, v, decay, causal=causal is not None),
        "retention.r": size[..., 0].clamp(min=1.0),
    }


def _claim(lab: Lab) -> ClaimResult:
    """Variants that no fused kernel covers against the same with the matrix of scores: time and memory."""
    from saccade.ops.measure import peak_bytes

    n = lab.size(4096, 64)
    q, k = (torch.randn(1, 4, n, 128, generator=lab.generator()) for _ in range(2))
    v = torch.randn(1, 4, n, 64, generator=lab.generator())
    decay = 1 - torch.exp2(-5.0 - torch.arange(4))
    variants: dict[str, dict[str, Any]] = {
        "sigmoid": {"normalize": "sigmoid"},
        "relu": {"normalize": "relu"},
        "retention": {
            "normalize": Retention(),
            "score_mod": lambda s, b, h, i, j: s * decay[h] ** (i - j).abs(),
        },
    }
    measured: dict[str, float] = {}
    for name, options in variants.items():
        eager = partial(attend, q, k, v, mask=masks.causal(), backend="reference", **options)
        tiled = partial(attend, q, k, v, mask=masks.causal(), **options)
        measured[f"{name}_speedup_over_eager"] = lab.seconds(eager, 2) / lab.seconds(tiled, 3)
        measured[f"{name}_memory_over_eager"] = peak_bytes(tiled) / max(1, peak_bytes(eager))
    b = torch.randn(1, 1, n, 64, generator=lab.generator())
    step = torch.rand(1, 4, n, generator=lab.generator())
    scan = lab.seconds(lambda: mamba2_attend(v, step, -torch.rand(4), b, b), repeats=3)
    dense = lab.seconds(lambda: attend(q, k, v, mask=masks.causal()), repeats=3)
    measured["mamba2_speedup_over_softmax"] = dense / scan
    faster = all(value > 1 for name, value in measured.items() if "speedup" in name)
    return ClaimResult(measured, holds=faster and all(v < 0.5 for name, v in measured.items() if "memory" in name))


register(
    "attention-engine",
    kind="sequence",
    summary="Any score and any row normalisation in online form, fused tile by tile; gated linear attention beside it.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="a framework: its parallel pattern is dense, its recurrent one linear with decay",
    complexity="parallel: time O(N M D), memory O(N + M); recurrent: time O(N D E), state O(D E)",
    invariants=(
        "tile by tile equals the direct form for softmax, sigmoid, ReLU and retention, for any tile size",
        "retention is A / max(sum |A|, 1) v, its gradient that with the normaliser detached",
        "parallel, recurrent and chunked forms of the recurrent pattern agree; g = 0 is plain linear attention",
        "keys in parts, put together, equal the whole",
        "the resource model grows with tiles; it fits D = 128 and refuses huge values",
    ),
    build=EngineAttention,
    example={"dim": 16, "num_heads": 4, "causal": True, "num_kv_heads": 2, "variant": "retention"},
    ports=(
        AuthorsPort(
            "parallel_variants", build=lambda args: nn.Identity(), convert=lambda state: state, run=_run_authors
        ),
    ),
    claim=Claim(
        paper="up to 10.4 x the best existing implementation for variants that hand-written libraries do not cover",
        expected="each variant is faster than written out with its scores, in less than half the memory",
        run=_claim,
    ),
)
