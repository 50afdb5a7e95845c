"""Kernels that are products of features, kappa(q, k) = a(q) . b(k), with the gradients of both sides.

Shape letters: R rows (batch x heads), D channels, F features, c tokens of a chunk; n and m queries and keys of a tile.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from saccade.ops.scratch import Scratch


class Expansion(Protocol):
    """A kernel, its features, and the gradients of both. Tensors (R, c, D), (R, c, F), (R, n, m)."""

    @property
    def code(self) -> list[float]:
        """The arguments from which `kernel_of` makes an equal one."""

    def width(self, channels: int) -> int:
        """F."""

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        """a(x) or b(x)."""

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        """Gradient of x from that of its features."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """kappa(q, k) of all pairs."""

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the scores."""


class Polynomial:
    """kappa = a0 + a1 x + a2 x^2 with x = q . k, exactly, in D (D + 1) / 2 + D + 1 features (D + 1 where a2 is 0).

    x^2 = sum_o w_o sum_i (q_i q_{i+o}) (k_i k_{i+o}), indices modulo D: offset o = 0 gives the squares, each o < D / 2
    gives D of the products of two channels, and o = D / 2 the last D / 2 of them; w is 1, then 2. So each pair occurs
    once, and all products are one multiplication of x with windows of itself. The queries carry the coefficients.

    Args:
        a0, a1, a2: the coefficients.
    """

    def __init__(self, a0: float = 1.0, a1: float = 1.0, a2: float = 0.5) -> None:
        self.a0, self.a1, self.a2 = a0, a1, a2

    @property
    def code(self) -> list[float]:
        return [0.0, self.a0, self.a1, self.a2]

    def width(self, channels: int) -> int:
        return (channels * (channels + 1) // 2 if self.a2 else 0) + channels + 1

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        R, c, D = x.shape
        F = self.width(D)
        pairs, offsets = (F - D - 1, D // 2 + 1) if self.a2 else (0, 0)
        out = buffers("features", R, c, F)
        if pairs:
            windows = torch.cat([x, x], -1).unfold(-1, D, 1)[:, :, :offsets]
            products = out[..., : offsets * D].unflatten(-1, (offsets, D))
            torch.mul(windows, (2.0 * self.a2 * x if query else x).unsqueeze(-2), out=products)
            if query:
                products[..., 0, :] *= 0.5
        # what the last offset has too many is written over
        out[..., pairs : pairs + D] = self.a1 * x if query else x
        out[..., F - 1] = self.a0 if query else 1.0
        return out

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        D = x.shape[-1]
        pairs = grad.shape[-1] - D - 1
        linear = grad[..., pairs : pairs + D]
        out = self.a1 * linear if query else linear.clone()
        if pairs:
            twice, rolled = torch.cat([x, x], -1), torch.zeros_like(torch.cat([x, x], -1))
            straight = torch.zeros_like(x)
            for offset in range(D // 2 + 1):
                part = grad[..., offset * D : min(pairs, (offset + 1) * D)]
                wide = part.shape[-1]
                straight[..., :wide].addcmul_(part, twice[..., offset : offset + wide])
                rolled[..., offset : offset + wide].addcmul_(part, x[..., :wide])
                if offset == 0 and query:  # the squares weigh half of the others
                    straight *= 0.5
                    rolled *= 0.5
            straight += rolled[..., :D] + rolled[..., D:]
            out.add_(straight, alpha=2.0 * self.a2 if query else 1.0)
        return out

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        x = q @ k.transpose(-1, -2)
        return (self.a2 * x).add_(self.a1).mul_(x).add_(self.a0) if self.a2 else x.mul_(self.a1).add_(self.a0)

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.a2:
            grad = (q @ k.transpose(-1, -2)).mul_(2.0 * self.a2).add_(self.a1).mul_(grad)
        else:
            grad = self.a1 * grad
        return grad @ k, grad.transpose(-1, -2) @ q


class Outer:
    """kappa = (q' . k') (q'' . k''), where x' are the first `first` channels of x and x'' the others.

    Args:
        first: channels of x'.
    """

    def __init__(self, first: int) -> None:
        self.first = int(first)

    @property
    def code(self) -> list[float]:
        return [1.0, float(self.first)]

    def width(self, channels: int) -> int:
        return self.first * (channels - self.first)

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        left, right = self._parts(x)
        out = buffers("features", *left.shape, right.shape[-1])
        return torch.mul(left.unsqueeze(-1), right.unsqueeze(-2), out=out).flatten(-2)

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        left, right = self._parts(x)
        grad = grad.unflatten(-1, (self.first, -1))
        grads = (grad @ right.unsqueeze(-1)).squeeze(-1), (left.unsqueeze(-2) @ grad).squeeze(-2)
        return torch.cat(grads, -1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        left, right = self._products(q, k)
        return left.mul_(right)

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self._products(q, k)
        right.mul_(grad), left.mul_(grad)
        (q_left, q_right), (k_left, k_right) = self._parts(q), self._parts(k)
        grad_q = torch.cat([right @ k_left, left @ k_right], -1)
        return grad_q, torch.cat([right.transpose(-1, -2) @ q_left, left.transpose(-1, -2) @ q_right], -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.first], x[..., self.first :]

    def _products(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (q_left, q_right), (k_left, k_right) = self._parts(q), self._parts(k)
        return q_left @ k_left.transpose(-1, -2), q_right @ k_right.transpose(-1, -2)


def kernel_of(code: list[float]) -> Expansion:
    kind, *arguments = code
    return Polynomial(*arguments) if kind == 0.0 else Outer(int(arguments[0]))
