"""How fast this machine multiplies matrices: the measure of every other rate."""

from __future__ import annotations

from functools import lru_cache

import torch

from saccade.ops.measure import machine, seconds


@lru_cache(maxsize=8)
def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1536) -> float:
    """FLOP/s of a square matrix multiplication, measured once a process (a tenth of a second)."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a)


def describe() -> str:
    """This machine in one line, with its matmul rate."""
    found = machine()
    place = found["accelerator"] or f"{found['processor']}, {found['threads']} of {found['cores']} cores"
    rate = matmul_rate("cuda" if found["accelerator"] else "cpu")
    return f"{place}, torch {found['torch']}, matmul {rate / 1e9:.0f} GFLOP/s fp32"
