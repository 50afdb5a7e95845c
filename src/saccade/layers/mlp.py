"""The feed-forward layer of a transformer.

    y = W2 f(W1 x + b1) + b2,     f = GELU, exact or by tanh, or ReLU

Shape letters: C channels, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """C -> F -> C on the last axis.

    Args:
        dim: C.
        hidden: F, 4 C where None.
        activation: of `ACTIVATIONS`.
        drop: dropout after the activation and at the end.

    Raises:
        ValueError: if `hidden` is not positive or the activation unknown.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: str = "gelu", drop: float = 0.0) -> None:
        super().__init__()
        width = 4 * dim if hidden is None else hidden
        if width < 1:
            raise ValueError(f"hidden must be positive, got {hidden}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.fc1, self.fc2, self.drop = nn.Linear(dim, width), nn.Linear(width, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(ACTIVATIONS[self.activation](self.fc1(x)))))
