"""Modifications of scores on a part of the pairs, whose queries and keys count from 0 again."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.score_mods import ByDistance, Composed, ScoreMod, SoftCap, compose, shifted

__all__ = ["moved"]


def moved(mod: ScoreMod, query: int, key: int) -> ScoreMod:
    """The same modification where query 0 and key 0 are others of the whole.

    Args:
        mod: of the whole sequence.
        query, key: which queries and keys of the whole come first here.
    """
    if isinstance(mod, SoftCap) or query == key == 0:
        return mod
    if isinstance(mod, Composed):
        return compose(*(moved(one, query, key) for one in mod.mods))
    if isinstance(mod, ByDistance):
        return shifted(mod, query - key)

    def of_part(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mod(score, b, h, q_idx + query, kv_idx + key)

    return of_part
