"""Pieces of boxes whose scores stay in the cache: loading, scoring, storing.

Shape letters: B batch, H query heads, K key heads, G = H / K, N tokens, D head dim; n windows of a piece, each for
every key head that it has; T tokens of a window, R = G T rows of a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.partitions.boxes import Boxes, cuts_of, kinds_of_boxes
from saccade.ops.scratch import Scratch

#: bytes of scores per thread and piece: larger ones leave the cache, smaller ones pay for more calls
_PIECE_BYTES = 2**20

LOG2_E = 1.4426950408889634


def loaded(room: Scratch, name: str, x: Tensor, *shape: int) -> Tensor:
    """`x` in one block of memory, itself where it is."""
    if x.dtype == room.dtype and x.is_contiguous():
        return x.view(shape)
    return room(name, *x.shape).copy_(x).view(shape)


def target(room: Scratch, name: str, x: Tensor, *shape: int) -> Tensor:
    """Where to write what belongs to `x`: `x` itself where it is one block."""
    return x.view(shape) if x.dtype == room.dtype and x.is_contiguous() else room(name, *shape)


def store(x: Tensor, written: Tensor) -> None:
    if written.data_ptr() != x.data_ptr():
        x.copy_(written.view(x.shape))


class Call:
    """What all pieces of a call share: the addends of the scores, in powers of two, and how large a piece may be."""

    def __init__(
        self, q: Tensor, bias: Tensor | None, mask: Tensor | None, spec: list[int], scale: float, memory: float
    ) -> None:
        dtype, self.scale = working_dtype(q.dtype), scale
        self.kinds = kinds_of_boxes(tuple(spec))
        self.bias, self.mask = (None if x is None else x.to(dtype) * LOG2_E for x in (bias, mask))
        cache = _PIECE_BYTES * torch.get_num_threads() if q.device.type == "cpu" else memory
        self.limit = int(min(cache, memory))

    def cuts(self, boxes: Boxes, B: int, K: int, G: int) -> Iterator[tuple[slice, ...]]:
        """Slices of batch, windows per axis, and key heads, whose scores fit into the limit."""
        return cuts_of([B, *(s.count for s in boxes.segments), K], self.limit // (4 * G * boxes.tokens**2))

    def bias_of(self, boxes: Boxes, G: int) -> Tensor | None:
        """(K, G, T, T)."""
        T = boxes.tokens
        return None if self.bias is None else boxes.pairs(self.bias).reshape(-1, G, T, T)

    def score(
        self,
        scores_nRT: Tensor,
        q_nRD: Tensor,
        k_nTD: Tensor,
        bias_KGTT: Tensor | None,
        cut: tuple[slice, ...],
        minus: Tensor | None = None,
    ) -> None:
        """Writes scale * q k^T + bias + mask - minus, in powers of two."""
        T, heads = k_nTD.shape[1], cut[-1]
        addends = [] if bias_KGTT is None else [bias_KGTT[heads]]
        if self.mask is not None:
            rows = torch.arange(cut[0].start, cut[0].stop, device=self.mask.device) % self.mask.shape[0]
            addends.append(self.mask[rows][:, None, None])
        if minus is not None:
            addends.append(minus.neg())
        split = scores_nRT.view(-1, heads.stop - heads.start, q_nRD.shape[1] // T, T, T)
        if len(addends) == 1:
            split.copy_(addends[0])
        elif addends:
            torch.add(addends[0], addends[1], out=split)
            for addend in addends[2:]:
                split.add_(addend)
        scores_nRT.baddbmm_(q_nRD, k_nTD.mT, beta=min(1, len(addends)), alpha=self.scale * LOG2_E)


def piece_of(view: Tensor, cut: tuple[slice, ...], G: int = 1) -> Tensor:
    """A piece of a view of boxes; G heads for each of the cut's."""
    *windows, heads = cut
    return view[(*windows, heads if G == 1 else slice(heads.start * G, heads.stop * G))]


def unpacked(tensors: list[Tensor]) -> list[Tensor]:
    """Views (B, H, N, D) of query, key and value."""
    return [x.transpose(1, 2) for x in tensors[0].unbind(2)] if len(tensors) == 1 else tensors
