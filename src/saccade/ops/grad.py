"""Whether anything has to be remembered for a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["needs_grad"]


def needs_grad(*inputs: Tensor | None) -> bool:
    """Gradients are recorded, and one of the inputs wants one."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
