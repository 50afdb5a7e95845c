"""Softmax attention that computes only the blocks with work to do, forward and backward.

With S(i) the key blocks that query block i visits, K_S their keys side by side, and b an optional bias per block,

    s = scale * q_i K_S^T + b_iS,   P = softmax(s),   out_i = P V_S,   lse_i = log sum exp(s)

and backwards, with delta = rowsum(d out * out),

    dP = d out V_S^T,   ds = P * (dP - delta + d lse),
    dV_S += P^T d out,  dq_i = scale * ds K_S,  dK_S += scale * ds^T q_i,  db = the sum of ds over each block

`saccade.ops.blocks` makes the pieces in which that is done: the key blocks of a piece are gathered into a batch that
stays in cache, and P is computed again in the backward pass. Extra memory is two gathered batches and two tiles of
scores. Half precision is computed in float32. On the CPU `saccade.ops.native` does it in C where it can.

Windows and neighbourhoods are regular, which `saccade.ops.windows` uses: `run` hands those over.
"""

from saccade.ops.backends.blocksparse.attend import blocksparse_attend
from saccade.ops.backends.blocksparse.path import LAYOUT_ROWS, extra_bytes, refusal, relative_time, run

__all__ = ["LAYOUT_ROWS", "blocksparse_attend", "extra_bytes", "refusal", "relative_time", "run"]
