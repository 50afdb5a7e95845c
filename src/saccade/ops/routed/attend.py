"""Block attention by routing, as it is called.

    out_i = softmax over { j <= i : j // S = i // S }  u  { j : j // S in chosen_i }  of (scale q_i . k_j)  v_j

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim, E width of values, S
tokens per block, j blocks chosen per query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.backends.sdpa import positive_scale
from saccade.ops.export import exporting, weigh
from saccade.ops.heads import repeat_heads
from saccade.ops.routed.operator import attend_chosen
from saccade.ops.sharding import in_parts


@in_parts
def routed_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    chosen_BHNj: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    own: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over its own block up to itself, and over all of the blocks chosen for it.

    Exact gradients for q, k and v, also through the LSE. Time O(N (j + 1/2) S D) per head, memory linear in N j.

    Args:
        q_BHND: queries; they are the last N of the M tokens.
        k_BKMD, v_BKME: keys and values; M is a multiple of `block_size` (pad, and choose no block with padding).
        chosen_BHNj: integers, the key blocks of each query, none twice; -1 is none.
        block_size: S.
        scale: factor of the dot product, D ** -0.5 where None.
        own: attend the own block; N must then be a multiple of S too, and no query may choose its own block.

    Returns:
        out (B, H, N, E) and the natural-log LSE (B, H, N); 0 and -inf for a query that attends to nothing.

    Raises:
        ValueError: if the shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    K, M, E = k_BKMD.shape[1], k_BKMD.shape[2], v_BKME.shape[3]
    if M % block_size or (own and (N % block_size or N > M)):
        raise ValueError(
            f"queries and keys must fill whole blocks of {block_size}, and M >= N; got N = {N} and M = {M}"
        )
    if chosen_BHNj.shape[:3] != (B, H, N) or chosen_BHNj.is_floating_point():
        raise ValueError(f"chosen must be integers of shape ({B}, {H}, {N}, j), got {tuple(chosen_BHNj.shape)}")
    if k_BKMD.shape != (B, K, M, D) or v_BKME.shape != (B, K, M, E) or H % K:
        raise ValueError(
            f"queries {tuple(q_BHND.shape)}, keys {tuple(k_BKMD.shape)} and values {tuple(v_BKME.shape)} do not fit"
        )
    q_BHND, scale = positive_scale(q_BHND, D**-0.5 if scale is None else float(scale))
    if 0 in (B, H, N, M):
        return q_BHND.new_zeros(B, H, N, E), q_BHND.new_full((B, H, N), float("-inf"), dtype=torch.float32)
    if exporting():
        return _all_pairs(q_BHND, k_BKMD, v_BKME, chosen_BHNj, block_size, scale, own)
    # the kernels want one width; zeros add nothing to a dot product or to a sum
    width = max(D, E)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BHND, k_BKMD, v_BKME))
    out, lse = attend_chosen(q, k, v, chosen_BHNj, block_size, scale, own)
    return out[..., :E], lse


def _all_pairs(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool
) -> tuple[Tensor, Tensor]:
    (B, H, N, _), M = q.shape, k.shape[2]
    k, v = (repeat_heads(x, H) for x in (k, v))
    blocks = torch.zeros(B, H, N, M // size + 1, dtype=torch.bool, device=q.device)
    blocks = blocks.scatter(3, torch.where(chosen < 0, M // size, chosen).long(), True)
    seen = blocks[..., :-1].repeat_interleave(size, 3)
    if own:
        key = torch.arange(M, device=q.device)
        place = key[M - N :, None]
        seen = seen | ((key // size == place // size) & (key <= place))
    return weigh(((q * scale) @ k.mT).masked_fill(~seen, float("-inf")), v)
