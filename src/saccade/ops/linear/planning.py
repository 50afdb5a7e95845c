"""What is asked of linear attention (`LinearProblem`), and which path does it (`LinearPlan`).

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D feature width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.ops.linear.pieces import varies


@dataclass(frozen=True)
class LinearProblem:
    """One call of `linear_attend`, without the tensors' contents.

    `form` is what decays vary by: "none", "head", "token" or "channel". `chunk_size` is the call's, or the default.
    """

    B: int
    H: int
    K: int
    N: int
    M: int
    D: int
    E: int
    dtype: torch.dtype
    device: torch.device
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

    @property
    def io_bytes(self) -> int:
        """Inputs and outputs, but for the decays."""
        elements = self.B * self.H * self.N * (self.D + self.E) + self.B * self.K * self.M * (self.D + self.E)
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class LinearPlan:
    """Which path `linear_attend` takes for the same arguments, why, and what it costs.

    Attributes:
        backend: name of the path.
        reason: why this one.
        flops: floating-point operations of the forward pass.
        bytes: inputs, outputs and extra memory, in bytes.
        refused: what the other paths answered, by name.
    """

    backend: str
    reason: str
    flops: int
    bytes: int
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"backend   {self.backend}: {self.reason}",
            f"FLOPs     {self.flops:.3g}",
            f"bytes     {self.bytes:.3g}",
        ]
        return "\n".join(lines + [f"not {name:<12}{why}" for name, why in self.refused.items()])


def form_of(factors: Tensor | None) -> str:
    """What the decays vary by, of factors as `as_factors` makes them."""
    if factors is None:
        return "none"
    if factors.shape[3] > 1:
        return "channel"
    return "token" if varies(factors) else "head"
