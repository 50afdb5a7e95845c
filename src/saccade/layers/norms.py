"""Norms that PyTorch has not.

Shape letters: B batch, N tokens, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.sharding import refuse_parts


class FrozenBatchNorm(nn.Module):
    """Batch norm of maps by numbers that stay as they are, in training too: (x - mean) / sqrt(var + eps) weight + bias.

    Args:
        channels: C.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a norm that was not frozen
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_norms(module: nn.Module) -> nn.Module:
    """The module with a `FrozenBatchNorm` of the same numbers in the place of each batch norm of maps in it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm(child.num_features, child.eps)
            own = {key: tensor for key, tensor in child.state_dict().items() if key != "num_batches_tracked"}
            frozen.load_state_dict(own)
            setattr(module, name, frozen)
        else:
            freeze_norms(child)
    return module


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.movedim(1, -1)).movedim(-1, 1)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of tokens (B, N, C), over batch and tokens."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        if self.training:
            refuse_parts("a batch norm that learns")
        return super().forward(x_BNC.transpose(1, 2)).transpose(1, 2)


class ScaleNorm(nn.Module):
    """x s / rms(x) with one learned number s (Nguyen and Salazar, arXiv 1910.05895, there with the length for the rms).

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least, without parameters (arXiv 2307.14995)."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
