"""Neighbourhoods with a bias by relative position: in C (`native/grid.c`), and in torch where that does not run.

    S = scale Q K_box^T + table[h, j' - i' + w - 1], or -inf outside the window,   P = softmax(S),   O = P V_box
    dS = P * (dO V_box^T - rowsum(dO * O) + dlse),   dtable = the sum of dS over pairs of one relative position

In torch, queries of a tile see the keys of a box, and tiles side by side along the last axis are one batch of products.
Dilated tokens are gathered: a tile holds queries of one residue class.

Shape letters: B batch, H query heads, K key heads, G = H / K, N tokens of the grid, Z, Y and X of its axes, D head dim
of q and k, E of v; X tiles side by side, T queries of a tile, L keys of its box, R entries of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from saccade.ops import native
from saccade.ops.autocast import working_dtype
from saccade.ops.masks import Neighborhood
from saccade.ops.native.grid import attend_grid, grid_gradients

__all__ = ["biased_window_attend"]

#: queries of a tile per axis, on grids of one, two and three axes
_TILES = {1: 64, 2: 8, 3: 4}


class _Axis(NamedTuple):
    """Tiles of an axis: which tokens are their queries and keys, and where in the table's axis each pair stands."""

    queries: Tensor  #: (tiles, t); the last token once more where a tile is not full
    real: Tensor  #: (tiles, t) bool
    keys: Tensor  #: (tiles, b)
    places: Tensor  #: (tiles, t, b), -1 where a query does not see a key


