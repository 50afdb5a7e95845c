"""Reading maps at points between their pixels: one and many scales, bilinear and discrete, and biases there.

Every form is a weighted sum of rows of a map whose channels lie together, out_k = sum_s w_ks row[i_ks]: a bilinear
sample is a sum of four rows, and multi-scale deformable attention

    out[b, n, h] = sum_s a[b, n, h, s] * sample(level of s, location[b, n, h, s])

is a sum of 4 S rows. So samples are never made: three primitives carry everything, forward and backward, and each
other's derivatives are among them (differentiable any number of times):

    gather_sum (rows, i, w)_k = sum_s w_ks rows[i_ks]           derivatives: scatter_sum in rows, gather_dot in w
    gather_dot (q, rows, i)_ks = q_k . rows[i_ks]               derivatives: gather_sum in q, scatter_sum in rows
    scatter_sum(i, w, g)_r = sum over (k, s) with i_ks = r of w_ks g_k

On CPUs they run on `embedding_bag`, on the sampled product of sparse matrices, and on an `embedding_bag` over the
sorted indices: rows are read once, in the cache, and added in registers.

A bias that depends on where a key's sampling point lies relative to a query (`relative_bias`), from a table with one
cell per pixel of displacement: all queries of a grid see a point at the same fraction of a cell, so the bias of a
point is a crop of the table, as large as the grid, and shifted by that fraction. Grid sampling would find four cells
anew for every pair.

Coordinates are (x, y), in pixels, a whole number in the middle of a pixel: `pixels` makes them of normalised ones.
Points outside the map read zeros ("zeros") or the nearest pixel of the border ("border"), as in `F.grid_sample`.
Discrete forms have gradients in weights and maps, none in locations.

Exporters (torch.export, ONNX) see operators of torch's own, and grid sampling in none but `relative_bias`. Numbers of
images may stay open (`dynamic_shapes`).

Shape letters: B batch, H, W height and width, C channels, G groups (or heads) of D channels with points of their own,
N points or queries, M pixels of all levels, S samples of a query, R rows, K sums, T heads that share points.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only

__all__ = [
    "Samples",
    "deformable_attend",
    "deformable_attend_reference",
    "deformable_conv",
    "gather_dot",
    "gather_sum",
    "pixels",
    "relative_bias",
    "sample",
    "samples",
    "scatter_sum",
]

#: how a point reads: four neighbours, the nearest pixel, or the pixel trunc(location + 1/2) of RT-DETRv2, which is
#: half a pixel towards the lower right of the nearest and always inside
MODES = ("bilinear", "nearest", "discrete")
PADDINGS = ("zeros", "border")

Size = tuple[int, int]


# ---------------------------------------------------------------------------- the three primitives


@torch.library.custom_op("saccade::gather_sum", mutates_args=())
def gather_sum(rows_RD: Tensor, index_KS: Tensor, weight_KS: Tensor) -> Tensor:
    """sum_s weight_ks rows[index_ks], (K, D). Indices are int32 or int64, in single or double precision."""
    if not index_KS.numel() or not rows_RD.shape[1]:
        return rows_RD.new_zeros(index_KS.shape[0], rows_RD.shape[1])
    return F.embedding_bag(
        index_KS.contiguous(), rows_RD.contiguous(), per_sample_weights=weight_KS.contiguous(), mode="sum"
    )


@torch.library.custom_op("saccade::gather_dot", mutates_args=())
def gather_dot(query_KD: Tensor, rows_RD: Tensor, index_KS: Tensor) -> Tensor:
    """query_k . rows[index_ks], (K, S)."""
    K, S = index_KS.shape
    if not index_KS.numel() or not rows_RD.shape[1]:
        return rows_RD.new_zeros(K, S)
    if rows_RD.device.type != "cpu":
        return (rows_RD[index_KS] @ query_KD[:, :, None])[..., 0]
    if rows_RD.shape[0] <= S:
        return (query_KD @ rows_RD.T).gather(1, index_KS.long())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are in beta
        starts = torch.arange(0, K * S + 1, S, dtype=index_KS.dtype)
        pairs = torch.sparse_csr_tensor(
            starts, index_KS.reshape(-1), rows_RD.new_zeros(K * S), (K, rows_RD.shape[0]), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(pairs, query_KD.contiguous(), rows_RD.contiguous().T, beta=0.0)
        return products.values().view(K, S)


@torch.library.custom_op("saccade::scatter_sum", mutates_args=())
def scatter_sum(index_KS: Tensor, weight_KS: Tensor, grad_KD: Tensor, rows: int) -> Tensor:
    """Row r is the sum of weight_ks grad_k over the pairs (k, s) with index_ks = r, (rows, D)."""
    S = index_KS.shape[1]
    if not index_KS.numel() or not rows or not grad_KD.shape[1]:
        return grad_KD.new_zeros(rows, grad_KD.shape[1])
    flat, weights = index_KS.reshape(-1), weight_KS.reshape(-1)
    if grad_KD.device.type != "cpu":
        out = grad_KD.new_zeros(rows, grad_KD.shape[1])
        return out.index_add_(0, flat, (weight_KS[..., None] * grad_KD[:, None]).flatten(0, 1))
    # sums over sorted pairs: an addition to rows in random order would go to memory each time
    order = flat.int().argsort()
    starts = F.pad(flat.bincount(minlength=rows).cumsum(0), (1, 0))
    return F.embedding_bag(
        order // S,
        grad_KD.contiguous(),
        starts,
        per_sample_weights=weights[order],
        mode="sum",
        include_last_offset=True,
    )


@gather_sum.register_fake
def _(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1])


@gather_dot.register_fake
def _(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape)


@scatter_sum.register_fake
def _(index: Tensor, weight: Tensor, grad: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _keep_sum(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_sum(ctx: Any, grad: Tensor) -> Any:
    rows, index, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_rows = scatter_sum(index, weight, grad, rows.shape[0]) if needs[0] else None
    return of_rows, None, gather_dot(grad, rows, index) if needs[2] else None


def _differentiate_dot(ctx: Any, grad: Tensor) -> Any:
    query, rows, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_query = gather_sum(rows, index, grad) if needs[0] else None
    return of_query, scatter_sum(index, grad, query, rows.shape[0]) if needs[1] else None, None


def _keep_scatter(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_scatter(ctx: Any, grad: Tensor) -> Any:
    index, weight, rows = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_weight = gather_dot(rows, grad, index) if needs[1] else None
    return None, of_weight, gather_sum(grad, index, weight) if needs[2] else None, None


gather_sum.register_autograd(_differentiate_sum, setup_context=_keep_sum)
gather_dot.register_autograd(_differentiate_dot, setup_context=_keep_sum)
scatter_sum.register_autograd(_differentiate_scatter, setup_context=_keep_scatter)


# ---------------------------------------------------------------------------- which rows, and how much of each


def pixels(points: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Coordinates in [-1, 1], (..., 2) as (x, y), in pixels of a map of `size` (height, width).

    -1 and 1 are the middles of the outermost pixels with `align_corners`, their outer edges without, as in
    `F.grid_sample`.

    >>> pixels(torch.tensor([-1.0, 1.0]), (4, 8), align_corners=True)
    tensor([0., 3.])
    """
    extent = points.new_tensor([size[1], size[0]])
    return (points + 1) / 2 * (extent - 1) if align_corners else ((points + 1) * extent - 1) / 2


