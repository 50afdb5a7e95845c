"""Tensors that a score, a score_mod or a normaliser captures: found, replaced by twins, read as slices.

They are found by running one small tile under a `TorchFunctionMode`. In the backward pass the same mode puts a detached
twin in the place of each, so that a tile's gradient ends there. The reads `captured[indices]` of a bias table are
differentiated by a scatter-add of the tile, not by a table of zeros per tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# learning about a score from one small tile


class Twins(TorchFunctionMode):
    """Puts detached twins in the place of captured tensors, so that a tile's graph ends at them.

    Args:
        twins: captured tensor and its twin, by the captured one's id.
        reads: if given, `captured[indices]` is cut out of the graph and noted here as (captured, indices, value):
            the gradient of the read is a scatter-add.
    """

    def __init__(
        self, twins: dict[int, tuple[Tensor, Tensor]], reads: list[tuple[Tensor, Any, Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.twins, self.reads = twins, reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.reads is not None and func is torch.Tensor.__getitem__ and id(args[0]) in self.twins:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # integer tensors only, which index_put_ takes, or slices only
            numbers = all(isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32) for i in index)
            if numbers or all(isinstance(i, slice) for i in index):
                value = args[0].detach()[index].requires_grad_(torch.is_grad_enabled())
                self.reads.append((args[0], index, value))
                return value
        swapped = [self._swap(x) for x in args]
        return func(*swapped, **{name: self._swap(x) for name, x in (kwargs or {}).items()})

    def _swap(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.twins[id(x)][1] if id(x) in self.twins else x
        return tree_map(self._swap, x) if isinstance(x, (tuple, list, dict)) else x


class ReadsAsSlices(TorchFunctionMode):
    """Reads tables as index tensors would, faster.

    `table[h, q_idx, kv_idx]` of whole ranges is a slice, ten times as fast; `table[h, x]` with one number x for each
    query and key is one `index_select` for all heads, four times as fast, in the forward pass.

    Args:
        index: the index tensors of a tile, known by identity: b, h, q_idx, kv_idx.
        ranges: what they run through.

    Attributes:
        of_pairs: whether there was a read of a value per pair; others are as fast by index tensors.
    """

    def __init__(self, index: tuple[Tensor, ...], ranges: tuple[slice, ...]) -> None:
        super().__init__()
        self.index, self.ranges = index, ranges
        self.axes = {id(x): axis for axis, x in enumerate(index)}
        self.of_pairs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            axes = [self.axes.get(id(x), -1) for x in index]
            if (
                len(set(axes)) == len(axes) == table.ndim
                and all(self.ranges[axis].stop <= length for axis, length in zip(axes, table.shape) if axis >= 0)
                and (found := self._read(table, index, axes)) is not None
            ):
                return found
        return func(*args, **(kwargs or {}))

    def _read(self, table: Tensor, index: tuple[Any, ...], axes: list[int]) -> Tensor | None:
        place = axes.index(-1) if -1 in axes else None
        numbers = None if place is None else index[place]
        if place is not None:
            known = isinstance(numbers, Tensor) and numbers.dtype in (torch.int64, torch.int32) and numbers.ndim == 2
            if not known or {2, 3} & set(axes):
                return None
            self.of_pairs = True
            if torch.is_grad_enabled():
                return None
        cut = table[tuple(slice(None) if axis < 0 else self.ranges[axis] for axis in axes)]
        if place is not None and numbers is not None:
            try:
                cut = cut.index_select(place, numbers.flatten()).unflatten(place, numbers.shape)
            except (IndexError, RuntimeError):  # numbers below 0, which count from the end
                return None
            axes = [*axes[:place], 2, 3, *axes[place + 1 :]]
        self.of_pairs = self.of_pairs or {2, 3} <= set(axes)
        ordered = cut.permute(sorted(range(len(axes)), key=axes.__getitem__))
        # as the index tensors broadcast
        return ordered[tuple(slice(None) if axis in axes else None for axis in range(min(axes), 4))]


class Discovery(Twins):
    """Finds what is captured: tensors that need a gradient and were not made in here.

    Args:
        own: what was made outside, but is not captured.
        mapped: the function runs under `vmap`, where no twin can be made, and without a graph.
    """

    def __init__(self, *own: Tensor, mapped: bool = False) -> None:
        super().__init__({})
        self.own, self.mapped = own, mapped
        self.known = {id(tensor): tensor for tensor in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in self.known and id(x) not in self.twins:
                self.twins[id(x)] = x, x if self.mapped else x.detach().requires_grad_()
        result = super().__torch_function__(func, types, args, kwargs)
        # kept alive, so that no id is used twice
        self.known.update((id(x), x) for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def found(self, *results: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The captured tensors, and leaves above `results` that a custom autograd function hid from this mode."""
        ends = {id(x) for x in self.own} | {id(twin) for _, twin in self.twins.values()}
        hidden, seen, todo = [], set(), [x.grad_fn for x in results]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in ends:
                hidden.append(variable)
            todo += [parent for parent, _ in node.next_functions]
        return [x for x, _ in self.twins.values()], hidden
