"""Mechanisms that choose blocks, on a sequence in parts: MoBA, Prism, SpargeAttn.

Every rank gets what the choice is made from, a mean for each block (`means`), makes the choice for its own queries,
tells the others which of their blocks it wants (`choice`) and gets those (`blocks`). What it then attends is its own
keys behind the ones that it fetched, which are of the past where there is one.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values; n, m blocks of
queries and keys, j blocks chosen for a query, S tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.moba.operator import moba_route
from saccade.attention.prism.operator import band_temperature, frequency_bands, prism_blocks
from saccade.attention.spargeattn.prediction import block_statistics, cover, map_of_statistics
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.routed import routed_attend
from saccade.ops.selection import block_causal, leading_blocks, pool_blocks
from saccade.ops.sharding import Layout
from saccade.parallel import dense
from saccade.parallel.chosen import Blocks, blocks_of, fetch, kept_here, of_all_blocks, wanted_of
from saccade.parallel.context import Shards
from saccade.parallel.exchange import gather


def moba_attend(
    shards: Shards,
    function: Callable[..., Any],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    block_size: int = 512,
    top_k: int = 3,
    sinks: int = 0,
    scale: float | None = None,
    mask: GivenMask = None,
) -> Tensor:
    """This rank's rows of `saccade.attention.moba.moba_attend`.

    Args:
        shards: the ranks.
        function: that, which says what is wrong with the options.
        q_BHND, k_BKMD, v_BKME: this rank's part.
        block_size, top_k, sinks, scale: as there.
        mask: none but causality.

    Raises:
        ValueError: as there, or for a mask, parted blocks or parts that are not contiguous.
    """
    function(*_one_token(q_BHND, k_BKMD, v_BKME), block_size=block_size, top_k=top_k, sinks=sinks)
    layout = _layout(shards, q_BHND, k_BKMD, mask, "MoBA")
    blocks = blocks_of(layout, block_size, "MoBA")
    if top_k >= blocks.total:
        options: dict[str, Any] = {"mask": masks.causal(), "scale": scale}
        return dense.attend(shards, attend, q_BHND, k_BKMD, v_BKME, **options)
    own, K, N = blocks.of(shards.rank), k_BKMD.shape[1], q_BHND.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, -N % block_size)) for x in (q_BHND, k_BKMD, v_BKME))
    with torch.no_grad():
        means = k.unflatten(2, (-1, block_size)).mean(3, dtype=torch.float32)
        means_BKmD = of_all_blocks(shards, means, blocks)
        chosen = moba_route(
            q,
            means_BKmD=means_BKmD,
            block_size=block_size,
            top_k=top_k,
            first_block=own.start,
            first_blocks=leading_blocks(sinks, block_size),
        )
        chosen[:, :, N:] = -1
        wanted = _wanted(chosen, K, blocks, own)
    fetched = fetch(shards, blocks, k, v, wanted, block_size)
    with torch.no_grad():
        slots = repeat_heads(fetched.slot_BKm, q.shape[1])
        there = slots.gather(2, chosen.clamp(min=0).flatten(2)).view_as(chosen)
        here = torch.where(chosen < own.start, there, chosen - own.start + fetched.most)
        here = torch.where(chosen < 0, -1, here)
    keys, values = torch.cat([fetched.keys, k], 2), torch.cat([fetched.values, v], 2)
    return routed_attend(q, keys, values, here, block_size, scale=scale)[0][:, :, :N]


def prism_attend(
    shards: Shards,
    function: Callable[..., Any],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: GivenMask = None,
    causal: bool = True,
    scale: float | None = None,
    return_map: bool = False,
    **options: Any,
) -> Tensor:
    """This rank's rows of `saccade.attention.prism.prism_attend`.

    Args:
        shards, function, q_BHND, k_BKMD, v_BKME, mask, scale: as in `moba_attend`.
        causal, return_map: must be True, and False.
        options: of the choice, as there.

    Raises:
        ValueError: as there, or as `moba_attend`.
    """
    function(*_one_token(q_BHND, k_BKMD, v_BKME), causal=causal, **options)
    _none_of({"return_map": return_map}, "Prism")
    size = options.pop("block_size", 128)
    layout = _layout(shards, q_BHND, k_BKMD, mask, "Prism")
    blocks = blocks_of(layout, size, "Prism")
    with torch.no_grad():
        q_BHnD, k_BKnD = (pool_blocks(x, size, tail="zeros") for x in (q_BHND, k_BKMD))
        k_BKmD = of_all_blocks(shards, k_BKnD, blocks)
        if options.pop("calibrate", True):
            bands = options.get("low_freq_dim"), options.get("high_freq_dim")
            high, low = _temperatures(shards, q_BHnD, k_BKmD, blocks.total, *bands)
            options |= {"low_freq_temperature": low, "high_freq_temperature": high}
        options["sinks"] = leading_blocks(options.get("sinks", 0), size)
        # what is chosen of means as tokens is what would be chosen of the tokens
        means = q_BHnD, k_BKmD[:, :, : blocks.of(shards.rank).stop]
        keep = prism_blocks(*means, block_size=1, calibrate=False, scale=scale, **options)
    return _attend_kept(shards, q_BHND, k_BKMD, v_BKME, keep, blocks, (size, size), True, scale, layout)


def spargeattn_attend(
    shards: Shards,
    function: Callable[..., Any],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    causal: bool = False,
    pv_threshold: Any = None,
    smooth_k: bool = True,
    quantize: bool = False,
    pv_rows: int | None = None,
    scale: float | None = None,
    return_map: bool = False,
    **options: Any,
) -> Tensor:
    """This rank's rows of `saccade.attention.spargeattn.spargeattn_attend`.

    Args:
        shards, function, q_BHND, k_BKMD, v_BKME, scale: as in `moba_attend`.
        causal, smooth_k: as there.
        pv_threshold, quantize, pv_rows, return_map: must be None or False.
        options: of the choice, as there.

    Raises:
        ValueError: as there, or as `moba_attend`.
    """
    function(*_one_token(q_BHND, k_BKMD, v_BKME), causal=causal, **options)
    _none_of({"pv_threshold": pv_threshold, "quantize": quantize, "return_map": return_map}, "SpargeAttn")
    size_q, size_k = options.pop("block_q", 128), options.pop("block_k", 64)
    layout = _layout(shards, q_BHND, k_BKMD, None, "SpargeAttn")
    blocks_of(layout, lcm(size_q, size_k), "SpargeAttn")
    rows, blocks = blocks_of(layout, size_q, "SpargeAttn"), blocks_of(layout, size_k, "SpargeAttn")
    first = rows.firsts[shards.rank]
    with torch.no_grad():
        k = k_BKMD
        if smooth_k:
            total = gather(shards, k.sum(2, keepdim=True, dtype=torch.float32), "means").sum(0)
            k = k - (total / max(1, layout.length)).to(k.dtype)
        q_BHnD, similarity_BHn = block_statistics(q_BHND, size_q)
        k_BKnD, similarity_BKn = block_statistics(k, size_k)
        of_keys = of_all_blocks(shards, torch.cat([k_BKnD, similarity_BKn[..., None]], -1), blocks)
        of_heads = repeat_heads(of_keys, q_BHND.shape[1])
        k_BHmD, similarity_BHm = of_heads[..., :-1], of_heads[..., -1]
        n, m = q_BHnD.shape[2], blocks.total
        past = block_causal(n, m, size_q, size_k, offset=first * size_q, device=k.device) if causal else None
        short = layout.length // size_q - first, layout.length // size_k
        keep = map_of_statistics(
            q_BHnD, similarity_BHn, k_BHmD, similarity_BHm, past, short, block_k=size_k,
            scale=q_BHND.shape[3] ** -0.5 if scale is None else scale, **options,
        )  # fmt: skip
        if causal:
            keep = cover(keep, size_q, size_k, first)
    sizes = size_q, size_k
    return _attend_kept(shards, q_BHND, k_BKMD, v_BKME, keep, blocks, sizes, causal, scale, layout)


def _attend_kept(
    shards: Shards,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_BHnm: Tensor,
    blocks: Blocks,
    sizes: tuple[int, int],
    causal: bool,
    scale: float | None,
    layout: Layout,
) -> Tensor:
    """Attention over the blocks that this rank's queries keep."""
    size, own, K = sizes[1], blocks.of(shards.rank), k.shape[1]
    missing = blocks.total * size - layout.length
    with torch.no_grad():
        keep_BHnm = F.pad(keep_BHnm, (0, blocks.total - keep_BHnm.shape[3]))
        wanted = wanted_of(keep_BHnm, K, own)
        last = bool(missing and wanted[..., -1:].any())
    fetched = fetch(shards, blocks, k, v, wanted, size, last=last)
    mask: masks.Mask = masks.blocks(kept_here(keep_BHnm, fetched, wanted, own), sizes)
    behind = fetched.most * size
    if causal:
        mask = mask & masks.causal(behind)
    if last:  # the end of the sequence's last block, which is in the last place
        place = torch.arange(behind + k.shape[2], device=k.device)
        mask = mask & masks.padding(((place < behind - missing) | (place >= behind))[None])
    keys, values = torch.cat([fetched.keys, k], 2), torch.cat([fetched.values, v], 2)
    return attend(q, keys, values, mask=mask, scale=scale)


