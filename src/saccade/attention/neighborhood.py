"""Neighbourhood attention in 1-D, 2-D and 3-D: each token attends a window of fixed size around itself.

Hassani, Hwu, Shi, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
arXiv 2403.04690.

On every axis, position i of n, with dilation d, i' = i // d and n' = ceil((n - i mod d) / d) positions like it:

    leader  i* = min(i' // g * g + g // 2, n' - 1)          window  s = clamp(i* - w // 2, 0, n' - w),  s .. s + w - 1
    causal  i* = min(i' // g * g + g - 1,  n' - 1)          window  max(i* - w + 1, 0) .. i'

    j is a neighbour of i  iff  on every axis  j mod d = i mod d  and  j // d lies in the window
    out_i = sum_j softmax_j(scale q_i . k_j + bias[h, j' - i' + w - 1]) v_j          over neighbours and extra keys

At borders the window is moved inwards, so that there are always prod(w) neighbours (on causal axes, fewer at the
start). The paper's fused kernels are flash attention over tiles of queries and the box of keys that a tile needs; here
that is `saccade.ops.windows`, on which `attend` runs `masks.neighborhood`. The paper's unfused form, scores of the
window as a tensor, is `neighborhood_scores` and `neighborhood_sum`.

| here          | paper | meaning                                                                    | default |
|---------------|-------|----------------------------------------------------------------------------|---------|
| kernel_size   | w     | neighbours per axis; even ones look one further to the left                | 7 (NAT) |
| dilation      | d     | step between neighbours per axis; prod(d) independent grids                | 1       |
| stride        | g     | queries that share a window (authors' later code); g = w: Swin's partition | 1       |
| causal        | c     | per axis, no neighbour after the query                                     | False   |
| relative_bias | RPB   | table (H, 2 w - 1, ...) added to the scores (NAT; later dropped)           | False   |

Choices that the paper leaves open: a causal axis may be shorter than w d, its windows are then as far as there are
tokens (the authors refuse; decoding needs it). The layer, not the function, fits other axes that are too short:
dilation first (DiNAT: at most n // w), then the kernel. Padding, which the kernels do not know, hides keys and leaves
the windows where they are. Only stride 1 decodes: the last leader of a longer stride depends on the length to come.

Shape letters: B batch, H query heads, K key heads, N tokens of the grid in row-major order, L extra keys, C channels,
D head dim of q and k, E of v, P = prod(w) places of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask, Neighborhood
from saccade.ops.measure import peak_bytes
from saccade.ops.merge import merge
from saccade.ops.score_mods import grid_bias

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

_Axes = int | Sequence[int]


# fmt: off
@overload
def neighborhood_attend(
    q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, size: _Axes, kernel_size: _Axes, *, dilation: _Axes = ...,
    stride: _Axes = ..., causal: bool | Sequence[bool] = ..., bias: Tensor | None = ..., mask: Tensor | None = ...,
    extra: tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def neighborhood_attend(
    q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, size: _Axes, kernel_size: _Axes, *, dilation: _Axes = ...,
    stride: _Axes = ..., causal: bool | Sequence[bool] = ..., bias: Tensor | None = ..., mask: Tensor | None = ...,
    extra: tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# fmt: on


def neighborhood_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: _Axes,
    kernel_size: _Axes,
    *,
    dilation: _Axes = 1,
    stride: _Axes = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to its neighbours on the grid. Exact, differentiable, memory linear in N.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens of the grid in row-major order; K divides H.
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
    windows = _windows(grid, kernel_size, dilation, stride, causal)
    for name, x in (("query", q_BHND), ("key", k_BKND), ("value", v_BKNE)):
        if x.ndim != 4 or x.shape[2] != prod(grid):
            raise ValueError(
                f"{name} must be (batch, heads, {prod(grid)} tokens, head_dim) for a grid of {grid}, "
                f"got shape {tuple(x.shape)}"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (k_BKND.shape[0], prod(grid))):
        raise ValueError(f"mask must be bool (batch, {prod(grid)} tokens), got {mask.dtype} of {tuple(mask.shape)}")
    # what is added to a causal axis that is too short stands after every token
    pad = [longer - n for longer, n in zip(windows.size, grid)]
    q, k, v = (_pad(x, grid, pad) for x in (q_BHND, k_BKND, v_BKNE))
    pairs: Mask = windows if len(grid) > 1 or bias is not None else _band(windows)
    if mask is not None:
        pairs = pairs & masks.padding(_pad(mask[:, None, :, None], grid, pad)[:, 0, :, 0])
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
    """The unfused second half (the authors' AV): weights in window order times values, (B, H, N, E)."""
    index_NP, _ = _neighbours(mask)
    v_BHNE = repeat_heads(v_BKNE, weights_BHNP.shape[1])
    return (weights_BHNP[..., None] * v_BHNE[:, :, index_NP]).sum(3)


def _windows(
    grid: tuple[int, ...], kernel_size: _Axes, dilation: _Axes, stride: _Axes, causal: bool | Sequence[bool]
) -> Neighborhood:
    """The mask, for a grid whose causal axes are at least as long as a window."""
    spans = [_axis(kernel_size, a) * _axis(dilation, a) for a in range(len(grid))]
    long = tuple(max(n, span) if _axis(causal, a) else n for a, (n, span) in enumerate(zip(grid, spans)))
    return cast(Neighborhood, masks.neighborhood(long, kernel_size, dilation, causal, stride=stride))


def _axis(option: Any, axis: int) -> Any:
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


class RollingCache(KVCache):
    """The last `room` tokens' keys and values: constant memory.

    Attributes:
        length: tokens seen.
        room: tokens held at most, (w - 1) d.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k_BKND: Tensor, v_BKNE: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns those that were held, followed by the new ones."""
        if self._held is not None:
            if self._held[0].shape[0] != k_BKND.shape[0]:
                raise ValueError(f"the cache holds {self._held[0].shape[0]} sequences, got {k_BKND.shape[0]}")
            k_BKND, v_BKNE = (torch.cat(pair, 2) for pair in zip(self._held, (k_BKND, v_BKNE)))
        self.length += k_BKND.shape[2] - self.held
        drop = max(0, k_BKND.shape[2] - self.room)
        # a view would keep what it is a part of
        self._held = k_BKND[:, :, drop:].detach().clone(), v_BKNE[:, :, drop:].detach().clone()
        return k_BKND, v_BKNE

    @property
    def held(self) -> int:
        return 0 if self._held is None else self._held[0].shape[2]

    @property
    def nbytes(self) -> int:
        return 0 if self._held is None else sum(x.numel() * x.element_size() for x in self._held)


class NeighborhoodAttention(QKVAttention):
    """Projections around `neighborhood_attend`, for sequences, images (B, H, W, C) and videos (B, T, H, W, C).

    Args:
        dim, num_heads, num_kv_heads, head_dim, qkv_bias, proj_bias: as in `QKVAttention`.
        causal: for all axes, or per axis (causal in time, free in space: `(True, False, False)`).
        kernel_size, dilation, stride: for all axes, or per axis.
        relative_bias: learn a table of biases by relative position, zero at the start; kernel_size must be per axis.
        rope: rotary positions, sequences only (not of the paper).
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool | Sequence[bool] = False,
        *,
        kernel_size: _Axes = 7,
        dilation: _Axes = 1,
        stride: _Axes = 1,
        relative_bias: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = False,
        rope_base: float = 10000.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        everywhere = causal if isinstance(causal, bool) else all(causal)
        super().__init__(
            dim, num_heads, everywhere, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base,
            qkv_bias=qkv_bias, proj_bias=proj_bias,
        )  # fmt: skip
        given = [len(x) for x in (kernel_size, dilation, stride, causal) if not isinstance(x, int)]
        if len(set(given)) > 1 or any(axes not in (1, 2, 3) for axes in given):
            raise ValueError(f"options per axis must be for the same one to three axes, got {given} entries")
        #: axes that the options are for, None where for any
        self.axes = given[0] if given else None
        self.kernel_size, self.dilation, self.stride, self.causal_axes = kernel_size, dilation, stride, causal
        for w, g, d in ((_axis(kernel_size, a), _axis(stride, a), _axis(dilation, a)) for a in range(self.axes or 1)):
            if w < 1 or d < 1 or not 1 <= g <= w:
                raise ValueError(
                    f"kernel_size and dilation must be at least 1, stride between 1 and kernel_size, got {w}, {d}, {g}"
                )
        if rope and self.axes not in (None, 1):
            raise ValueError(f"rotary positions are for sequences, got options for {self.axes} axes")
        self.bias: nn.Parameter | None = None
        if relative_bias:
            if isinstance(kernel_size, int):
                raise ValueError(f"relative_bias needs the kernel_size of each axis, got {kernel_size}")
            self.bias = nn.Parameter(torch.zeros(num_heads, *(2 * w - 1 for w in kernel_size)))
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context_BLC: Tensor | None = None,
        *,
        size: _Axes | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from every token to its neighbours.

        Args:
            x: (B, N, C), or a grid (B, H, W, C) or (B, T, H, W, C).
            context_BLC: tokens that every query attends to besides its neighbours (the authors' additional keys).
            size: the grid of a (B, N, C) input, row-major; one axis of N where None.
            mask: bool (B, N), True = real token. With a cache, of all tokens so far.
            cache: of `new_cache`; 1-D, causal and stride 1 only.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        if x.ndim in (4, 5) and size is None and cache is None:
            grid = tuple(x.shape[1:-1])
            if mask is not None:
                mask = mask.reshape(x.shape[0], -1)
            return self.forward(x.flatten(1, -2), context_BLC, size=grid, mask=mask).unflatten(1, grid)
        self._check(x, None, None)
        grid = self._grid(x, size)
        self._check_context(x, context_BLC, cache)
        q, k = self._queries_and_keys(x, None, 0 if cache is None else cache.length)
        v = self._heads(self.v_proj(x), self.num_kv_heads)
        extra = None
        if context_BLC is not None:
            extra = tuple(self._heads(p(context_BLC), self.num_kv_heads) for p in (self.k_proj, self.v_proj))
        if cache is None:
            out = self._mixed(q, k, v, grid, mask, extra)
        else:
            k, v = cache.append(k, v)
            out = self._step(q, k, v, None if mask is None else mask[:, -k.shape[2] :], extra)
        return self.proj_drop(self.out_proj(out.transpose(1, 2).flatten(2)))

    def mix(  # type: ignore[override]
        self, x: Tensor, values_BHME: Tensor, *, size: _Axes | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """This layer's weights on `x`, applied to given values (B, H, M, E); what `attention_map` calls."""
        if x.ndim in (4, 5):
            x, size = x.flatten(1, -2), x.shape[1:-1]
        q, k = self._queries_and_keys(x, None, 0)
        return self._mixed(q, repeat_heads(k, self.num_heads), values_BHME, self._grid(x, size), mask, None)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RollingCache:
        """An empty cache of the last (w - 1) d tokens."""
        return RollingCache((_axis(self.kernel_size, 0) - 1) * _axis(self.dilation, 0))

    def extra_repr(self) -> str:
        options = f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
        return f"{super().extra_repr()}, causal_axes={self.causal_axes}, {options}"

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], mask: Tensor | None, extra: Any) -> Tensor:
        kernel, dilation, stride, bias = self._fitted(grid)
        return neighborhood_attend(
            q, k, v, grid, kernel, dilation=dilation, stride=stride, causal=self.causal_axes, bias=bias, mask=mask,
            extra=extra,
        )  # fmt: skip

    def _step(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: Any) -> Tensor:
        """The last tokens' rows from the keys held and their own."""
        held = k.shape[2] - q.shape[2]
        if q.shape[2] == 1 and self.bias is None and extra is None:
            near = slice(held % _axis(self.dilation, 0), None, _axis(self.dilation, 0))
            real = None if mask is None else masks.padding(mask[:, near])
            return attend(q, k[:, :, near], v[:, :, near], mask=real)
        # a window depends on differences of positions only, so the first key held may stand at 0
        return self._mixed(F.pad(q, (0, 0, held, 0)), k, v, (k.shape[2],), mask, extra)[:, :, held:]

    def _fitted(self, grid: tuple[int, ...]) -> tuple[Any, Any, Any, Tensor | None]:
        """Kernel, dilation and stride per axis, smaller where an axis that is not causal is too short; the bias."""
        kernel, dilation, stride, kept = [], [], [], [slice(None)]
        for axis, n in enumerate(grid):
            w, d, g = (_axis(option, axis) for option in (self.kernel_size, self.dilation, self.stride))
            middle = w - 1
            if not _axis(self.causal_axes, axis):
                w = min(w, n)
                d, g = min(d, n // w), min(g, w)
            kernel.append(w)
            dilation.append(d)
            stride.append(g)
            kept.append(slice(middle - w + 1, middle + w))
        return kernel, dilation, stride, None if self.bias is None else self.bias[tuple(kept)]

    def _grid(self, x: Tensor, size: _Axes | None) -> tuple[int, ...]:
        grid = (x.shape[1],) if size is None else (size,) if isinstance(size, int) else tuple(size)
        if self.axes is not None and len(grid) != self.axes:
            raise ValueError(f"x must be a grid of {self.axes} axes, or size must be given; got a size of {grid}")
        if prod(grid) != x.shape[1] or not 1 <= len(grid) <= 3:
            raise ValueError(f"size must be one to three axes of {x.shape[1]} tokens, got {grid}")
        if self.rope and len(grid) > 1:
            raise ValueError(f"rotary positions are for sequences, got a grid of {grid}")
        return grid

    def _check_context(self, x: Tensor, context: Tensor | None, cache: KVCache | None) -> None:
        if context is not None:
            if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.dim:
                raise ValueError(f"context must be ({x.shape[0]}, tokens, {self.dim}), got {tuple(context.shape)}")
            if self.rope:
                raise ValueError("extra tokens have no place among rotary positions; build with rope=False")
        if cache is not None:
            if self.axes not in (None, 1) or not self.causal or _axis(self.stride, 0) != 1:
                raise ValueError("only a causal 1-D layer of stride 1 decodes with a cache")


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' call: q, k, v (B, *S, H, D), options per axis; also the mask over all pairs."""
    grid = tuple(inputs["q"].shape[1:-2])
    options = {name: args.get(name, default) for name, default in _AUTHORS.items()}
    q, k, v = (inputs[name].flatten(1, -3).transpose(1, 2) for name in "qkv")
    extra = None
    if "additional_keys" in inputs:
        extra = inputs["additional_keys"].transpose(1, 2), inputs["additional_values"].transpose(1, 2)
    out, lse = neighborhood_attend(
        q, k, v, grid, args["kernel_size"], dilation=options["dilation"], stride=options["stride"],
        causal=options["is_causal"], scale=options["scale"], extra=extra, return_lse=True,
    )  # fmt: skip
    mask = masks.neighborhood(
        grid, args["kernel_size"], options["dilation"], options["is_causal"], stride=options["stride"]
    )
    return {
        "out": out.transpose(1, 2).unflatten(1, grid),
        "lse": lse.transpose(1, 2).unflatten(1, grid),
        "mask": mask.dense(prod(grid), prod(grid))[0, 0],
    }


#: the authors' defaults
_AUTHORS: dict[str, Any] = {"stride": 1, "dilation": 1, "is_causal": False, "scale": None}


def _claim(lab: Lab) -> ClaimResult:
    """Fused against unfused and against dense attention with a mask, 7 x 7 on 56 x 56; and growth with the grid."""
    side, w = lab.size(56, 14), lab.size(7, 3)
    measured = {}
    with lab.seeded(), torch.no_grad():
        q, k, v = torch.randn(3, 1, 4, side * side, 64)
        windows = _windows((side, side), (w, w), 1, 1, False)
        full = windows.dense(side * side, side * side)

        def fused() -> Tensor:
            return neighborhood_attend(q, k, v, (side, side), w)

        def unfused() -> Tensor:
            return neighborhood_sum(neighborhood_scores(q, k, windows).softmax(-1), v, windows)

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=full)

        expected = dense()
        measured["fused_error"] = (fused() - expected).abs().max().item()
        measured["unfused_error"] = (unfused() - expected).abs().max().item()
        forms = {"fused": fused, "unfused": unfused, "dense_masked": dense}
        for name, form in lab.progress(forms.items(), "forms"):
            measured[f"{name}_seconds"] = lab.seconds(form, repeats=3)
            measured[f"{name}_megabytes"] = peak_bytes(form) / 2**20
        wide = 2 * side
        a, b, c = torch.randn(3, 1, 4, wide * wide, 64)
        seconds = lab.seconds(lambda: neighborhood_attend(a, b, c, (wide, wide), w), repeats=3)
    measured["growth_exponent"] = log(seconds / measured["fused_seconds"]) / log(4)
    measured["speedup_over_unfused_ratio"] = measured["unfused_seconds"] / measured["fused_seconds"]
    measured["speedup_over_dense_ratio"] = measured["dense_masked_seconds"] / measured["fused_seconds"]
    holds = (
        max(measured["fused_error"], measured["unfused_error"]) < 1e-5
        and measured["speedup_over_unfused_ratio"] > 4
        and measured["speedup_over_dense_ratio"] > 4
        and measured["fused_megabytes"] < measured["unfused_megabytes"] / 4
        and measured["growth_exponent"] < 1.3
    )
    note = "fused_megabytes leaves out buffers that a thread keeps from call to call (at most 64 MiB)"
    return ClaimResult(measured, holds=holds, note=note)


