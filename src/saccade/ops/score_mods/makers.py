"""The modifications by name, made of what they need, which is checked here.

Shape letters: B batch, H heads, N queries, M keys, R distances of a table (-r to r), n buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.masks import Mask, Neighborhood
from saccade.ops.score_mods.modifications import (
    Added,
    Alibi,
    Bias,
    BucketedBias,
    Composed,
    GridBias,
    Modification,
    RelativeBias,
    ScoreMod,
    Shifted,
    SoftCap,
)


def alibi(slopes: Tensor | int, *, symmetric: bool = False, device: torch.device | str | None = None) -> Modification:
    """s + m_h (j - i): a penalty on distance, steeper in some heads (Press et al., arXiv 2108.12409).

    Args:
        slopes: m (H,), or the number of heads, for the paper's m_h = 2^(-8 (h + 1) / H).
        symmetric: s - m_h |j - i|, for attention that is not causal.
        device: where the paper's slopes are made.

    Raises:
        ValueError: if `slopes` has another form.

    >>> alibi(4).table.tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if isinstance(slopes, int):
        if slopes < 1:
            raise ValueError(f"slopes for at least one head, got {slopes}")
        slopes = torch.exp2(-8.0 * torch.arange(1, slopes + 1, device=device) / slopes)
    if slopes.ndim != 1 or not slopes.is_floating_point() or not len(slopes):
        raise ValueError(f"slopes must be floating point (H,), got {slopes.dtype} of shape {tuple(slopes.shape)}")
    return Alibi(slopes, symmetric=symmetric)


def soft_cap(cap: float) -> Modification:
    """c tanh(s / c): scores stay between -c and c (Gemma 2, arXiv 2408.00118).

    Args:
        cap: c.

    Raises:
        ValueError: if `cap` is not positive.

    >>> s, zero = torch.tensor([0.0, 1e6]), torch.tensor(0)
    >>> soft_cap(50.0)(s, zero, zero, zero, zero).tolist()
    [0.0, 50.0]
    """
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap must be positive, got {cap}")
    return SoftCap(float(cap))


def relative_bias(table_HR: Tensor) -> Modification:
    """s + table[h, clamp(j - i + r, 0, 2 r)]: a bias per head and distance, the outermost for all that are farther.

    Args:
        table_HR: (H, 2 r + 1), distances -r to r; H may be 1, for all heads.

    Raises:
        ValueError: if the table has another form.

    >>> mod = relative_bias(torch.tensor([[-1.0, 0.0, 1.0]]))
    >>> i = torch.arange(4)
    >>> mod(torch.zeros(4, 4), i[:1], i[:1], i[:, None], i)[1].tolist()
    [-1.0, 0.0, 1.0, 1.0]
    """
    _refuse_table(table_HR, "(H, 2 r + 1)")
    if table_HR.shape[1] % 2 == 0:
        raise ValueError(f"table must have an odd number of distances, got {table_HR.shape[1]}")
    return RelativeBias(table_HR)


def bucketed_bias(table_Hn: Tensor, *, max_distance: int = 128, bidirectional: bool = True) -> Modification:
    """s + table[h, bucket(j - i)]: small distances have buckets of their own, larger ones share logarithmic ones (T5).

    Args:
        table_Hn: (H, n), T5's embedding transposed; H may be 1, for all heads.
        max_distance: from here on all distances share the last bucket.
        bidirectional: half of the buckets are for keys after the query, which otherwise count as distance 0.

    Raises:
        ValueError: if the table has another form or too few buckets, or `max_distance` is too small.
    """
    _refuse_table(table_Hn, "(H, n)")
    exact = table_Hn.shape[1] // (4 if bidirectional else 2)
    if exact < 1 or (bidirectional and table_Hn.shape[1] % 2):
        need = "an even number of buckets, at least 4" if bidirectional else "at least 2 buckets"
        raise ValueError(f"table must have {need}, got {table_Hn.shape[1]}")
    if max_distance <= exact:
        raise ValueError(f"max_distance must be above the {exact} exact distances, got {max_distance}")
    return BucketedBias(table_Hn, max_distance=max_distance, bidirectional=bidirectional)


