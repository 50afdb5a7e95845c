"""Kernels in Triton, for CUDA and HIP devices: what neither torch nor compiled FlexAttention has a fused operator for.

    launching.py      how they are called, on a device, interpreted on the CPU, or only noted
    compiling.py      how they are compiled without a device, and what they take of its registers and memory
    X_kernels.py      the kernels of X: the only files that import triton
    X.py              what calls them: tensors in, tensors out, and `rehearse` for `compiling`

A kernel's source runs in three ways. On a device, as always. Under Triton's interpreter where `TRITON_INTERPRET=1` was
set before triton was imported: numpy on the CPU, slow, for tests, and never chosen by a planner. And compiled for
devices that are not there: `rehearse` calls everything on meta tensors, `launch` notes what would have been launched,
and `python -m saccade.ops.triton.compiling` compiles exactly that, with the types, sizes and warps of the call.
"""

from __future__ import annotations

from saccade.ops.triton.launching import chosen, interpreted, launch, refusal

__all__ = ["chosen", "interpreted", "launch", "refusal"]
