"""Statistics of feature maps and volumes: what is kept of a map when its positions, or its channels, are summed up.

    channel statistics   over all positions         (B, C) each
    spatial statistics   over all channels          (B, 1, H, W) each

and the two gates that are made of them in most of feature-map attention (CBAM: Woo et al., arXiv 1807.06521):

    channel gate = sigmoid(sum_k mlp(s_k))          spatial gate = sigmoid(conv([s_1; ..; s_K]))

| name  | of values x_1 .. x_n                        |
|-------|---------------------------------------------|
| `avg` | their mean                                  |
| `max` | the largest                                 |
| `std` | sqrt(mean (x - mean x)^2), divided by n     |
| `lp`  | sqrt(sum x^2)                               |
| `lse` | log sum exp x                               |

Shape letters: B batch, C channels, H height, W width (any number of axes in their place), K statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "STATISTICS",
    "channel_gate",
    "channel_statistics",
    "check_statistics",
    "spatial_gate",
    "spatial_statistics",
]

#: called with a tensor, the axes to sum up and whether they stay
STATISTICS: Mapping[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "avg": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "std": lambda x, axes, keep: x.std(axes, correction=0, keepdim=keep),
    "lp": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "lse": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}


def check_statistics(
    names: Sequence[str], argument: str = "statistics", among: Sequence[str] = tuple(STATISTICS)
) -> tuple[str, ...]:
    """The names as a tuple.

    Args:
        names: what was given.
        argument: what the message calls them.
        among: the names of `STATISTICS` that are taken.

    Raises:
        ValueError: if there is none, or one is unknown.
    """
    if not names or isinstance(names, str) or not set(names) <= set(among):
        raise ValueError(f"{argument} must be some of {', '.join(among)}, got {names!r}")
    return tuple(names)


def channel_statistics(x_BCHW: Tensor, names: Sequence[str] = ("avg",)) -> Tensor:
    """Of each channel, over all positions: (K, B, C).

    Args:
        x_BCHW: a map, or a volume, or a sequence (B, C, N).
        names: of `STATISTICS`.

    >>> channel_statistics(torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]]), ["avg", "max"])
    tensor([[[2., 2.]],
    <BLANKLINE>
            [[3., 2.]]])
    """
    axes = tuple(range(2, x_BCHW.ndim))
    return torch.stack([STATISTICS[name](x_BCHW, axes, False) for name in names])


def spatial_statistics(x_BCHW: Tensor, names: Sequence[str] = ("max", "avg")) -> Tensor:
    """Of each position, over all channels, side by side: (B, K, H, W).

    Args:
        x_BCHW: a map, or a volume, or a sequence (B, C, N).
        names: of `STATISTICS`.

    >>> spatial_statistics(torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]])).tolist()
    [[[[2.0, 3.0]], [[1.5, 2.5]]]]
    """
    return torch.cat([STATISTICS[name](x_BCHW, (1,), True) for name in names], 1)


def channel_gate(x_BCHW: Tensor, mlp: Callable[[Tensor], Tensor], names: Sequence[str] = ("avg", "max")) -> Tensor:
    """sigmoid(sum_k mlp(s_k)), a number in (0, 1) per channel: (B, C, 1, 1).

    Args:
        x_BCHW: a map or a volume.
        mlp: of (..., C), the same for all statistics.
        names: of `STATISTICS`.
    """
    gate_BC = mlp(channel_statistics(x_BCHW, names)).sum(0).sigmoid()
    return gate_BC[(...,) + (None,) * (x_BCHW.ndim - 2)]


def spatial_gate(
    x_BCHW: Tensor, convolution: Callable[[Tensor], Tensor], names: Sequence[str] = ("max", "avg")
) -> Tensor:
    """sigmoid(conv([s_1; ..; s_K])), a number in (0, 1) per position: (B, 1, H, W).

    Args:
        x_BCHW: a map or a volume.
        convolution: (B, K, H, W) -> (B, 1, H, W), or to several gates.
        names: of `STATISTICS`.
    """
    return convolution(spatial_statistics(x_BCHW, names)).sigmoid()
