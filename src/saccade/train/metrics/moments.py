"""How well moments and events are found in time.

| score | what | source |
|---|---|---|
| `map`, `map50`, `map75` | average precision of moments, mean over IoU 0.5, 0.55 .. 0.95 | QVHighlights (2107.09609) |
| `r1_50`, `r1_70` | the share of questions whose surest moment overlaps a true one by IoU 0.5, 0.7 | the same |
| `miou` | the best IoU of the surest moment with a true one, mean over questions | Charades-STA |
| `hit1` | the share of questions whose highest step is one that answers | QVHighlights |
| `highlight_map` | average precision of the steps' ranking | scikit-learn |
| `segment_f1`, `event_f1` | of steps; of unbroken runs that overlap by IoU 0.5 | Look, Listen and Parse (2007.10558) |

Average precision is the area under the precision of the best recall from there on (all points). F1 counts all classes
of a stream together, and is a mean over streams; where nothing is there and nothing said, it is 1.

Shape letters: Q questions, N moments that are found, G true ones, T steps, K classes, B streams, R thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.moments import overlaps

#: of the IoU
THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))


def moment_scores(found: Sequence[tuple[Tensor, Tensor]], truth: Sequence[Tensor]) -> dict[str, float]:
    """`map`, `map50`, `map75`, `r1_50`, `r1_70` and `miou`, from 0 to 1.

    Args:
        found: of each question, spans (N, 2) as start and end, and scores (N,), the surest first.
        truth: of each, the true spans (G, 2).

    Raises:
        ValueError: if there are not as many questions, none, or one without a true moment.

    >>> said = [(torch.tensor([[0.0, 0.4], [0.5, 0.6]]), torch.tensor([0.9, 0.3]))]
    >>> moment_scores(said, [torch.tensor([[0.0, 0.5]])])["r1_70"]
    1.0
    """
    if len(found) != len(truth) or not truth:
        raise ValueError(f"found and truth must be of the same questions, one at least, got {len(found)}, {len(truth)}")
    if not all(map(len, truth)):
        raise ValueError("each question must have a true moment")
    precisions = torch.stack([_precision(spans, spans_G) for (spans, _), spans_G in zip(found, truth)]).mean(0)
    best = torch.tensor(
        [float(overlaps(spans[:1], spans_G).max()) if len(spans) else 0.0 for (spans, _), spans_G in zip(found, truth)]
    )
    return {
        "map": float(precisions.mean()),
        "map50": float(precisions[0]),
        "map75": float(precisions[5]),
        "r1_50": float((best >= 0.5 - 1e-6).double().mean()),
        "r1_70": float((best >= 0.7 - 1e-6).double().mean()),
        "miou": float(best.double().mean()),
    }


def highlight_scores(curves: Sequence[Tensor], answers: Sequence[Tensor]) -> dict[str, float]:
    """`hit1` and `highlight_map`, from 0 to 1.

    Args:
        curves: of each question a value for each step, (T,); T may differ.
        answers: bool, the steps that answer; one at least.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if shapes differ, or nothing answers a question.

    >>> highlight_scores([torch.tensor([0.1, 0.7, 0.9])], [torch.tensor([False, True, False])])
    {'hit1': 0.0, 'highlight_map': 0.5}
    """
    if [x.shape for x in curves] != [x.shape for x in answers] or not answers:
        raise ValueError("curves and answers must be of the same questions and steps, one at least")
    if not all(bool(x.any()) for x in answers):
        raise ValueError("each question must have a step that answers")
    area = need("sklearn.metrics", "the average precision of steps").average_precision_score
    hits = [float(answer[curve.argmax()]) for curve, answer in zip(curves, answers)]
    areas = [float(area(answer.cpu().numpy(), curve.float().cpu().numpy())) for curve, answer in zip(curves, answers)]
    return {"hit1": sum(hits) / len(hits), "highlight_map": sum(areas) / len(areas)}


def segment_f1(said_BTK: Tensor, truth_BTK: Tensor) -> float:
    """F1 of single steps.

    Args:
        said_BTK, truth_BTK: bool, which class happens at which step.

    Raises:
        ValueError: if shapes differ, or they are not bool.

    >>> segment_f1(torch.tensor([[[True], [True], [False]]]), torch.tensor([[[True], [False], [False]]]))
    0.6666666666666666
    """
    _check_bool(said_BTK, truth_BTK)
    right_B = (said_BTK & truth_BTK).flatten(1).sum(1).double()
    counted_B = said_BTK.flatten(1).sum(1) + truth_BTK.flatten(1).sum(1)
    return float(torch.where(counted_B > 0, 2 * right_B / counted_B.clamp(min=1), 1.0).mean())


def event_f1(said_BTK: Tensor, truth_BTK: Tensor, least: float = 0.5) -> float:
    """F1 of events, which are unbroken runs of steps of a class: one is right if it overlaps a true one that no other
    has taken by `least` or more.

    Args:
        said_BTK, truth_BTK: bool, which class happens at which step.
        least: of the IoU.

    Raises:
        ValueError: if shapes differ, or they are not bool.

    >>> event_f1(torch.tensor([[[True], [True], [False]]]), torch.tensor([[[True], [False], [False]]]))
    1.0
    """
    _check_bool(said_BTK, truth_BTK)
    scores = []
    for said_TK, truth_TK in zip(said_BTK, truth_BTK):
        right = counted = 0
        for said_T, truth_T in zip(said_TK.T, truth_TK.T):
            found, there = spans_of(said_T), spans_of(truth_T)
            counted += len(found) + len(there)
            if len(found) and len(there):
                right += int(_taken(overlaps(found, there), (least - 1e-6,))[0].sum())
        scores.append(2 * right / counted if counted else 1.0)
    return sum(scores) / len(scores)


def spans_of(there_T: Tensor) -> Tensor:
    """Unbroken runs of True as (start, end), shares of all steps, (N, 2).

    >>> spans_of(torch.tensor([True, False, True, True])).tolist()
    [[0.0, 0.25], [0.5, 1.0]]
    """
    edges = F.pad(there_T.int(), (1, 1)).diff()
    ends = [torch.nonzero(edges == step)[:, 0] for step in (1, -1)]
    return torch.stack(ends, -1) / max(1, len(there_T))


def _precision(spans_N2: Tensor, truth_G2: Tensor) -> Tensor:
    """The average precision of a question at each threshold."""
    if not len(spans_N2):
        return torch.zeros(len(THRESHOLDS), dtype=torch.float64)
    right_RN = _taken(overlaps(spans_N2, truth_G2), tuple(t - 1e-6 for t in THRESHOLDS)).double()
    count_RN = right_RN.cumsum(1)
    precision_RN = count_RN / torch.arange(1, right_RN.shape[1] + 1, dtype=torch.float64)
    best_RN = precision_RN.flip(1).cummax(1).values.flip(1)
    return (best_RN * right_RN).sum(1) / len(truth_G2)


def _taken(shares_NG: Tensor, least: tuple[float, ...]) -> Tensor:
    """Which of the found, in their order, take a true one that is free, at each threshold: (thresholds, N)."""
    least_R, free_RG = torch.tensor(least), torch.ones(len(least), shares_NG.shape[1], dtype=torch.bool)
    right_RN, each = torch.zeros(len(least), len(shares_NG), dtype=torch.bool), torch.arange(len(least))
    for n, share_G in enumerate(shares_NG.cpu()):
        best_R, which_R = share_G.expand_as(free_RG).masked_fill(~free_RG, -1.0).max(1)
        right_RN[:, n] = best_R >= least_R
        free_RG[each, which_R] &= ~right_RN[:, n]
    return right_RN


def _check_bool(said: Tensor, truth: Tensor) -> None:
    if said.shape != truth.shape or said.ndim != 3 or said.dtype != torch.bool or truth.dtype != torch.bool:
        raise ValueError(
            f"said and truth must be bool (streams, steps, classes), got {said.dtype} {tuple(said.shape)} and "
            f"{truth.dtype} {tuple(truth.shape)}"
        )
