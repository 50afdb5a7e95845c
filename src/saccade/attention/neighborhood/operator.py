"""Neighbourhood attention in 1-D, 2-D and 3-D: the fused function, and its two halves with the scores between them.

Shape letters: B batch, H query heads, K key heads, N tokens of the grid in row-major order, L extra keys,
D head dim of q and k, E of v, P = prod(w) places of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask, Neighborhood
from saccade.ops.merge import merge
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.score_mods import grid_bias
from saccade.ops.sharding import in_force, whole

Axes = int | Sequence[int]


# fmt: off
@overload
def neighborhood_attend(
    q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, size: Axes, kernel_size: Axes, *, dilation: Axes = ...,
    stride: Axes = ..., causal: bool | Sequence[bool] = ..., bias: Tensor | None = ..., mask: GivenMask = ...,
    extra: tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def neighborhood_attend(
    q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, size: Axes, kernel_size: Axes, *, dilation: Axes = ...,
    stride: Axes = ..., causal: bool | Sequence[bool] = ..., bias: Tensor | None = ..., mask: GivenMask = ...,
    extra: tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: Axes,
    kernel_size: Axes,
    *,
    dilation: Axes = 1,
    stride: Axes = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    mask: GivenMask = None,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to its neighbours on the grid. Exact, differentiable, memory linear in N.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens of the grid in row-major order (this rank's, in parts); K divides H.
        size: the grid, an int or a tuple of up to three.
        kernel_size, dilation, stride, causal: one for all axes, or one per axis; kernel_size * dilation <= size on axes
            that are not causal, stride <= kernel_size.
        bias: table (H, 2 w_1 - 1, ...), at index key' - query' + w - 1 per axis. Gradients reach it.
        mask: bool (B, N), True = real token. A token with no real neighbour gives zeros.
        extra: further keys (B, K, L, D) and values (B, K, L, E) that every query attends to.
        scale: D ** -0.5 where None.
        return_lse: also return the log of the sum of the exponentials (B, H, N).

    Returns:
        out (B, H, N, E), or (out, lse).

    Raises:
        ValueError: if the grid, the options or the shapes do not fit.

    >>> q = k = v = torch.randn(1, 2, 6 * 8, 4)
    >>> neighborhood_attend(q, k, v, (6, 8), 3, dilation=(1, 2)).shape
    torch.Size([1, 2, 48, 4])
    """
    grid = (size,) if isinstance(size, int) else tuple(size)
    windows = windows_of(grid, kernel_size, dilation, stride, causal)
    # of a sequence in parts the grid is the whole
    tokens = whole(k_BKND.shape[2]) if k_BKND.ndim == 4 else 0
    for name, x in (("query", q_BHND), ("key", k_BKND), ("value", v_BKNE)):
        if x.ndim != 4 or x.shape[2] != k_BKND.shape[2] or tokens != prod(grid):
            raise ValueError(
                f"{name} must be (batch, heads, {prod(grid)} tokens, head_dim) for a grid of {grid}, "
                f"got shape {tuple(x.shape)}"
            )
    B, N = k_BKND.shape[0], prod(grid)
    real_BN = Pattern.of(mask, B, N, N).only(("padding",), "neighborhood attention").real_keys(B)
    # what is added to a causal axis that is too short stands after every token
    pad = [longer - n for longer, n in zip(windows.size, grid)]
    if in_force() is not None and (any(pad) or extra is not None):
        raise ValueError("a grid in parts (saccade.parallel) has no extra keys, and no axis shorter than its kernel")
    q, k, v = (_pad(x, grid, pad) for x in (q_BHND, k_BKND, v_BKNE))
    pairs: Mask = windows if len(grid) > 1 or bias is not None else _band(windows)
    if real_BN is not None:
        pairs = pairs & masks.padding(_pad(real_BN[:, None, :, None], grid, pad)[:, 0, :, 0])
    add = None if bias is None else _bias(bias, windows, q.shape[1])
    if extra is None and not return_lse:
        return _crop(attend(q, k, v, mask=pairs, score_mod=add, scale=scale), windows.size, grid)
    out, lse = attend(q, k, v, mask=pairs, score_mod=add, scale=scale, return_lse=True)
    out, lse = _crop(out, windows.size, grid), _crop(lse[..., None], windows.size, grid)[..., 0]
    if extra is not None:
        out, lse = merge(out, lse, *attend(q_BHND, *extra, scale=scale, return_lse=True))
    return (out, lse) if return_lse else out


