"""Mask expressions such as `causal() & ~window(64)`, read without evaluating code."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable

from saccade.catalogue.options import nearest
from saccade.ops import masks

#: the masks that numbers alone describe
_MAKERS: dict[str, Callable[..., masks.Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "neighborhood": masks.neighborhood,
}
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}


#: more than anyone writes, and little enough for Python's parser
_LONGEST = 1000


def parse_mask(text: str) -> masks.Mask:
    """The mask that an expression of causal, window, prefix, neighborhood, `&`, `|` and `~` stands for.

    >>> parse_mask("causal & window(3)")
    (causal() & window(3, 0))

    Raises:
        ValueError: if it is anything else.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"the mask must have at most {_LONGEST} characters, got {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read the mask {text!r}: {error}") from error
    return _mask(tree)


def _mask(node: ast.expr) -> masks.Mask:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_mask(node.left), _mask(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Name) and node.id == "causal":
        return masks.causal()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _MAKERS:
        return _made(node.func.id, node)
    near = nearest(node.id if isinstance(node, ast.Name) else getattr(getattr(node, "func", None), "id", ""), _MAKERS)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"a mask is made of {', '.join(_MAKERS)}, &, | and ~, got {ast.unparse(node)!r}{hint}")


def _made(name: str, node: ast.Call) -> masks.Mask:
    """A mask by name, from integers and tuples of them."""
    taken = inspect.signature(_MAKERS[name])
    try:
        positional = [_literal(argument) for argument in node.args]
        named = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
        taken.bind(*positional, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} takes {', '.join(taken.parameters)} as integers; {error}") from error
    return _MAKERS[name](*positional, **named)


def _literal(node: ast.expr) -> int | bool | tuple[int | bool, ...]:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    items = value if isinstance(value, (tuple, list)) else (value,)
    if not items or not all(isinstance(item, int) for item in items):
        raise ValueError(f"got {ast.unparse(node)!r}")
    return tuple(items) if isinstance(value, (tuple, list)) else value  # type: ignore[return-value]
