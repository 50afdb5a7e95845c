"""Neighbourhood attention with a bias by relative position, as DAT++'s local blocks need it: tile by tile.

Queries of a tile see keys of a box, the tile and half a window around it, moved inside the map at the borders. One
dense product per tile; what a query does not see gets a bias of -inf. Tiles that lie alike have one bias.

    P = softmax(scale q k^T + bias),  o = P v,  dS = P * (do v^T - rowsum(do * o)),  dbias = sum of dS over like tiles

Shape letters: B batch, H, W map, h heads, D head dim, C = h D, K kernel; Y, X tiles per axis, t, s tile, b, c box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only


@dataclass(frozen=True, eq=False)
class _Tiling:
    """An axis: tiles of queries, boxes of keys, and places in the table."""

    queries: Tensor  #: (Y, t); those of the last tile may go beyond the map
    keys: Tensor  #: (Y, b)
    kinds: Tensor  #: (kinds, t, b) place in the table's axis, -1 where a query does not see a key
    kind: Tensor  #: (Y,) which a tile is


@lru_cache(maxsize=32)
def _tiling(n: int, kernel: int, device: torch.device) -> _Tiling:
    tile = n if n <= 2 * kernel else ceil(n / ceil(n / 8))
    box = min(n, tile + kernel - 1)
    start = torch.arange(0, n, tile, device=device)[:, None]
    queries = start + torch.arange(tile, device=device)
    keys = (start - kernel // 2).clamp(0, n - box) + torch.arange(box, device=device)
    seen_from = queries.clamp(max=n - 1)[..., None]
    first = (seen_from - kernel // 2).clamp(0, n - kernel)
    sees = (keys[:, None] >= first) & (keys[:, None] < first + kernel)
    places = torch.where(sees, keys[:, None] - seen_from + kernel - 1, -1)
    kinds, kind = places.unique(dim=0, return_inverse=True)
    return _Tiling(queries, keys, kinds, kind)


def _places(y: _Tiling, x: _Tiling, side: int) -> tuple[Tensor, Tensor]:
    """Place in the flat table of each pair of each kind of tile (Ky Kx, t s, b c), and whether it is seen."""
    rows, columns = y.kinds[:, None, :, None, :, None], x.kinds[None, :, None, :, None, :]
    seen = (rows >= 0) & (columns >= 0)
    place = torch.where(seen, rows * side + columns, 0)
    return place.flatten(0, 1).flatten(1, 2).flatten(2), seen.flatten(0, 1).flatten(1, 2).flatten(2)


def _biases(table_hKK: Tensor, y: _Tiling, x: _Tiling) -> Tensor:
    """(Y X h, t s, b c)."""
    place, seen = _places(y, x, table_hKK.shape[2])
    of_kinds = table_hKK.flatten(1)[:, place].masked_fill(~seen, float("-inf")).transpose(0, 1)
    return of_kinds[_kind_of_tile(y, x)].flatten(0, 1)


def _kind_of_tile(y: _Tiling, x: _Tiling) -> Tensor:
    return (y.kind[:, None] * len(x.kinds) + x.kind).flatten()


def _cut(x_BHWhD: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, Y X h, t s, D)."""
    lower, right = (max(0, int(i.max()) + 1 - n) for i, n in ((rows, x_BHWhD.shape[1]), (columns, x_BHWhD.shape[2])))
    cut = F.pad(x_BHWhD, (0, 0, 0, 0, 0, right, 0, lower))[:, rows.flatten()][:, :, columns.flatten()]
    cut = cut.unflatten(2, columns.shape).unflatten(1, rows.shape)  # B Y t X s h D
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)


def _spread(x: Tensor, tiles: tuple[torch.Size, torch.Size], heads: int) -> Tensor:
    """(B, Y X h, t s, D) as the rows and columns of tiles (B, Y t, X s, h, D)."""
    (Y, t), (X, s) = tiles
    x = x.unflatten(1, (Y, X, heads)).unflatten(4, (t, s))
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _add(x: Tensor, rows: Tensor, columns: Tensor, heads: int, size: tuple[int, int]) -> Tensor:
    """The adjoint of `_cut`: (B, H, W, h, D)."""
    x = _spread(x, (rows.shape, columns.shape), heads)
    out = x.new_zeros(x.shape[0], x.shape[1], size[1], *x.shape[3:]).index_add_(2, columns.flatten(), x)
    return out.new_zeros(x.shape[0], *size, *x.shape[3:]).index_add_(1, rows.flatten(), out)


def _tilings(table_hKK: Tensor, size: tuple[int, int]) -> tuple[_Tiling, _Tiling]:
    kernel = (table_hKK.shape[1] + 1) // 2
    return _tiling(size[0], kernel, table_hKK.device), _tiling(size[1], kernel, table_hKK.device)


