"""Policies for a key-value cache: which tokens of a key head stay, where only so many may.

A policy scores tokens, and a cache stores those that stay and nothing else: every key head holds its own number, in
memory too. `PolicyCache` is one layer's, in plain torch; `saccade.compressed` runs a transformers model with them.

| name            | class          | what stays                                                                    |
|-----------------|----------------|-------------------------------------------------------------------------------|
| "full"          | `Full`         | everything                                                                    |
| "window"        | `Window`       | the first tokens and the latest                                               |
| "heavy-hitters" | `HeavyHitters` | what has been given most weight, and the latest                               |
| "key-norm"      | `KeyNorm`      | short keys, the first tokens and the latest                                   |
| "random"        | `Random`       | any, the first tokens and the latest                                          |
| "nats"          | `Roles`        | what trained roles say, and for how long                                      |
"""

from __future__ import annotations

from saccade.compress.policies.baselines import Full, HeavyHitters, KeyNorm, Random, Window
from saccade.compress.policies.budget import Budget, share_out
from saccade.compress.policies.cache import PolicyCache
from saccade.compress.policies.policy import Entering, Held, Policy
from saccade.compress.policies.roles import Roles

__all__ = [
    "POLICIES",
    "Budget",
    "Entering",
    "Full",
    "HeavyHitters",
    "Held",
    "KeyNorm",
    "Policy",
    "PolicyCache",
    "Random",
    "Roles",
    "Window",
    "share_out",
]

#: by name
POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "window": Window,
    "heavy-hitters": HeavyHitters,
    "key-norm": KeyNorm,
    "random": Random,
    "nats": Roles,
}
