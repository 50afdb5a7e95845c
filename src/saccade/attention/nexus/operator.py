"""Nexus: the nesting of queries or keys, and attention by nested ones as a function.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern

Branches = Literal["both", "query", "key"]


Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


Keep = Callable[[str, Tensor], Tensor]


def keep_nothing(name: str, x: Tensor) -> Tensor:
    return x


def nested(
    z_BHND: Tensor,
    depth: int,
    inner: Inner,
    *,
    recurse_values: bool = False,
    keep: Keep = keep_nothing,
    name: str = "",
) -> Tensor:
    """Phi_depth(Z): Phi_0 = Z, Phi_r = inner(Phi_{r-1}, Phi_{r-1}, Z or, with `recurse_values`, Phi_{r-1}).

    Args:
        z_BHND: Q or K.
        depth: r, how often `inner` is applied; 0 gives Z.
        inner: A(q, k, v).
        recurse_values: the value of level r is Phi_{r-1}, not Z.
        keep: (name, the new tokens of a level) -> all tokens of that level, where a cache holds earlier ones.
        name: the first word of the names that `keep` gets; the number of the level is the second.
    """
    phi = z_BHND
    for level in range(depth):
        keys = keep(f"{name} {level}", phi)
        if level == 0:
            values = keys
        phi = inner(phi, keys, keys if recurse_values else values)
    return phi


def nexus_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    order: int = 2,
    branches: Branches = "both",
    recurse_values: bool = False,
    mask: GivenMask = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Reading S as a function: A(Phi_{m-1}(Q), Phi_{m-1}(K), V). No weights, no positions.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H.
        order: m; time is that of 2 (m - 1) + 1 attentions.
        branches: what is nested.
        recurse_values: Phi_{r-1} instead of Z as the inner values; makes a difference from order 3 on.
        mask: over query-key pairs, or (B, M) padding of keys; in self-attention it holds inside too. With another
            number of queries than keys, only padding can be honoured (inside, by the key branch).
        causal: no token attends to a later one, inside and outside.
        scale: of the scores, inside and outside.

    Raises:
        ValueError: if an argument is out of range, or the mask is of pairs and N is not M.
    """
    check_options(order, branches)
    N, M = q_BHND.shape[2], k_BKMD.shape[2]
    pattern = Pattern.of(mask, q_BHND.shape[0], N, M, causal=causal, crosses=N != M)
    if N != M and (causal or {*pattern.says} - {"padding"}):
        raise ValueError(f"queries ({N}) and keys ({M}) must be the same tokens here")

    def inner(inside: Mask | None) -> Inner:
        return lambda q, k, v: attend(q, k, v, mask=inside, scale=scale)

    if branches != "key":
        q_BHND = nested(q_BHND, order - 1, inner(None if N != M else pattern.mask), recurse_values=recurse_values)
    if branches != "query":
        k_BKMD = nested(k_BKMD, order - 1, inner(pattern.mask), recurse_values=recurse_values)
    return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, scale=scale)


def check_options(order: int, branches: str) -> None:
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order}")
    if branches not in ("both", "query", "key"):
        raise ValueError(f"branches must be 'both', 'query' or 'key', got {branches!r}")