def neighborhood_with_bias(q_BHWhD: Tensor, k_BHWhD: Tensor, v_BHWhD: Tensor, table_hKK: Tensor) -> Tensor:
    """Each query attends the K x K window around it, moved inside at borders; the map is at least K x K.

    Args:
        q_BHWhD, k_BHWhD, v_BHWhD: maps of heads.
        table_hKK: (h, 2 K - 1, 2 K - 1), added to the logits at key minus query plus K - 1.
    """
    return (_gathered if exporting() else _operator)(q_BHWhD, k_BHWhD, v_BHWhD, table_hKK)


def _forward(q_BHWhD: Tensor, k_BHWhD: Tensor, v_BHWhD: Tensor, table_hKK: Tensor) -> Tensor:
    H, W, heads = q_BHWhD.shape[1:4]
    y, x = _tilings(table_hKK, (H, W))
    q = _cut(q_BHWhD, y.queries, x.queries)
    k, v = (_cut(z, y.keys, x.keys) for z in (k_BHWhD, v_BHWhD))
    out = F.scaled_dot_product_attention(q, k, v, _biases(table_hKK, y, x).expand(len(q), -1, -1, -1))
    return _spread(out, (y.queries.shape, x.queries.shape), heads)[:, :H, :W].contiguous()


def _gathered(q_BHWhD: Tensor, k_BHWhD: Tensor, v_BHWhD: Tensor, table_hKK: Tensor) -> Tensor:
    """The same with the neighbours of each query side by side, which every exporter knows."""
    kernel = (table_hKK.shape[1] + 1) // 2
    seen, places = [], []
    for n in q_BHWhD.shape[1:3]:
        i = torch.arange(n, device=q_BHWhD.device)[:, None]
        seen.append((i - kernel // 2).clamp(0, n - kernel) + torch.arange(kernel, device=q_BHWhD.device))
        places.append(seen[-1] - i + kernel - 1)
    k, v = (z[:, seen[0]][:, :, :, seen[1]].permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for z in (k_BHWhD, v_BHWhD))
    bias_hHKWK = table_hKK[:, places[0]][..., places[1]]
    scores = (q_BHWhD[..., None, :] @ k.mT)[..., 0, :] * q_BHWhD.shape[-1] ** -0.5
    weights = (scores + bias_hHKWK.permute(1, 3, 0, 2, 4).flatten(3)).softmax(-1)
    return (weights[..., None, :] @ v)[..., 0, :]


_operator = torch.library.custom_op("saccade::neighborhood_with_bias", _forward, mutates_args=())


@torch.library.custom_op("saccade::neighborhood_with_bias_backward", mutates_args=())
def _backward(
    grad_BHWhD: Tensor, q_BHWhD: Tensor, k_BHWhD: Tensor, v_BHWhD: Tensor, table_hKK: Tensor, out_BHWhD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, W, heads, D = q_BHWhD.shape[1:]
    y, x = _tilings(table_hKK, (H, W))
    scale = D**-0.5
    q, grad, out = (_cut(z, y.queries, x.queries) for z in (q_BHWhD, grad_BHWhD, out_BHWhD))
    k, v = (_cut(z, y.keys, x.keys) for z in (k_BHWhD, v_BHWhD))
    weights = (q @ k.mT).mul_(scale).add_(_biases(table_hKK, y, x)).softmax(-1)
    of_v = weights.mT @ grad
    of_scores = (grad @ v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
    of_q = (of_scores @ k).mul_(scale)
    of_k = (of_scores.mT @ q).mul_(scale)
    place, seen = _places(y, x, table_hKK.shape[2])
    of_tiles = of_scores.sum(0).unflatten(0, (-1, heads))
    of_kinds = of_tiles.new_zeros(len(place), *of_tiles.shape[1:]).index_add_(0, _kind_of_tile(y, x), of_tiles)
    of_table = torch.zeros_like(table_hKK).flatten(1)
    of_table.index_add_(1, place[seen], of_kinds.transpose(0, 1)[:, seen].to(of_table.dtype))
    of_q = _spread(of_q, (y.queries.shape, x.queries.shape), heads)[:, :H, :W].contiguous()
    of_k, of_v = (_add(z, y.keys, x.keys, heads, (H, W)) for z in (of_k, of_v))
    return of_q, of_k, of_v, of_table.view_as(table_hKK)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table.new_empty(table.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output)


_once = first_derivatives_only("neighborhood_with_bias", "differentiate it once")
_operator.register_autograd(_once(lambda ctx, grad: _backward(grad, *ctx.saved_tensors)), setup_context=_keep)


@register_flop_formula(torch.ops.saccade.neighborhood_with_bias)
def _flops(q: Any, k: Any, v: Any, table: Any, *args: Any, **kwargs: Any) -> int:
    """Two products with the K x K keys of each query; what a tile's box computes beyond them is not counted."""
    B, H, W, heads, D = q
    kernel = (table[1] + 1) // 2
    return int(4 * B * H * W * heads * D * kernel**2)
