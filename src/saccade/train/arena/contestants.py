"""What is compared: policies for a key-value cache by name, `heavy-hitters:recent=0.25`, or objects of the caller's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from torch import nn

from saccade import catalogue
from saccade.compress.a_vl import AVLOptions
from saccade.compress.policies import POLICIES, Policy
from saccade.train.entries import options_in, read_value

__all__ = ["FULL", "Contestant", "parse"]

#: what all are compared with
FULL = "full"
#: options of the cache beside the policy's own
_CACHE: dict[str, Any] = {"least": float | None}


@dataclass(frozen=True)
class Contestant:
    """One way to keep fewer keys and values.

    Attributes:
        name: in tables and folders.
        policy: the name of a policy, a `saccade.compress.policies.Policy`, or a press in kvpress' sense.
        options: of a policy that is named.
    """

    name: str
    policy: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_share(self) -> bool:
        """Whether it can be told which share of the tokens it may keep; else it keeps what it keeps."""
        kind = POLICIES.get(self.policy, self.policy) if isinstance(self.policy, str) else self.policy
        return getattr(kind, "budget_is", "optional") != "refused"

    @contextmanager
    def opened(self, model: nn.Module, share: float | None) -> Iterator[Any]:
        """An empty cache for one sequence; the model runs with it as long as the context lasts.

        Args:
            model: of transformers.
            share: of the tokens that may stay; None where it takes none.

        Raises:
            ValueError: if the model, or the share, is not of the kind.
        """
        from saccade.integrations.compression import compressed
        from saccade.integrations.compression.press import PressPolicy

        policy, budget = self.policy, share
        if not isinstance(policy, (str, Policy)):
            press = copy.copy(policy)
            press.compression_ratio = 1.0 - (1.0 if share is None else share)
            policy, budget = PressPolicy(press=press), None
        with compressed(model, policy, budget, **self.options) as cache:
            yield cache

    def as_config(self) -> dict[str, Any]:
        """What identifies it in config.json."""
        told = self.policy if isinstance(self.policy, str) else _told(self.policy)
        return {"name": self.name, "policy": told, "options": dict(self.options)}


def _told(thing: Any) -> str:
    """An object of the caller's: its class, and what it holds that is plain."""
    held = {each.name: getattr(thing, each.name) for each in fields(thing)} if is_dataclass(thing) else vars(thing)
    plain = {name: value for name, value in held.items() if isinstance(value, (int, float, str, bool, type(None)))}
    plain.pop("compression_ratio", None)  # which the arena sets
    return f"{type(thing).__qualname__}({', '.join(f'{name}={value!r}' for name, value in sorted(plain.items()))})"


def parse(names: Sequence[str] | Mapping[str, Any] | str) -> list[Contestant]:
    """The contestants that a caller named, and `full` before them.

    Args:
        names: policies, each with options after a colon; or a mapping from names to such, to policies or to presses.

    Raises:
        ValueError: if a name is unknown or comes twice, or an option is unknown, of another type or out of range.
    """
    if isinstance(names, str):
        names = [names]
    pairs = list(names.items()) if isinstance(names, Mapping) else [(str(text), text) for text in names]
    if not pairs:
        raise ValueError("there must be at least one cache to compare, got none")
    found = [_parsed(name, what) for name, what in pairs]
    if Contestant(FULL, FULL) not in found:
        found.insert(0, Contestant(FULL, FULL))
    for place, each in enumerate(found):
        if each.name in [earlier.name for earlier in found[:place]]:
            raise ValueError(f"cache {each.name!r} comes twice")
    return found


def _parsed(name: str, what: Any) -> Contestant:
    if isinstance(what, Policy) or callable(getattr(what, "compress", None)):
        return Contestant(name, what)
    if not isinstance(what, str):
        raise ValueError(f"cache {name!r} must be a policy by name, a Policy or a press, got {type(what).__name__}")
    policy, given = options_in(what)
    policies = [*POLICIES, "a-vl"]
    if policy not in policies:
        near = catalogue.nearest(policy, policies)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{policy!r} is no policy for a cache; there are {', '.join(policies)}{hint}")
    kind: Any = AVLOptions if policy == "a-vl" else POLICIES[policy]
    hints = get_type_hints(kind)
    types = {each.name: hints[each.name] for each in fields(kind)} | ({} if policy == "a-vl" else _CACHE)
    options = {}
    for option, text in given.items():
        if option not in types:
            raise ValueError(f"{policy} has the options {', '.join(types)}, not {option!r}")
        options[option] = read_value(text, types[option], f"{policy}: {option}")
    kind(**{option: value for option, value in options.items() if option not in _CACHE})  # refuses what is out of range
    return Contestant(name, policy, options)
