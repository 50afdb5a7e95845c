"""Linear attention: feature maps instead of a softmax, optional decay, time linear in the number of tokens.

    o_i = sum_{j<=i} (prod_{t=j+1..i} decay_t) (q_i . k_j) v_j                       causal
    o_i = sum_j (q_i . k_j) v_j                                                      not causal
    normalised: o_i divided by the same sum with v_j = 1

The causal form runs by chunks: inside a chunk a masked product with the decays between its tokens, between chunks a
state S = sum_j (decays after j) k_j^T v_j. Decays only ever multiply, over spans that begin after j and end at i, so
that nothing is divided by a cumulative product and any decay in (0, 1] is safe over any length. Where they vary by
token or channel a chunk is built by halving: what reaches from the earlier to the later half of a span of 2s tokens is
(products to the middle) x (products from the middle), an outer product for a factor per head, and
(q * products from the middle) (k * products to the middle)^T for a factor per channel; then s doubles.

Backward recomputes each piece from its inputs and from the state before it; nothing of size N x N or N x D x E exists.
Gradients of decays are sums of the very terms in which the decay occurs, never differences of large sums.

That is computed in torch and C, and on CUDA and HIP devices by kernels of our own in Triton or by those of
flash-linear-attention, where it is installed: `backends`, and `linear_plan` says which and why.
"""

from saccade.ops.linear.attend import linear_attend, linear_attend_reference, linear_plan, linear_step
from saccade.ops.linear.inputs import LinearState, elu_plus_one, retention_decay
from saccade.ops.linear.planning import LinearPlan

__all__ = [
    "LinearPlan",
    "LinearState",
    "elu_plus_one",
    "linear_attend",
    "linear_attend_reference",
    "linear_plan",
    "linear_step",
    "retention_decay",
]
