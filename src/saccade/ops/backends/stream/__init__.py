"""Any score, any normaliser, tile by tile: nothing of size N x M is ever kept, forward or backward.

Forward. Blocks of queries, all batch rows and heads together, go over the keys in tiles. Tiles that the mask leaves
empty are skipped, full ones are not masked. The normaliser's row state is carried along (`ops.normalizers`).

Backward. Each tile's scores are computed again. With <dO_i, out_i> = f_i r_i and the row scalar

    r_t = c_t r_{t-1} + sum_j p_tj dP_tj,        dP_tj = <dO_i, v_j>

the whole normalisation is a recursion over row scalars, (state, r): it is run once to get the states before each
tile, then backwards, one small autograd step per tile, which gives dS of the tile and the weight of its dV. This is
exact for every differentiable normaliser, in any order of tiles. Where the normaliser has a closed form (all named
ones do) one round suffices:  dS = grad(S, P, dP, delta),  delta_i = <dO_i, out_i>,  for softmax less d lse.
From dS on: matrix products where the score is the dot product, else autograd through the score's tile.

Captured tensors. `score`, `score_mod` and the normaliser may use any tensors: parameters, or activations of the
surrounding graph. They are found by running one small tile under a `TorchFunctionMode` and become inputs of the
autograd function, so that gradients reach them as in eager code (also through `torch.autograd.grad`). In the backward
pass the same mode puts a detached twin in the place of each, so that a tile's gradient ends there. The reads
`captured[indices]` of a bias table are differentiated by a scatter-add of the tile, not by a table of zeros per tile.

Workers. On the CPU, blocks of queries of the forward pass go to one core each (`ops.workers`), where the score is a dot
product and the normaliser a known one; the softmax of a tile is one pass of C (`ops.native.soften`).

Memory. The same small tile tells what the score keeps per pair (a network keeps its hidden activations), and the
tile's size follows: at most `memory_mb`, and by default no more than fits the processor's caches (`TILE_BYTES`,
tuned by `saccade.autotune`). On top come row states and gradient accumulators, linear in N + M.

Second derivatives are refused. Random numbers (dropout, also inside the score) are drawn from a seed per tile,
so that the backward pass sees the same ones and leaves the global generator alone.
"""

from saccade.ops.backends.stream.forecast import CANDIDATES, extra_bytes, refusal, relative_time, trials
from saccade.ops.backends.stream.operator import run

__all__ = ["CANDIDATES", "extra_bytes", "refusal", "relative_time", "run", "trials"]
