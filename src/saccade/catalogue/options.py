"""What a part's constructor takes: every option by name, those included that it hands on as `**keywords`."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Union

#: the default of an option that must be given
REQUIRED = inspect.Parameter.empty

_PLURALS = {int: "ints", float: "numbers", bool: "booleans", str: "strings"}
_WORDS = {int: "an int", float: "a number", bool: "True or False", str: "a string", type(None): "None", Any: "anything"}


class Option(NamedTuple):
    """One option: its type (the annotation's text where it cannot be evaluated) and its default, or `REQUIRED`.

    Attributes:
        type: the annotation, or its text.
        default: or `REQUIRED`.
    """

    type: Any
    default: Any

    @property
    def words(self) -> str:
        """The type as a message says it."""
        return in_words(self.type)


def read(build: Callable[..., Any], passes: Iterable[Callable[..., Any]] = ()) -> dict[str, Option]:
    """The options of a constructor, in the order in which signatures name them.

    Where it takes `**keywords`, the options of `passes` follow, or those of the next class where there are none. What
    these ask for without a default is given by the constructor itself, and is no option.
    """
    found: dict[str, Option] = {}
    passes = tuple(passes)
    for depth, function in enumerate(_constructors(build)):
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.name != "self" and not (depth and parameter.default is REQUIRED):
                found.setdefault(parameter.name, Option(_evaluated(parameter.annotation, function), parameter.default))
        if passes or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    for other in passes:
        for name, option in read(other).items():
            if option.default is not REQUIRED:
                found.setdefault(name, option)
    return found


def check(name: str, known: Mapping[str, Option], given: Mapping[str, Any], *, complete: bool = True) -> None:
    """Compare the options given with those there are.

    Args:
        complete: ask for all that have no default.

    Raises:
        ValueError: naming the option that is unknown (and the nearest), missing, or of another type.
    """
    for option, value in given.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}")
        if not fits(value, known[option].type):
            raise ValueError(f"{name}: {option} must be {known[option].words}, got {value!r}")
    missing = [option for option, (_, default) in known.items() if default is REQUIRED and option not in given]
    if complete and missing:
        raise ValueError(f"{name} needs {' and '.join(f'{option} ({known[option].words})' for option in missing)}")


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `name`, whatever its capitals and hyphens.

    Args:
        name: as it was given.
        names: that there are.
    """
    plain = {each.lower().replace("_", "-"): each for each in names}
    name = name.lower().replace("_", "-").replace(" ", "-")
    close = [name] if name in plain else difflib.get_close_matches(name, plain, n=3, cutoff=0.5)
    return [plain[each] for each in close]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; what is inside mappings and which of several literals it is are not looked at."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) for each in inner)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is str or (origin is None and isinstance(kind, type)):
        return isinstance(value, kind)
    if not isinstance(origin, type) or origin is type:
        return True
    if issubclass(origin, Mapping) or not issubclass(origin, Iterable):
        return isinstance(value, origin)
    kinds = [each for each in inner if each is not Ellipsis]
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, Mapping))
        and (isinstance(value, Iterator) or all(any(fits(item, each) for each in kinds or [Any]) for item in value))
    )


def in_words(kind: Any) -> str:
    """A type as a message says it.

    >>> in_words(int | None), in_words(tuple[int, ...])
    ('an int or None', 'a sequence of ints')
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inner))
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, inner[:-1])), repr(inner[-1]))))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        items = dict.fromkeys(_PLURALS.get(each) or in_words(each) for each in inner if each is not Ellipsis)
        return f"a sequence of {' or '.join(items)}"
    if origin is not None:
        return "a function"
    return f"of type {kind.__name__}" if isinstance(kind, type) else str(kind)


def _nearest(option: str, known: Iterable[str]) -> str:
    near = nearest(option, known)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; it has {', '.join(known)}"


def _constructors(build: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The function that takes the arguments; of a class, its `__init__` and those that it inherits."""
    if not isinstance(build, type):
        return [build]
    return [vars(each)["__init__"] for each in build.__mro__ if "__init__" in vars(each)]


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """The type that a deferred annotation names; its text where it names what only type checkers import."""
    if annotation is REQUIRED:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except NameError:
        return annotation
