"""Linear attention in C: chunks of tokens against each other and against a state that stays in the cache.

Shape letters: B batch, H query heads, K key heads, N tokens, D width of q and k, E of v, W of values in C.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library
from saccade.ops.native.tasks import WIDTH

__all__ = ["attend_chunks"]

#: tokens of a segment, at the least
_SEGMENT = 512


def attend_chunks(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    state_BHDE: Tensor,
    decay_H: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Causal: output (B, H, N, E) and the state after the last token, float32; `linear_attend` without its checks.

    Args:
        state_BHDE: before the first token; where normalised one column wider.
        decay_H: a factor for each head, float64.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    B, H, N, D = q_BHND.shape
    E, columns = v_BKNE.shape[3], state_BHDE.shape[3]
    segment = _segment(B * H, N)
    states = q_BHND.new_zeros(B, H, ceil(N / segment), D, ceil(columns / WIDTH) * WIDTH)
    states[:, :, 0, :, :columns] = state_BHDE
    if states.shape[2] > 1:
        whole = 1.0 if decay_H is None else (decay_H**segment).to(states.dtype)[:, None, None]
        before = (states.shape[2] - 1) * segment
        sums = _sums(k_BKND[:, :, :before], v_BKNE[:, :, :before], H, decay_H, segment, normalize, states.shape[4])
        for i in range(states.shape[2] - 1):
            states[:, :, i + 1] = states[:, :, i] * whole + sums[:, :, i]
    q, k, v = _in_place(q_BHND), _in_place(k_BKND), _in_place(v_BKNE)
    strides, out = _strides(q, k, v), large_empty((B, H, N, E), q.dtype, q.device)
    failed = library().saccade_linear(
        address(q), address(k), address(v), address(states), address(out), address(decay_H), address(strides),
        B, H, k.shape[1], N, D, E, states.shape[4], segment, normalize, scale, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the working memory of attention")
    return out, states[:, :, -1, :, :columns].contiguous()


def _segment(heads: int, tokens: int) -> int:
    """Tokens of a head that are one task: all, unless there are too few heads for all threads."""
    threads = torch.get_num_threads()
    if heads % threads == 0 or heads >= 4 * threads:
        return max(1, tokens)
    return max(_SEGMENT, ceil(tokens / ceil(4 * threads / max(1, heads))))


def _in_place(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([step for x in tensors for step in x.stride()[:3]])


def _sums(k: Tensor, v: Tensor, H: int, decay_H: Tensor | None, segment: int, normalize: bool, width: int) -> Tensor:
    """(B, H, segments, D, W): what the tokens of each segment add to the state after it."""
    B, K, N, D = k.shape
    k, v = _in_place(k), _in_place(v)
    strides = _strides(k, v)
    sums = k.new_empty(B, H, ceil(N / segment), D, width)
    failed = library().saccade_linear_sums(
        address(k), address(v), address(sums), address(decay_H), address(strides), B, H, K, N, D, v.shape[3],
        width, segment, normalize, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the working memory of attention")
    return sums
