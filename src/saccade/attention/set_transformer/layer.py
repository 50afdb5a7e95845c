"""Set Transformer: the blocks, the models of them, the mechanism for sequences, and the likelihood of mixtures.

Shape letters: B batch, N elements, M elements of the other set, C width, H heads, K seeds (or components of a mixture),
D axes of a point, P numbers of a component.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.attend import attend
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import refuse_parts, whole

Scale = Literal["width", "head"]


class MAB(nn.Module):
    """Multi-head attention block from one set to another.

    Args:
        query_dim, key_dim: widths of the two sets' elements.
        dim: C, the width of the output.
        num_heads: H, a divisor of C.
        layer_norm: normalise after attention and after the feed-forward layer.
        scale: "width": scores are divided by sqrt(C), as the authors' code does; "head": by sqrt(C / H).

    Raises:
        ValueError: if heads do not divide, or `scale` is neither.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        dim: int,
        num_heads: int = 4,
        *,
        layer_norm: bool = False,
        scale: Scale = "width",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if scale not in ("width", "head"):
            raise ValueError(f"scale must be 'width' or 'head', got {scale!r}")
        self.query_dim, self.key_dim, self.dim, self.num_heads = query_dim, key_dim, dim, num_heads
        self.scale = (dim if scale == "width" else dim // num_heads) ** -0.5
        self.fc_q, self.fc_k, self.fc_v = nn.Linear(query_dim, dim), nn.Linear(key_dim, dim), nn.Linear(key_dim, dim)
        self.fc_o = nn.Linear(dim, dim)
        self.ln0 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.ln1 = nn.LayerNorm(dim) if layer_norm else nn.Identity()

    def forward(self, x_BNC: Tensor, y_BMC: Tensor, *, mask: GivenMask = None) -> Tensor:
        """MAB(x, y); `mask` (B, M), True = a real element of `y`. A set without any gives no attention.

        Raises:
            ValueError: if shapes do not fit.
        """
        for name, tokens, width in (("x", x_BNC, self.query_dim), ("y", y_BMC, self.key_dim)):
            if tokens.ndim != 3 or tokens.shape[-1] != width:
                raise ValueError(f"{name} must be (batch, elements, {width}), got {tuple(tokens.shape)}")
        B, N, M = x_BNC.shape[0], whole(x_BNC.shape[1]), whole(y_BMC.shape[1])
        real = Pattern.of(mask, B, N, M, crosses=True).only(("padding",), "a set").mask
        q, k, v = (
            p(z).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p, z in ((self.fc_q, x_BNC), (self.fc_k, y_BMC), (self.fc_v, y_BMC))
        )
        out_BNC = (q + attend(q, k, v, mask=real, scale=self.scale)).transpose(1, 2).flatten(2)
        out_BNC = self.ln0(out_BNC)
        return self.ln1(out_BNC + F.relu(self.fc_o(out_BNC)))


class SAB(nn.Module):
    """Self-attention among the elements of a set: MAB(X, X).

    Args:
        in_dim: width of an element.
        dim: C, the width of the output.
        num_heads: H.
        **block: `layer_norm` and `scale` of `MAB`.

    Raises:
        ValueError: if `MAB` refuses an argument.
    """

    def __init__(self, in_dim: int, dim: int, num_heads: int = 4, **block: Any) -> None:
        super().__init__()
        self.mab = MAB(in_dim, in_dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        return self.mab(x_BNC, x_BNC, mask=mask)


class ISAB(nn.Module):
    """The same through `num_inds` learned points: MAB(X, MAB(I, X)), linear in the set's size.

    Args:
        in_dim: width of an element.
        dim: C, the width of the output and of the points.
        num_heads: H.
        num_inds: m, learned points.
        **block: `layer_norm` and `scale` of `MAB`.

    Raises:
        ValueError: if `num_inds` is below 1, or `MAB` refuses an argument.
    """

    def __init__(self, in_dim: int, dim: int, num_heads: int = 4, num_inds: int = 32, **block: Any) -> None:
        super().__init__()
        if num_inds < 1:
            raise ValueError(f"num_inds must be at least 1, got {num_inds}")
        self.I = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_inds, dim)))
        self.mab0 = MAB(dim, in_dim, dim, num_heads, **block)
        self.mab1 = MAB(in_dim, dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        refuse_parts("ISAB")
        return self.mab1(x_BNC, self.mab0(self.I.expand(x_BNC.shape[0], -1, -1), x_BNC, mask=mask))


class PMA(nn.Module):
    """Pooling by attention of `num_seeds` learned seeds: MAB(S, X).

    Args:
        dim: C, the width of an element, of the seeds and of the output.
        num_heads: H.
        num_seeds: K, the number of outputs.
        **block: `layer_norm` and `scale` of `MAB`.

    Raises:
        ValueError: if `num_seeds` is below 1, or `MAB` refuses an argument.
    """

    def __init__(self, dim: int, num_heads: int = 4, num_seeds: int = 1, **block: Any) -> None:
        super().__init__()
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
        self.S = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_seeds, dim)))
        self.mab = MAB(dim, dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        refuse_parts("PMA")
        return self.mab(self.S.expand(x_BNC.shape[0], -1, -1), x_BNC, mask=mask)


class SetTransformer(nn.Module):
    """Encoder of (I)SABs, pooling, decoder of SABs, a linear layer: a set in, K outputs that its order does not change.

    Args:
        in_dim: width of an element.
        num_outputs, out_dim: K outputs of that width.
        num_inds: inducing points of the encoder's ISABs; None for SABs.
        dim, num_heads, layer_norm, scale: of all blocks.
        encoder_blocks: 2, as published.
        decoder_blocks: SABs after pooling: the code's model has 2, the point-cloud one 0.
        dropout: before and after pooling (0.5 for point clouds).

    Raises:
        ValueError: if a number of points or outputs is below 1, or `MAB` refuses an argument.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        out_dim: int,
        num_inds: int | None = 32,
        dim: int = 128,
        num_heads: int = 4,
        *,
        encoder_blocks: int = 2,
        decoder_blocks: int = 2,
        dropout: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [dim] * max(0, encoder_blocks - 1)
        self.enc = nn.ModuleList(
            SAB(width, dim, num_heads, **block) if num_inds is None else ISAB(width, dim, num_heads, num_inds, **block)
            for width in widths
        )
        self.drop = nn.Dropout(dropout)
        self.pool = PMA(dim, num_heads, num_outputs, **block)
        self.dec = nn.ModuleList(SAB(dim, dim, num_heads, **block) for _ in range(decoder_blocks))
        self.out = nn.Linear(dim, out_dim)

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        """(B, N, in_dim) -> (B, K, out_dim); `mask` (B, N), True = a real element."""
        for block in self.enc:
            x_BNC = block(x_BNC, mask=mask)
        y_BKC = self.drop(self.pool(self.drop(x_BNC), mask=mask))
        for block in self.dec:
            y_BKC = block(y_BKC)
        return self.out(y_BKC)


class DeepSet(nn.Module):
    """The paper's baseline: an MLP per element, mean (or max, sum) over the set, an MLP.

    Args:
        in_dim: width of an element.
        num_outputs, out_dim: K outputs of that width.
        dim: hidden width.
        pool: "mean", "max" or "sum" over the set.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        out_dim: int,
        dim: int = 128,
        *,
        pool: Literal["mean", "max", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.num_outputs, self.pool = num_outputs, pool
        self.enc = _mlp(in_dim, dim, dim)
        self.dec = _mlp(dim, dim, num_outputs * out_dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        refuse_parts("DeepSet")
        z_BNC = self.enc(x_BNC)
        pooled = z_BNC.amax(1) if self.pool == "max" else z_BNC.sum(1) if self.pool == "sum" else z_BNC.mean(1)
        return self.dec(pooled).unflatten(-1, (self.num_outputs, -1))


def _mlp(in_dim: int, dim: int, out_dim: int) -> nn.Sequential:
    widths = [in_dim, dim, dim, dim, out_dim]
    layers: list[nn.Module] = []
    for first, second in zip(widths, widths[1:]):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SetAttention(nn.Module):
    """An SAB, or an ISAB, as a sequence mechanism without positions.

    Args:
        dim: C.
        num_heads: H.
        causal: must be False.
        num_inds: inducing points, linear time; None: every element attends to every other.
        layer_norm, scale: `MAB`'s.

    Raises:
        ValueError: if `causal` is True, or a number does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        causal: bool = False,
        *,
        num_inds: int | None = 32,
        layer_norm: bool = False,
        scale: Scale = "width",
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError("a set has no order: got causal=True")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        whole = num_inds is None
        block: dict[str, Any] = {"layer_norm": layer_norm, "scale": scale}
        self.block = SAB(dim, dim, num_heads, **block) if whole else ISAB(dim, dim, num_heads, num_inds or 0, **block)

    def forward(
        self, x_BNC: Tensor, context_BMC: Tensor | None = None, *, mask: GivenMask = None, cache: None = None
    ) -> Tensor:
        """Attend within `x_BNC`, or to the set `context_BMC` (MAB; through the inducing points where there are any)."""
        if cache is not None:
            raise ValueError("a set has no order, so there is nothing to decode")
        if context_BMC is None:
            return self.block(x_BNC, mask=mask)
        if isinstance(self.block, SAB):
            return self.block.mab(x_BNC, context_BMC, mask=mask)
        points = self.block.I.expand(context_BMC.shape[0], -1, -1)
        return self.block.mab1(x_BNC, self.block.mab0(points, context_BMC, mask=mask))


def mixture_log_likelihood(x_BND: Tensor, raw_BKP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-likelihood of points under the Gaussian mixture that a model put out, and its weights (B, K).

    raw[0] is the weight's logit, then D means, then one deviation for all axes or one for each, through softplus:
    log p(x) = logsumexp_k( log N(x; mu_k, diag sigma_k^2) + log(pi_k + 1e-10) ).

    Args:
        x_BND: points, D numbers each.
        raw_BKP: K components of P numbers each, as above.

    Raises:
        ValueError: if `raw` has neither 1 + D + 1 nor 1 + 2 D channels.
    """
    width = x_BND.shape[-1]
    if raw_BKP.shape[-1] not in (2 + width, 1 + 2 * width):
        raise ValueError(f"a mixture has {2 + width} or {1 + 2 * width} numbers a component, got {raw_BKP.shape[-1]}")
    pi_BK = raw_BKP[..., 0].softmax(-1)
    mean, sigma = raw_BKP[..., 1 : 1 + width], F.softplus(raw_BKP[..., 1 + width :])
    normal = torch.distributions.Normal(mean[:, None], sigma[:, None].expand(-1, -1, -1, width), validate_args=False)
    log_BNK = normal.log_prob(x_BND[:, :, None]).sum(-1) + (pi_BK + 1e-10).log()[:, None]
    return log_BNK.logsumexp(-1).mean(), pi_BK
