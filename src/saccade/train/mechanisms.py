"""What is compared: names like `moba:block_size=32,top_k=3`, or the caller's own constructors."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from saccade import catalogue

#: the name of the baseline that leaves a gate or a fusion part out
NONE = "none"

KINDS = {
    "sequence": "a sequence mechanism",
    "gate": "a feature-map gate",
    "fusion": "a fusion part",
    "model": "a whole model",
    "compressor": "a compressor",
    "analysis": "an analysis",
}


@dataclass(frozen=True)
class Mechanism:
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


def parse(mechanisms: Sequence[str] | Mapping[str, str | Callable[..., nn.Module]] | str) -> list[Mechanism]:
    """The mechanisms that a caller named.

    Args:
        mechanisms: slugs, each with options after a colon (`"moba:block_size=32,top_k=3"`), or a mapping from names
            to such slugs or to constructors.

    Raises:
        ValueError: if a slug is unknown or not built yet, an option is not `name=value`, or a name comes twice.
    """
    if isinstance(mechanisms, str):
        mechanisms = [mechanisms]
    pairs = list(mechanisms.items()) if isinstance(mechanisms, Mapping) else [(str(text), text) for text in mechanisms]
    if not pairs:
        raise ValueError("there must be at least one mechanism to compare, got none")
    found: list[Mechanism] = []
    for name, what in pairs:
        if isinstance(what, str):
            slug, options = _parse_options(what)
            if slug != NONE:
                catalogue.part(slug)
            found.append(Mechanism(name, slug, options))
        elif callable(what):
            found.append(Mechanism(name, None, {}, what))
        else:
            raise ValueError(f"mechanism {name!r} must be a slug or a constructor, got {type(what).__name__}")
        if name in [earlier.name for earlier in found[:-1]]:
            raise ValueError(f"mechanism {name!r} comes twice")
    return found


def check_fit(mechanism: Mechanism, task: str, kind: str, needs: Sequence[str]) -> None:
    """Raise ValueError, naming parts that would fit, unless the mechanism is of that kind and supports the needs."""
    if mechanism.slug is None:
        return
    if mechanism.slug == NONE:
        if kind == "sequence":
            raise ValueError(f"task {task!r} has no baseline without a mechanism; {_fitting(kind, needs)}")
        return
    part = catalogue.part(mechanism.slug)
    if part.kind != kind:
        raise ValueError(
            f"{mechanism.name!r} is {KINDS[part.kind]}, but task {task!r} needs {KINDS[kind]}; {_fitting(kind, needs)}"
        )
    lacking = [need for need in needs if not _supports(part, need)]
    if lacking:
        raise ValueError(
            f"{mechanism.name!r} does not support {', '.join(lacking)}, which task {task!r} needs; "
            f"{_fitting(kind, needs)}"
        )


def _supports(part: catalogue.Summary, need: str) -> bool:
    """Whether a part does what a task needs. Teacher-forced parts are compared in causal tasks: the comparison measures
    whether they see the future."""
    return need in part.supports or (need == "causal" and "teacher-forced" in part.supports)


def _fitting(kind: str, needs: Sequence[str]) -> str:
    slugs = [p.slug for p in catalogue.parts() if p.kind == kind and all(_supports(p, need) for need in needs)]
    return f"fitting: {', '.join(slugs) or 'none yet'}"


def _parse_options(text: str) -> tuple[str, dict[str, Any]]:
    slug, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for piece in split_options(rest):
        name, equals, value = piece.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"options must be name=value with commas between, got {piece!r} in {text!r}")
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = value.strip()
    return slug.strip(), options


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
