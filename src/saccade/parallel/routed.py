"""Mechanisms that choose blocks, on a sequence in parts: MoBA, Prism, SpargeAttn.

Every rank gets what the choice is made from, a mean for each block (`means`), makes the choice for its own queries,
tells the others which of their blocks it wants (`choice`) and gets those (`blocks`). What it then attends is its own
keys behind the ones that it fetched, which are of the past where there is one.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values; n, m blocks of
queries and keys, j blocks chosen for a query, S tokens per block; L places of a row that is laid out anew.
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
from saccade.ops.autocast import one_type
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.routed import BlockLayout, block_layout, routed_attend
from saccade.ops.selection import block_causal, leading_blocks, pool_blocks
from saccade.ops.sharding import Layout
from saccade.parallel import dense
from saccade.parallel.chosen import Blocks, blocks_of, fetch, in_blocks, kept_here, kept_of, of_all_blocks, wanted_of
from saccade.parallel.context import Shards, places_of
from saccade.parallel.exchange import gather, tied


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
        mask: as there, of the whole sequence.

    Raises:
        ValueError: as there.
    """
    function(*one_token(q_BHND, k_BKMD, v_BKME), block_size=block_size, top_k=top_k, sinks=sinks)
    layout, (B, H), K = _layout(shards, q_BHND, k_BKMD, "MoBA"), q_BHND.shape[:2], k_BKMD.shape[1]
    of_rows = laid_out(mask, B, layout.length, block_size)
    if of_rows is None and top_k >= -(-layout.length // block_size):
        options: dict[str, Any] = {"mask": masks.causal(), "scale": scale}
        return dense.attend(shards, attend, q_BHND, k_BKMD, v_BKME, **options)
    source_BL = None if of_rows is None else of_rows.source_BL
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    recut = in_blocks(layout, block_size, B, source_BL, q.device)
    blocks, (q, k, v) = blocks_of(recut.cut, block_size), recut.there(shards, q, k, v)
    own, N = blocks.of(shards.rank), q.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, -N % block_size)) for x in (q, k, v))
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
            start_Bn=None if of_rows is None else of_rows.start_Bn,
        )
        chosen[:, :, N:] = -1
        if source_BL is not None:
            empty_BN = source_BL[:, places_of(recut.cut, shards.rank, q.device)] >= layout.length
            chosen[:, :, :N].masked_fill_(empty_BN[:, None, :, None], -1)
        wanted = wanted_of(kept_of(chosen, blocks.total), K, own)
    fetched = fetch(shards, blocks, k, v, wanted, block_size)
    with torch.no_grad():
        slots = repeat_heads(fetched.slot_BKm, H)
        there = slots.gather(2, chosen.clamp(min=0).flatten(2)).view_as(chosen)
        here = torch.where(chosen < own.start, there, chosen - own.start + fetched.most)
        here = torch.where(chosen < 0, -1, here)
    keys, values = torch.cat([fetched.keys, k], 2), torch.cat([fetched.values, v], 2)
    out = routed_attend(q, keys, values, here, block_size, scale=scale)[0][:, :, :N]
    return recut.back(shards, out if N else tied(out, q, keys, values))


