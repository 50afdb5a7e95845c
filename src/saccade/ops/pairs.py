"""A function of one query-key pair, in FlexAttention's signature, asked for many pairs at once.

`mask_mod(b, h, q_idx, kv_idx)` and `score_mod(score, b, h, q_idx, kv_idx)` are written for one pair: their indices are
scalars, as FlexAttention maps them over the pairs. Most give the same for index tensors that broadcast, which is
faster; those that do not (`intervals[b][0]`, `torch.dot(row[q_idx], column[kv_idx])`) are mapped here as well.

Used by mask functions (`masks.function`) and by score modifications.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["for_pairs", "has_to_be_mapped", "is_scalar_only"]

PairFunction = Callable[..., Tensor]

#: answers of `has_to_be_mapped` about a function, by case
_answers: WeakKeyDictionary[FunctionType, dict[object, bool]] = WeakKeyDictionary()

#: what a function that is written for scalars raises where it gets tensors
_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


def for_pairs(function: PairFunction, *inputs: Tensor, scalars: bool = False) -> Tensor:
    """`function` of each pair: the inputs broadcast, and the answer has their common shape.

    Args:
        scalars: `function` is known to take scalars only; else that is tried where it cannot take the tensors whole.

    Raises:
        whatever `function` raises for the tensors, where it cannot take scalars either.
    """
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    if 0 in shape:
        return inputs[0].expand(shape)
    if not scalars:
        try:
            return torch.as_tensor(function(*inputs), device=inputs[0].device).expand(shape)
        except _FAILURES as failure:
            try:
                return _one_by_one(function, inputs).expand(shape)
            except _FAILURES:
                raise failure from None
    return _one_by_one(function, inputs).expand(shape)


def is_scalar_only(function: PairFunction, *inputs: Tensor) -> bool:
    """Whether `function` raises or is wrong where it gets `inputs` whole instead of a pair at a time.

    A few pairs of each are looked at, two to six along an axis, so that axes that were confused do not fit.
    """
    few = [_corner(x, len(inputs)) for x in inputs]
    try:
        expected = _one_by_one(function, few)
    except _FAILURES:
        return False
    if expected.shape != torch.broadcast_shapes(*(x.shape for x in few)):
        return False  # not one number for one pair
    try:
        answer = torch.as_tensor(function(*few), device=expected.device).expand(expected.shape)
    except _FAILURES:
        return True
    return not torch.allclose(answer.float(), expected.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


def has_to_be_mapped(function: PairFunction, *inputs: Tensor) -> bool:
    """`is_scalar_only`, where a function that draws random numbers is taken whole, and none of them are used up.

    Remembered of plain functions, for as long as what they capture keeps its shapes: the question costs a millisecond.
    """
    if not isinstance(function, FunctionType):
        return _has_to_be_mapped(function, *inputs)
    few = tuple((_corner(x, len(inputs)).shape, x.dtype, x.device) for x in inputs)
    case = few, tuple(x.shape if isinstance(x, Tensor) else id(x) for x in _captured(function))
    answers = _answers.setdefault(function, {})
    if case not in answers:
        answers[case] = _has_to_be_mapped(function, *inputs)
    return answers[case]


def _captured(function: FunctionType) -> list[object]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return cells + [function.__globals__.get(name) for name in function.__code__.co_names]


def _has_to_be_mapped(function: PairFunction, *inputs: Tensor) -> bool:
    with torch.no_grad(), torch.random.fork_rng([x.device for x in inputs[:1] if x.device.type == "cuda"]):
        before = torch.get_rng_state()
        answer = is_scalar_only(function, *(x.detach() for x in inputs))
        return answer and torch.equal(before, torch.get_rng_state())


def _corner(x: Tensor, axes: int) -> Tensor:
    """The first entries of `x` on every axis: two, three, four ... from the first axis of all to the last."""
    first = axes - x.ndim
    return x[tuple(slice(first + axis + 2) for axis in range(x.ndim))]


def _one_by_one(function: PairFunction, inputs: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """`function` mapped over the axes in which the inputs broadcast, one after the other."""
    axes = max(x.ndim for x in inputs)
    inputs = [x[(None,) * (axes - x.ndim)] for x in inputs]
    if axes == 0:
        return torch.as_tensor(function(*inputs), device=inputs[0].device)
    length = max(x.shape[0] for x in inputs)
    mapped = tuple(None if x.shape[0] == 1 else 0 for x in inputs)
    inputs = [x[0] if axis is None else x for x, axis in zip(inputs, mapped)]
    if length == 1:
        return _one_by_one(function, inputs)[None]
    return torch.vmap(lambda *xs: _one_by_one(function, xs), mapped, randomness="different")(*inputs)
