"""How large an arena is: lengths, how many texts and prompts, and the budgets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from saccade.train.data import DEPTHS, KEYS
from saccade.train.entries import options_in, read_value


@dataclass(frozen=True)
class Sizes:
    """Of one comparison of caches; every field may be given to `compress` by name.

    Attributes:
        length: tokens of each text and each prompt.
        new: tokens of a text that are told one by one.
        texts: how many.
        each: prompts of each kind for each depth; 0 for none, where only perplexity, bytes and speed are asked for.
        depths: where in the text the answer stands.
        keys: numbers that stand in a text of `multi-key`.
        shares: of the tokens' keys and values that may be kept.
    """

    length: int = 512
    new: int = 64
    texts: int = 1
    each: int = 1
    depths: tuple[float, ...] = DEPTHS
    keys: int = max(KEYS)
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)

    def changed(self, changes: dict[str, Any]) -> Sizes:
        """With some fields replaced.

        Args:
            changes: by name.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"no setting of task compress is called {name!r}; there is {', '.join(known)}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, (list, tuple)) else v for n, v in changes.items()}
        found = replace(self, **given)
        for name, least in (("length", 1), ("new", 2), ("texts", 1), ("each", 0), ("keys", 2)):
            value = getattr(found, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if found.new >= found.length:
            raise ValueError(f"new must be below length ({found.length}), got {found.new}")
        if not found.shares or not all(0 < share <= 1 for share in found.shares):
            raise ValueError(f"shares must be above 0 and at most 1, got {found.shares}")
        if not found.depths or not all(0 <= depth <= 1 for depth in found.depths):
            raise ValueError(f"depths must be from 0 to 1, got {found.depths}")
        return found


BUDGETS: dict[str, Sizes] = {
    "quick": Sizes(),
    "standard": Sizes(length=2048, new=128, texts=2),
    "long": Sizes(length=8192, new=256, texts=4, each=2),
}


def read(budget: str) -> tuple[str, dict[str, Any]]:
    """A budget's name and the settings that were given with it: of "long:texts=1,each=0" "long", and these two.

    Args:
        budget: as the caller wrote it.

    Raises:
        ValueError: if there is no such budget or setting, or a value is of another type.
    """
    name, given = options_in(budget)
    if name not in BUDGETS:
        raise ValueError(f"budget of task compress must be {', '.join(BUDGETS)}, got {name!r}")
    types = get_type_hints(Sizes)
    # an unknown name is refused with the others' (`Sizes.changed`)
    return name, {each: read_value(text, types.get(each, str), each) for each, text in given.items()}