register(
    "neighborhood",
    kind="sequence",
    summary="Each token attends a window around itself on a 1-D, 2-D or 3-D grid, dilated, strided, causal per axis.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "local", "representations": "single"},
    efficiency="sparse/fixed/window",
    complexity="time O(N prod(w) D), memory O(N D), cache O(w d D)",
    invariants=(
        "a window of the whole grid is full attention, a window of one gives the value",
        "prod(w) neighbours for every query wherever no axis is causal",
        "1-D causal is the band 0 <= i - j < w",
        "dilation is each residue class by itself",
        "stride = kernel is attention inside non-overlapping windows",
        "the mask is the product of its axes' masks",
        "the fused form equals the unfused one, forward and backward",
        "extra keys equal one softmax over the union, forward and backward",
        "decoding with a cache of (w - 1) d tokens equals the parallel form",
    ),
    build=NeighborhoodAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True, "kernel_size": 3, "dilation": 2},
    at_length=lambda length: {"kernel_size": min(256, max(4, length // 8)), "rope": True},
    ports=tuple(
        AuthorsPort(
            module=f"na{axes}d", build=lambda args: nn.Identity(), convert=lambda state: state, run=_run_authors
        )
        for axes in (1, 2, 3)
    ),
    claim=Claim(
        paper="fused neighbourhood attention is exact, 5.8 x (2-D) to 16 x (1-D) faster than naive kernels in half "
        "precision, with constant memory (Table 2, A100)",
        expected="7 x 7 on 56 x 56 tokens, 4 heads of 64, fp32 on the CPU: fused is masked dense attention to 1e-5, "
        "at least 4 x as fast as it and as the unfused form, in less than a quarter of the unfused memory; time "
        "grows with the number of tokens with an exponent below 1.3",
        run=_claim,
    ),
)
