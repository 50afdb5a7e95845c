"""Bidirectional WKV as it is called, and the slow reference.

    y_t = (sum_{i != t} e^(k_i - w d(t, i)) v_i + e^(u + k_t) v_t) / (sum_{i != t} e^(k_i - w d(t, i)) + e^(u + k_t))

| distance      | d(t, i) of i != t                                                                             |
|---------------|-----------------------------------------------------------------------------------------------|
| `"published"` | abs(t - i) - 1                                                                                |
| `"kernel"`    | abs(t - i); one less for those before t in its chunk, of which a row has `chunks` or fewer    |

Shape letters: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.export import exporting
from saccade.ops.grad import needs_grad
from saccade.ops.sharding import in_parts
from saccade.ops.wkv.operator import forward

#: what d(t, i) may be
DISTANCES = ("published", "kernel")


@in_parts
def wkv(
    k_BTC: Tensor,
    v_BTC: Tensor,
    decay_C: Tensor,
    bonus_C: Tensor,
    *,
    distance: str = "published",
    chunks: int = 16,
) -> Tensor:
    """Bidirectional WKV, see the equations at the top of this file.

    Time and memory O(T C), forward and backward, for decay of either sign and strength. Computed in float32 (float64
    for float64 values), given back in the dtype of the values.

    Args:
        k_BTC, v_BTC: keys (logarithms of weights) and values.
        decay_C: w; negative where what is farther away weighs more.
        bonus_C: u, what a token's own key gets.
        distance: d, one of `DISTANCES`: Vision-RWKV's equation (arXiv 2403.02308), or that of the kernel which is used
            for it.
        chunks: with `distance="kernel"`: a chunk has ceil(T / chunks) tokens.

    Raises:
        ValueError: if shapes or types do not fit, or the distance is unknown.

    >>> import torch
    >>> k, v, zero = torch.zeros(1, 3, 1), torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1), torch.zeros(1)
    >>> wkv(k, v, zero, zero).flatten().tolist()
    [3.0, 3.0, 3.0]
    """
    chunk, shift = _check(k_BTC, v_BTC, decay_C, bonus_C, distance, chunks)
    wide = working_dtype(v_BTC.dtype)
    k, v, w, u = (x.to(wide) for x in (k_BTC, v_BTC, decay_C, bonus_C))
    if not k.numel():
        return v_BTC
    if exporting():
        return forward(k, v, w, u, chunk, shift, False)[0].to(v_BTC.dtype)
    return torch.ops.saccade.wkv(k, v, w, u, chunk, shift, needs_grad(k, v, w, u))[0].to(v_BTC.dtype)


def wkv_reference(
    k_BTC: Tensor,
    v_BTC: Tensor,
    decay_C: Tensor,
    bonus_C: Tensor,
    *,
    distance: str = "published",
    chunks: int = 16,
) -> Tensor:
    """`wkv`, slow and obvious: the weights of all pairs. The oracle of the tests.

    Args:
        k_BTC, v_BTC, decay_C, bonus_C, distance, chunks: as in `wkv`.

    Raises:
        ValueError: as `wkv`.
    """
    chunk, shift = _check(k_BTC, v_BTC, decay_C, bonus_C, distance, chunks)
    place = torch.arange(k_BTC.shape[1], device=k_BTC.device)
    query, key = place[:, None], place
    near = (key < query) & (key // chunk == query // chunk)
    away_TT1 = torch.where(near, query - key - 1, (query - key).abs() - shift)[..., None]
    own_TT1 = (query == key)[..., None]
    scores_BTTC = k_BTC[:, None] + torch.where(own_TT1, bonus_C, -decay_C * away_TT1)
    return (scores_BTTC.softmax(2) * v_BTC[:, None]).sum(2)


def _check(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, distance: str, chunks: int) -> tuple[int, int]:
    """Tokens of a chunk, and what is taken off |t - i| outside it."""
    if k.ndim != 3 or k.shape != v.shape or not (k.is_floating_point() and v.is_floating_point()):
        raise ValueError(
            f"k and v must be floating point (batch, tokens, channels) of one shape, got {k.dtype} {tuple(k.shape)} "
            f"and {v.dtype} {tuple(v.shape)}"
        )
    for name, x in (("decay", decay), ("bonus", bonus)):
        if x.shape != k.shape[2:]:
            raise ValueError(f"{name} must be ({k.shape[2]},), a number for each channel, got {tuple(x.shape)}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    tokens = max(1, k.shape[1])
    return (tokens, 1) if distance == "published" else (-(-tokens // chunks), 0)
