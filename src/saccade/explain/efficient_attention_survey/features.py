"""Feature maps phi of kernelised attention: phi(q) . phi(k) in place of exp(q . k).

Shape letters: ... batch and heads, N tokens, D head dim, m features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.linear import elu_plus_one

#: elu(x) + 1, the Linear Transformer's
elu_features = elu_plus_one


def random_features(width: int, count: int, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """exp(w . x - |x|^2 / 2) / sqrt m, w ~ N(0, I): the Performer's; E[phi(q) . phi(k)] = exp(q . k).

    Args:
        width: channels of x.
        count: m, the number of features.
        seed: of the directions w.
    """
    w = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))

    def features(x: Tensor) -> Tensor:
        return (x @ w.to(x).mT - x.square().sum(-1, keepdim=True) / 2).exp() * count**-0.5

    return features


def trigonometric_features(width: int, count: int, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """exp(|x|^2 / 2) [cos(w . x), sin(w . x)] / sqrt m, w ~ N(0, I): RFA's; E[phi(q) . phi(k)] = exp(q . k).

    Args:
        width: channels of x.
        count: m, the number of directions; there are twice as many features.
        seed: of the directions w.
    """
    w = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))

    def features(x: Tensor) -> Tensor:
        turned = x @ w.to(x).mT
        size = (x.square().sum(-1, keepdim=True) / 2).exp() * count**-0.5
        return size * torch.cat([turned.cos(), turned.sin()], -1)

    return features


def taylor_features(x: Tensor) -> Tensor:
    """[1, x, x x^T / sqrt 2], Based's: phi(q) . phi(k) = 1 + q . k + (q . k)^2 / 2; 1 + D + D^2 features.

    Args:
        x: queries or keys, scaled already.
    """
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


def hedgehog_features(x: Tensor) -> Tensor:
    """[softmax(x), softmax(-x)], Hedgehog's, of what a learned layer made of queries or keys.

    Args:
        x: that.
    """
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def cosine_features(x: Tensor, length: int, *, start: int = 0) -> Tensor:
    """relu(x) [cos(pi t / 2 M), sin(pi t / 2 M)], cosFormer's: relu(q) . relu(k) cos(pi (t - s) / 2 M).

    Args:
        x: queries or keys (..., N, D).
        length: M, the longest sequence.
        start: t of the first.

    Raises:
        ValueError: if there are more tokens than that.
    """
    if start + x.shape[-2] > length:
        raise ValueError(f"tokens must be {length} at most, got {start + x.shape[-2]}")
    angle_N1 = (torch.arange(x.shape[-2], device=x.device) + start)[:, None] * (math.pi / (2 * length))
    return torch.cat([F.relu(x) * angle_N1.cos().to(x), F.relu(x) * angle_N1.sin().to(x)], -1)
