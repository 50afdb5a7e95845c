"""What is compared: names like `moba:block_size=32,top_k=3`, or the caller's own constructors."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from saccade import catalogue
from saccade.catalogue.options import fits, in_words, nearest

#: the name of the baseline that leaves a gate or a fusion part out
NONE = "none"


@dataclass(frozen=True)
class Entry:
    """One entry of a comparison.

    Attributes:
        name: in tables and folders.
        slug: of the catalogue, or None.
        options: constructor arguments given by the caller.
        factory: the caller's own constructor, where there is no slug.
    """

    name: str
    slug: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: Callable[..., nn.Module] | None = None

    @property
    def supports(self) -> tuple[str, ...]:
        """The capabilities on its card; none are known of a caller's own."""
        return () if self.slug in (None, NONE) else tuple(catalogue.part(str(self.slug)).supports)

    def arguments(self, length: int) -> dict[str, Any]:
        """Constructor arguments beyond the task's own, at this length."""
        part = None if self.slug in (None, NONE) else catalogue.part(str(self.slug))
        own = part.at_length(length) if part is not None and part.at_length is not None else {}
        return {**own, **self.options}

    def build(self, length: int, *, seed: int, **arguments: Any) -> nn.Module:
        """The part. Its initial weights depend on `seed` alone, and what stands around it draws the same numbers
        whichever part is built.

        Args:
            length: tokens, for arguments that follow the length.
            **arguments: the task's own, like `dim`. `layer_index` and `num_layers` go where they are known.

        Raises:
            ValueError: if an argument does not fit.
        """
        constructor = self.factory if self.factory is not None else catalogue.part(str(self.slug)).build
        if constructor is None:
            raise ValueError(f"{self.slug!r} is a function, not a module, and cannot be trained as one")
        accepted = inspect.signature(constructor).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            for name in ("layer_index", "num_layers"):
                if name not in accepted:
                    arguments.pop(name, None)
        else:
            arguments = {name: value for name, value in arguments.items() if name not in ("layer_index", "num_layers")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.factory is not None:
                part = self.factory(**{**arguments, **self.options})
                if not isinstance(part, nn.Module):
                    raise ValueError(
                        f"the constructor of {self.name!r} must return a module, got {type(part).__name__}"
                    )
                return part
            return catalogue.create(str(self.slug), **{**arguments, **self.arguments(length)})

    def as_config(self) -> dict[str, Any]:
        """What identifies it in config.json."""
        own = None if self.factory is None else getattr(self.factory, "__qualname__", type(self.factory).__name__)
        return {"name": self.name, "slug": self.slug, "options": dict(self.options), "own": own}


def parse(mechanisms: Sequence[str] | Mapping[str, str | Callable[..., nn.Module]] | str) -> list[Entry]:
    """The mechanisms that a caller named.

    Args:
        mechanisms: slugs, each with options after a colon (`"moba:block_size=32,top_k=3"`), or a mapping from names
            to such slugs or to constructors.

    Raises:
        ValueError: if a slug is unknown or not built yet, an option is not `name=value`, unknown or of another type,
            or a name comes twice.
    """
    if isinstance(mechanisms, str):
        mechanisms = [mechanisms]
    pairs = list(mechanisms.items()) if isinstance(mechanisms, Mapping) else [(str(text), text) for text in mechanisms]
    if not pairs:
        raise ValueError("there must be at least one mechanism to compare, got none")
    found: list[Entry] = []
    for name, what in pairs:
        if isinstance(what, str):
            slug, options = _parse_options(what)
            if slug != NONE:
                catalogue.part(slug)
            found.append(Entry(name, slug, options))
        elif callable(what):
            found.append(Entry(name, None, {}, what))
        else:
            raise ValueError(f"mechanism {name!r} must be a slug or a constructor, got {type(what).__name__}")
        if name in [earlier.name for earlier in found[:-1]]:
            raise ValueError(f"mechanism {name!r} comes twice")
    return found


def _parse_options(text: str) -> tuple[str, dict[str, Any]]:
    slug, given = options_in(text)
    if slug == NONE and given:
        raise ValueError(f"{NONE!r} leaves the mechanism out and has no options, got {', '.join(given)}")
    known = catalogue.options(slug) if given else {}
    for name, value in given.items():
        if name not in known:
            catalogue.check_options(slug, **{name: value})
    return slug, {name: read_value(value, known[name].type, f"{slug}: {name}") for name, value in given.items()}


def options_in(text: str) -> tuple[str, dict[str, str]]:
    """A name and its options, not read yet: of `moba:top_k=3` "moba" and {"top_k": "3"}.

    Args:
        text: as the caller wrote it.

    Raises:
        ValueError: if an option is not `name=value`, or comes twice.
    """
    slug, _, rest = text.partition(":")
    found: dict[str, str] = {}
    for piece in split_options(rest):
        name, equals, value = (each.strip() for each in piece.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"options must be name=value with commas between, got {piece!r} in {text!r}")
        if name in found:
            raise ValueError(f"option {name!r} comes twice in {text!r}")
        found[name] = value
    return slug.strip(), found


#: words for values that are no Python
_WORDS: dict[str, Any] = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS |= {"none": None, "null": None}
_SWITCHES = {"1": True, "0": False}


def read_value(text: str, kind: Any, what: str) -> Any:
    """An option's value as its type reads the text: the first of a Python literal, a word (`true`, `off`, `none`), a
    switch (`0`, `1`) and the text itself that is of the type.

    Args:
        text: as the caller wrote it.
        kind: the type.
        what: the option's name, for messages.

    Raises:
        ValueError: if none is.
    """
    candidates: list[Any] = [text]
    if text in _SWITCHES:
        candidates.insert(0, _SWITCHES[text])
    if text.lower() in _WORDS:
        candidates.insert(0, _WORDS[text.lower()])
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        candidates.insert(0, ast.literal_eval(text))
    for value in candidates:
        if _admits(kind, value):
            return value
    near = nearest(text, [name for name in _literals(kind) if isinstance(name, str)])
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{what} must be {in_words(kind)}, got {text!r}{hint}")


def _admits(kind: Any, value: Any) -> bool:
    """Whether a value is of a type, and one of its literals where it has some."""
    literals = _literals(kind)
    if any(type(value) is type(each) for each in literals):
        return value in literals
    return fits(value, kind)


def _literals(kind: Any) -> list[Any]:
    """The values that a type names one by one."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [value for each in get_args(kind) for value in _literals(each)]


def split_options(text: str) -> list[str]:
    """At commas that are not inside brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece.strip()]
