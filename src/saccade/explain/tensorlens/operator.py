"""The rules: each part of a transformer as an affine map of tokens, what depends on the input held.

A step gives T v (`linear`), w^T T (`transposed`), T v + b (`affine`), and T itself (`dense`), which is made for tiny
models and tests alone. T is (D, L, D, L) numbers an example: T[i, d, j, e] is what number e of token j does to number
d of token i.

Shape letters: B batch, ... any vectors at once, L tokens, i and j two of them, D width, d and e two of its numbers, H
heads, E head width, F hidden width, k and f what is summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Step:
    """One affine map of tokens (B, L, D); a subclass says `linear`, `transposed`, `constant` and `dense`."""

    def linear(self, v: Tensor) -> Tensor:
        """T v (..., B, L, D).

        Args:
            v: (..., B, L, D).
        """
        raise NotImplementedError

    def transposed(self, w: Tensor) -> Tensor:
        """w^T T (..., B, L, D).

        Args:
            w: (..., B, L, D).
        """
        raise NotImplementedError

    def constant(self) -> Tensor | float:
        """b, as it is added to tokens; 0 for none."""
        return 0.0

    def affine(self, x: Tensor) -> Tensor:
        """T x + b.

        Args:
            x: (..., B, L, D).
        """
        return self.linear(x) + self.constant()

    def dense(self) -> Tensor:
        """T (B, L, D, L, D)."""
        raise NotImplementedError


def _diagonal(blocks_BLde: Tensor) -> Tensor:
    """T of a map that leaves each token alone."""
    eye = torch.eye(blocks_BLde.shape[1], dtype=blocks_BLde.dtype, device=blocks_BLde.device)
    return torch.einsum("bide,ij->bidje", blocks_BLde, eye)


@dataclass
class Norm(Step):
    """T[id, je] = (i = j) s_i gamma_d ((d = e) - 1 / D), the last term of LayerNorm alone.

    Attributes:
        scale_BL1: s, 1 / std of each token.
        gain_D: gamma.
        bias_D: beta; None for RMSNorm, which does not take the mean away either.
    """

    scale_BL1: Tensor
    gain_D: Tensor
    bias_D: Tensor | None

    def _centred(self, v: Tensor) -> Tensor:
        return v if self.bias_D is None else v - v.mean(-1, keepdim=True)

    def linear(self, v: Tensor) -> Tensor:
        return self._centred(v) * self.scale_BL1 * self.gain_D

    def transposed(self, w: Tensor) -> Tensor:
        return self._centred(w * self.scale_BL1 * self.gain_D)

    def constant(self) -> Tensor | float:
        return 0.0 if self.bias_D is None else self.bias_D

    def dense(self) -> Tensor:
        D = len(self.gain_D)
        centre_de = torch.eye(D, dtype=self.gain_D.dtype, device=self.gain_D.device)
        centre_de = centre_de if self.bias_D is None else centre_de - 1 / D
        return _diagonal(self.scale_BL1[..., None] * self.gain_D[:, None] * centre_de)


@dataclass
class Attention(Step):
    """T[id, je] = sum_h A^h[i, j] (W_V^h W_O^h)[e, d].

    Attributes:
        weight_BHLL: A; masks, rotary positions and grouped heads are in it.
        value_HDE, out_HED: W_V and W_O of each head; None where values are left out, and heads are averaged.
        value_bias_HE, out_bias_D: b_V and b_O.
    """

    weight_BHLL: Tensor
    value_HDE: Tensor | None = None
    out_HED: Tensor | None = None
    value_bias_HE: Tensor | None = None
    out_bias_D: Tensor | None = None

    def linear(self, v: Tensor) -> Tensor:
        if self.value_HDE is None or self.out_HED is None:
            return self.weight_BHLL.mean(1) @ v
        value = v[..., None, :, :] @ self.value_HDE
        return ((self.weight_BHLL @ value) @ self.out_HED).sum(-3)

    def transposed(self, w: Tensor) -> Tensor:
        if self.value_HDE is None or self.out_HED is None:
            return self.weight_BHLL.mean(1).mT @ w
        of_heads = w[..., None, :, :] @ self.out_HED.mT
        return ((self.weight_BHLL.mT @ of_heads) @ self.value_HDE.mT).sum(-3)

    def constant(self) -> Tensor | float:
        if self.value_HDE is None or self.out_HED is None:
            return 0.0
        b = 0.0 if self.out_bias_D is None else self.out_bias_D
        if self.value_bias_HE is None:
            return b
        row_BHL1 = self.weight_BHLL.sum(-1, keepdim=True)  # 1, but of a token that sees nothing
        return b + ((row_BHL1 * self.value_bias_HE[:, None]) @ self.out_HED).sum(1)

    def dense(self) -> Tensor:
        if self.value_HDE is None or self.out_HED is None:
            raise ValueError("values are left out: the dense map needs them")
        return torch.einsum("bhij,hed->bidje", self.weight_BHLL, self.value_HDE @ self.out_HED)


@dataclass
class FeedForward(Step):
    """T[id, je] = (i = j) sum_f W1[e, f] G[i, f] W2[f, d]; of a gated layer G and W1 as `gated` has them.

    Attributes:
        gain_BLF: G.
        in_DF, out_FD: W1 and W2.
        in_bias_F, out_bias_D: b1 and b2.
    """

    gain_BLF: Tensor
    in_DF: Tensor
    out_FD: Tensor
    in_bias_F: Tensor | None = None
    out_bias_D: Tensor | None = None

    def linear(self, v: Tensor) -> Tensor:
        return (v @ self.in_DF * self.gain_BLF) @ self.out_FD

    def transposed(self, w: Tensor) -> Tensor:
        return (w @ self.out_FD.mT * self.gain_BLF) @ self.in_DF.mT

    def constant(self) -> Tensor | float:
        b = 0.0 if self.out_bias_D is None else self.out_bias_D
        return b if self.in_bias_F is None else b + (self.gain_BLF * self.in_bias_F) @ self.out_FD

    def dense(self) -> Tensor:
        return _diagonal(torch.einsum("ef,bif,fd->bide", self.in_DF, self.gain_BLF, self.out_FD))


@dataclass
class Sum(Step):
    """c (r I + sum of maps): the residual path about a sublayer, about both of a parallel block; the mean of maps.

    Attributes:
        steps: maps of the same tokens.
        kept: r.
        scale: c; with r = 1 and c = 1/2 attention alone gives the rollout.
    """

    steps: Sequence[Step]
    kept: float = 1.0
    scale: float = 1.0

    def linear(self, v: Tensor) -> Tensor:
        return self.scale * sum((step.linear(v) for step in self.steps), self.kept * v)

    def transposed(self, w: Tensor) -> Tensor:
        return self.scale * sum((step.transposed(w) for step in self.steps), self.kept * w)

    def affine(self, x: Tensor) -> Tensor:
        return self.scale * sum((step.affine(x) for step in self.steps), self.kept * x)

    def dense(self) -> Tensor:
        first, *others = (step.dense() for step in self.steps)
        L, D = first.shape[1:3]
        eye = torch.eye(L * D, dtype=first.dtype, device=first.device).view(L, D, L, D)
        return self.scale * sum(others, self.kept * eye + first)


@dataclass
class Chain(Step):
    """T_n ... T_2 T_1, and b <- T_k b + b_k.

    Attributes:
        steps: the first one first; none is the identity.
    """

    steps: Sequence[Step]

    def linear(self, v: Tensor) -> Tensor:
        for step in self.steps:
            v = step.linear(v)
        return v

    def transposed(self, w: Tensor) -> Tensor:
        for step in reversed(self.steps):
            w = step.transposed(w)
        return w

    def affine(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.affine(x)
        return x

    def dense(self) -> Tensor:
        first, *others = (step.dense() for step in self.steps)
        for after in others:
            first = torch.einsum("bidkf,bkfje->bidje", after, first)
        return first
