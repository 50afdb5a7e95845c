"""What the tasks are trained by, in the losses and weights of the field; and how several tasks are judged as one.

Shape letters: B batch, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.objective import Objective
from saccade.layers.resize import resize
from saccade.models.multitask import Multitask

#: a pixel that has no label
IGNORED = 255
#: the share of the edges' loss that pixels on edges have
_EDGES = 0.95


def class_entropy(logits_BKHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Cross-entropy of the pixels that have a label.

    Args:
        logits_BKHW: of the classes.
        truth_BHW: numbers of classes, or `IGNORED`.
    """
    return F.cross_entropy(logits_BKHW, truth_BHW, ignore_index=IGNORED)


def balanced_entropy(logits_B1HW: Tensor, truth_B1HW: Tensor, share: float | None = None) -> Tensor:
    """Binary cross-entropy, -w y log p - (1 - w) (1 - y) log (1 - p), the mean over pixels that have a label.

    Args:
        logits_B1HW: p is their sigmoid.
        truth_B1HW: y: 0 or 1, or `IGNORED`.
        share: w; that of the zeros in the batch where None.
    """
    valid = (truth_B1HW != IGNORED).to(logits_B1HW)
    y = (truth_B1HW == 1).to(logits_B1HW)
    count = valid.sum().clamp(min=1)
    weight = ((1 - y) * valid).sum() / count if share is None else share
    losses = -weight * y * F.logsigmoid(logits_B1HW) - (1 - weight) * (1 - y) * F.logsigmoid(-logits_B1HW)
    return (losses * valid).sum() / count


def edge_entropy(logits_B1HW: Tensor, truth_B1HW: Tensor) -> Tensor:
    """`balanced_entropy` with 0.95 for pixels on edges.

    Args:
        logits_B1HW, truth_B1HW: as there.
    """
    return balanced_entropy(logits_B1HW, truth_B1HW, _EDGES)


def distance(found_BCHW: Tensor, truth_BCHW: Tensor) -> Tensor:
    """The mean of |e| over numbers that are known.

    Args:
        found_BCHW: of the network.
        truth_BCHW: numbers, or `IGNORED`.
    """
    valid = truth_BCHW != IGNORED
    return torch.where(valid, (found_BCHW - truth_BCHW).abs(), 0.0).sum() / valid.sum().clamp(min=1)


def normal_distance(found_B3HW: Tensor, truth_B3HW: Tensor) -> Tensor:
    """`distance` of directions, those of the network brought to length 1.

    Args:
        found_B3HW: of any length.
        truth_B3HW: of length 1, or `IGNORED`.
    """
    return distance(F.normalize(found_B3HW, dim=1), truth_B3HW)


#: task -> its loss (map, truth) and its weight
LOSSES: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "segmentation": (class_entropy, 1.0),
    "parts": (class_entropy, 2.0),
    "saliency": (balanced_entropy, 5.0),
    "edges": (edge_entropy, 50.0),
    "normals": (normal_distance, 10.0),
    "depth": (distance, 1.0),
}


def medusa_loss(
    output: Multitask,
    tasks: Sequence[str],
    truths: Mapping[str, Tensor],
    losses: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = LOSSES,
) -> Objective:
    """sum_t w_t (L(map_t) + sum_s L(map_ts at the truth's size)), and each task's sum by its name.

    Args:
        output: of the network; in training with the maps of each scale.
        tasks: the network's names, in the order of the output.
        truths: of the tasks that count.
        losses: task -> its loss (map, truth) and its weight.

    Raises:
        ValueError: if the names do not fit the output, or a task has no loss.
    """
    if len(tasks) != len(output.logits):
        raise ValueError(f"tasks must be the output's {len(output.logits)}, got {', '.join(tasks)}")
    strange = [name for name in truths if name not in tasks or name not in losses]
    if strange:
        raise ValueError(f"truths must be of tasks that have a loss ({', '.join(losses)}), got {', '.join(strange)}")
    side = output.side or []
    scales = len(side) // len(tasks)
    total, terms = output.logits[0].new_zeros(()), {}
    for number, (name, logits) in enumerate(zip(tasks, output.logits)):
        if name not in truths:
            continue
        loss, weight = losses[name]
        like = truths[name][:, None] if truths[name].ndim == 3 else truths[name]
        maps = [logits, *side[number * scales : (number + 1) * scales]]
        terms[name] = torch.stack([loss(resize(map_BCHW, like), truths[name]) for map_BCHW in maps]).sum()
        total = total + weight * terms[name]
    return Objective(total, terms)


def multitask_gain(
    measured: Mapping[str, float], single: Mapping[str, float], lower_is_better: Sequence[str] = ("depth", "normals")
) -> float:
    """Delta: the mean over tasks of how much better, relative to networks of one task each.

    Args:
        measured: task -> quality.
        single: the same, of the networks of one task.
        lower_is_better: the tasks whose quality is an error.

    Raises:
        ValueError: if the tasks are not the same.

    >>> round(multitask_gain({"segmentation": 44.0, "depth": 0.57}, {"segmentation": 40.0, "depth": 0.6}), 3)
    0.075
    """
    if not measured or measured.keys() != single.keys():
        raise ValueError(f"tasks must be the same, got {', '.join(measured)} and {', '.join(single)}")
    gains = [
        (-1 if name in lower_is_better else 1) * (value - single[name]) / single[name]
        for name, value in measured.items()
    ]
    return sum(gains) / len(gains)
