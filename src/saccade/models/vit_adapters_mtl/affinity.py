"""TROA: tasks whose gradients of the shared features agree lend each other their embeddings.

    s_ij = cos(g_i, g_j),    Omega_ij <- Omega_ij exp(eta s_ij) / sum_k Omega_ik exp(eta s_ik),
    omega_i = sum_j Omega_ij theta_j

Shape letters: T tasks, D width of a task's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def similarities(gradients: Sequence[Tensor]) -> Tensor:
    """s_ij, (T, T), of gradients of one shape; that of a zero gradient with any is 0.

    >>> similarities([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])]).tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    unit = nn.functional.normalize(torch.stack([each.flatten() for each in gradients]), dim=1)
    return unit @ unit.T


class TaskAffinity(nn.Module):
    """Omega (T, T), rows that sum to 1, the same for all at first. It is no parameter: gradients of the features move
    it, not those of the loss by it.

    Args:
        tasks: T.
        rate: eta.
    """

    weights: Tensor

    def __init__(self, tasks: int, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("weights", torch.full((tasks, tasks), 1 / tasks))

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor]) -> None:
        """One step of Omega.

        Args:
            gradients: of each task's loss by the shared features of the same images.

        Raises:
            ValueError: if they are not one for each task, of one shape.
        """
        shapes = {tuple(each.shape) for each in gradients}
        if len(gradients) != len(self.weights) or len(shapes) != 1:
            raise ValueError(
                f"gradients must be {len(self.weights)} of one shape, got {len(gradients)} of {sorted(shapes)}"
            )
        moved = self.weights.log() + self.rate * similarities(gradients).to(self.weights)
        self.weights.copy_(moved.softmax(1))

    def forward(self, embeddings_TD: Tensor) -> Tensor:
        """omega of each task, (T, D)."""
        return self.weights @ embeddings_TD
