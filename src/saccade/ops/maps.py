"""The effective attention matrix of anything that is linear in its values, whatever its algorithm.

A mechanism that gives out = A v with weights A that do not depend on v, shows its weights when it is run with unit
vectors as values:

    A[:, j] = mechanism(..., e_j)             a column per unit vector
    A[i, :] = d mechanism(..., v)_i / d v     a row per gradient, where rows are fewer than columns

so that dense, sparse, linear, recurrent and windowed mechanisms are looked at in the same way, and none has to store
a map. Columns (or rows) are taken together as the width of v, in groups bounded in memory.

**Protocol.** The values of a module are a projection of its input, so there is no argument to put unit vectors into.
A module that wants to be looked at has one method:

    mix(x_BNC, values_BHME, *, context=None, mask=None) -> out_BHNE

"apply your weights, computed from x (and context), to these values instead of your own": before the output
projection, for every *query* head (H = `module.num_heads`), for any width E, with the mask that `forward` would take.
M is the number of tokens of `context`, or of x without one. `mix` must be linear in its values, column by column.
Arguments that a module does not know it leaves out of its signature.

A feature-map gate has `gate(x_BCHW)` and shows what it multiplies its input with. Feature-map attention whose positions
attend to one another has `mix(x_BCHW, values_BHME)`: its tokens are the positions in raster order, M = height x width.

Shape letters: B batch, H heads, N queries, M keys, C channels, E width of the values; W columns per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Gates", "Mixes", "attention_map"]

Index = int | slice | range | Sequence[int] | Tensor | None

#: how far a probe may be from linear, relative to its size
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@runtime_checkable
class Mixes(Protocol):
    """A sequence mechanism that can apply its weights to given values."""

    num_heads: int

    def mix(self, x_BNC: Tensor, values_BHME: Tensor) -> Tensor:
        """Weights computed from `x_BNC`, applied to `values_BHME`: out_BHNE. See the module's docstring."""
        ...


@runtime_checkable
class Gates(Protocol):
    """A feature-map attention that can show its gate."""

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """What `x_BCHW` is multiplied with; broadcasts to its shape."""
        ...


