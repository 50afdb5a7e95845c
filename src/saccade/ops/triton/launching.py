"""Calling a kernel: where that is possible, and what happens then. See the package's docstring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Launch",
    "block",
    "chosen",
    "contiguous_rows",
    "for_hip",
    "interpreted",
    "launch",
    "noted",
    "products",
    "refusal",
    "work_type",
]


#: numbers from a token to the next, from which on a chunk is longer than offsets of 32 bits reach
FURTHEST = 2**24


class Launch(NamedTuple):
    """A call of a kernel, without the contents of its tensors.

    Attributes:
        kernel: the function that `triton.jit` made.
        grid: number of programs by axis.
        arguments: tensors (on the meta device) and numbers, in its order.
        constants: its constexpr arguments by name.
        warps, stages: as Triton's `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_noted: list[Launch] | None = None
_noted_for_hip = False


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter in this process: its own variable, set before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel takes tensors of this kind, or None.

    Args:
        device, dtype: of the tensors.
    """
    if not _installed():
        return "triton is not installed: pip install 'saccade[triton]'"
    if dtype == torch.float64:
        return "its kernels have no double precision"
    if device.type == "cpu":
        return None if interpreted() else "for CUDA and HIP devices; on the CPU under TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    return _too_old(device)


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def chosen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether operators that have a kernel call it: on a device that takes it; interpreted ones are for tests alone.

    Args:
        device, dtype: of the tensors.
    """
    return device.type == "cuda" and refusal(device, dtype) is None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, the device has {major}.{minor}"


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` on the device of its tensors; on the meta device nothing runs, see `noted`.

    Args:
        kernel: made by `triton.jit`.
        grid: number of programs by axis, at most three, of which CUDA holds the last two to 65,535; nothing runs where
            one is 0.
        arguments: what is not constexpr, in the kernel's order: tensors of one device, and numbers.
        warps, stages: as Triton's `num_warps` and `num_stages`.
        constants: the constexpr arguments.
    """
    if 0 in grid:
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "meta":
        if _noted is not None:
            _noted.append(Launch(kernel, grid, arguments, constants, warps, stages))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # products and sums may be fused, as in torch's own kernels; said because Triton's default changes
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def block(size: int, most: int) -> int:
    """Columns of a tile for `size` columns: a power of two, at least the 16 that a product needs.

    Args:
        size: columns.
        most: the largest tile, itself a power of two; more columns take several.
    """
    return min(most, max(16, 1 << (size - 1).bit_length()))


def contiguous_rows(x: Tensor) -> Tensor:
    """x, copied only where the numbers of its last axis do not lie side by side, or its tokens are `FURTHEST` apart.

    Args:
        x: any tensor, its tokens the last axis but one.
    """
    return x if x.stride(-1) == 1 and x.stride(-2) < FURTHEST else x.contiguous()


def work_type(dtype: torch.dtype) -> torch.dtype:
    """What tiles are multiplied and kept in: bfloat16, else float32; float16 has no room for sums over many tokens.

    Args:
        dtype: of what the tiles are loaded from.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def for_hip(device: torch.device) -> bool:
    """Whether kernels are launched for AMD's devices, or noted for them.

    Args:
        device: of the tensors.
    """
    return _noted_for_hip if device.type == "meta" else torch.version.hip is not None


def products(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of kernels that multiply tiles: WORK, their type, and PRECISION, Triton's `input_precision`.

    Half precision asks for no more than tf32 has, and float32 may be given up as for torch's own products, by
    `torch.set_float32_matmul_precision` or, from torch 2.9 on, by `torch.backends.cuda.matmul.fp32_precision`;
    else float32 is multiplied as three products in tf32 (errors of 2^-21) on NVIDIA, exactly on AMD.

    Args:
        device, dtype: of what the tiles are loaded from.
    """
    from triton import language as tl

    # numpy, which the interpreter multiplies with, knows no bfloat16
    brief = work_type(dtype) == torch.bfloat16 and not interpreted()
    return {"WORK": tl.bfloat16 if brief else tl.float32, "PRECISION": _precision(device, dtype)}


def _precision(device: torch.device, dtype: torch.dtype) -> str:
    enough, hip = dtype != torch.float32 or _given_up(), for_hip(device)
    if hip and device.type == "cuda":
        # the only one of theirs with products in tf32
        enough &= torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
    return "tf32" if enough else "ieee" if hip else "tf32x3"


def _given_up() -> bool:
    # the older function refuses to answer once the newer attribute was set, which it sets itself
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if newer is None else newer == "tf32"


@contextmanager
def noted(hip: bool = False) -> Iterator[list[Launch]]:
    """Inside, the launches on meta tensors are appended to the list that this gives.

    Args:
        hip: whether they are for AMD's devices, else for NVIDIA's.
    """
    global _noted, _noted_for_hip
    before = _noted, _noted_for_hip
    _noted, _noted_for_hip = [], hip
    try:
        yield _noted
    finally:
        _noted, _noted_for_hip = before
