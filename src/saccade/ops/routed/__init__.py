"""Block attention by routing: each query attends its own key block, causally, and the blocks that were chosen for it.

    out_i = softmax over { j <= i : j // S = i // S }  u  { j : j // S in chosen_i }  of (scale q_i . k_j)  v_j

Per (key block, head) the queries that chose it are listed (one sort), cut into tiles of one size, and each tile is
attended to its block densely; the parts of a query are merged by their LSEs. The backward pass gives every part the
*merged* output and LSE, which makes the parts' own gradients exact. The choice has no gradient.

Tiles have a size that depends on shapes alone and list their queries in order: what a query gets is the same, bit for
bit, whatever later queries choose.

S are the tokens of a block.
"""

from saccade.ops.routed.attend import routed_attend
from saccade.ops.routed.sequences import BlockLayout, block_layout

__all__ = ["BlockLayout", "block_layout", "routed_attend"]