def attention_map(
    module_or_function: nn.Module | Callable[..., Tensor],
    *inputs: Tensor,
    rows: Index = None,
    columns: Index = None,
    heads: Index = None,
    values: Sequence[int] | None = None,
    width: int | None = None,
    memory_mb: float = 64.0,
    **options: Any,
) -> Tensor:
    """The weights A (B, H, N, M) with which a mechanism sums values: out = A v. No gradient flows through them.

    - A function is called as `function(*inputs, v, **options)` with v of shape (*leading, M, E), where (*leading, M)
      are the axes of the last input but its last: `attention_map(attend, q, k, mask=causal())`. Any number of leading
      axes will do. Every output head may read one head of v (its own, or that of its group).
    - A module with `mix` (see above) is called as `module.mix(x, v, **options)`; x is a sequence or a map.
    - A module with `gate` and no `mix` gives `module.gate(*inputs)` as it is; rows, columns and heads do not apply.

    A mechanism with dropout should be in `eval` mode.

    Args:
        module_or_function: what to look at.
        *inputs: what it computes its weights from: q and k, or x.
        rows: queries to show: an index, a sequence or tensor of them, a slice; None for all. The axis stays.
        columns: keys to show, likewise. Few rows or few columns are cheap, also of very long inputs.
        heads: heads to show, likewise (the third axis from the right).
        values: shape (*leading, M) of the values, where it is not that of the last input.
        width: number of value columns per call, where the function wants a certain one.
        memory_mb: bound of values and outputs of one call in MiB; the result comes on top.
        **options: passed on.

    Returns:
        (B, H, rows, columns) in the dtype of the mechanism's output.

    Raises:
        ValueError: if the mechanism is not linear in its values column by column, an index is out of range, or a
            module has neither `mix` nor `gate`.

    >>> import torch, saccade
    >>> q = k = torch.randn(1, 2, 6, 4)
    >>> A = saccade.attention_map(saccade.attend, q, k, mask=saccade.masks.causal())
    >>> A.shape, bool((A.sum(-1) - 1).abs().max() < 1e-5), bool(A.triu(1).any())
    (torch.Size([1, 2, 6, 6]), True, False)
    """
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if memory_mb <= 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError("attention_map needs the tensors from which the weights are computed, got none")
    target = module_or_function
    if isinstance(target, nn.Module) and isinstance(target, Gates) and not hasattr(target, "mix"):
        if not (rows is columns is heads is None):
            raise ValueError("rows, columns and heads are for attention weights, but this module has a gate")
        with torch.no_grad():
            return target.gate(*inputs, **options)
    mechanism, shape = _mechanism(target, inputs, values, options)
    like = inputs[-1]

    def run(v: Tensor) -> Tensor:
        return _in_widths(mechanism, v, width)

    out_shape = _probe(run, shape, like)
    head_list = None
    if heads is not None:
        if len(out_shape) < 3:
            raise ValueError(f"there are no heads to choose from in an output of shape {out_shape}")
        head_list = _indices(heads, out_shape[-3], "heads", like.device)
    row_list = _indices(rows, out_shape[-2], "rows", like.device)
    column_list = _indices(columns, shape[-1], "columns", like.device)
    if not row_list.numel() or not column_list.numel():
        empty = like.new_zeros(*out_shape[:-2], row_list.numel(), column_list.numel())
        return empty if head_list is None else empty[..., head_list, :, :]
    per_column = (like.new_empty(0).element_size()) * (_count(shape) + _count(out_shape[:-1]))
    most = max(1, int(memory_mb * 2**20 / max(1, per_column)))
    most = most if width is None else max(width, most // width * width)

    by_rows = row_list.numel() < column_list.numel() and tuple(shape[:-1]) == tuple(out_shape[:-2])
    parts = _rows(run, shape, like, row_list, most) if by_rows else None
    if parts is not None:
        weights = parts[..., column_list]
    else:
        weights = _columns(run, shape, like, row_list, column_list, most)
    return weights if head_list is None else weights[..., head_list, :, :]


def _mechanism(
    target: Any, inputs: tuple[Tensor, ...], values: Sequence[int] | None, options: dict[str, Any]
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """The mechanism as a function of its values alone, and their shape without the last axis."""
    if isinstance(target, nn.Module):
        if not isinstance(target, Mixes):
            raise ValueError(
                f"{type(target).__name__} has neither mix(x, values) nor gate(x): "
                "pass a function (q, k, v) -> out, or give it one of them"
            )
        x = inputs[0]
        if x.ndim not in (3, 4):
            raise ValueError(f"x must have 3 axes (batch, tokens, channels) or be a map of 4, got {tuple(x.shape)}")
        context = options.get("context")
        source = x if context is None else context
        tokens = source.shape[1] if source.ndim == 3 else _count(source.shape[2:])
        shape = (x.shape[0], target.num_heads, tokens) if values is None else tuple(values)
        mix: Callable[..., Tensor] = target.mix
        return (lambda v: mix(*inputs, v, **options)), shape
    if not callable(target):
        raise ValueError(f"attention_map takes a module or a function, got {type(target).__name__}")
    if values is None and inputs[-1].ndim < 2:
        raise ValueError(f"the last input must have the keys' axes, got shape {tuple(inputs[-1].shape)}")
    shape = tuple(inputs[-1].shape[:-1]) if values is None else tuple(values)
    return (lambda v: target(*inputs, v, **options)), shape


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _in_widths(mechanism: Callable[[Tensor], Tensor], v: Tensor, width: int | None) -> Tensor:
    """The mechanism on v, `width` columns a call, the last call filled up with zeros."""
    if width is None:
        return mechanism(v)
    columns = v.shape[-1]
    v = torch.nn.functional.pad(v, (0, -columns % width))
    return torch.cat([mechanism(part) for part in v.split(width, -1)], -1)[..., :columns]


def _probe(run: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """The output's shape; ValueError unless run([a, b, a + 2 b]) = [x, y, x + 2 y], as it is where out = A v."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, *shape, generator=generator).to(like)
    with torch.no_grad():
        out = run(torch.stack([a, b, a + 2 * b], -1))
    if not isinstance(out, Tensor):
        raise ValueError(f"the mechanism must return a tensor, got {type(out).__name__}")
    if out.ndim < 2 or out.shape[-1] != 3:
        raise ValueError(f"the mechanism must keep the values' width (3 in a probe), got shape {tuple(out.shape)}")
    x, y, both = out.double().unbind(-1)
    error = (both - x - 2 * y).abs().max() if both.numel() else both.new_zeros(())
    size = out.double().abs().max() if both.numel() else both.new_ones(())
    tolerance = max(_TOLERANCE.get(dtype, 1e-3) for dtype in (out.dtype, like.dtype))
    if not bool(error <= tolerance * size + 1e-12):
        raise ValueError(
            f"attention_map needs a mechanism that is linear in its values, column by column: "
            f"f(a + 2 b) differs from f(a) + 2 f(b) by {error.item():.2g} (outputs up to {size.item():.2g})"
        )
    return tuple(out.shape)


def _indices(index: Index, length: int, name: str, device: torch.device) -> Tensor:
    if index is None:
        return torch.arange(length, device=device)
    if isinstance(index, slice):
        return torch.tensor(list(range(length)[index]), dtype=torch.long, device=device)
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        if tuple(index.shape) != (length,):
            raise ValueError(f"{name} as a bool tensor must have shape ({length},), got {tuple(index.shape)}")
        return index.nonzero()[:, 0].to(device)
    chosen = torch.as_tensor(list(index) if isinstance(index, range) else index, device=device)
    if chosen.numel() == 0:
        chosen = chosen.long()
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.ndim > 1:
        raise ValueError(f"{name} must be indices, got {chosen.dtype} of shape {tuple(chosen.shape)}")
    chosen = chosen.reshape(-1).long()
    if chosen.numel() and not (-length <= int(chosen.min()) and int(chosen.max()) < length):
        raise ValueError(
            f"{name} must be between {-length} and {length - 1}, got {int(chosen.min())} to {int(chosen.max())}"
        )
    return chosen % length if length else chosen


def _columns(
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    like: Tensor,
    rows: Tensor,
    columns: Tensor,
    most: int,
) -> Tensor:
    """Unit vectors as values, a group of columns at a time."""
    parts = []
    with torch.no_grad():
        for group in columns.split(most):
            v = like.new_zeros(*shape, group.numel())
            v[..., group, torch.arange(group.numel(), device=v.device)] = 1
            parts.append(run(v)[..., rows, :])
    return torch.cat(parts, -1)


def _rows(
    run: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor, rows: Tensor, most: int
) -> Tensor | None:
    """Gradients with respect to the values, a group of rows at a time; None where the mechanism has none."""
    parts = []
    with torch.enable_grad():
        for group in rows.split(most):
            v = like.new_zeros(*shape, group.numel()).requires_grad_()
            out = run(v)
            if not out.requires_grad:
                return None
            unit = torch.zeros_like(out)
            unit[..., group, torch.arange(group.numel(), device=v.device)] = 1
            (grad,) = torch.autograd.grad(out, v, unit)
            parts.append(grad.mT.detach().to(out.dtype))
    return torch.cat(parts, -2)
