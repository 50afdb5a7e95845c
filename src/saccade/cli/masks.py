"""Mask expressions such as `causal() & ~window(64)`, read without evaluating code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from saccade.ops import masks

#: the masks that numbers alone describe
_MAKERS: dict[str, Callable[..., masks.Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "neighborhood": masks.neighborhood,
}
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}


def parse_mask(text: str) -> masks.Mask:
    """The mask that an expression of causal, window, prefix, neighborhood, `&`, `|` and `~` stands for.

    >>> parse_mask("causal & window(3)")
    (causal() & window(3, 0))

    Raises:
        ValueError: if it is anything else.
    """
    try:
        return _mask(ast.parse(text, mode="eval").body)
    except (RecursionError, MemoryError):  # the second is what Python's parser raises
        raise ValueError(f"the mask {_shorten(text, 60)!r} nests too deep to be read") from None
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"cannot read the mask {_shorten(text, 200)!r}: {error}") from error


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _mask(node: ast.expr) -> masks.Mask:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_mask(node.left), _mask(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Name) and node.id == "causal":
        return masks.causal()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _MAKERS:
        positional = [ast.literal_eval(argument) for argument in node.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return _MAKERS[node.func.id](*positional, **named)
    raise ValueError(f"a mask is made of {', '.join(_MAKERS)}, &, | and ~, got {ast.unparse(node)!r}")
