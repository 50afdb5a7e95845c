"""A sequence in parts, one on each of several ranks: who holds which tokens, who needs which, and what is in force.

`saccade.parallel` moves the tensors; here stands what can be said without moving any. A function of a sequence asks
`in_force()`, or is marked `in_parts`, and is then run by the row of `saccade.parallel.rows` that has its name; one that
is marked and has no row is refused, never computed for each part alone. Code that only needs to know where it stands
asks `whole` and `places`.
"""

from saccade.ops.sharding.active import (
    Sharding,
    in_force,
    in_parts,
    places,
    put_in_force,
    refuse_parts,
    suspended,
    whole,
)
from saccade.ops.sharding.forecast import goes_round, is_softmax, parts_of, parts_of_keys, parts_of_states
from saccade.ops.sharding.layout import BALANCES, Dealing, Dealt, Layout, dealing
from saccade.ops.sharding.needs import Needs, Tile, needs_of

__all__ = [
    "BALANCES",
    "Dealing",
    "Dealt",
    "Layout",
    "Needs",
    "Sharding",
    "Tile",
    "dealing",
    "goes_round",
    "in_force",
    "in_parts",
    "is_softmax",
    "needs_of",
    "parts_of",
    "parts_of_keys",
    "parts_of_states",
    "places",
    "put_in_force",
    "refuse_parts",
    "suspended",
    "whole",
]
