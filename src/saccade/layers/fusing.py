"""Networks for use alone, with fewer steps: a norm by fixed numbers taken into the convolution before it.

norm(conv(x)) = conv'(x),     kernel' = kernel g / sqrt(var + eps),   bias' = (bias - mean) g / sqrt(var + eps) + b
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from saccade.layers.norms import FrozenBatchNorm
from saccade.layers.residual import ResidualBlock


def fused(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """One convolution that gives what `norm` gives of `conv` in evaluation.

    Args:
        conv: the convolution.
        norm: `nn.BatchNorm2d` with running statistics, or a `FrozenBatchNorm`.
    """
    numbers: Any = norm
    together = copy.deepcopy(conv)
    together.weight, together.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, numbers.running_mean, numbers.running_var, numbers.eps, numbers.weight, numbers.bias
    )
    return together


def fuse_norms(module: nn.Module) -> nn.Module:
    """Take each batch norm into the convolution before it, in place: in sequences, and in residual blocks.

    What comes out is for evaluation: norms no longer follow a batch, and names in the state dict are others. Kernels
    lie channels last, and so will maps, whatever the image's layout: on a CPU that is faster.
    """
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            _fuse_pairs(part, list(pairwise(part._modules)))
        elif isinstance(part, ResidualBlock):
            _fuse_pairs(part, [(f"conv{i}", f"norm{i}") for i in (1, 2, 3) if hasattr(part, f"norm{i}")])
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _fuse_pairs(module: nn.Module, names: list[tuple[str, str]]) -> None:
    for first, second in names:
        conv, norm = getattr(module, first), getattr(module, second)
        follows = isinstance(norm, FrozenBatchNorm) or (
            isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        )
        if isinstance(conv, nn.Conv2d) and follows:
            setattr(module, first, fused(conv, norm))
            setattr(module, second, nn.Identity())
