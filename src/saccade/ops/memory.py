"""Memory for large results.

Works as `torch.empty` everywhere; on Linux the system is told that the pages of a large tensor may be huge.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["HUGE_FROM", "large_empty"]

#: bytes of a huge page, and of the smallest tensor that asks for them
_HUGE_PAGE, HUGE_FROM = 2**21, 2**24


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, for large ones in huge pages where Linux leaves that to the program.

    A page fault for every 4 kB of a long output costs a seventh of the time that the output takes.
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= HUGE_FROM and (advise := _madvise()) is not None:
        begin = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        advise(begin, (x.data_ptr() + x.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE, 14)  # MADV_HUGEPAGE
    return x


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system call, or None where there is none; its result does not matter, it is advice."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
