"""SpargeAttn: attention over the blocks that are predicted to matter, and the skips inside its online softmax.

Shape letters: B batch, H query heads, K key heads, N queries, L those filled up to whole blocks, M keys, D head dim,
E width of values; n, m blocks of queries and keys.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.spargeattn.prediction import LOG2E, cover, int8, sparge_block_map
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.autocast import working_dtype
from saccade.ops.heads import check_qkv
from saccade.ops.masks import Mask
from saccade.ops.selection import PerHead, one_per_head
from saccade.ops.sharding import in_parts


@in_parts
def spargeattn_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    causal: bool = False,
    similarity_threshold: PerHead | None = None,
    cdf_threshold: PerHead | None = None,
    top_k: PerHead | None = None,
    pv_threshold: PerHead | None = None,
    attention_sink: bool = False,
    sinks: int = 0,
    smooth_k: bool = True,
    quantize: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    pv_rows: int | None = None,
    scale: float | None = None,
    short_blocks: Literal["measure", "keep"] = "measure",
    return_map: bool = False,
) -> Any:
    """Attention over the blocks that `sparge_block_map` keeps; `similarity_threshold=1` keeps all.

    Gradients flow through the kept blocks. Memory is linear in N + M; with `pv_threshold` that holds for inference
    only (stage 2 is here for its result: a loop over key blocks that skips no work).

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; E may differ from D.
        causal: no query sees a later key. With N < M the queries are the last of the tokens, and all is dense.
        similarity_threshold, cdf_threshold, top_k, attention_sink, sinks, block_q, block_k, short_blocks: see
            `sparge_block_map`.
        pv_threshold: lambda >= 0 of stage 2, for all or per head; None leaves stage 2 out.
        smooth_k: predict (and quantise) from k less its mean over the sequence.
        quantize: q and smoothed k go through INT8, one scale per block, as in the authors' kernels; inference only.
        pv_rows: rows that stage 2 skips together, a divisor of `block_q`; where None, 32 (a warp of the authors'
            kernels) or what `block_q` has in common with it.
        scale: factor of the dot product, D ** -0.5 where None.
        return_map: also return the blocks that were kept.

    Returns:
        out (B, H, N, E); with `return_map` also the map (B, H, n, m), bool.

    Raises:
        ValueError: if shapes or thresholds do not fit.
    """
    check_qkv(q_BHND, k_BKMD, v_BKME)
    H, N, D = q_BHND.shape[1:]
    M = k_BKMD.shape[2]
    scale = D**-0.5 if scale is None else float(scale)
    if causal and N > M:
        raise ValueError(f"with a causal mask the queries are the last of the tokens: at most {M}, got {N}")
    pv_rows = math.gcd(32, block_q) if pv_rows is None else pv_rows
    if pv_threshold is not None and (pv_rows < 1 or block_q % pv_rows):
        raise ValueError(f"pv_rows must divide block_q ({block_q}), got {pv_rows}")
    if quantize and torch.is_grad_enabled() and (q_BHND.requires_grad or k_BKMD.requires_grad):
        raise ValueError("quantize=True has no gradient: call it under torch.no_grad()")
    smoothed = k_BKMD - k_BKMD.mean(2, keepdim=True) if smooth_k and M else k_BKMD
    keep_BHnm = sparge_block_map(
        q_BHND,
        smoothed,
        causal=causal,
        similarity_threshold=similarity_threshold,
        cdf_threshold=cdf_threshold,
        top_k=top_k,
        attention_sink=attention_sink,
        sinks=sinks,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        short_blocks=short_blocks,
    )
    dense = causal and N < M
    if dense:
        keep_BHnm = torch.ones_like(keep_BHnm)
    elif causal:
        keep_BHnm = cover(keep_BHnm, block_q, block_k)

    if quantize:
        q_BHND, k_BKMD = int8(q_BHND.float() * (scale * LOG2E), block_q), int8(smoothed.float(), block_k)
        q_BHND, k_BKMD, scale = q_BHND.to(v_BKME.dtype), k_BKMD.to(v_BKME.dtype), math.log(2)
    if pv_threshold is not None and not dense:
        threshold = one_per_head(pv_threshold, "pv_threshold", H, q_BHND.device, 0.0)
        out = _two_stages(q_BHND, k_BKMD, v_BKME, keep_BHnm, threshold, block_q, block_k, pv_rows, causal, scale)
    else:
        mask: Mask | None = None if dense else masks.blocks(keep_BHnm, (block_q, block_k))
        if causal:
            mask = masks.causal(M - N) if mask is None else mask & masks.causal()
        out = attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=scale)
    return (out, keep_BHnm) if return_map else out


def _two_stages(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    keep_BHnm: Tensor,
    threshold_H: Tensor,
    block_q: int,
    block_k: int,
    rows: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """The online softmax over key blocks with the softmax-aware skip; all query blocks at once."""
    (B, H, N, _), M, E = q_BHND.shape, k_BKMD.shape[2], v_BKME.shape[3]
    wide = working_dtype(q_BHND.dtype)
    group = H // k_BKMD.shape[1]
    q = F.pad(q_BHND.to(wide) * (scale * LOG2E), (0, 0, 0, -N % block_q))
    L = q.shape[2]
    position = torch.arange(L, device=q.device)
    top = q.new_full((B, H, L), float("-inf"))
    total, out = q.new_zeros(B, H, L), q.new_zeros(B, H, L, E)
    for j in range(keep_BHnm.shape[3]):
        first, last = j * block_k, min((j + 1) * block_k, M)
        k, v = (x[:, :, first:last].to(wide).repeat_interleave(group, 1) for x in (k_BKMD, v_BKME))
        seen = keep_BHnm[..., j].repeat_interleave(block_q, 2)[..., None] & (position < N)[:, None]
        if causal:
            seen = seen & (position[:, None] >= torch.arange(first, last, device=q.device))
        scores = (q @ k.mT).masked_fill(~seen, float("-inf"))
        here = scores.amax(-1)
        new_top = torch.maximum(top, here)
        gain = torch.where(here == float("-inf"), float("-inf"), here - top)
        worth = gain.unflatten(2, (-1, rows)).amax(-1) + threshold_H[:, None] > 0
        worth = worth.repeat_interleave(rows, 2)
        new_top = torch.where(worth, new_top, top)
        safe = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = torch.where(worth[..., None], (scores - safe[..., None]).exp2(), 0.0)
        decay = (top - safe).exp2()
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None] + weights @ v
        top = new_top
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out[:, :, :N].to(q_BHND.dtype)
