"""M-BEIR's kinds of retrieval, and the five categories in which the paper reports (UniIR, arXiv 2311.17136).

The categories' members are inferred from their names. Recall counts 1 where anything relevant is among the first k; k
is 5, and 10 of the two sets of fashion.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: number of a kind: what the query has, what the candidate has
KINDS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("text", "image"),
        1: ("text", "text"),
        2: ("text", "image and text"),
        3: ("image", "text"),
        4: ("image", "image"),
        6: ("image and text", "text"),
        7: ("image and text", "image"),
        8: ("image and text", "image and text"),
    }
)
#: the kinds of each category
CATEGORIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "single-modal": (1, 4),
        "cross-modal": (0, 3),
        "mixed-modal": (2,),
        "multi-modal": (6, 8),
        "conditional": (7,),
    }
)
#: the sixteen test sets: data set -> its kinds
SETS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "visualnews": (0, 3),
        "mscoco": (0, 3),
        "fashion200k": (0, 3),
        "webqa": (1, 2),
        "edis": (2,),
        "nights": (4,),
        "oven": (6, 8),
        "infoseek": (6, 8),
        "fashioniq": (7,),
        "cirr": (7,),
    }
)


def headline(data_set: str) -> int:
    """The k of the recall that stands for a data set.

    Args:
        data_set: of `SETS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if data_set not in SETS:
        raise ValueError(f"data_set must be one of {', '.join(SETS)}, got {data_set!r}")
    return 10 if data_set in ("fashion200k", "fashioniq") else 5


def by_category(recalls: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """The mean recall of each category that there is something of.

    Args:
        recalls: (data set, kind) -> recall at its `headline`.

    Raises:
        ValueError: if one is none of the sixteen test sets.

    >>> by_category({("mscoco", 0): 0.8, ("mscoco", 3): 0.9, ("cirr", 7): 0.5})
    {'cross-modal': 0.85..., 'conditional': 0.5}
    """
    for data_set, kind in recalls:
        if kind not in SETS.get(data_set, ()):
            raise ValueError(f"there is no test set {data_set!r} of kind {kind}")
    found = {
        category: [recall for (_, kind), recall in recalls.items() if kind in kinds]
        for category, kinds in CATEGORIES.items()
    }
    return {category: sum(values) / len(values) for category, values in found.items() if values}
