"""The discrete Laplacian, and weights that are held at such a target where they matter.

    (L x)_p = sum over the 2 n neighbours q of p of (x_q - x_p)              n axes: 2, 4 or 6 neighbours

A convolution that starts as L and is learned can be consolidated (elastic weight consolidation: Kirkpatrick et al.,
arXiv 1612.00796): how much a loss depends on each weight is measured once, those above the others are held at their
target from then on, and the rest may be drawn to it by a penalty.

    F = mean over samples of (d loss / d w)^2        important = F > mean F + s std F        over the taps of a kernel
    w' = target where important, else w              penalty = sum of (F) (w - target)^2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saccade.ops.frequency.extension import extend

__all__ = [
    "consolidated",
    "elastic_penalty",
    "fisher_information",
    "important",
    "laplacian",
    "laplacian_kernel",
]


def laplacian_kernel(axes: int, device: torch.device | None = None) -> Tensor:
    """L as a kernel of 3 taps along each axis: -2 n in the middle, 1 at the faces, 0 elsewhere.

    Args:
        axes: n.
        device: on which it is made.

    Raises:
        ValueError: if there is no axis.

    >>> laplacian_kernel(2).tolist()
    [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
    """
    if axes < 1:
        raise ValueError(f"axes must be one at least, got {axes}")
    distance = sum(torch.meshgrid(*[torch.arange(-1, 2, device=device).abs()] * axes, indexing="ij"))
    assert isinstance(distance, Tensor)
    return (distance == 1).float() - 2 * axes * (distance == 0).float()


def laplacian(x: Tensor, axes: Sequence[int] = (-2, -1), mode: str = "zero") -> Tensor:
    """L x, of the size of `x`.

    Args:
        x: of any shape.
        axes: over which neighbours are counted.
        mode: what lies beyond the ends, of `saccade.ops.frequency.EXTENSIONS`; "zero" is a padded convolution, and
            with "symmetric" a constant has none anywhere.

    Raises:
        ValueError: if the mode is unknown or an axis is empty.

    >>> laplacian(torch.tensor([0.0, 0.0, 1.0, 0.0]), (-1,)).tolist()
    [0.0, 1.0, -2.0, 1.0]
    """
    found = torch.zeros_like(x)
    for axis in axes:
        wide, length = extend(x, 1, 1, axis, mode), x.shape[axis]
        found = found + wide.narrow(axis, 0, length) + wide.narrow(axis, 2, length) - 2 * x
    return found


def fisher_information(losses: Iterable[Tensor], weight: Tensor) -> Tensor:
    """F: the mean over the losses of their squared derivatives, of the shape of `weight`.

    Args:
        losses: scalars that depend on the weight, one for each sample; made one after the other by a generator, one
            graph is held at a time.
        weight: the parameter.

    Raises:
        ValueError: if there is no loss.

    >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
    >>> fisher_information([w[0] * 5, w[1] * w[1]], w).tolist()
    [12.5, 18.0]
    """
    total, count = torch.zeros_like(weight, requires_grad=False), 0
    for loss in losses:
        total = total + torch.autograd.grad(loss, weight)[0].square()
        count += 1
    if not count:
        raise ValueError("losses must be one at least, got none")
    return total.detach() / count


def important(fisher: Tensor, axes: Sequence[int], deviations: float = 1.0) -> Tensor:
    """Where F is above its mean by so many standard deviations: bool, of its shape.

    Args:
        fisher: F.
        axes: over which mean and deviation (divided by n - 1) are taken: the taps of a kernel.
        deviations: s.
    """
    axes = tuple(axes)
    limit = fisher.mean(axes, keepdim=True) + deviations * fisher.std(axes, keepdim=True)
    return fisher > limit


def consolidated(weight: Tensor, target: Tensor, held: Tensor) -> Tensor:
    """The target where `held`, the weight elsewhere; what is held has no gradient, and no optimiser moves it.

    Args:
        weight: as it is learned.
        target: broadcasts to it.
        held: bool, broadcasts to it.
    """
    return torch.where(held, target.to(weight.dtype), weight)


def elastic_penalty(weight: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
    """sum of F (w - target)^2; of (w - target)^2 where `fisher` is None.

    Args:
        weight: as it is learned.
        target: broadcasts to it.
        fisher: F.
    """
    off = (weight - target.to(weight.dtype)).square()
    return (off if fisher is None else fisher * off).sum()
