"""The conditional head: conditions as queries, the block that lets them see an image, and the embeddings.

Shape letters: B batch, N tokens, D their width, K conditions, Q conditions that are asked for, E width of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.pretrained import copy_affine
from saccade.layers.softmax_attention import SoftmaxAttention

CONDITIONS = ("table", "mlp", "mask")
PROJECTIONS = ("singleton", "branch")
_EPS = 1e-6


class Conditions(nn.Module):
    """A query for each condition, (K, D): a table, a perceptron of the one-hot vectors, or a mask ReLU(W one-hot).

    Args:
        count: K.
        dim: D.
        kind: of `CONDITIONS`.

    Raises:
        ValueError: if there is no such kind.
    """

    def __init__(self, count: int, dim: int, kind: str = "table") -> None:
        super().__init__()
        if kind not in CONDITIONS:
            raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {kind!r}")
        self.kind = kind
        if kind == "mlp":
            self.fc1, self.fc2 = nn.Linear(count, dim), nn.Linear(dim, dim)
        else:
            self.table = nn.Parameter(torch.randn(count, dim))

    def forward(self) -> Tensor:
        if self.kind == "mlp":  # of the unit matrix: each column of the weight, and the bias
            return self.fc2(F.gelu(self.fc1.weight.T + self.fc1.bias))
        return self.table.relu() if self.kind == "mask" else self.table


class ConditionalBlock(nn.Module):
    """A transformer block whose queries are conditions, not tokens: keys and values are the image's.

        y = Attention(q = W_q e, k = W_k LN1(X), v = W_v LN1(X)),   Z = X + y,   out = Z + MLP(LN2(Z))

    Args:
        dim: D.
        num_heads: of the attention.
        hidden: of the MLP, 4 D where None.
        dropout: of the weights and of both branches.
        layer_scale: a learned factor for each channel of a branch, at the start; None has none.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.1,
        layer_scale: float | None = None,
        norm_eps: float = _EPS,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attention = SoftmaxAttention(
            dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=dropout
        )  # fmt: skip
        self.drop, self.mlp = nn.Dropout(dropout), MLP(dim, hidden, drop=dropout)
        self.scale1, self.scale2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def seen(self, condition_BQD: Tensor, tokens_BND: Tensor, mask: Any = None) -> Tensor:
        """y (B, Q, D): what each condition takes from the image, the same at all of its positions."""
        y_BQD = self.drop(self.attention(condition_BQD, self.norm1(tokens_BND), mask=mask))
        return y_BQD if self.scale1 is None else y_BQD * self.scale1

    def forward(self, condition_BQD: Tensor, tokens_BND: Tensor, mask: Any = None) -> Tensor:
        """The class position of the block's output under each condition, (B, Q, D).

        Args:
            condition_BQD: queries, before W_q.
            tokens_BND: the class token first.
            mask: bool (B, N), False is padding.
        """
        return self._fed(tokens_BND[:, :1] + self.seen(condition_BQD, tokens_BND, mask))

    def sequence(self, condition_BD: Tensor, tokens_BND: Tensor, mask: Any = None) -> Tensor:
        """The output at all positions under one condition each, (B, N, D)."""
        return self._fed(tokens_BND + self.seen(condition_BD[:, None], tokens_BND, mask))

    def _fed(self, z: Tensor) -> Tensor:
        y = self.mlp(self.norm2(z))
        return z + (y if self.scale2 is None else y * self.scale2)

    @classmethod
    def from_layer(cls, layer: nn.Module, *, dropout: float = 0.1) -> ConditionalBlock:
        """With the weights of a layer of a vision transformer: of transformers (ViT, DINOv2), or a `PreNormBlock`.

        Args:
            layer: has an attention, two norms before the branches, an MLP with GELU, and factors of them or none.
            dropout: of the new block.

        Raises:
            ValueError: if it is no such layer.
        """
        name = type(layer).__name__
        norm1, norm2 = _first(layer, "norm1", "layernorm_before"), _first(layer, "norm2", "layernorm_after")
        attention, mlp = _first(layer, "attention"), _first(layer, "mlp")
        fc1, fc2 = (getattr(mlp, part, None) for part in ("fc1", "fc2"))
        activation = getattr(mlp, "activation", type(getattr(mlp, "activation_fn", None)).__name__)
        if (
            attention is None
            or not (isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm))
            or not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear))
        ):
            raise ValueError(f"{name} is no pre-norm layer of a vision transformer with attention and a plain MLP")
        if activation not in ("gelu", "GELUActivation"):
            raise ValueError(f"the MLP of {name} must have GELU, got {activation}")
        read = SoftmaxAttention.from_softmax(attention, rope=False, qkv_bias=True, proj_bias=True, attn_drop=dropout)
        scales = [_first(layer, f"scale{i}", f"layer_scale{i}") for i in (1, 2)]
        block = cls(
            read.dim, read.num_heads, fc1.out_features, dropout=dropout, norm_eps=norm1.eps,
            layer_scale=None if scales[0] is None else 1.0,
        )  # fmt: skip
        block.attention = read
        block.norm1.load_state_dict(norm1.state_dict())
        block.norm2.load_state_dict(norm2.state_dict())
        copy_affine(block.mlp.fc1, (fc1.weight, fc1.bias))
        copy_affine(block.mlp.fc2, (fc2.weight, fc2.bias))
        with torch.no_grad():
            for place, scale in zip((block.scale1, block.scale2), scales):
                if place is not None:
                    place.copy_(getattr(scale, "lambda1", scale))
        return block