def laid_out(mask: GivenMask, batch: int, tokens: int, block_size: int) -> BlockLayout | None:
    """Rows of which MoBA counts blocks from the first token of each sequence; None where it is the row's.

    Args:
        mask: of `moba_attend`.
        batch, tokens: B rows of N tokens.
        block_size: S.

    Raises:
        ValueError: if the mask is of another kind.
    """
    pattern = Pattern.of(mask, batch, tokens, tokens, causal=True).only(("padding", "documents"), "MoBA")
    ids_BM = pattern.sequence_ids(batch, tokens)
    if ids_BM is None:
        return None
    return block_layout(ids_BM, block_size, blocks=-(-tokens // block_size) if pattern.ids_BM is None else None)


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
        shards, function, q_BHND, k_BKMD, v_BKME, mask, scale: as in `moba_attend`; of masks padding alone.
        causal, return_map: must be True, and False.
        options: of the choice, as there.

    Raises:
        ValueError: as there, or for an option that is not.
    """
    function(*one_token(q_BHND, k_BKMD, v_BKME), causal=causal, **options)
    none_of("Prism", return_map=return_map)
    size, layout = options.pop("block_size", 128), _layout(shards, q_BHND, k_BKMD, "Prism")
    B, M = q_BHND.shape[0], layout.length
    real_BM = Pattern.of(mask, B, M, M, causal=True).only(("padding",), "Prism").real_keys(B)
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    recut = in_blocks(layout, size, B, device=q.device)
    layout, blocks, (q, k, v) = recut.cut, blocks_of(recut.cut, size), recut.there(shards, q, k, v)
    with torch.no_grad():
        own = None if real_BM is None else real_BM[:, places_of(layout, shards.rank, q.device)]
        q_BHnD, k_BKnD = (pool_blocks(x, size, tail="zeros", valid_BN=own) for x in (q, k))
        k_BKmD = of_all_blocks(shards, k_BKnD, blocks)
        if options.pop("calibrate", True):
            bands = options.get("low_freq_dim"), options.get("high_freq_dim")
            high, low = _temperatures(shards, q_BHnD, k_BKmD, _blocks_with_tokens(real_BM, blocks, size), *bands)
            options |= {"low_freq_temperature": low, "high_freq_temperature": high}
        options["sinks"] = leading_blocks(options.get("sinks", 0), size)
        # what is chosen of means as tokens is what would be chosen of the tokens
        means = q_BHnD, k_BKmD[:, :, : blocks.of(shards.rank).stop]
        keep = prism_blocks(*means, block_size=1, calibrate=False, scale=scale, **options)
    out = _attend_kept(shards, q, k, v, keep, blocks, (size, size), True, scale, layout, real_BM)
    return recut.back(shards, out)


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
        ValueError: as there, or for an option that is not.
    """
    function(*one_token(q_BHND, k_BKMD, v_BKME), causal=causal, **options)
    none_of("SpargeAttn", pv_threshold=pv_threshold, quantize=quantize, return_map=return_map)
    size_q, size_k = options.pop("block_q", 128), options.pop("block_k", 64)
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    recut = in_blocks(_layout(shards, q, k, "SpargeAttn"), lcm(size_q, size_k), len(q), device=q.device)
    layout, rows, blocks = recut.cut, blocks_of(recut.cut, size_q), blocks_of(recut.cut, size_k)
    q, k, v = recut.there(shards, q, k, v)
    first, H = rows.firsts[shards.rank], q.shape[1]
    with torch.no_grad():
        smoothed = k
        if smooth_k:
            total = gather(shards, k.sum(2, keepdim=True, dtype=torch.float32), "means").sum(0)
            smoothed = k - (total / max(1, layout.length)).to(k.dtype)
        q_BHnD, similarity_BHn = block_statistics(q, size_q)
        k_BKnD, similarity_BKn = block_statistics(smoothed, size_k)
        of_keys = of_all_blocks(shards, torch.cat([k_BKnD, similarity_BKn[..., None]], -1), blocks)
        of_heads = repeat_heads(of_keys, H)
        k_BHmD, similarity_BHm = of_heads[..., :-1], of_heads[..., -1]
        n, m = q_BHnD.shape[2], blocks.total
        past = block_causal(n, m, size_q, size_k, offset=first * size_q, device=k.device) if causal else None
        short = layout.length // size_q - first, layout.length // size_k
        keep = map_of_statistics(
            q_BHnD, similarity_BHn, k_BHmD, similarity_BHm, past, short, block_k=size_k,
            scale=q.shape[3] ** -0.5 if scale is None else scale, **options,
        )  # fmt: skip
        if causal:
            keep = cover(keep, size_q, size_k, first)
    out = _attend_kept(shards, q, k, v, keep, blocks, (size_q, size_k), causal, scale, layout)
    return recut.back(shards, out)


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
    real_BM: Tensor | None = None,
) -> Tensor:
    """Attention over the blocks that this rank's queries keep, of `real_BM` tokens."""
    size, own, (B, K) = sizes[1], blocks.of(shards.rank), k.shape[:2]
    missing = blocks.total * size - layout.length
    with torch.no_grad():
        keep_BHnm = F.pad(keep_BHnm, (0, blocks.total - keep_BHnm.shape[3]))
        wanted = wanted_of(keep_BHnm, K, own)
        if real_BM is None and missing:
            real_BM = wanted.new_ones(B, layout.length)
        filled_BM = None if real_BM is None else F.pad(real_BM, (0, missing))
    fetched = fetch(shards, blocks, k, v, wanted, size, filled_BM)
    behind = fetched.most * size
    keys, values = torch.cat([fetched.keys, k], 2), torch.cat([fetched.values, v], 2)
    # each key head has blocks of its own: it is a row of the batch, with its queries
    q, keys, values = q.unflatten(1, (K, -1)).flatten(0, 1), keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]
    with torch.no_grad():
        keep = kept_here(keep_BHnm, fetched, wanted, own).unflatten(1, (K, -1)).flatten(0, 1)
        mask: masks.Mask = masks.blocks(keep, sizes)
        if causal:
            mask = mask & masks.causal(behind)
        if real_BM is not None and fetched.real_BKM is not None:
            own_BN = real_BM[:, places_of(layout, shards.rank, k.device)]
            real_BKM = torch.cat([fetched.real_BKM, own_BN[:, None].expand(-1, K, -1)], 2)
            mask = mask & masks.padding(real_BKM.flatten(0, 1))
    return attend(q, keys, values, mask=mask, scale=scale).unflatten(0, (B, K)).flatten(1, 2)


