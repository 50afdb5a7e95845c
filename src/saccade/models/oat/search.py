"""How OAT is trained, and how searches are compared: by what people do, not by which object is next.

Adam at 1e-4, batches of 20, gradients of norm 1 at most, up to 500 epochs; stopped after 30 without a smaller
`behaviour_difference` on held-out searches.

Shape letters: B searches, T steps, K answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor

from saccade.models.scanpath import ScanpathOutput

#: what `behaviour` tells
BEHAVIOUR = ("success", "length", "search", "refixation", "revisit")


def next_object_loss(said: ScanpathOutput, path_BT: Tensor) -> Tensor:
    """Cross-entropy of the next object, or the stop; steps after that do not count.

    Args:
        said: of `OAT.forward` on all but the last of the steps.
        path_BT: numbers of objects, then N, then N + 1.

    Raises:
        ValueError: if there is not a step for each answer.
    """
    if said.logits.shape[:2] != path_BT.shape:
        raise ValueError(f"path must be {tuple(said.logits.shape[:2])}, got {tuple(path_BT.shape)}")
    nothing = said.logits.shape[2] - 1
    return F.cross_entropy(said.logits.float().flatten(0, 1), path_BT.flatten(), ignore_index=nothing)


def behaviour(path: Sequence[int], target: int) -> dict[str, float]:
    """What a search was like, by the names of `BEHAVIOUR`; the last three are shares of its length, with sum 1.

    `success`: it ends at the target. `search`: stays at objects not seen before. `refixation`: further fixations in a
    row on the same object. `revisit`: stays at objects that were left before.

    Args:
        path: numbers of objects, without the stop.
        target: the one that was searched for.

    Raises:
        ValueError: if nothing was looked at.

    >>> behaviour([3, 3, 1, 3], target=3)
    {'success': 1.0, 'length': 4.0, 'search': 0.5, 'refixation': 0.25, 'revisit': 0.25}
    """
    if not path:
        raise ValueError("path must have a fixation at least, got none")
    stays = [place for place, _ in groupby(path)]
    new = len(set(stays))
    shares = new / len(path), (len(path) - len(stays)) / len(path), (len(stays) - new) / len(path)
    return dict(zip(BEHAVIOUR, (float(path[-1] == target), float(len(path)), *shares)))


def behaviour_difference(
    model: Sequence[tuple[Sequence[int], int]], human: Sequence[tuple[Sequence[int], int]]
) -> float:
    """The mean over `BEHAVIOUR` of |model - human| / human, each the mean over searches.

    What people never did is left out.

    Args:
        model, human: searches, a path and its target each.

    Raises:
        ValueError: if there is no search, or one without a fixation.
    """
    if not model or not human:
        raise ValueError(f"there must be searches of both, got {len(model)} and {len(human)}")
    means = [
        {name: sum(each[name] for each in found) / len(found) for name in BEHAVIOUR}
        for found in ([behaviour(path, target) for path, target in searches] for searches in (model, human))
    ]
    shares = [abs(means[0][name] - means[1][name]) / means[1][name] for name in BEHAVIOUR if means[1][name] > 0]
    return sum(shares) / len(shares)