def _working(dtype: torch.dtype) -> torch.dtype:
    """Coordinates and sums are kept in single precision at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------- samples of one map or of many


@dataclass(frozen=True)
class Samples:
    """Which rows S samples per query read, and how much of each: made once, read from any number of maps.

    Attributes:
        index_KI: rows of maps (B, M, G, D) as (B M G, D) that the K = B N G queries read: I = S, or 4 S with all upper
            left corners first.
        weight_KI: how much of each; None is one.
        shape: (B, N, G, S).
        pixels: M.
    """

    index_KI: Tensor
    weight_KI: Tensor | None
    shape: tuple[int, int, int, int]
    pixels: int

    def sum(self, values_BMGD: Tensor, weights_BNGS: Tensor | None = None) -> Tensor:
        """sum_s weights_s sample_s, (B, N, G, D); weights are ones where None. No sample is made on the way."""
        rows = self._rows(values_BMGD)
        weight_KI = self.weight_KI
        if weights_BNGS is not None:
            if tuple(weights_BNGS.shape) != self.shape:
                raise ValueError(f"weights must be {self.shape}, got shape {tuple(weights_BNGS.shape)}")
            weight_KS = weights_BNGS.to(rows.dtype).reshape(self.index_KI.shape[0], self.shape[3])
            # corners are the outer axis of a row
            corners = self.index_KI.shape[1] // max(1, self.shape[3])
            weight_KI = weight_KS if weight_KI is None else weight_KI.to(rows.dtype) * weight_KS.repeat(1, corners)
        elif weight_KI is None:
            weight_KI = rows.new_ones(self.index_KI.shape)
        sums = _plain_sum if exporting() else gather_sum
        out = sums(rows, self.index_KI, weight_KI.to(rows.dtype))
        return out.view(*self.shape[:3], rows.shape[1]).to(values_BMGD.dtype)

    def dot(self, query_BNGD: Tensor, keys_BMGD: Tensor) -> Tensor:
        """query . sample_s, (B, N, G, S): the logits of key-aware deformable attention, unscaled."""
        rows = self._rows(keys_BMGD)
        expected = (*self.shape[:3], keys_BMGD.shape[3])
        if tuple(query_BNGD.shape) != expected:
            raise ValueError(f"query must be {expected}, got shape {tuple(query_BNGD.shape)}")
        products_KI = gather_dot(query_BNGD.to(rows.dtype).reshape(-1, expected[3]), rows, self.index_KI)
        if self.weight_KI is not None:
            products_KI = products_KI * self.weight_KI.to(rows.dtype)
            corners = self.weight_KI.shape[1] // max(1, self.shape[3])
            products_KI = products_KI.view(products_KI.shape[0], corners, self.shape[3]).sum(1)
        return products_KI.view(self.shape).to(query_BNGD.dtype)

    def _rows(self, values_BMGD: Tensor) -> Tensor:
        B, _, G, _ = self.shape
        if values_BMGD.ndim != 4 or tuple(values_BMGD.shape[:3]) != (B, self.pixels, G):
            raise ValueError(
                f"values must be ({B}, {self.pixels} pixels, {G}, channels), got shape {tuple(values_BMGD.shape)}"
            )
        return values_BMGD.to(_working(values_BMGD.dtype)).reshape(-1, values_BMGD.shape[3])


def samples(
    points_BNGS2: Tensor,
    shapes: Sequence[Size],
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Samples:
    """Which rows the points read.

    Args:
        points_BNGS2: (x, y) in pixels of the level of the sample; in single precision at least.
        shapes: (height, width) of each level.
        counts: samples of each level, one level after the other; equally many where None.
        mode: "bilinear", "nearest" or "discrete".
        padding: "zeros" or "border"; "discrete" is always inside.

    Raises:
        ValueError: if shapes, counts or names do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if points_BNGS2.ndim != 5 or points_BNGS2.shape[4] != 2:
        raise ValueError(f"points must be (batch, queries, groups, samples, 2), got shape {tuple(points_BNGS2.shape)}")
    B, N, G, S = points_BNGS2.shape[:4]
    levels = _counts(S, len(shapes), counts)
    x, y = points_BNGS2.unbind(-1)
    if x.dtype != _working(x.dtype):
        x, y = x.float(), y.float()
    width, height, start = _grid(shapes, levels, x)
    columns, of_columns = _axis(x, width, mode, padding)
    rows, of_rows = _axis(y, height, mode, padding)
    M = sum(h * w for h, w in shapes)
    group = torch.arange(G, device=x.device, dtype=torch.int32)
    image = torch.arange(B, device=x.device, dtype=torch.int32) * (M * G)
    first = (image[:, None] + group)[:, None, :, None]
    # pixel = row * width + column + start; row in maps (B, M, G) = (image * M + pixel) * G + group
    lines = [r * (width * G) + (start * G + first) for r in rows]
    index = torch.stack([line + c * G for line in lines for c in columns], 3)
    weight = torch.stack([r * c for r in of_rows for c in of_columns], 3) if of_rows else None
    return Samples(
        index.flatten(0, 2).flatten(1), None if weight is None else weight.flatten(0, 2).flatten(1), (B, N, G, S), M
    )


