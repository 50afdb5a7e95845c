"""Masks as objects: who may attend to whom, without an N x M tensor.

A mask answers two questions. `allowed(b, h, q, k)` says, for broadcastable index tensors, whether query `q` of
head `h` in batch row `b` may attend to key `k` (FlexAttention's `mask_mod` signature). `block_map(n, m, size)` says,
for each (query block, key block), whether it is EMPTY, PARTIAL or FULL; it is computed from intervals, so its cost is
the number of blocks. PARTIAL may be said of a block that is in truth empty or full, never the other way round.

`simplified(n, m)` is the same mask for that many queries and keys in fewer words: None where it hides nothing.

Masks compose with `&`, `|` and `~`, and `print(mask.picture(n, m))` draws them.

Positions are absolute: query 0 stands at key 0 also where N != M (the upper-left alignment of SDPA's `is_causal`).
When the queries are the last N of M tokens, as in decoding with a cache, say `causal(offset=M - N)`.

A kind of mask outside of this package is a subclass of `Mask`; what it needs to speak of blocks is in `block_states`.
"""

from saccade.ops.masks.bands import Band, Prefix, and_causal, causal, prefix, window
from saccade.ops.masks.block_states import EMPTY, FULL, PARTIAL
from saccade.ops.masks.functions import Function, function
from saccade.ops.masks.grids import Neighborhood, neighborhood
from saccade.ops.masks.lifetimes import FOREVER, Lifetimes
from saccade.ops.masks.mask import And, Mask, Not, Or, Pairwise
from saccade.ops.masks.sequences import (
    Documents,
    Padding,
    PerDocument,
    documents,
    packed,
    padding,
    per_document,
)
from saccade.ops.masks.tables import Blocks, Dense, blocks, dense
from saccade.ops.masks.trees import Tree, tree

__all__ = [
    "EMPTY",
    "FOREVER",
    "FULL",
    "PARTIAL",
    "And",
    "Band",
    "Blocks",
    "Dense",
    "Documents",
    "Function",
    "Lifetimes",
    "Mask",
    "Neighborhood",
    "Not",
    "Or",
    "Padding",
    "Pairwise",
    "PerDocument",
    "Prefix",
    "Tree",
    "and_causal",
    "blocks",
    "causal",
    "dense",
    "documents",
    "function",
    "neighborhood",
    "packed",
    "padding",
    "per_document",
    "prefix",
    "tree",
    "window",
]
