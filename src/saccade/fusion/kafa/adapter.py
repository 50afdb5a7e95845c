"""KAFA's adapter of output features, and the adapter that it is compared with.

Shape letters: B batch, M tokens (the image first), N that ask, D width of a feature, K objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.constants import numbers

FORMS = ("encoder", "query", "weights")
#: of the tokens that may stand beside the image, in the order of the call
OTHERS = ("scene_text", "knowledge", "objects")


class AdapterLayer(nn.Module):
    """x + MHA(LN x, LN memory), and a bottleneck of an MLP after it where one is asked for; adds nothing at the start.

    Args:
        dim: D.
        num_heads: of the attention.
        bottleneck: inner width of the MLP; None has none.
    """

    def __init__(self, dim: int, num_heads: int, bottleneck: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True)
        self.mlp = self.mlp_norm = None
        last = [self.attention.out_proj]
        if bottleneck is not None:
            self.mlp, self.mlp_norm = MLP(dim, bottleneck), nn.LayerNorm(dim)
            last.append(self.mlp.fc2)
        for linear in last:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BND: Tensor, memory_BMD: Tensor, mask_BM: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm(x_BND), self.norm(memory_BMD), mask=mask_BM)
        if self.mlp is None or self.mlp_norm is None:
            return x_BND
        return x_BND + self.mlp(self.mlp_norm(x_BND))


class FeatureAdapter(nn.Module):
    """y = norm(alpha u + (1 - alpha) v), u what attention makes of the features of an image and its surroundings.

    | form | u |
    |---|---|
    | "encoder" | the image's place, or the mean, after pre-norm layers of self-attention over all tokens |
    | "query" | v + MHA(v, all tokens): such a layer of which only the image's place is taken |
    | "weights" | sum_m a_m W_m x_m, a = softmax of a linear score of each token |

    At the start y = v: the ranking is the frozen model's.

    Args:
        dim: D.
        form: of the table.
        num_heads, depth, bottleneck: of the layers; `bottleneck` is the inner width of an MLP in each, None has none.
        pool: "image" or "mean", of "encoder".
        mix: alpha, at the start where it is learned.
        learn_mix: whether alpha is learned, through a sigmoid.
        drop_tokens: probability in training that a token other than the image is hidden.

    Raises:
        ValueError: if a word is unknown, or a number is not in its range.
    """

    def __init__(
        self,
        dim: int = 768,
        *,
        form: Literal["encoder", "query", "weights"] = "encoder",
        num_heads: int = 8,
        depth: int = 2,
        bottleneck: int | None = None,
        pool: Literal["image", "mean"] = "image",
        mix: float = 0.5,
        learn_mix: bool = True,
        drop_tokens: float = 0.2,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if pool not in ("image", "mean"):
            raise ValueError(f"pool must be image or mean, got {pool!r}")
        if not (0 < mix < 1 if learn_mix else 0 <= mix <= 1) or not 0 <= drop_tokens < 1:
            raise ValueError(
                "mix must be in [0, 1], inside of it where it is learned, and drop_tokens in [0, 1), got "
                f"{mix} and {drop_tokens}"
            )
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.dim, self.form, self.pool, self.drop_tokens = dim, form, pool, drop_tokens
        self.mix = nn.Parameter(torch.tensor(math.log(mix / (1 - mix)))) if learn_mix else mix
        kinds = 1 + len(OTHERS)
        if form == "weights":
            self.score = nn.Linear(dim, 1)
            self.maps = nn.Parameter(torch.zeros(kinds, dim, dim))
        else:
            self.types = nn.Parameter(torch.zeros(kinds, dim))
            layers = (AdapterLayer(dim, num_heads, bottleneck) for _ in range(1 if form == "query" else depth))
            self.layers = nn.ModuleList(layers)

    def forward(
        self,
        image_BD: Tensor,
        scene_text: Tensor | None = None,
        knowledge: Tensor | None = None,
        objects: Tensor | None = None,
        *,
        masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The adapted feature (B, D), of unit length.

        Args:
            image_BD: of the image.
            scene_text: (B, D), of the words in it.
            knowledge: (B, D), of what is known about it.
            objects: (B, K, D), of things in it.
            masks: of scene text, knowledge and objects: bool (B,), and (B, K) of objects, True = there.

        Raises:
            ValueError: if a feature or a mask has another shape.
        """
        if image_BD.ndim != 2 or image_BD.shape[1] != self.dim:
            raise ValueError(f"image must be (batch, {self.dim}), got {tuple(image_BD.shape)}")
        x_BMD, kind_M, there_BM = self.tokens(image_BD, (scene_text, knowledge, objects), masks)
        if self.training and self.drop_tokens:
            kept_BM = torch.rand(there_BM.shape, device=there_BM.device) >= self.drop_tokens
            kept_BM = kept_BM | (kind_M == 0)
            there_BM = there_BM & kept_BM
        u_BD, mix = self.fused(x_BMD, kind_M, there_BM), self.mix
        alpha: Tensor | float = mix.sigmoid() if isinstance(mix, Tensor) else mix
        return F.normalize(alpha * u_BD + (1 - alpha) * x_BMD[:, 0], dim=-1)

    def tokens(
        self, image_BD: Tensor, others: Sequence[Tensor | None], masks: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of unit length (B, M, D), the kind of each token (M,), and which are there, bool (B, M)."""
        batch, given = len(image_BD), [None] * len(others) if masks is None else list(masks)
        if len(given) > len(others):
            raise ValueError(f"masks must be of {', '.join(OTHERS)}, got {len(given)}")
        given += [None] * (len(others) - len(given))
        parts, kinds = [image_BD[:, None]], [0]
        there = [image_BD.new_ones(batch, 1, dtype=torch.bool)]
        for kind, (name, x, mask) in enumerate(zip(OTHERS, others, given), 1):
            if x is None:
                continue
            many = name == "objects"
            if x.ndim != 2 + many or x.shape[0] != batch or x.shape[-1] != self.dim:
                wanted = f"({batch}, objects, {self.dim})" if many else f"({batch}, {self.dim})"
                raise ValueError(f"{name} must be {wanted}, got {tuple(x.shape)}")
            if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
                raise ValueError(
                    f"the mask of {name} must be bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
                )
            x = x if many else x[:, None]
            mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.view(batch, -1)
            parts.append(torch.where(mask[..., None], x, 0))
            kinds += [kind] * x.shape[1]
            there.append(mask)
        kind_M = numbers(kinds, image_BD, torch.long)
        return F.normalize(torch.cat(parts, 1), dim=-1), kind_M, torch.cat(there, 1)

    def fused(self, x_BMD: Tensor, kind_M: Tensor, there_BM: Tensor) -> Tensor:
        """u (B, D)."""
        if self.form == "weights":
            score_BM = self.score(x_BMD)[..., 0].masked_fill(~there_BM, -torch.inf)
            mapped_BMD = torch.einsum("bmd,med->bme", x_BMD, self.maps[kind_M])
            return (score_BM.softmax(1)[..., None] * mapped_BMD).sum(1)
        x_BMD = x_BMD + self.types[kind_M]
        if self.form == "query":
            return self.layers[0](x_BMD[:, :1], x_BMD, there_BM)[:, 0]
        for layer in self.layers:
            x_BMD = layer(x_BMD, x_BMD, there_BM)
        if self.pool == "image":
            return x_BMD[:, 0]
        return (x_BMD * there_BM[..., None]).sum(1) / there_BM.sum(1, keepdim=True)


class CLIPAdapter(nn.Module):
    """ratio ReLU(W2 ReLU(W1 v)) + (1 - ratio) v of a feature that is not normalised (arXiv 2110.04544).

    Args:
        dim: D.
        reduction: of D between the two maps.
        ratio: share of what is new.
    """

    def __init__(self, dim: int = 768, reduction: int = 4, ratio: float = 0.2) -> None:
        super().__init__()
        self.ratio = ratio
        self.down, self.up = (
            nn.Linear(a, b, bias=False) for a, b in ((dim, dim // reduction), (dim // reduction, dim))
        )

    def forward(self, image_BD: Tensor) -> Tensor:
        new_BD = self.up(self.down(image_BD).relu()).relu()
        return self.ratio * new_BD + (1 - self.ratio) * image_BD