def _counts(S: int, levels: int, counts: Sequence[int] | None) -> tuple[int, ...]:
    if not levels:
        raise ValueError("shapes must be (height, width) of at least one level, got none")
    if counts is None:
        if S % levels:
            raise ValueError(f"samples ({S}) must be equally many on each of {levels} levels, or counts be given")
        return (S // levels,) * levels
    if len(counts) != levels or sum(counts) != S or min(counts) < 0:
        raise ValueError(f"counts must be one per level ({levels}) and sum to the samples ({S}), got {counts}")
    return tuple(counts)


def _grid(shapes: Sequence[Size], counts: Sequence[int], like: Tensor) -> tuple[Any, Any, Any]:
    """Width, height and first pixel of the level of each sample: int32 (S,), or numbers where there is one level."""
    if len(shapes) == 1:
        return shapes[0][1], shapes[0][0], 0
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    of_levels = [(w, h, start) for (h, w), start in zip(shapes, starts)]
    of_samples = [level for level, count in zip(of_levels, counts) for _ in range(count)]
    width, height, start = torch.tensor(of_samples, dtype=torch.int32, device=like.device).view(-1, 3).unbind(1)
    return width, height, start


def _axis(p: Tensor, n: Any, mode: str, padding: str) -> tuple[list[Tensor], list[Tensor]]:
    """Indices (int32) and weights (none: ones) of the pixels that coordinates read on an axis of n pixels."""
    last = n - 1
    if mode == "discrete":
        # trunc(location n + 1/2) is floor(p + 1), but for what the border catches
        return [_clamp(p.detach() + 1, 0, last).int()], []
    # outside a map with zeros, everything reads nothing; so far is enough, and casts to integers stay defined
    p = _clamp(p, 0, last) if padding == "border" else _clamp(p, -1, n)
    if mode == "nearest":
        low = (p.detach() + 0.5).int() if padding == "border" else (p.detach() + 0.5).floor().int()
        return [_clamp(low, 0, last)], [] if padding == "border" else [((low >= 0) & (low < n)).to(p.dtype)]
    floor = p.detach().floor()
    low = floor.int()
    far = p - floor
    near = 1 - far
    indices = [_clamp(low, 0, last), _clamp(low + 1, 0, last)]
    if padding == "border":
        return indices, [near, far]
    return indices, [near * ((low >= 0) & (low < n)), far * (low < last)]


def _clamp(x: Tensor, low: int, high: Any) -> Tensor:
    return x.clamp(low, high) if isinstance(high, int) else x.clamp(min=low).minimum(high.to(x.dtype))


def _plain_sum(rows_RD: Tensor, index_KI: Tensor, weight_KI: Tensor) -> Tensor:
    """`gather_sum` in operators that every exporter knows."""
    gathered = rows_RD.index_select(0, index_KI.reshape(-1)).view(*index_KI.shape, -1)
    return (gathered * weight_KI[..., None]).sum(1)


def sample(x_BHWC: Tensor, points_BNG2: Tensor, *, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """A map at points: (B, N, C). Each of the G groups of channels has points of its own.

    Args:
        x_BHWC: the map, channels last (a channels-last (B, C, H, W) is one after `permute(0, 2, 3, 1)`, uncopied).
        points_BNG2: (x, y) in pixels, in single precision at least; G divides C.
        mode: "bilinear", "nearest" or "discrete".
        padding: "zeros" or "border"; "discrete" is always inside.

    Raises:
        ValueError: if shapes or names do not fit.

    >>> x = torch.arange(6.0).view(1, 2, 3, 1)
    >>> sample(x, torch.tensor([[[[0.5, 0.0]], [[2.0, 0.5]]]])).flatten()
    tensor([0.5000, 3.5000])
    """
    if x_BHWC.ndim != 4 or points_BNG2.ndim != 4:
        raise ValueError(
            "x must be (batch, height, width, channels) and points (batch, points, groups, 2), got shapes "
            f"{tuple(x_BHWC.shape)} and {tuple(points_BNG2.shape)}"
        )
    G, (H, W, C) = points_BNG2.shape[2], x_BHWC.shape[1:]
    if not G or C % G:
        raise ValueError(f"groups of points must divide the channels ({C}), got {G}")
    read = samples(points_BNG2[:, :, :, None], [(H, W)], mode=mode, padding=padding)
    return read.sum(x_BHWC.flatten(1, 2).unflatten(2, (G, -1))).flatten(2)


def deformable_attend(
    values_BMGD: Tensor,
    shapes: Sequence[Size],
    locations_BNGS2: Tensor,
    weights_BNGS: Tensor,
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Tensor:
    """Multi-scale deformable attention: sum_s weights_s sample_s, (B, N, G, D).

    Args:
        values_BMGD: pixels of all levels, each in row-major order, G heads.
        shapes: (height, width) of each level; their areas sum to M.
        locations_BNGS2: (x, y), from 0 to 1 between the outer edges of the sample's level.
        weights_BNGS: of any range.
        counts, mode, padding: see `samples`.

    Raises:
        ValueError: if shapes, counts or names do not fit.

    >>> values, locations, weights = torch.randn(2, 20, 4, 8), torch.rand(2, 5, 4, 6, 2), torch.rand(2, 5, 4, 6)
    >>> deformable_attend(values, [(4, 4), (2, 2)], locations, weights, [4, 2]).shape
    torch.Size([2, 5, 4, 8])
    """
    points = level_pixels(locations_BNGS2, shapes, counts)
    return samples(points, shapes, counts, mode=mode, padding=padding).sum(values_BMGD, weights_BNGS)


def level_pixels(locations_BNGS2: Tensor, shapes: Sequence[Size], counts: Sequence[int] | None = None) -> Tensor:
    """Locations in [0, 1] in pixels of the sample's level."""
    width, height, _ = _grid(shapes, _counts(locations_BNGS2.shape[3], len(shapes), counts), locations_BNGS2)
    locations = locations_BNGS2.to(_working(locations_BNGS2.dtype))
    if isinstance(width, int):
        return locations * locations.new_tensor([width, height]) - 0.5
    return locations * torch.stack([width, height], -1) - 0.5


def deformable_attend_reference(
    values_BMGD: Tensor,
    shapes: Sequence[Size],
    locations_BNGS2: Tensor,
    weights_BNGS: Tensor,
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Tensor:
    """`deformable_attend` as it is usually written: `F.grid_sample` level by level. Slow; what tests compare with."""
    B, _, G, D = values_BMGD.shape
    maps = values_BMGD.split([h * w for h, w in shapes], 1)
    per_level = _counts(locations_BNGS2.shape[3], len(shapes), counts)
    found = []
    for (h, w), x_BMGD, locations in zip(shapes, maps, locations_BNGS2.split(per_level, 3)):
        x = x_BMGD.permute(0, 2, 3, 1).reshape(B * G, D, h, w)
        grid = locations.transpose(1, 2).flatten(0, 1)
        if mode == "discrete":
            cell = (grid * grid.new_tensor([w, h]) + 0.5).long()
            flat = cell[..., 1].clamp(0, h - 1) * w + cell[..., 0].clamp(0, w - 1)
            read = x.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, D, -1)).unflatten(2, flat.shape[1:])
        else:
            read = F.grid_sample(x, 2 * grid - 1, mode=mode, padding_mode=padding, align_corners=False)
        found.append(read.view(B, G, D, *grid.shape[1:3]))
    return torch.einsum("bgdns,bngs->bngd", torch.cat(found, -1), weights_BNGS)


def deformable_conv(
    x_BCHW: Tensor,
    offset_BOHW: Tensor,
    weight_ECkk: Tensor,
    bias_E: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    mask_BkHW: Tensor | None = None,
) -> Tensor:
    """Convolution whose taps are moved, y(p) = b + sum_k w_k m_k(p) x(p stride - padding + k dilation + offset_k(p)).

    Args:
        x_BCHW: read as zeros outside.
        offset_BOHW: O = 2 g k k numbers per output position in pixels, of g groups of channels of x; for each group
            and tap (row-major) dy, then dx.
        weight_ECkk, bias_E: of an ordinary convolution.
        mask_BkHW: m, (B, g k k, H', W'); ones where None.

    Returns:
        (B, E, H', W'), channels-last where x is.

    Raises:
        ValueError: if the offsets are not those of the output's size.
    """
    B, C, H, W = x_BCHW.shape
    E, _, kh, kw = weight_ECkk.shape
    taps = kh * kw
    out = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((H, kh), (W, kw))]
    g = offset_BOHW.shape[1] // (2 * taps)
    if not g or tuple(offset_BOHW.shape) != (B, 2 * g * taps, *out) or C % g:
        raise ValueError(f"offset must be ({B}, {2 * taps} per group, {out[0]}, {out[1]}), got {offset_BOHW.shape}")
    offsets = offset_BOHW.to(_working(offset_BOHW.dtype)).view(B, g, taps, 2, *out)
    y, x = (torch.arange(n, device=x_BCHW.device) * stride - padding for n in out)
    dy, dx = (torch.arange(k, device=x_BCHW.device) * dilation for k in (kh, kw))
    rows = offsets[:, :, :, 0] + y[:, None] + dy.repeat_interleave(kw)[:, None, None]
    columns = offsets[:, :, :, 1] + x + dx.repeat(kh)[:, None, None]
    # a query is a position and a tap; channels of a position's taps lie together afterwards
    points_BNG2 = torch.stack([columns, rows], -1).permute(0, 3, 4, 2, 1, 5).flatten(1, 3)
    columns_BNC = sample(x_BCHW.permute(0, 2, 3, 1), points_BNG2)
    if mask_BkHW is not None:
        factors = mask_BkHW.view(B, g, taps, *out).permute(0, 3, 4, 2, 1).flatten(1, 3)
        columns_BNC = (columns_BNC.unflatten(2, (g, -1)) * factors[..., None]).flatten(2)
    # as a 1 x 1 convolution, for which PyTorch has the faster matrix product on many CPUs
    columns_BKHW = columns_BNC.reshape(B, *out, taps * C).permute(0, 3, 1, 2)
    y_BEHW = F.conv2d(columns_BKHW, weight_ECkk.permute(0, 2, 3, 1).reshape(E, -1, 1, 1), bias_E)
    last = x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()
    return y_BEHW if last else y_BEHW.contiguous()


# ---------------------------------------------------------------------------- a bias by relative position


#: bytes of windows that are worked on at a time, so that they stay in the cache
_PIECE_BYTES = 2**19


def _pieces(like: Tensor, keys: int, numbers: int) -> Iterator[slice]:
    step = keys if like.device.type != "cpu" else max(1, _PIECE_BYTES // max(1, numbers * like.element_size()))
    return (slice(start, start + step) for start in range(0, keys, max(1, step)))


def _floors(top_K: Tensor, left_K: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole positions, and the fractions beyond them as factors (K, 1, 1, 1)."""
    whole = [p.floor() for p in (top_K, left_K)]
    parts = [(p - low).to(like.dtype)[:, None, None, None] for p, low in zip((top_K, left_K), whole)]
    return whole[0].long(), whole[1].long(), parts[0], parts[1]


@torch.library.custom_op("saccade::shifted_crops", mutates_args=())
def _crops(table_GTYX: Tensor, top_K: Tensor, left_K: Tensor, group_K: Tensor, height: int, width: int) -> Tensor:
    """Windows (K, T, height, width) of the table of a group at positions between its cells."""
    K, T = top_K.shape[0], table_GTYX.shape[1]
    windows = table_GTYX.unfold(2, height + 1, 1).unfold(3, width + 1, 1)
    top, left, down, across = _floors(top_K, left_K, table_GTYX)
    out = table_GTYX.new_empty(K, T, height, width)
    for k in _pieces(table_GTYX, K, T * (height + 1) * (width + 1)):
        crops = windows[group_K[k], :, top[k], left[k]]
        lines = torch.lerp(crops[:, :, :-1], crops[:, :, 1:], down[k])
        torch.lerp(lines[..., :-1], lines[..., 1:], across[k], out=out[k])
    return out


@torch.library.custom_op("saccade::shifted_crops_backward", mutates_args=())
def _crops_backward(
    grad_KTHW: Tensor, table_GTYX: Tensor, top_K: Tensor, left_K: Tensor, group_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    K, T, H, W = grad_KTHW.shape
    Y, X = table_GTYX.shape[2:]
    windows = table_GTYX.unfold(2, H + 1, 1).unfold(3, W + 1, 1)
    top, left, down, across = _floors(top_K, left_K, table_GTYX)
    of_table, of_top, of_left = (torch.zeros_like(x) for x in (table_GTYX, top_K, left_K))
    place = torch.arange(T * Y * X, device=top.device).view(T, Y, X)[:, : H + 1, : W + 1]
    for k in _pieces(table_GTYX, K, T * (H + 1) * (W + 1)):
        grad = grad_KTHW[k]
        crops = windows[group_K[k], :, top[k], left[k]]
        lines = torch.lerp(crops[:, :, :-1], crops[:, :, 1:], down[k])
        of_left[k] = (lines.diff(dim=3) * grad).sum((1, 2, 3))
        far = grad * across[k]
        of_lines = F.pad(far, (1, 0))
        of_lines[..., :-1] += grad - far
        of_top[k] = (crops.diff(dim=2) * of_lines).sum((1, 2, 3))
        far = of_lines * down[k]
        of_crops = F.pad(far, (0, 0, 1, 0))
        of_crops[:, :, :-1] += of_lines.sub_(far)
        first = (group_K[k] * T * Y + top[k]) * X + left[k]
        index = first[:, None, None, None] + place
        of_table.view(-1).scatter_add_(0, index.view(-1), of_crops.view(-1))
    return of_table, of_top, of_left


@_crops.register_fake
def _(table: Tensor, top: Tensor, left: Tensor, group: Tensor, height: int, width: int) -> Tensor:
    return table.new_empty(top.shape[0], table.shape[1], height, width)


@_crops_backward.register_fake
def _(grad: Tensor, table: Tensor, top: Tensor, left: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(top), torch.empty_like(left)


def _keep_crops(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_crops(ctx: Any, grad: Tensor) -> Any:
    return (*_crops_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None)


_once = first_derivatives_only("a table of biases at points", "torch's grid_sample has all")
_crops.register_autograd(_once(_differentiate_crops), setup_context=_keep_crops)


def relative_bias(table_HYX: Tensor, points_BNG2: Tensor, size: Size) -> Tensor:
    """Bias of queries on a grid towards keys at points, from a table by displacement: (B, H heads, queries, N).

    The table's middle is displacement 0, its edges are the grid's length: with displacements delta = (query - point)
    / (length - 1) in [-1, 1] per axis, it is read bilinearly at delta (`align_corners`), zero outside. A table
    (H, 2 h - 1, 2 w - 1) has one cell per pixel of a grid (h, w); one of another size is stretched over the grid.

    Args:
        table_HYX: H a multiple of G; heads of a group are neighbours.
        points_BNG2: (x, y) in pixels of the grid.
        size: (height, width) of the grid of queries, in row-major order in the result.

    Raises:
        ValueError: if heads are no multiple of groups.
    """
    heads, rows, columns = table_HYX.shape
    (B, N, G), (H, W) = points_BNG2.shape[:3], size
    if not G or heads % G:
        raise ValueError(f"groups of points must divide the heads of the table ({heads}), got {G}")
    table = table_HYX.view(G, heads // G, rows, columns)
    points = points_BNG2.to(_working(points_BNG2.dtype))
    if (rows, columns) != (2 * H - 1, 2 * W - 1) or exporting():
        return _stretched_bias(table, points, size)
    # query (i, j) reads the table at (i + top, j + left): beyond these limits, only zeros
    x, y = points.unbind(-1)
    # an axis of one pixel has one displacement
    left = (W - 1 - x).clamp(-W, 2 * W - 1).flatten() if W > 1 else (x * 0).flatten()
    top = (H - 1 - y).clamp(-H, 2 * H - 1).flatten() if H > 1 else (y * 0).flatten()
    group = torch.arange(G, device=top.device).repeat(B * N)
    padded = F.pad(table, (W, W + 1, H, H + 1))
    crops = _crops(padded, top + H, left + W, group, H, W)
    return crops.view(B, N, heads, H * W).permute(0, 2, 3, 1)


def _stretched_bias(table_GTYX: Tensor, points_BNG2: Tensor, size: Size) -> Tensor:
    """Any table on any grid, pair by pair."""
    (B, N), (H, W) = points_BNG2.shape[:2], size
    extent = points_BNG2.new_tensor([max(W - 1, 1), max(H - 1, 1)])
    y, x = (torch.arange(n, device=points_BNG2.device, dtype=points_BNG2.dtype) for n in size)
    queries = torch.stack([x.expand(H, W), y[:, None].expand(H, W)], -1).flatten(0, 1)
    delta = (queries[:, None] - points_BNG2.transpose(1, 2)[:, :, None]) / extent
    grid = delta.to(table_GTYX.dtype).flatten(0, 1)
    tables = table_GTYX.expand(B, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return bias.view(B, -1, H * W, N)
