"""Instances of both patterns as functions of tensors, and the resource model that says which tile fits a GPU.

Shape letters: B batch, H query heads, K key heads, G groups of heads, N queries, M keys, D head dim, E head dim of v,
L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.normalizers import AbsSum, Normalizer, Retention

Variant = Literal["softmax", "sigmoid", "relu", "retention"]


class Identity(Normalizer):
    """The identity as online function: modified scores are the weights, 0 where masked."""

    def update(self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]) -> Any:
        return scores.masked_fill(~allowed, 0.0), state, None


def softmax_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        mask: which pairs count; all where None.
        scale: D ** -0.5 where None.
    """
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
    """sigmoid(scale q k^T + bias) v, as the paper writes it: (tanh((s + bias) / 2) + 1) / 2, and no normalisation.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        bias: one number for all scores, which may be learned.
        mask: which pairs count; all where None.
        scale: D ** -0.5 where None.
    """
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
    """max(scale q k^T, 0) v.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        mask: which pairs count; all where None.
        scale: D ** -0.5 where None.
    """
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
        q_BHND, k_BKMD, v_BKME: K divides H.
        decay: factors per head, (H,) in (0, 1]: decay^(i - j); or a given matrix (B or 1, H, N, M).
        causal: no query sees a later key.
        offset: the key at which query 0 stands.
        mask: which pairs count beside causality.
        scale: D ** -0.5 where None.
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
    """RetNet's linear form: g = log gamma_h.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H, N = M.
        gamma_H: decay factors of the heads, in (0, 1].
        scale: 1 where None.
        options: `linear_attend`'s `state`, `return_state`, `chunk_size`.
    """
    return linear_attend(q_BHND, k_BKMD, v_BKME, decay=gamma_H, scale=scale, **options)


def gated_retention_attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, log_decay_BHN: Tensor, *, scale: float | None = None, **options: Any
) -> Any:
    """Simple gated linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H, N = M.
        log_decay_BHN: g_t <= 0, the log sigmoid of a gate.
        scale: D ** -0.5 where None.
        options: `linear_attend`'s `state`, `return_state`, `chunk_size`.
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
        options: `linear_attend`'s `state`, `return_state`, `chunk_size`.
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
        mask: which pairs count; all where None.
        scale: D ** -0.5 where None.

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

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        splits: how many parts; fewer where there are fewer keys.
        scale: D ** -0.5 where None.

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
    """What a GPU has for one kernel.

    Attributes:
        registers: of a multiprocessor; registers_per_thread: the most that one thread has.
        shared_bytes: shared memory of a multiprocessor.
        tile_m, tile_n: rows and columns of one matrix product.
        threads_per_product: threads that make it together.
        multiprocessors: how many there are.
    """

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
    """A fused kernel's sizes.

    Attributes:
        block_m, block_n: queries and keys of a tile.
        threads: of a block.
        stages: tiles of k and v held at a time.
        scores_shared, output_shared: scores, output go through shared memory beside registers.
    """

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
        device: what the kernel is for.
        element_bytes: of a number of q, k and v.
        largest: the largest side of a tile that is tried.

    Raises:
        ValueError: if a size is not positive.

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
