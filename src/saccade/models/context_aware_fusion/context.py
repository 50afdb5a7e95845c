"""What C-DiffDet+ adds to a detector: one vector of the whole scene, how proposals read it, and a gate of channels.

Shape letters: B batch, N proposals, M context tokens, L tokens of a map, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.gates import ChannelGate
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.backbone import check_images


class GlobalContextEncoder(nn.Module):
    """GCE: the scene as one token, or as a token for each position of a map of stride 8.

        g = mean over positions of [ ReLU conv ReLU conv ReLU conv (image) + W pool pool pool (image) ]

    The convolutions are 3 x 3 at stride 2, 64, 128 and C channels wide; the pools 3 x 3 at stride 2, with the zeros
    around the image in their means.

    Args:
        channels: C.
        in_channels: of the image.
        pooled: one token, as the authors; False leaves the mean out.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, channels: int = 256, in_channels: int = 3, *, pooled: bool = True) -> None:
        super().__init__()
        if channels < 1 or in_channels < 1:
            raise ValueError(f"channels and in_channels must be positive, got {channels} and {in_channels}")
        self.in_channels, self.pooled = in_channels, pooled
        widths = (in_channels, 64, 128, channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in zip(widths, widths[1:]))
        self.shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalised images of any size -> context tokens (B, M, C).

        Raises:
            ValueError: if they are no batch of images with `in_channels`.
        """
        check_images(image_BCHW, self.in_channels)
        y_BCHW = rest_BCHW = image_BCHW
        for conv in self.convs:
            y_BCHW = F.relu(conv(y_BCHW))
            rest_BCHW = F.avg_pool2d(rest_BCHW, 3, 2, padding=1)
        tokens_BMC = (y_BCHW + self.shortcut(rest_BCHW)).flatten(2).mT
        return tokens_BMC.mean(1, keepdim=True) if self.pooled else tokens_BMC


class ContextFusion(nn.Module):
    """CAF: proposals read the context, LN(Q + MHA(Q, context, context)).

    Where the context is one token all weights are 1, whatever Q: each proposal of an image gets the same vector,
    W_o (W_v g + b_v) + b_o, and the norm mixes it in.

    Args:
        dim: C.
        num_heads: of the attention.
        dropout: of its weights and of what it adds.

    Raises:
        ValueError: if the heads do not divide the channels, or the dropout is no probability.
    """

    def __init__(self, dim: int = 256, num_heads: int = 8, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=dropout)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim)

    def forward(self, query_BNC: Tensor, context_BMC: Tensor) -> Tensor:
        """Proposals (B, N, C) -> (B, N, C).

        Raises:
            ValueError: if the shapes do not fit.
        """
        return self.norm(query_BNC + self.dropout(self.attention(query_BNC, context_BMC)))


class ACEBlock(ChannelGate):
    """ACE: tokens times a gate of their channels, x sigmoid(W2 ReLU(W1 mean_L x)); (B, L, C) to the same shape.

    Args:
        dim: C.
        reduction: W1 is C // reduction wide.

    Raises:
        ValueError: if the reduction is not between 1 and C.
    """

    def __init__(self, dim: int, reduction: int = 16) -> None:
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction must be between 1 and dim ({dim}), got {reduction}")
        super().__init__(dim, dim // reduction, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return super().forward(x_BLC.mT).mT


def gate_last_stage(backbone: nn.Module, reduction: int = 16) -> nn.Module:
    """Put ACE behind the norm of the last stage of transformers' Swin backbone, in place.

    Args:
        backbone: a `transformers.SwinBackbone`, whose last map is given out.
        reduction: of the gate.

    Raises:
        ValueError: if the backbone has no norms of its stages.
    """
    norms = getattr(backbone, "hidden_states_norms", None)
    if not isinstance(norms, nn.ModuleDict) or not norms:
        raise ValueError(
            f"backbone must have a norm of each stage, as transformers' Swin; got {type(backbone).__name__}"
        )
    last = list(norms)[-1]
    norm = norms[last]
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"the last stage must end in a layer norm, got {type(norm).__name__}")
    norms[last] = nn.Sequential(norm, ACEBlock(norm.normalized_shape[0], reduction))
    return backbone
