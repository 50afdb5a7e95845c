"""LoFTR's transformer: layers of linear attention inside an image and across both, and its code of positions.

    q, k, v = Wq x, Wk s, Wv s                                                s: the image itself, or the other one
    m = LN(Wm attention(q, k, v));   x <- x + LN(W2 ReLU(W1 [x ; m]))
    linear attention: sum_j phi(q) . phi(k_j) v_j / (eps + sum_j phi(q) . phi(k_j)),   phi(t) = elu(t) + 1

Shape letters: B batch, N tokens of the map that is changed, M of the one that is read, C channels, H heads of D
channels, h and w height and width of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_heads
from saccade.ops.linear import elu_plus_one, linear_attend

LAYERS = ("self", "cross")
ATTENTIONS = ("linear", "full")
#: added to the sum of linear attention's weights
EPS = 1e-6


def position_code(height: int, width: int, channels: int, like: Tensor, *, first_release: bool = False) -> Tensor:
    """Sines and cosines of the position, counted from 1, (C, h, w).

    Channels 4k to 4k + 3 are sin(x d_k), cos(x d_k), sin(y d_k), cos(y d_k), d_k = 10000 ** (-2k / (C / 2)).

    Args:
        height, width: of the map.
        channels: C, a multiple of 4.
        like: a tensor of the device and dtype that is wanted.
        first_release: d_k = exp(-2k), by a parenthesis that was missing when the first weights were trained.
    """
    k = torch.arange(0, channels // 2, 2, device=like.device, dtype=torch.float32)
    factor = -math.log(10000.0) / channels // 2 if first_release else -math.log(10000.0) / (channels // 2)
    rates = (k * factor).exp()[:, None, None]
    x = torch.arange(1, width + 1, device=like.device, dtype=torch.float32)[None, None, :] * rates
    y = torch.arange(1, height + 1, device=like.device, dtype=torch.float32)[None, :, None] * rates
    waves = torch.broadcast_tensors(x.sin(), x.cos(), y.sin(), y.cos())
    return torch.stack(waves, 1).flatten(0, 1).to(like.dtype)


class MatchingLayer(nn.Module):
    """One layer, as above.

    Args:
        dim: C.
        num_heads: H, divides C.
        attention: "linear" or "full" (softmax).

    Raises:
        ValueError: if the attention is unknown, or the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, attention: str = "linear") -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.num_heads, self.attention = num_heads, attention
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(2 * dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, x_BNC: Tensor, source_BMC: Tensor, valid_BN: Tensor | None = None, source_valid_BM: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x_BNC: tokens that are changed.
            source_BMC: tokens that are read.
            valid_BN, source_valid_BM: bool, True = real; what is not is not read, and reads nothing.
        """
        inputs = (self.q_proj(x_BNC), self.k_proj(source_BMC), self.v_proj(source_BMC))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in inputs)
        read_BHND = self._linear(q, k, v, source_valid_BM) if self.attention == "linear" else self._full(
            q, k, v, source_valid_BM
        )  # fmt: skip
        if valid_BN is not None:
            read_BHND = read_BHND * valid_BN[:, None, :, None]
        message = self.norm1(self.merge(read_BHND.transpose(1, 2).flatten(2)))
        return x_BNC + self.norm2(self.down(F.relu(self.up(torch.cat([x_BNC, message], 2)))))

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None) -> Tensor:
        q, k = elu_plus_one(q), elu_plus_one(k)
        if valid_BM is not None:
            k = k * valid_BM[:, None, :, None]
        return linear_attend(q, k, v, causal=False, normalize=True, eps=EPS)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None) -> Tensor:
        return attend(q, k, v, mask=None if valid_BM is None else masks.padding(valid_BM))


class FeatureTransformer(nn.Module):
    """Layers that make the features of two images depend on each other; both images share them.

    "self": each image reads itself. "cross": the first reads the second, then the second the *changed* first.

    Args:
        dim: C.
        num_heads: H.
        layers: "self" or "cross" each.
        attention: "linear" or "full".

    Raises:
        ValueError: if a layer or the attention is unknown, or the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, layers: Sequence[str] = LAYERS * 4, attention: str = "linear") -> None:
        super().__init__()
        if unknown := [name for name in layers if name not in LAYERS]:
            raise ValueError(f"layers must be among {', '.join(LAYERS)}, got {unknown[0]!r}")
        self.names = tuple(layers)
        self.layers = nn.ModuleList(MatchingLayer(dim, num_heads, attention) for _ in layers)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, f0_BNC: Tensor, f1_BMC: Tensor, valid0_BN: Tensor | None = None, valid1_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            f0_BNC, f1_BMC: features of the two images.
            valid0_BN, valid1_BM: bool, True = real.
        """
        for name, layer in zip(self.names, self.layers):
            if name == "self":
                f0_BNC = layer(f0_BNC, f0_BNC, valid0_BN, valid0_BN)
                f1_BMC = layer(f1_BMC, f1_BMC, valid1_BM, valid1_BM)
            else:
                f0_BNC = layer(f0_BNC, f1_BMC, valid0_BN, valid1_BM)
                f1_BMC = layer(f1_BMC, f0_BNC, valid1_BM, valid0_BN)
        return f0_BNC, f1_BMC
