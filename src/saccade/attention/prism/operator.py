"""Prism: the bands of the rotary frequencies, the blocks that they choose, and attention over those.

Shape letters: B batch, H query heads, K key heads, N queries, L the same with those that fill up the first block,
M keys, D head dim, E width of values; n, m blocks of queries and keys; d channels of a band.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import (
    PerHead,
    block_causal,
    block_sparsity,
    leading_blocks,
    one_per_head,
    own_blocks,
    pool_blocks,
    top_blocks,
)
from saccade.ops.sharding import in_parts


@in_parts
def prism_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    block_size: int = 128,
    low_freq_dim: int | None = None,
    high_freq_dim: int | None = None,
    low_freq_threshold: PerHead = 0.95,
    high_freq_threshold: PerHead = 0.95,
    calibrate: bool = True,
    low_freq_temperature: float = 1.0,
    high_freq_temperature: float = 1.0,
    force_sink: bool = True,
    sinks: int = 0,
    force_recent: bool = True,
    mask: GivenMask = None,
    causal: bool = True,
    scale: float | None = None,
    return_map: bool = False,
) -> Any:
    """Causal attention over the blocks that `prism_blocks` chooses; one query against many keys is dense.

    Gradients flow through the kept blocks, none through the choice. Memory is linear in N + M.

    Args:
        q_BHND: rotated queries, the last N of the M tokens.
        k_BKMD, v_BKME: rotated keys, and values; K divides H, E may differ from D.
        block_size, low_freq_dim, high_freq_dim, low_freq_threshold, high_freq_threshold: see `prism_blocks`.
        calibrate, low_freq_temperature, high_freq_temperature, force_sink, sinks, force_recent: see
            `prism_blocks`.
        mask: bool (B, M), True = real token, or `masks.padding` of it. Queries that are padding give what they give.
        causal: must be True.
        scale: factor of the dot product, D ** -0.5 where None.
        return_map: also return the blocks that were kept.

    Returns:
        out (B, H, N, E); with `return_map` also the map (B, H, n, m), bool.

    Raises:
        ValueError: if shapes or options do not fit, `causal` is False, or the mask is of another kind.

    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> out, kept = prism_attend(q, k, v, block_size=8, return_map=True)
    >>> out.shape, kept.shape
    (torch.Size([1, 2, 64, 16]), torch.Size([1, 2, 8, 8]))
    """
    if not causal:
        raise ValueError("Prism is causal: its blocks are chosen among those of the past; got causal=False")
    if v_BKME.ndim != 4 or v_BKME.shape[:3] != k_BKMD.shape[:3]:
        raise ValueError(f"key and value do not fit: {tuple(k_BKMD.shape)} and {tuple(v_BKME.shape)}")
    keep_BHnm = prism_blocks(
        q_BHND,
        k_BKMD,
        block_size=block_size,
        low_freq_dim=low_freq_dim,
        high_freq_dim=high_freq_dim,
        low_freq_threshold=low_freq_threshold,
        high_freq_threshold=high_freq_threshold,
        calibrate=calibrate,
        low_freq_temperature=low_freq_temperature,
        high_freq_temperature=high_freq_temperature,
        force_sink=force_sink,
        sinks=sinks,
        force_recent=force_recent,
        mask=mask,
        scale=scale,
    )
    N, M = q_BHND.shape[2], k_BKMD.shape[2]
    valid_BM = _real_keys(mask, q_BHND, k_BKMD)
    padding = None if valid_BM is None else masks.padding(valid_BM)
    if N == 1 < M:
        out, keep_BHnm = attend(q_BHND, k_BKMD, v_BKME, mask=padding, scale=scale), torch.ones_like(keep_BHnm)
        return (out, keep_BHnm) if return_map else out
    front = (M - N) % block_size
    if front:
        q_BHND = F.pad(q_BHND, (0, 0, front, 0))
    pattern = masks.blocks(keep_BHnm, block_size) & masks.causal(M - N - front)
    out = attend(q_BHND, k_BKMD, v_BKME, mask=pattern if padding is None else pattern & padding, scale=scale)
    out = out[:, :, front:] if front else out
    return (out, keep_BHnm) if return_map else out


@torch.no_grad()
def prism_blocks(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    *,
    block_size: int = 128,
    low_freq_dim: int | None = None,
    high_freq_dim: int | None = None,
    low_freq_threshold: PerHead = 0.95,
    high_freq_threshold: PerHead = 0.95,
    calibrate: bool = True,
    low_freq_temperature: float | Tensor = 1.0,
    high_freq_temperature: float | Tensor = 1.0,
    force_sink: bool = True,
    sinks: int = 0,
    force_recent: bool = True,
    mask: GivenMask = None,
    scale: float | None = None,
) -> Tensor:
    """Which blocks matter: bool (B, H, n, m), lower triangular, m = ceil(M / block_size); n = m where N = M.

    With N < M the rows are the last n: row 0 is the block in which query 0 stands. Time O(N M D / block_size^2 +
    (N + M) D) per head.

    Args:
        q_BHND, k_BKMD: rotated queries, the last N of the M tokens, and rotated keys.
        block_size: tokens per block.
        low_freq_dim, high_freq_dim: channels of the two bands, even, at most D; 3/4 and 1/2 of D where None.
        low_freq_threshold, high_freq_threshold: share of a band's pooled weight that a row keeps, for all or per
            head; the block that passes it is kept too. Above 1 all blocks of the past are kept, at 0 the best one.
        calibrate: temperatures from the energy of the bands; else the two that are given.
        low_freq_temperature, high_freq_temperature: t of the bands where `calibrate` is False, numbers or (B, H, 1, 1).
        force_sink, force_recent: always keep the first block, and the queries' own.
        sinks: always keep the blocks of so many first tokens.
        mask: as in `prism_attend`.
        scale: factor of the dot product, D ** -0.5 where None.

    Raises:
        ValueError: if shapes or options do not fit.
    """
    _check(q_BHND, k_BKMD, block_size)
    (B, H, N, _), M = q_BHND.shape, k_BKMD.shape[2]
    of_bands = ("high_freq_threshold", high_freq_threshold), ("low_freq_threshold", low_freq_threshold)
    thresholds = [one_per_head(value, name, H, q_BHND.device, 0.0)[:, None, None] for name, value in of_bands]
    first = (M - N) // block_size
    n, m = -(-M // block_size) - first if N else 0, -(-M // block_size)
    if 0 in (B, n, m):
        return torch.ones(B, H, n, m, dtype=torch.bool, device=q_BHND.device)
    bands = band_scores(
        q_BHND, k_BKMD, block_size, low_freq_dim, high_freq_dim,
        (low_freq_temperature, high_freq_temperature) if not calibrate else None,
        _real_keys(mask, q_BHND, k_BKMD), scale,
    )  # fmt: skip
    where: dict[str, Any] = {"offset": first * block_size, "device": q_BHND.device}
    keep = torch.zeros(B, H, n, m, dtype=torch.bool, device=q_BHND.device)
    for (_, share_BHnm), threshold_H11 in zip(bands, thresholds, strict=True):
        keep |= top_blocks(share_BHnm, p=threshold_H11, crossing=True)
    past = block_causal(n, m, block_size, block_size, **where)
    if first_blocks := max(int(force_sink), leading_blocks(sinks, block_size)):
        keep[..., :first_blocks] = True
    keep &= past
    if force_recent:
        keep |= own_blocks(n, m, block_size, block_size, **where)
    return keep


def prism_sparsity(keep_BHnm: Tensor) -> Tensor:
    """Share of the blocks of the past that are left out, (B, H).

    Args:
        keep_BHnm: the map of `prism_blocks`; its rows are the last n of the m blocks.
    """
    n, m = keep_BHnm.shape[2:]
    return block_sparsity(keep_BHnm, block_causal(n, m, 1, 1, offset=m - n, device=keep_BHnm.device))


def frequency_bands(
    head_dim: int,
    low_freq_dim: int | None = None,
    high_freq_dim: int | None = None,
    *,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Channels of the high and of the low band, in half-split rotary layout.

    Args:
        head_dim: D, even.
        low_freq_dim, high_freq_dim: channels of the bands, even; where None 3/4 and 1/2 of D, rounded up to whole
            pairs.
        device: where the indices are put.

    Raises:
        ValueError: if the head dim or a band is odd, or a band is empty or wider than the head.

    >>> [band.tolist() for band in frequency_bands(8)]
    [[0, 1, 4, 5], [1, 2, 3, 5, 6, 7]]
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary pairs need an even head_dim, got {head_dim}")
    half = head_dim // 2
    low = 2 * math.ceil(3 * half / 4) if low_freq_dim is None else low_freq_dim
    high = 2 * math.ceil(half / 2) if high_freq_dim is None else high_freq_dim
    for name, width in (("low_freq_dim", low), ("high_freq_dim", high)):
        if not 2 <= width <= head_dim or width % 2:
            raise ValueError(f"{name} must be even, from 2 to the head_dim ({head_dim}), got {width}")
    pairs_high = torch.arange(high // 2, device=device)
    pairs_low = torch.arange(half - low // 2, half, device=device)
    return torch.cat([pairs_high, pairs_high + half]), torch.cat([pairs_low, pairs_low + half])


def mean_attenuation(head_dim: int, block_size: int, *, base: float = 10000.0) -> Tensor:
    """What the mean over a block leaves of each rotary pair's length, (D / 2,): the Dirichlet kernel.

    |sin(b theta / 2) / (b sin(theta / 2))|,  theta_i = base^(-2i / D)

    Args:
        head_dim: D.
        block_size: b, tokens per block.
        base: of the rotary positions.
    """
    half = torch.arange(head_dim // 2, dtype=torch.float64)
    theta = base ** (-2.0 * half / head_dim)
    return ((block_size * theta / 2).sin() / (block_size * (theta / 2).sin())).abs()


def band_scores(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    block_size: int,
    low_freq_dim: int | None,
    high_freq_dim: int | None,
    temperatures: tuple[float | Tensor, float | Tensor] | None,
    valid_BM: Tensor | None,
    scale: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """Temperature (B, H, 1, 1) and shares (B, H, n, m) of the high and of the low band."""
    (_, H, N, D), M = q_BHND.shape, k_BKMD.shape[2]
    channels = frequency_bands(D, low_freq_dim, high_freq_dim, device=q_BHND.device)
    front = (M - N) % block_size
    valid_BN = None if valid_BM is None else F.pad(valid_BM[:, M - N :], (front, 0))
    q_BHLD = F.pad(q_BHND, (0, 0, front, 0)) if front else q_BHND
    q_BHnD = pool_blocks(q_BHLD, block_size, tail="zeros", valid_BN=valid_BN)
    k_BHmD = repeat_heads(pool_blocks(k_BKMD, block_size, tail="zeros", valid_BN=valid_BM), H)

    n, m = q_BHnD.shape[2], k_BHmD.shape[2]
    past = block_causal(n, m, 1, 1, offset=m - n, device=q_BHND.device)

    def rms(q_BHnd: Tensor, k_BHmd: Tensor) -> tuple[Tensor, Tensor]:
        return _rms(q_BHnd, valid_BN, block_size), _rms(k_BHmd, valid_BM, block_size)

    q_rms, k_rms = rms(q_BHnD, k_BHmD)
    factor = D**-0.5 if scale is None else float(scale)
    bands = []
    for band, constant in zip(channels, (None, None) if temperatures is None else temperatures[::-1], strict=True):
        q_BHnd, k_BHmd = q_BHnD[..., band], k_BHmD[..., band]
        d = band.shape[0]
        if constant is None:
            q_band, k_band = rms(q_BHnd, k_BHmd)
            t_BH11 = band_temperature(d, D, (q_band, q_rms), (k_band, k_rms))
        else:
            t_BH11 = torch.as_tensor(constant, dtype=q_rms.dtype, device=q_rms.device).expand_as(q_rms)
        # a band without energy has no preference
        logits = q_BHnd @ k_BHmd.mT * (factor * (D / d) ** 0.5 / t_BH11.clamp(min=1e-30))
        bands.append((t_BH11, logits.masked_fill(~past, float("-inf")).softmax(-1)))
    return bands


def band_temperature(width: int, D: int, q_rms: tuple[Tensor, Tensor], k_rms: tuple[Tensor, Tensor]) -> Tensor:
    """t of a band, sqrt(d / D) times what it has of the energy of queries and of keys.

    Args:
        width: d, channels of the band.
        D: head dim.
        q_rms, k_rms: root mean square of the pooled band, and of all channels.
    """
    (q_band, q_all), (k_band, k_all) = q_rms, k_rms
    return (width / D) ** 0.5 * (q_band / q_all.clamp(min=1e-6)) * (k_band / k_all.clamp(min=1e-6))


def _rms(x_BHnd: Tensor, valid_BN: Tensor | None, block_size: int) -> Tensor:
    """Root mean square over the blocks that hold a token and the channels, (B, H, 1, 1)."""
    if valid_BN is None:
        return x_BHnd.square().mean((2, 3), keepdim=True).sqrt()
    real_Bn = F.pad(valid_BN, (0, -valid_BN.shape[1] % block_size)).unflatten(1, (-1, block_size)).any(2)
    count_B111 = real_Bn.sum(1).clamp(min=1)[:, None, None, None] * x_BHnd.shape[3]
    return (x_BHnd.square().sum((2, 3), keepdim=True) / count_B111).sqrt()


def _check(q: Tensor, k: Tensor, block_size: int) -> None:
    check_qkv(q, k, k, tokens="last")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size}")


def _real_keys(mask: GivenMask, q_BHND: Tensor, k_BKMD: Tensor) -> Tensor | None:
    B, N, M = q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2]
    return Pattern.of(mask, B, N, M, causal=True, offset=M - N).only(("padding",), "Prism").valid_BM