class ConditionalHead(nn.Module):
    """Tokens of an image to one embedding for each condition; they share keys and values, only queries differ.

    Args:
        num_attributes: K.
        dim: D.
        num_heads, hidden, dropout: of the block.
        embedding_dim: E.
        condition: of `CONDITIONS`.
        projection: "singleton", one for all conditions, or "branch", one for each.
        block: in the block's place, of width `dim`.
        norm_eps: of the last norm.

    Raises:
        ValueError: if a number is not positive, or an option is unknown.
    """

    def __init__(
        self,
        num_attributes: int,
        dim: int = 768,
        *,
        num_heads: int = 12,
        hidden: int | None = None,
        dropout: float = 0.1,
        embedding_dim: int = 340,
        condition: str = "table",
        projection: str = "singleton",
        block: ConditionalBlock | None = None,
        norm_eps: float = _EPS,
    ) -> None:
        super().__init__()
        if min(num_attributes, dim, embedding_dim) < 1:
            raise ValueError(
                "num_attributes, dim and embedding_dim must be positive, got "
                f"{num_attributes}, {dim} and {embedding_dim}"
            )
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        self.num_attributes, self.dim = num_attributes, dim
        self.conditions = Conditions(num_attributes, dim, condition)
        self.block = ConditionalBlock(dim, num_heads, hidden, dropout=dropout) if block is None else block
        self.norm = nn.LayerNorm(dim, norm_eps)
        count = 1 if projection == "singleton" else num_attributes
        self.projections = nn.ModuleList(nn.Linear(dim, embedding_dim) for _ in range(count))

    def forward(self, tokens_BND: Tensor, condition: Tensor | None = None, mask: Any = None) -> Tensor:
        """Embeddings before their length is taken out: (B, K, E) of all conditions, or (B, E) of one for each image.

        Args:
            tokens_BND: the class token first, positions added.
            condition: (B,) whole numbers below K; -1 is an unknown one, for which the mean of the queries stands, and
                that of the projections. None: all of them.
            mask: bool (B, N), False is padding.

        Raises:
            ValueError: if tokens, condition and mask do not fit together.
        """
        if tokens_BND.ndim != 3 or tokens_BND.shape[2] != self.dim or not tokens_BND.shape[1]:
            raise ValueError(f"tokens must be (batch, tokens, {self.dim}), got {tuple(tokens_BND.shape)}")
        query_KD, B = self.conditions(), len(tokens_BND)
        if condition is None:
            z_BKD = self.norm(self.block(query_KD.expand(B, -1, -1), tokens_BND, mask))
            if len(self.projections) == 1:
                return self.projections[0](z_BKD)
            return torch.stack([each(z_BKD[:, k]) for k, each in enumerate(self.projections)], 1)
        if condition.shape != (B,) or condition.is_floating_point():
            raise ValueError(f"condition must be {B} whole numbers, got {condition.dtype} {tuple(condition.shape)}")
        query_BD = _with_mean(query_KD)[condition]
        z_BD = self.norm(self.block(query_BD[:, None], tokens_BND, mask))[:, 0]
        if len(self.projections) == 1:
            return self.projections[0](z_BD)
        weight_BED = _with_mean(torch.stack([each.weight for each in self.projections]))[condition]  # type: ignore[misc]
        bias_BE = _with_mean(torch.stack([each.bias for each in self.projections]))[condition]  # type: ignore[misc]
        return (weight_BED @ z_BD[..., None])[..., 0] + bias_BE


def _with_mean(rows: Tensor) -> Tensor:
    """With their mean as the last one, which the number -1 means."""
    return torch.cat([rows, rows.mean(0, keepdim=True)])


def _first(module: nn.Module, *names: str) -> Any:
    """The first of the attributes that there is."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)