def _refuse_table(table: Tensor, form: str) -> None:
    if table.ndim != 2 or not table.is_floating_point() or 0 in table.shape:
        raise ValueError(f"table must be floating point {form}, got {table.dtype} of shape {tuple(table.shape)}")


def grid_bias(table_HR: Tensor, neighborhood: Mask) -> Modification:
    """s + table[h, j' - i' + w - 1]: a bias per head and relative position on every axis of a grid (Swin, NAT).

    i' and j' are places within a residue class, where the neighbourhood is dilated. With `neighborhood` as its mask, it
    runs in windows, forward and backward.

    Args:
        table_HR: (H, 2 w_1 - 1, ...), an entry per offset on each axis; H may be 1, for all heads.
        neighborhood: a mask of `masks.neighborhood`, with kernel (w_1, ...).

    Raises:
        ValueError: if the table or the mask have another form.

    >>> from saccade import masks
    >>> grid_bias(torch.zeros(2, 5, 5), masks.neighborhood((8, 8), 3))
    grid_bias(2 heads, neighborhood((8, 8), (3, 3)))
    """
    if not isinstance(neighborhood, Neighborhood):
        raise ValueError(f"neighborhood must be a mask of masks.neighborhood, got {neighborhood!r}")
    sides = tuple(2 * w - 1 for w in neighborhood.kernel)
    if table_HR.ndim == 0 or tuple(table_HR.shape[1:]) != sides or not table_HR.is_floating_point():
        raise ValueError(
            f"bias must be floating point (heads, {', '.join(map(str, sides))}) for a kernel of "
            f"{neighborhood.kernel}, got {table_HR.dtype} of shape {tuple(table_HR.shape)}"
        )
    return GridBias(table_HR, grid=neighborhood)


def bias(table: Tensor) -> Modification:
    """s + table[b, h, i, j]; -inf forbids a pair.

    Args:
        table: (B, H, N, M), where each but the last may be 1, for all, and the first one or two may be left out. It may
            cover more queries and keys than there are.

    Raises:
        ValueError: if the table has another form.

    >>> zero = torch.tensor(0)
    >>> bias(torch.eye(3))(torch.zeros(3), zero, zero, zero + 1, torch.arange(3)).tolist()
    [0.0, 1.0, 0.0]
    """
    if not 2 <= table.ndim <= 4 or not table.is_floating_point():
        raise ValueError(f"table must be floating point (B, H, N, M), got {table.dtype} of shape {tuple(table.shape)}")
    return Bias(table[(None,) * (4 - table.ndim)])


def compose(*mods: ScoreMod) -> ScoreMod:
    """One modification after the other, from left to right; functions of your own too.

    Args:
        mods: one or more.

    Raises:
        ValueError: if there is none.

    >>> compose(soft_cap(2.0), alibi(2))
    compose(soft_cap(2), alibi(2 heads))
    """
    if not mods:
        raise ValueError("compose needs at least one modification")
    flat = [each for mod in mods for each in (mod.mods if isinstance(mod, Composed) else (mod,))]
    return flat[0] if len(flat) == 1 else Composed(tuple(flat))


def shifted(mod: ScoreMod, offset: int) -> ScoreMod:
    """The same modification where the first query stands at position `offset`, as in decoding with a cache.

    Args:
        mod: of this module, or a function of your own.
        offset: added to the query's index.
    """
    if offset == 0 or isinstance(mod, SoftCap):
        return mod
    if isinstance(mod, Composed):
        return Composed(tuple(shifted(each, offset) for each in mod.mods))
    return mod.shift(offset) if isinstance(mod, Added) else Shifted(mod, offset)
