"""Bidirectional WKV in C: two passes over the tokens, in which the sums stay in the cache.

Shape letters: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library
from saccade.ops.native.tasks import WIDTH

__all__ = ["wkv_backward_in_c", "wkv_in_c"]

#: vectors of channels of a task, at most
_VECTORS = 4


def wkv_in_c(
    k_BTC: Tensor, v_BTC: Tensor, w_C: Tensor, u_C: Tensor, chunk: int, shift: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.wkv.operator.forward` gives, the last three empty without `keep`; all float32.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    C = k_BTC.shape[2]
    k, v, w, u = map(_whole, (k_BTC, v_BTC, w_C, u_C))
    y, *kept = (large_empty(tuple(k.shape), k.dtype, k.device) for _ in range(4 if keep else 1))
    _run("saccade_wkv", (k, v, w, u, y, *(kept if keep else (None, None, None))), k, chunk, shift)
    key, age, slope = (_cut(x, C) for x in kept) if keep else (k.new_empty(0) for _ in range(3))
    return _cut(y, C), key, age, slope


def wkv_backward_in_c(*given: Tensor, chunk: int, shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.wkv.operator.backward` gives of its tensors; all float32.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    C = given[0].shape[2]
    whole = tuple(map(_whole, given))
    k = whole[0]
    of_k, of_v = (large_empty(tuple(k.shape), k.dtype, k.device) for _ in range(2))
    of_w, of_u = (k.new_empty(k.shape[0], k.shape[2]) for _ in range(2))
    _run("saccade_wkv_backward", (*whole, of_k, of_v, of_w, of_u), k, chunk, shift)
    return _cut(of_k, C), _cut(of_v, C), of_w[:, :C].sum(0), of_u[:, :C].sum(0)


def _whole(x: Tensor) -> Tensor:
    """Contiguous, the channels filled up to whole vectors."""
    missing = -x.shape[-1] % WIDTH
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def _cut(x: Tensor, channels: int) -> Tensor:
    return x[..., :channels].contiguous()


def _run(name: str, tensors: tuple[Tensor | None, ...], like: Tensor, chunk: int, shift: int) -> None:
    B, T, C = like.shape
    threads = torch.get_num_threads()
    vectors = max(1, min(_VECTORS, B * C // WIDTH // (2 * threads)))
    if getattr(library(), name)(*map(address, tensors), B, T, C, chunk, shift, vectors, threads):
        raise MemoryError("no room for the working memory of wkv")
