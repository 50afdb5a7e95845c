"""Linear attention with wide features: built for one chunk of tokens at a time, and inside a chunk not at all.

    o_i = sum_{j<=i} kappa(q_i, k_j) v_j,     kappa(q, k) = a(q) . b(k),     a, b: D channels -> F features, F >> D

`linear_attend` takes features as they are, N x F numbers. Where F is hundreds or thousands (products of channels) that
is more than everything else together, so here an `Expansion` makes them on demand:

    inside a chunk      o = tril(kappa(q, k)) v       from the kernel itself, which costs D and not F a pair
    from the past       o = o + a(q) S,  S = sum_j b(k_j)^T v_j  (F x E)

Nothing of size N x F or N x N exists, forward or backward: each chunk is computed again for its gradient, from its
tokens and from the state before it. That state is kept for every F tokens or so, and computed again in between. Without
causality few keys are met pair by pair, a tile of queries at a time, wherever that costs less than features.

There is no normaliser: carry a column of ones in v, or of zeros and ones where some keys are padding.
"""

from saccade.ops.expansion.attend import expanded_attend, expanded_attend_reference, in_segments
from saccade.ops.expansion.kernels import Expansion, Outer, Polynomial

__all__ = ["Expansion", "Outer", "Polynomial", "expanded_attend", "expanded_attend_reference", "in_segments"]