def neighborhood_scores(
    q_BHND: Tensor, k_BKND: Tensor, mask: Neighborhood, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The unfused first half (the authors' QK): scores in window order, row-major, (B, H, N, P); -inf where a causal
    window has fewer places. Keeps N P D numbers: to look at, and the oracle of the fused form.

    Args:
        q_BHND, k_BKND: tokens of the grid in row-major order; K divides H.
        mask: the windows, of `saccade.ops.masks.neighborhood`.
        bias: table (H, 2 w_1 - 1, ...), as in `neighborhood_attend`.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: if `bias` does not have that shape.
    """
    index_NP, real_NP = _neighbours(mask)
    k_BHND = repeat_heads(k_BKND, q_BHND.shape[1])
    scores = (q_BHND[:, :, :, None] * k_BHND[:, :, index_NP]).sum(-1)
    scores = scores * (q_BHND.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        i = torch.arange(index_NP.shape[0])[:, None]
        scores = _bias(bias, mask, q_BHND.shape[1])(
            scores, None, torch.arange(bias.shape[0])[:, None, None], i, index_NP
        )
    return scores.masked_fill(~real_NP, float("-inf"))


def neighborhood_sum(weights_BHNP: Tensor, v_BKNE: Tensor, mask: Neighborhood) -> Tensor:
    """The unfused second half (the authors' AV): weights in window order times values, (B, H, N, E).

    Args:
        weights_BHNP: softmax of `neighborhood_scores`.
        v_BKNE: values of the grid's tokens; K divides H.
        mask: the windows that the weights are of.
    """
    index_NP, _ = _neighbours(mask)
    v_BHNE = repeat_heads(v_BKNE, weights_BHNP.shape[1])
    return (weights_BHNP[..., None] * v_BHNE[:, :, index_NP]).sum(3)


def windows_of(
    grid: tuple[int, ...], kernel_size: Axes, dilation: Axes, stride: Axes, causal: bool | Sequence[bool]
) -> Neighborhood:
    """The mask, for a grid whose causal axes are at least as long as a window."""
    spans = [on_axis(kernel_size, a) * on_axis(dilation, a) for a in range(len(grid))]
    long = tuple(max(n, span) if on_axis(causal, a) else n for a, (n, span) in enumerate(zip(grid, spans)))
    return cast(Neighborhood, masks.neighborhood(long, kernel_size, dilation, causal, stride=stride))


def on_axis(option: Any, axis: int) -> Any:
    if isinstance(option, int):
        return option
    return option[axis] if axis < len(option) else 1  # the wrong number of entries is refused by the mask


def _band(windows: Neighborhood) -> Mask:
    """A causal 1-D window is a band, which knows no border."""
    if windows.causal == (True,) and windows.dilation == windows.stride == (1,):
        return masks.window(windows.kernel[0] - 1)
    return windows


def _pad(x: Tensor, grid: Sequence[int], pad: Sequence[int]) -> Tensor:
    if not any(pad):
        return x
    sides = [side for p in reversed(pad) for side in (0, p)]
    return F.pad(x.unflatten(2, tuple(grid)), (0, 0, *sides)).flatten(2, -2)


def _crop(x: Tensor, longer: Sequence[int], grid: Sequence[int]) -> Tensor:
    if tuple(longer) == tuple(grid):
        return x
    x = x.unflatten(2, tuple(longer))
    for axis, n in enumerate(grid):
        x = x.narrow(2 + axis, 0, n)
    return x.flatten(2, -2)


def _bias(table: Tensor, mask: Neighborhood, heads: int) -> Any:
    """A `score_mod` that adds the table at the pair's relative position within its residue class."""
    expected = (heads, *(2 * w - 1 for w in mask.kernel))
    if tuple(table.shape) != expected:
        raise ValueError(f"bias must be {expected} for a kernel of {mask.kernel}, got shape {tuple(table.shape)}")
    return grid_bias(table, mask)


def _neighbours(mask: Neighborhood) -> tuple[Tensor, Tensor]:
    """Token at each place of each window (N, P), and whether there is one (causal windows begin short)."""
    index, real = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for axis, (n, w, d) in enumerate(zip(mask.size, mask.kernel, mask.dilation)):
        group, first, last = (x[:, None] for x in mask.axis_window(axis, torch.arange(n)))
        place = first + torch.arange(w)
        token = (group + place * d).clamp(max=n - 1)
        index = (index[:, None, :, None] * n + token[:, None]).flatten(2).flatten(0, 1)
        real = (real[:, None, :, None] & (place <= last)[:, None]).flatten(2).flatten(0, 1)
    return index, real