def _wanted(chosen_BHNj: Tensor, K: int, blocks: Blocks, own: slice) -> Tensor:
    """Blocks before this rank's own that some query of a key head's group chose, (B, K, m)."""
    chosen = chosen_BHNj.unflatten(1, (K, -1)).flatten(2)
    found = torch.zeros(*chosen.shape[:2], blocks.total + 1, dtype=torch.bool, device=chosen.device)
    found.scatter_(2, torch.where((chosen < 0) | (chosen >= own.start), blocks.total, chosen), True)
    return found[..., :-1]


def _temperatures(
    shards: Shards, q_BHnD: Tensor, k_BKmD: Tensor, total: int, low_dim: int | None, high_dim: int | None
) -> tuple[Tensor, Tensor]:
    """Of the high and of the low band, from the energy of all blocks."""
    D, device = q_BHnD.shape[3], q_BHnD.device
    bands = [torch.arange(D, device=device), *frequency_bands(D, low_dim, high_dim, device=device)]
    squares = torch.stack([q_BHnD[..., band].square().sum((2, 3)) for band in bands])
    squares = gather(shards, squares, "means").sum(0)
    k_BHmD = repeat_heads(k_BKmD, q_BHnD.shape[1])
    q_rms = [(x / (total * len(band))).sqrt()[..., None, None] for x, band in zip(squares, bands)]
    k_rms = [k_BHmD[..., band].square().mean((2, 3), keepdim=True).sqrt() for band in bands]
    high, low = (
        band_temperature(len(band), D, (q_rms[i], q_rms[0]), (k_rms[i], k_rms[0])) for i, band in enumerate(bands) if i
    )
    return high, low


def _one_token(*tensors: Tensor) -> list[Tensor]:
    """What a function says is wrong with its options on is little, and the same on every rank."""
    return [x.detach().new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]) for x in tensors]


def _layout(shards: Shards, q: Tensor, k: Tensor, mask: GivenMask, who: str) -> Layout:
    check_qkv(q, k, k)
    queries, keys = shards.layouts(q.shape[2], k.shape[2])
    if queries != keys:
        raise ValueError(f"{who} takes as many queries as keys, got {queries.length} and {keys.length}")
    n = queries.length
    if mask is not None and (said := [x for x in Pattern.of(mask, q.shape[0], n, n).says if x != "causal"]):
        raise ValueError(f"{who} takes no mask on a sequence in parts, got {' and '.join(said)}")
    return queries


def _none_of(options: dict[str, Any], who: str) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{who} takes no {name} on a sequence in parts, got {value}")
