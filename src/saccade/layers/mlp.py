"""The feed-forward layers of a transformer.

    y = W2 f(W1 x + b1) + b2                        `MLP`
    y = W_down (f(W_gate x) * W_up x)               `GatedMLP`: Shazeer, arXiv 2002.05202; SwiGLU with f = SiLU

Shape letters: C channels, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class MLP(nn.Module):
    """C -> F -> C on the last axis.

    Args:
        dim: C.
        hidden: F, 4 C where None.
        activation: of `ACTIVATIONS`.
        drop: dropout after the activation and at the end.
        inner_drop: dropout after the activation, where it is another; as `drop` where None.
        bias: of both linears.

    Raises:
        ValueError: if `hidden` is not positive or the activation unknown.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str = "gelu",
        drop: float = 0.0,
        inner_drop: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = 4 * dim if hidden is None else hidden
        _check(width, activation)
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias)
        self.drop = nn.Dropout(drop)
        self.inner_drop = self.drop if inner_drop is None else nn.Dropout(inner_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.inner_drop(ACTIVATIONS[self.activation](self.fc1(x)))))


class GatedMLP(nn.Module):
    """C -> F -> C on the last axis, F being a product of two maps of x; the parameters have LLaMA's names.

    Args:
        dim: C.
        hidden: F, 8 C / 3 where None: as many parameters as an MLP of 4 C.
        activation: f, of `ACTIVATIONS`; "identity" has none.
        bias: of all three maps.

    Raises:
        ValueError: if `hidden` is not positive or the activation unknown.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        width = 8 * dim // 3 if hidden is None else hidden
        _check(width, activation)
        self.activation = activation
        self.gate_proj, self.up_proj = (nn.Linear(dim, width, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


def _check(width: int, activation: str) -> None:
    if width < 1:
        raise ValueError(f"hidden must be positive, got {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
