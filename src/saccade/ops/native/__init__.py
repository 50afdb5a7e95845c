"""Inner loops in C for the CPU, compiled on the machine at first use: what torch has no fused operator for.

    attend.c      softmax attention over lists of keys          blocks.py, routes.py make the lists
    gradients.c   its backward pass
    soften.c      a step of the running softmax over tiles      soften.py
    grid.c        neighbourhoods on 2-D and 3-D grids           grid.py calls it and grid_gradients.c
    linear.c      linear attention                              linear.py
    gather.c      sums over rows at indices, crops of tables    gather.py
    wkv.c         bidirectional WKV, forward and backward       wkv.py
    scan.c        selective scan, forward and backward          scan.py
    team.c        work of somebody else's on the same threads   ops/workers.py
    vectors.h     the product that all of them are made of

Float32, and half precision by way of it. The compiler is the one that `torch.compile` uses too (`$CC`, else cc, gcc or
clang; five seconds, once), for the machine's own instructions. Where there is none, `refusal` says why, `saccade.plan`
shows it, and the same is computed in torch. `SACCADE_NATIVE=0` turns it off. Planning asks `forecast`, which compiles
nothing.
"""

from __future__ import annotations

from saccade.ops.native.build import forecast, refusal

__all__ = ["forecast", "refusal"]
