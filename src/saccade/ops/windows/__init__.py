"""Windows and neighbourhoods on 1-D, 2-D and 3-D grids of tokens, exactly, without N x M work.

Queries are cut into tiles (a block of positions on every axis). The keys that a tile's queries may see lie in a
box, the tile plus a halo. A tile is then one small dense attention over its box, and the pairs of the box that the
mask forbids get a bias of -inf:

    S = scale * Q K_box^T + bias,   P = softmax(S),   O = P V_box,   lse = log sum exp(S)
    dS = P * (dO V_box^T - rowsum(dO * O) + dlse)
    dQ = scale * dS K_box,   dK_box += scale * dS^T Q,   dV_box += P^T dO

What makes it fast:

- Small tiles waste little of their box, large ones make fast matrix products: `layout` weighs the two, with copies and
  calls, and finds the tile of each region of the grid. Near a border windows are moved inwards until several queries
  share one: these are tiles of their own, without a halo.
- A part (equal tiles at equal distances) has one bias. Along its first axis boxes are a strided view; the other axes
  are cut into overlapping strips, some at a time, which are in the cache when they are used.
- Scores are made piece by piece in the cache too; the backward pass computes them again.

Dilation d is d separate grids (card `neighborhood`: residue classes), and query heads that share a key head are
further rows of a tile.
"""

from saccade.ops.windows.forecast import density, extra_bytes, regular, relative_time
from saccade.ops.windows.operator import run

__all__ = ["density", "extra_bytes", "regular", "relative_time", "run"]
