"""Working memory that a thread uses again from call to call: fresh pages cost more than what is written to them.

    with scratch("windows", torch.float32, device) as room:
        scores = room("scores", 64, 64)

A lease: as long as it lasts nobody else has this memory, not even a call inside this one, which gets some of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from math import prod
from threading import local
from typing import Any

import torch
from torch import Tensor

from saccade.ops.memory import large_empty

__all__ = ["KEPT_BYTES", "Scratch", "scratch"]

#: bytes of a buffer that outlives its lease, and of all that a thread keeps, at most
KEPT_BYTES, _ALL_BYTES = 2**25, 2**26

#: what is made of a lease's buffers and kept with them, at most
_BOUND = 4096


class Scratch:
    """Buffers by name, each as large as the largest that was asked for.

    Attributes:
        bound: what its user makes of the buffers (views, calls) to have it again; forgotten when one is replaced.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.bound: dict[Any, Any] = {}
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer of this name, in this shape, with whatever was left in it."""
        need = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < need:
            if buffer is not None:
                self.bound.clear()
            with torch.inference_mode(False):  # it may be used again outside
                buffer = self._buffers[name] = large_empty((need,), self.dtype, self.device)
        return buffer[:need].view(shape)

    def trim(self, kept_bytes: int = KEPT_BYTES) -> int:
        """Let go of buffers that are larger than that; the bytes that remain."""
        large = [name for name, buffer in self._buffers.items() if buffer.nbytes > kept_bytes]
        for name in large:
            del self._buffers[name]
        if large or len(self.bound) > _BOUND:
            self.bound.clear()
        return sum(buffer.nbytes for buffer in self._buffers.values())


class _Free(local):
    """What a thread has in store: (key, bytes, memory), the last used last."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Hashable, int, Scratch]] = []


_free = _Free()


@contextmanager
def scratch(
    purpose: Hashable, dtype: torch.dtype, device: torch.device, kept_bytes: int = KEPT_BYTES
) -> Iterator[Scratch]:
    """Memory for the time of a `with`, where there is some that served the same purpose before.

    Args:
        purpose: who asks; what is found in `bound` was left there by the same.
        dtype: of all its buffers.
        device: only a CPU's memory is kept, as an accelerator's allocator does that by itself.
        kept_bytes: of a buffer that outlives the lease, at most.
    """
    if device.type != "cpu":
        yield Scratch(dtype, device)
        return
    rooms, key = _free.rooms, (purpose, dtype)
    place = next((place for place in reversed(range(len(rooms))) if rooms[place][0] == key), None)
    room = Scratch(dtype, device) if place is None else rooms.pop(place)[2]
    try:
        yield room
    finally:
        rooms.append((key, room.trim(kept_bytes), room))
        while sum(size for _, size, _ in rooms) > _ALL_BYTES:
            del rooms[0]