@lru_cache(maxsize=64)
def _axis(n: int, kernel: int, dilation: int, stride: int, causal: bool, tile: int, device: torch.device) -> _Axis:
    found = []
    for residue in range(dilation):
        length = len(range(residue, n, dilation))
        line = Neighborhood((length,), (kernel,), (1,), (stride,), (causal,))
        _, first, last = (x.to(device) for x in line.axis_window(0, torch.arange(length)))
        place = torch.arange(-(-length // tile) * tile, device=device).view(-1, tile)
        query = place.clamp(max=length - 1)
        found.append((residue, query, place < length, first[query], last[query]))
    box = max(int((last.amax(1) - first.amin(1)).max()) + 1 for *_, first, last in found)
    parts = []
    for residue, query, real, first, last in found:
        key = first.amin(1)[:, None] + torch.arange(box, device=device)
        sees = (key[:, None] >= first[..., None]) & (key[:, None] <= last[..., None])
        places = torch.where(sees, key[:, None] - query[..., None] + kernel - 1, -1)
        token = (key * dilation + residue).clamp(max=n - 1)
        parts.append(_Axis(query * dilation + residue, real, token, places))
    return _Axis(*(torch.cat(x) for x in zip(*parts)))


class _Tile(NamedTuple):
    """The tiles at one place of the first two of three axes, all along the last."""

    queries: tuple[Tensor, Tensor, Tensor]  #: tokens by axis; of the last axis those of all tiles
    real: Tensor  #: (X, T)
    keys: tuple[Tensor, Tensor, Tensor]
    places: Tensor  #: (X, T, L) in the flat table
    seen: Tensor  #: (X, T, L)

    def take(self, x_BHZYXD: Tensor, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(B, H, X, T or L, D)."""
        for axis, i in enumerate(index):
            x_BHZYXD = x_BHZYXD.index_select(2 + axis, i)
        return x_BHZYXD.unflatten(4, (len(self.real), -1)).permute(0, 1, 4, 2, 3, 5, 6).flatten(3, 5)

    def put(self, x_BHXTD: Tensor, index: tuple[Tensor, Tensor, Tensor], out_BHZYXD: Tensor, *, add: bool) -> None:
        """Write, or add, where `take` took."""
        z, y, x = index
        x_BHXTD = x_BHXTD.unflatten(3, (len(z), len(y), -1)).permute(0, 1, 3, 4, 2, 5, 6).flatten(2, 5)
        token = (z[:, None, None] * out_BHZYXD.shape[3] + y[:, None]) * out_BHZYXD.shape[4] + x
        flat = out_BHZYXD.flatten(2, 4)
        if add:
            flat.index_add_(2, token.flatten(), x_BHXTD)
        else:
            flat.index_copy_(2, token.flatten(), x_BHXTD)


def _tiles(spec: Sequence[int], device: torch.device) -> Iterator[_Tile]:
    d = spec[0]
    options = [spec[1 + a * d : 1 + (a + 1) * d] for a in range(5)]
    axes = [_axis(1, 1, 1, 1, False, 1, device)] * (3 - d)
    axes += [_axis(n, w, step, g, bool(c), _TILES[d], device) for n, w, step, g, c in zip(*options)]
    z, y, x = axes
    _, side_y, side_x = [1] * (3 - d) + [2 * w - 1 for w in options[1]]
    for i, j in product(range(len(z.queries)), range(len(y.queries))):
        at_z, at_y = z.places[i][:, None, None, :, None, None], y.places[j][:, None, None, :, None]
        at_x = x.places[:, None, None, :, None, None, :]
        seen = ((at_z >= 0) & (at_y >= 0) & (at_x >= 0)).flatten(4).flatten(1, 3)
        places = ((at_z * side_y + at_y) * side_x + at_x).flatten(4).flatten(1, 3)
        real = z.real[i][:, None, None] & y.real[j][:, None] & x.real[:, None, None]
        yield _Tile(
            (z.queries[i], y.queries[j], x.queries.flatten()),
            real.flatten(1),
            (z.keys[i], y.keys[j], x.keys.flatten()),
            torch.where(seen, places, 0),
            seen,
        )


def _on_grid(x_BHND: Tensor, spec: Sequence[int], wide: torch.dtype) -> Tensor:
    size = spec[1 : 1 + spec[0]]
    return x_BHND.to(wide).contiguous().unflatten(2, [1] * (3 - len(size)) + list(size))


def _grid(spec: Sequence[int]) -> Neighborhood:
    d = spec[0]
    size, kernel, dilation, stride, causal = (tuple(spec[1 + a * d : 1 + (a + 1) * d]) for a in range(5))
    return Neighborhood(size, kernel, dilation, stride, tuple(map(bool, causal)))


def _scores(tile: _Tile, q: Tensor, k: Tensor, table: Tensor, scale: float) -> Tensor:
    """(B, K, G, X, T, L)."""
    K = k.shape[1]
    q = tile.take(q, tile.queries).unflatten(1, (K, -1))
    scores = (q @ tile.take(k, tile.keys)[:, :, None].mT) * scale
    bias = table.flatten(1).to(scores.dtype)[:, tile.places].masked_fill(~tile.seen, float("-inf"))
    return scores.add_(bias.unflatten(0, (K, -1)))


@torch.library.custom_op("saccade::biased_window_attend", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, spec: list[int], scale: float) -> tuple[Tensor, Tensor]:
    if native.refusal(q.device, q.dtype) is None:
        out, lse = attend_grid(q.float(), k.float(), v.float(), _grid(spec), scale, table.float())
        return out.to(q.dtype).contiguous(), lse
    wide = working_dtype(q.dtype)
    q_, k_, v_ = (_on_grid(x, spec, wide) for x in (q, k, v))
    out_, lse_ = q_.new_zeros(*q_.shape[:5], v.shape[3]), q_.new_full((*q_.shape[:5], 1), float("-inf"))
    for tile in _tiles(spec, q.device):
        scores = _scores(tile, q_, k_, table, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
        tile.put((weights @ tile.take(v_, tile.keys)[:, :, None]).flatten(1, 2), tile.queries, out_, add=False)
        tile.put(lse.flatten(1, 2), tile.queries, lse_, add=False)
    return out_.flatten(2, 4).to(q.dtype), lse_.flatten(2)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, spec: list[int], scale: float) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=working_dtype(q.dtype))


@torch.library.custom_op("saccade::biased_window_attend_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if native.refusal(q.device, q.dtype) is None:
        a, b, c, bias, o, g = (x.float() for x in (q, k, v, table, out, grad_out))
        grads = grid_gradients(a, b, c, _grid(spec), scale, bias, o, lse, g, grad_lse)
        assert grads[3] is not None
        return (*(x.to(q.dtype).contiguous() for x in grads[:3]), grads[3].to(table.dtype))  # type: ignore[return-value]
    wide, K = working_dtype(q.dtype), k.shape[1]
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)[..., None]
    q_, k_, v_, grad_, delta_, lse_ = (_on_grid(x, spec, wide) for x in (q, k, v, grad_out, delta, lse[..., None]))
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_, k_, v_))
    grad_table = q_.new_zeros(table.shape[0], table[0].numel())
    for tile in _tiles(spec, q.device):
        shift, above = (tile.take(x, tile.queries).unflatten(1, (K, -1)) for x in (lse_, delta_))
        # what stands in a tile a second time counts once
        off = shift.masked_fill((shift == float("-inf")) | ~tile.real[..., None], float("inf"))
        weights = (_scores(tile, q_, k_, table, scale) - off).exp_()
        grad = tile.take(grad_, tile.queries).unflatten(1, (K, -1))
        keys, values = (tile.take(x, tile.keys)[:, :, None] for x in (k_, v_))
        of_scores = weights * (grad @ values.mT - above)
        queries = tile.take(q_, tile.queries).unflatten(1, (K, -1))
        tile.put((of_scores @ keys).flatten(1, 2) * scale, tile.queries, grad_q, add=True)
        tile.put((of_scores.mT @ queries).sum(2) * scale, tile.keys, grad_k, add=True)
        tile.put((weights.mT @ grad).sum(2), tile.keys, grad_v, add=True)
        grad_table.index_add_(1, tile.places.flatten(), of_scores.sum(0).flatten(0, 1).flatten(1))
    sums = (x.flatten(2, 4).to(like.dtype) for x, like in ((grad_q, q), (grad_k, k), (grad_v, v)))
    return *sums, grad_table.view(table.shape).to(table.dtype)  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, table))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, table, ctx.spec, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, table, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    q, k, v, table, out, lse = ctx.saved_tensors
    grads = _backward(grad_out, grad_lse, q, k, v, table, out, lse, ctx.spec, ctx.scale)
    return (*grads, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.saccade.biased_window_attend)
def _flops(q: Any, k: Any, v: Any, table: Any, spec: Any, *args: Any, **kwargs: Any) -> int:
    """Two products with the keys of each query's window; what a box computes beyond them is not counted."""
    B, H, N, D = q
    return int(2 * B * H * N * (D + v[3]) * prod(spec[1 + spec[0] : 1 + 2 * spec[0]]))


def biased_window_attend(
    q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, table_HR: Tensor, spec: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) and LSE (B, H, N), differentiable, the table too.

    Args:
        table_HR: (H, 2 w_1 - 1, ...).
        spec: the neighbourhood in integers: number of axes, then size, kernel, dilation, stride and causal of each.
        scale: of the dot products.
    """
    out, lse = _forward(q_BHND, k_BKND, v_BKNE, table_HR, list(spec), scale)
    return out, lse