def _blocks_with_tokens(real_BM: Tensor | None, blocks: Blocks, size: int) -> Any:
    """How many blocks of each row hold a token, (B, 1)."""
    if real_BM is None:
        return blocks.total
    filled_BM = F.pad(real_BM, (0, -real_BM.shape[1] % size))
    return filled_BM.unflatten(1, (-1, size)).any(2).sum(1, keepdim=True).clamp(min=1)


def _temperatures(
    shards: Shards, q_BHnD: Tensor, k_BKmD: Tensor, count: Any, low_dim: int | None, high_dim: int | None
) -> tuple[Tensor, Tensor]:
    """Of the high and of the low band, from the energy of all blocks, of which `count` hold a token."""
    D, device = q_BHnD.shape[3], q_BHnD.device
    bands = [torch.arange(D, device=device), *frequency_bands(D, low_dim, high_dim, device=device)]

    def energy(x_BHnD: Tensor) -> Tensor:
        return torch.stack([x_BHnD[..., band].square().sum((2, 3)) for band in bands])

    of_queries = gather(shards, energy(q_BHnD), "means").sum(0)
    of_keys = repeat_heads(energy(k_BKmD).movedim(0, 2), q_BHnD.shape[1]).movedim(2, 0)
    q_rms, k_rms = (
        [(x / (count * len(band))).sqrt()[..., None, None] for x, band in zip(of_all, bands)]
        for of_all in (of_queries, of_keys)
    )
    high, low = (
        band_temperature(len(band), D, (q_rms[i], q_rms[0]), (k_rms[i], k_rms[0])) for i, band in enumerate(bands) if i
    )
    return high, low


def one_token(*tensors: Tensor) -> list[Tensor]:
    """What a function says is wrong with its options on is little, and the same on every rank.

    Args:
        tensors: (B, heads, tokens, width).
    """
    shapes = [(*x.shape[:2], 1, x.shape[3]) for x in tensors]
    devices = ["cpu" if x.is_meta else x.device for x in tensors]
    return [torch.zeros(s, dtype=x.dtype, device=device) for x, s, device in zip(tensors, shapes, devices)]


def _layout(shards: Shards, q: Tensor, k: Tensor, who: str) -> Layout:
    check_qkv(q, k, k)
    queries, keys = shards.layouts(q.shape[2], k.shape[2])
    if queries != keys:
        raise ValueError(f"{who} takes as many queries as keys, got {queries.length} and {keys.length}")
    return queries


def none_of(who: str, **options: Any) -> None:
    """Refuse options.

    Args:
        who: does not take them in parts.
        options: what was given.

    Raises:
        ValueError: if one is not None or False.
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{who} takes no {name} on a sequence in parts, got {value}")
