"""Whether anything has to be remembered for a backward pass, and what has none of a second order."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["first_derivatives_only", "needs_grad"]


def needs_grad(*inputs: Tensor | None) -> bool:
    """Gradients are recorded, and one of the inputs wants one."""
    if torch.is_grad_enabled():
        for x in inputs:  # a loop: this is asked before every call, however small
            if x is not None and x.requires_grad:
                return True
    return False


def first_derivatives_only(name: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the `backward` of an autograd function or operator that autograd cannot differentiate again.

    Where that is asked for after all (`create_graph=True`, and a derivative of the gradients), it says so in words:
    torch's own `once_differentiable` has gradients that seem to depend on nothing.

    Args:
        name: what has first derivatives only.
        instead: what to do.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                results = backward(ctx, *grads)
            sources = [x for x in (*ctx.saved_tensors, *grads) if needs_grad(x)] if torch.is_grad_enabled() else []
            if not sources:
                return results
            message = f"{name} has first derivatives only: {instead}"
            return tree_map(lambda x: _Refusal.apply(message, x, *sources) if isinstance(x, Tensor) else x, results)

        return once

    return decorate


class _Refusal(torch.autograd.Function):
    """A gradient whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, message: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
