"""What is asked of linear attention (`LinearProblem`), and which path does it (`LinearPlan`).

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D feature width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.linear.pieces import varies
from saccade.ops.planning import AnyPlan, Parts, Shapes
from saccade.ops.sharding import Dealing, parts_of_states


@dataclass(eq=False)
class LinearProblem(Shapes):
    """One call of `linear_attend`, without the tensors' contents.

    `form` is what decays vary by: "none", "head", "token" or "channel". `chunk_size` is the call's, or the default.
    The decays' own bytes are not in `io_bytes`.
    """

    causal: bool
    normalize: bool
    form: str
    scale: float
    chunk_size: int

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two, forward: each token's part of the state and its way out, and inside chunks
        the scores of all pairs that a chunk's square has."""
        D, E = self.D, self.E + self.normalize
        pairs = self.N * min(self.chunk_size, self.N) if self.causal else 0
        return 2 * self.B * (self.H * (self.N * D * E + pairs * (D + E)) + self.K * self.M * D * E)


class LinearPlan(AnyPlan):
    """Which path `linear_attend` takes for the same arguments, why, and what it costs; attributes as in `AnyPlan`."""


def form_of(factors: Tensor | None) -> str:
    """What the decays vary by, of factors as `as_factors` makes them."""
    if factors is None:
        return "none"
    if factors.shape[3] > 1:
        return "channel"
    return "token" if varies(factors) else "head"


def linear_parts(problem: LinearProblem, factors: Tensor | None, ranks: Dealing, needs_grad: bool) -> Parts:
    """What falls to each rank: the state that its tokens leave behind, and their rows behind the others' states.

    Where decays are there, a state is of a query head, not of a key head, and its product of decays comes along; where
    not causal the states of a rank's pieces are one.

    Args:
        problem: the call on the whole sequence.
        factors: its decays, of `as_factors`.
        ranks: who share it.
        needs_grad: keys, values or decays have a gradient.
    """
    B, H, K, D, E = problem.B, problem.H, problem.K, problem.D, problem.E + problem.normalize
    heads = K if factors is None else H
    decays = 0 if factors is None else factors.shape[0] * H * factors.shape[3]
    state = (B * heads * D * E + decays) * working_dtype(problem.dtype).itemsize
    queries, keys = ranks.layout(problem.N), ranks.layout(problem.M)

    def flops(n: int, m: int) -> int:
        return 2 * B * heads * m * D * E + replace(problem, N=n, M=m).flops

    if not problem.causal:
        of_ranks = [flops(n, m) for n, m in zip(queries.shares, keys.shares)]
        return parts_of_states(state, of_ranks, needs_grad)
    of_ranks = [sum(flops(len(x), len(x)) for x in queries.pieces(rank)) for rank in range(ranks.ranks)]
    return parts_of_states(queries.slots * state, of_ranks, needs_grad)
